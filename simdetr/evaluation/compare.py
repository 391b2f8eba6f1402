"""What was the pretraining worth? One row per fine-tuning run in, a table of means over seeds out.

A row is a dict: ``initialisation`` (the arm, see `simdetr.training.arms`), ``label_budget`` (a text, a fraction of the
labels as float, or a number of images as int), ``seed`` (int, optional) and the metrics as fractions in 0..1: ``AP``,
and where measured the other ``METRICS`` (None or nan where a run has no such number). `simdetr compare` adds ``images``
and ``labels`` (trained on), ``seconds`` and ``device``. The same rows are kept in ``comparison.json`` of a run and in
benchmark results, and shown in the report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simdetr.evaluation.intervals import AVERAGED, Interval, image_interval, joint_interval, seed_interval

METRICS = ("AP", "AP50", "AP75", "AR@1", "AR@10", "AR@100")
WITHOUT_PRETRAINING = ("backbone", "backbone only", "random", "scratch", "checkpoint")
"""Arms that a user has without pretraining, the first that there is being what gains are measured against; two of them
are names of earlier versions."""
Draws = Mapping[tuple[str, str, int], Mapping[str, NDArray[np.float64]]]
"""(budget as text, arm, seed) -> metric -> its values on the same draws of images [B]."""


@dataclass(frozen=True)
class SeedSummary:
    """Runs that differ in their seed only: mean and sample deviation of every metric, in percent points.

    ``std`` is nan for a single run; ``gain`` is the difference of the mean AP to the baseline's at the same label
    budget, None for the baseline itself and where one of the two is not known.
    """

    label_budget: str
    initialisation: str
    runs: int
    mean: dict[str, float]
    std: dict[str, float]
    gain: float | None


def summarise_seeds(rows: Sequence[Mapping[str, Any]], *, baseline: str | None = None) -> list[SeedSummary]:
    """Group runs by label budget and initialisation, in the order in which they first appear; see `comparison_table`.

    Raises:
        ValueError: a row without initialisation, label budget or AP, or a metric that only some rows have.
    """
    metrics = _common_metrics(rows)
    baseline = baseline or baseline_of(rows)
    groups: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        groups.setdefault(budget_text(row["label_budget"]), {}).setdefault(str(row["initialisation"]), []).append(row)
    summaries = []
    for budget, by_initialisation in groups.items():
        baseline_ap = [run["AP"] for run in by_initialisation.get(baseline, [])]
        for initialisation, runs in by_initialisation.items():
            values = {metric: 100 * np.asarray([run[metric] for run in runs], np.float64) for metric in metrics}
            mean = {metric: float(v.mean()) for metric, v in values.items()}
            std = {metric: float(v.std(ddof=1)) if len(v) > 1 else math.nan for metric, v in values.items()}
            gain = None
            if baseline_ap and initialisation != baseline:
                difference = mean["AP"] - 100 * float(np.asarray(baseline_ap, np.float64).mean())
                gain = None if math.isnan(difference) else difference
            summaries.append(SeedSummary(budget, initialisation, len(runs), mean, std, gain))
    return summaries


def baseline_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the runs without pretraining started from: a backbone with weights, if any run did, else random ones."""
    there = {row["initialisation"] for row in rows}
    return next((name for name in WITHOUT_PRETRAINING if name in there), "random")


def comparison_table(rows: Sequence[Mapping[str, Any]], *, baseline: str | None = None) -> str:
    """The summary as a Markdown table in percent: mean ± deviation over seeds, and the gain over the baseline.

    Args:
        rows: one per run, see the module's docstring.
        baseline: the initialisation that gains are measured against, see `baseline_of`; where no run has it there is
            no gain column.

    Raises:
        ValueError: no rows, or as `summarise_seeds`.
    """
    if not rows:
        raise ValueError("rows: expected at least one finished run, got none")
    baseline = baseline or baseline_of(rows)
    summaries = summarise_seeds(rows, baseline=baseline)
    metrics = list(summaries[0].mean)
    with_gain = any(summary.gain is not None for summary in summaries)
    heads = ["labels", "initialisation", "seeds", *metrics, *([f"AP gain over {baseline}"] if with_gain else [])]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "--:|" * (len(heads) - 2)]
    for summary in summaries:
        cells = [summary.label_budget, summary.initialisation, str(summary.runs)]
        cells += [format_mean(summary.mean[metric], summary.std[metric]) for metric in metrics]
        if with_gain:
            cells.append("" if summary.gain is None else f"{summary.gain:+.1f}")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Difference:
    """An arm less the baseline in one metric, paired by seed, in percent points, and what its intervals cover."""

    label_budget: str
    initialisation: str
    baseline: str
    metric: str
    by_seed: dict[int, float]
    mean: float
    seeds: Interval | None  # None of fewer than two seeds
    images: Interval | None  # None where no predictions were kept, and for recall
    both: Interval | None


def paired_differences(
    rows: Sequence[Mapping[str, Any]], baseline: str, draws: Draws | None = None, num_images: int = 0
) -> list[Difference]:
    """Every arm against the baseline, in every metric that all rows have, in the order of the rows.

    Args:
        rows: One per training.
        baseline: The arm that the others are compared with.
        draws: What the trainings score on validation images drawn again, fractions in 0..1.
        num_images: Validation images that were drawn from.
    """
    found, drawn = [], draws or {}
    table = {(budget_text(row["label_budget"]), str(row["initialisation"]), row["seed"]): row for row in rows}
    for budget, arm in dict.fromkeys((budget, arm) for budget, arm, _ in table):
        seeds = sorted(s for b, a, s in table if (b, a) == (budget, arm) and (budget, baseline, s) in table)
        if arm == baseline or not seeds:
            continue
        pairs = [((budget, arm, seed), (budget, baseline, seed)) for seed in seeds]
        for metric in _common_metrics(rows):
            by_seed = {ours[2]: 100 * _less(table[ours][metric], table[theirs][metric]) for ours, theirs in pairs}
            values = np.array(list(by_seed.values()))
            images = np.zeros(0)
            if metric in AVERAGED and all(key in drawn for pair in pairs for key in pair):
                images = np.mean(
                    [100 * (drawn[ours][metric] - drawn[theirs][metric]) for ours, theirs in pairs], axis=0
                )
            intervals = (seed_interval(values), image_interval(images), joint_interval(values, images, num_images))
            found.append(Difference(budget, arm, baseline, metric, by_seed, float(values.mean()), *intervals))
    return found


def _less(ours: float | None, theirs: float | None) -> float:
    return math.nan if ours is None or theirs is None else ours - theirs


def difference_table(differences: Sequence[Difference]) -> str:
    """AP of every arm against the baseline as a Markdown table in percent points, with all intervals."""
    of_ap = [one for one in differences if one.metric == "AP"]
    if not of_ap:
        return ""
    heads = ["labels", f"AP − {of_ap[0].baseline}", "mean", "pairs", "95 %: seeds", "images", "seeds and images"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "--:|" * (len(heads) - 2)]
    for one in of_ap:
        shown = [str(interval) if interval else "–" for interval in (one.seeds, one.images, one.both)]
        cells = [one.label_budget, one.initialisation, f"{one.mean:+.1f}", str(len(one.by_seed)), *shown]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def format_mean(mean: float, std: float) -> str:
    """``12.3 ± 0.4``, without the deviation where there is none, and a dash where nothing was measured."""
    if math.isnan(mean):
        return "–"
    return f"{mean:.1f}" if math.isnan(std) else f"{mean:.1f} ± {std:.1f}"


def budget_text(budget: str | float) -> str:
    """A fraction of the labels in percent, a number of images as such, a text as it is."""
    if isinstance(budget, str):
        return budget
    if isinstance(budget, float) and budget <= 1:
        return f"{100 * budget:g} %"
    return f"{budget:g} images"


def _common_metrics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    for index, row in enumerate(rows):
        absent = [key for key in ("initialisation", "label_budget", "AP") if key not in row]
        if absent:
            raise ValueError(f"rows: row {index} lacks {absent}; it has {sorted(row)}")
    metrics = [metric for metric in METRICS if any(metric in row for row in rows)]
    for metric in metrics:
        having = sum(metric in row for row in rows)
        if having != len(rows):
            raise ValueError(f"rows: {metric} is in {having} of {len(rows)} rows; measure it in all or in none")
    return metrics

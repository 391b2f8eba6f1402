"""What was the pretraining worth? One row per fine-tuning run in, a table of means over seeds out.

A row is a dict: ``initialisation`` (str), ``label_budget`` (a text, a fraction of the labels as float, or a number of
images as int), ``seed`` (int, optional) and the metrics as fractions in 0..1: ``AP``, and where measured ``AP50`` and
``AR100`` (None or nan where a run has no such number). The same rows are kept in ``comparison.json`` of a run and in
benchmark results, and shown in the report.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simdetr.data.storage import json_ready, write_json

LOG = logging.getLogger(__name__)
METRICS = ("AP", "AP50", "AR100", "AR@100")
PRETRAINED, SCRATCH, BACKBONE_ONLY = "pretrained", "scratch", "backbone only"
"""What pretraining is compared with: a detector from random weights, or a new one on a backbone that has some."""


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


class ComparisonRows:
    """The rows of a comparison, kept in a JSON file that grows with every training.

    Args:
        path: The file; its rows are taken up where it is there already.
        quiet: Do not log which training comes next, as all processes but one should not.
    """

    def __init__(self, path: Path, *, quiet: bool = False) -> None:
        self.path, self.quiet = path, quiet
        self.rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def missing(
        self, fractions: Sequence[float], seeds: Sequence[int], baseline: str
    ) -> Iterator[tuple[str, float, int]]:
        """Initialisation, part of the labels and seed of every training that has no row yet."""
        trainings = list(itertools.product(map(float, fractions), seeds, (PRETRAINED, baseline)))
        done = {(row["label_budget"], row["seed"], row["initialisation"]) for row in self.rows}
        for number, (fraction, seed, start) in enumerate(trainings, 1):
            if (fraction, seed, start) in done:
                continue
            if not self.quiet:
                place = f"{number} of {len(trainings)}"
                LOG.info("%s: %s, %g %% of the labels, seed %d", place, start, 100 * fraction, seed)
            yield start, fraction, seed

    def add(self, initialisation: str, label_budget: float, seed: int, scores: Mapping[str, float]) -> None:
        """Keep the scores of one more training."""
        key = {"initialisation": initialisation, "label_budget": label_budget, "seed": seed}
        self.rows.append(key | json_ready(scores))
        write_json(self.path, self.rows, indent=1)


def summarise_seeds(rows: Sequence[Mapping[str, Any]], *, baseline: str | None = None) -> list[SeedSummary]:
    """Group runs by label budget and initialisation, in the order in which they first appear; see `comparison_table`.

    Raises:
        ValueError: a row without initialisation, label budget or AP, or a metric that only some rows have.
    """
    metrics = _common_metrics(rows)
    baseline = baseline or baseline_of(rows)
    groups: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        groups.setdefault(_budget_text(row["label_budget"]), {}).setdefault(str(row["initialisation"]), []).append(row)
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
    return BACKBONE_ONLY if any(row["initialisation"] == BACKBONE_ONLY for row in rows) else SCRATCH


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


def format_mean(mean: float, std: float) -> str:
    """``12.3 ± 0.4``, without the deviation where there is none, and a dash where nothing was measured."""
    if math.isnan(mean):
        return "–"
    return f"{mean:.1f}" if math.isnan(std) else f"{mean:.1f} ± {std:.1f}"


def _budget_text(budget: str | float) -> str:
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

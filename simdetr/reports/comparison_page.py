"""A comparison's rows and predictions in; the answer, ``summary.json`` and a page out.

Before any training the mined boxes are looked at, for what speaks against pretraining on them.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simdetr.data.annotations import LabelError
from simdetr.data.images import open_images
from simdetr.data.label_files import read_labels, read_with_report
from simdetr.data.labels import Labels
from simdetr.data.storage import atomic_path, write_json
from simdetr.evaluation.coco_metric import match_boxes
from simdetr.evaluation.compare import Draws, budget_text, paired_differences, summarise_seeds
from simdetr.evaluation.early_warning import MAX_IMAGES, figures_in_words, mining_figures, warnings_of
from simdetr.evaluation.intervals import drawn_images, resampled_scores
from simdetr.evaluation.verdict import (
    COVERED,
    WORTH,
    Comparison,
    Evidence,
    cost_in_words,
    costs_of,
    labels_saved,
    verdict,
)
from simdetr.recipe import PREDICTIONS, ROW, ComparisonJob
from simdetr.reports.charts import INK, LINE_COLOURS, new_figure, read_curve, style_panel, to_svg
from simdetr.reports.page import page_template
from simdetr.training.arms import BACKBONE, RANDOM, STAGE, Arm, baseline_of, subject_of
from simdetr.training.run_folder import RunFolder, RunMismatchError, leads

LOG = logging.getLogger(__name__)
COMPARISON, SUMMARY = "comparison.json", "summary.json"


def check_rows(out: Path) -> None:
    """RunMismatchError where a comparison of an earlier version lies there, which kept nothing to draw images from."""
    path = out / COMPARISON
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if any("labels" not in row for row in rows):
        raise RunMismatchError(
            f"out: {path} is of an earlier version, whose trainings kept no predictions. It can be shown still (copy "
            "it into the run folder and write its report); choose another out to compare anew."
        )


def rows_there(job: ComparisonJob) -> list[dict[str, Any]]:
    """Rows of the job's trainings that are done, in their order: by budget, arm and seed."""
    trainings = [training for training in job.trainings() if (training.folder / ROW).is_file()]
    arms, budgets = [arm.name for arm in job.own_arms], list(job.budgets)
    trainings.sort(key=lambda one: (budgets.index(one.budget), arms.index(one.arm.name), one.seed))
    return [json.loads((training.folder / ROW).read_text(encoding="utf-8")) for training in trainings]


def write_rows(job: ComparisonJob) -> None:
    """Write the rows of all trainings of the folder that are done, also those of arms that are not asked for now."""
    if not leads():
        return
    rows = rows_there(job)
    known = {(row["label_budget"], row["initialisation"], row["seed"]) for row in rows}
    others = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(job.out).glob(f"*/{ROW}")))
    rows += [row for row in others if (row["label_budget"], row["initialisation"], row["seed"]) not in known]
    write_json(Path(job.out) / COMPARISON, rows, indent=1)


def mining_evidence(job: ComparisonJob) -> Evidence:
    """What is known of the mined boxes and of the stages' before any fine-tuning; warnings are logged."""
    run = RunFolder(Path(job.init))
    if not run.labels(0).is_file():
        return Evidence()
    mined = read_labels(run.labels(0))
    try:
        truth = read_with_report(job.labels, images=open_images(job.images))[0]
    except LabelError:  # classes of whole images, which have no boxes
        return Evidence(mining_figures(mined))
    figures = mining_figures(mined, truth)
    if leads():
        LOG.info("mining: %s", figures_in_words(figures))
        for warning in warnings_of(figures):
            LOG.warning("before any training: %s", warning)
    shared = [name for name in truth.image_ids if name in mined][:MAX_IMAGES]
    recall, quality = [], []
    for stage in run.stages() if shared else []:
        if run.labels(stage).is_file():
            boxes = read_labels(run.labels(stage))
            common = [name for name in shared if name in boxes]
            scores = match_boxes(truth.select(common), boxes.select(common), class_agnostic=True, max_boxes=(100,))
            recall.append(scores.average_recall(100, iou=50))
            quality.append(scores.average_precision(iou=50))
    return Evidence(figures, tuple(recall), tuple(quality))


def conclude(job: ComparisonJob, evidence: Evidence) -> Comparison:
    """The answer of a comparison whose trainings are done; the leader writes it down."""
    rows, arms = rows_there(job), job.own_arms
    baseline, subject = baseline_of(arms), subject_of(arms)
    truth = read_with_report(job.val_labels, images=open_images(job.val_images))[0]
    draws = resampled(job, truth)
    differences = paired_differences(rows, baseline.name, draws, len(truth))
    others = [arm.name for arm in arms if arm.name != baseline.name]
    found = Comparison(
        rows=rows,
        starts={arm.name: arm.says for arm in arms},
        baseline=baseline.name,
        subject=subject.name,
        differences=differences,
        saved=labels_saved(rows, baseline.name, draws),
        verdicts={name: verdict(rows, differences, name, baseline.name, evidence) for name in others},
        costs=costs_of(rows, {arm.name: pretraining_seconds(arm, Path(job.init)) for arm in arms}),
        warnings=[] if evidence.figures is None else warnings_of(evidence.figures),
        figures="" if evidence.figures is None else figures_in_words(evidence.figures),
        commands=commands(job),
        num_images=len(truth),
        page=str(RunFolder(Path(job.out)).report),
    )
    if leads():
        write_rows(job)
        write_comparison(found, Path(job.out), loss_curves(job))
    return found


def resampled(job: ComparisonJob, truth: Labels) -> Draws:
    """What every training scores on the same draws of validation images."""
    counts = drawn_images(len(truth))
    return {
        (budget_text(one.budget.value), one.arm.name, one.seed): resampled_scores(
            truth, read_labels(one.folder / PREDICTIONS), counts
        )
        for one in job.trainings()
        if (one.folder / PREDICTIONS).is_file()
    }


def pretraining_seconds(arm: Arm, init: Path) -> float | None:
    """What the detector of an arm took to pretrain, from its run's record; 0 without pretraining, None if not known.

    Proposals that an arm took from the run of ``init`` cost what that took to mine them.
    """
    if arm.name in (RANDOM, BACKBONE):
        return 0.0
    steps = None if arm.run is None else _seconds(arm.run)
    if steps is None:
        return None
    stage = int(arm.name.removeprefix(STAGE)) if arm.name.startswith(STAGE) else math.inf
    seconds = (_seconds(init) or {}).get("mine", 0.0) if arm.variant is not None and arm.variant.rival is None else 0.0
    for name, took in steps.items():
        what, _, number = name.partition("-stage")
        after = number and (int(number) > stage or (int(number) == stage and what == "relabel"))
        if what in ("mine", "take", "cluster", "fit", "relabel") and not after:
            seconds += took
    return seconds


def _seconds(run: Path) -> dict[str, float] | None:
    """Seconds of a run's steps, as they were done last; None where it has no record."""
    path = RunFolder(run).steps
    if not path.is_file():
        return None
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["name"]: line["seconds"] for line in lines}


def commands(job: ComparisonJob) -> dict[str, str]:
    """The lines that repeat the comparison and each of its trainings, by what they do."""
    given = {"init": job.init, "images": job.images, "labels": job.labels}
    given |= {"val_images": job.val_images, "val_labels": job.val_labels, "out": job.out}
    words = [f"--{name} {value}" for name, value in given.items()]
    words += [f"--config {path}" for path in job.config]
    words.append(f"--arms '[{', '.join(job.arms or (arm.name for arm in job.own_arms))}]'")
    words += [f"--fractions '{list(job.fractions)}'"] if job.fractions else []
    words += [f"--shots '{list(job.shots)}'"] if job.shots else []
    words += [f"--seeds '{list(job.seeds)}'", *job.options]
    found = {"the comparison": f"simdetr compare {' '.join(words)}"}
    for one in job.trainings():
        record = RunFolder(one.folder).config
        found[one.title] = (
            f"simdetr finetune --config {record} --images {job.images} --labels {job.labels_of(one)} "
            f"--out {one.folder}-again"
        )
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The page.


def write_comparison(comparison: Comparison, out: Path, curves: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write ``summary.json`` and ``report/index.html``; returns the page.

    Args:
        comparison: What was found.
        out: Folder of the comparison.
        curves: For each budget, arm -> (steps, losses) of its trainings.
    """
    summary = asdict(comparison) | {"verdict": asdict(comparison.verdict)}
    write_json(out / SUMMARY, _without_nan(summary), indent=1)
    page = out / "report" / "index.html"
    with atomic_path(page) as temporary:
        temporary.write_text(render_comparison(comparison, out.name, curves), encoding="utf-8")
    return page


def _without_nan(value: Any) -> Any:  # noqa: ANN401
    """Values with None for what JSON does not know."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render_comparison(comparison: Comparison, name: str, curves: Mapping[str, Mapping[str, Any]]) -> str:
    """The page as HTML text."""
    summaries = summarise_seeds(comparison.rows, baseline=comparison.baseline)
    amounts: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in comparison.rows:
        amounts.setdefault((budget_text(row["label_budget"]), row["initialisation"]), []).append(row)
    counted = {
        place: {key: float(np.mean([row[key] or 0 for row in rows])) for key in ("images", "labels")}
        for place, rows in amounts.items()
    }
    return page_template("comparison.html.jinja").render(
        comparison=comparison,
        name=name,
        created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        summaries=summaries,
        metrics=list(summaries[0].mean) if summaries else [],
        counted=counted,
        figure=to_svg(labels_figure(comparison), "AP by labels"),
        gains=to_svg(differences_figure(comparison), "differences") if comparison.differences else "",
        losses={budget: draw_losses(budget, of_arms) for budget, of_arms in curves.items() if of_arms},
        costs=[cost_in_words(cost) for cost in comparison.costs],
        covered=COVERED,
    )


def labels_figure(comparison: Comparison) -> Figure:
    """AP against labels, a line per arm: mean over seeds, with a band of one standard deviation."""
    figure = new_figure(2)
    axes = figure.subplots()
    for colour, arm in zip(LINE_COLOURS * 2, comparison.starts, strict=False):
        points: dict[str, list[Mapping[str, Any]]] = {}
        for row in comparison.rows:
            if row["initialisation"] == arm:
                points.setdefault(budget_text(row["label_budget"]), []).append(row)
        if points:
            _draw_arm(axes, arm, colour, list(points.values()))
    style_panel(axes, "AP on validation images, %", "labels (boxes) trained on")
    axes.set_xscale("log")
    measured = sorted({point for line in axes.get_lines() for point in np.asarray(line.get_xdata(), float).tolist()})
    axes.set_xticks(measured, [f"{count:,.0f}" for count in measured])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def differences_figure(comparison: Comparison) -> Figure:
    """AP of every arm less the baseline's: a row per budget and arm, with a bar per interval and a dot per seed.

    An answer rests on the lowest, thick bar. The grey stripe reaches from 0 to what a user would notice.
    """
    of_ap = [one for one in comparison.differences if one.metric == "AP"]
    figure = new_figure(2)
    figure.set_figheight(0.9 + 0.6 * len(of_ap))
    axes = figure.subplots()
    for place, one in enumerate(of_ap):
        colour = LINE_COLOURS[list(comparison.starts).index(one.initialisation) % len(LINE_COLOURS)]
        for offset, width, interval in ((-0.05, 1.4, one.seeds), (0.12, 1.4, one.images), (0.29, 4, one.both)):
            if interval is not None:
                ends = (interval.low, interval.high)
                axes.plot(ends, [place + offset] * 2, color=colour, linewidth=width, solid_capstyle="butt")
                at, shift = (ends[1], place + offset), (4, 0)
                axes.annotate(
                    interval.covers, at, shift, textcoords="offset points", fontsize=6, color=INK, va="center"
                )
        axes.plot(list(one.by_seed.values()), [place - 0.22] * len(one.by_seed), "o", color=colour, markersize=4)
        axes.plot(one.mean, place - 0.22, "|", color=INK, markersize=9)
    style_panel(axes, f"AP less that of {comparison.baseline}", "AP points; dots are seeds, the stroke is their mean")
    axes.axvspan(0, WORTH, color=INK, alpha=0.12, linewidth=0)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.margins(x=0.12)
    axes.set_yticks(range(len(of_ap)), [f"{one.label_budget}, {one.initialisation}" for one in of_ap])
    axes.set_ylim(len(of_ap) - 0.4, -0.5)
    axes.grid(visible=False, axis="y")
    return figure


def _draw_arm(axes: Axes, arm: str, colour: str, budgets: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    labels = np.array([np.mean([row["labels"] or 1 for row in rows]) for rows in budgets])
    values = [100 * np.array([row["AP"] if row["AP"] is not None else np.nan for row in rows]) for rows in budgets]
    order = np.argsort(labels)
    mean = np.array([own.mean() for own in values])[order]
    spread = np.array([own.std(ddof=1) if len(own) > 1 else 0.0 for own in values])[order]
    axes.plot(labels[order], mean, color=colour, marker="o", markersize=4, linewidth=1.6, label=arm)
    if len(labels) > 1:
        axes.fill_between(labels[order], mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    else:
        axes.errorbar(labels, mean, yerr=spread, color=colour, capsize=3, linewidth=1.2)


def loss_curves(job: ComparisonJob) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """For each budget, arm -> (steps, mean training loss over the seeds that have that step)."""
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for budget in job.budgets:
        of_arms: dict[str, tuple[list[float], list[float]]] = {}
        for arm in job.own_arms:
            sums: dict[float, list[float]] = {}
            for one in job.trainings():
                if (one.budget, one.arm.name) != (budget, arm.name):
                    continue
                files = sorted(one.folder.glob("logs/version_*/metrics.csv"))
                for step, value in zip(*read_curve(arm.name, *files).metrics.get("train/loss", ((), ())), strict=True):
                    sums.setdefault(step, []).append(value)
            if sums:
                steps = sorted(sums)
                of_arms[arm.name] = (steps, [float(np.mean(sums[step])) for step in steps])
        found[budget.title] = of_arms
    return found


def draw_losses(budget: str, of_arms: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Training loss by step, a line per arm."""
    figure = new_figure(1)
    axes = figure.subplots()
    for colour, (arm, (steps, losses)) in zip(LINE_COLOURS * 2, of_arms.items(), strict=False):
        axes.plot(steps, losses, color=colour, linewidth=1.4, label=arm)
    style_panel(axes, f"training loss, {budget}", "step")
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    return to_svg(figure, f"loss {budget}")

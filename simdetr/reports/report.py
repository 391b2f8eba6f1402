"""A run's folder -> what its report shows.

The folder: ``config.yaml``, ``steps.jsonl`` (one JSON object per finished step: name, seconds, count, what),
``stage0/labels.parquet`` (mined), ``stage0/clustering.json`` (what became of their pseudo-classes),
``stageJ/labels.parquet`` (relabelled by stage J), ``**/metrics.csv`` (Lightning's CSVLogger) and ``comparison.json``
(rows of `simdetr.evaluation.compare`). Whatever is not there yet is named with the reason in `ReportData.missing`; only
the proposals of other methods, ``rivals/*``, are passed over in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simdetr.data.annotations import ImageLabels, Lineage
from simdetr.data.images import ImageSource
from simdetr.data.label_files import read_labels
from simdetr.data.labels import Labels
from simdetr.reports.charts import Curve, panels, read_curve
from simdetr.reports.drawing import Colour, class_colour, class_montage
from simdetr.reports.page import ReportData, StepRow
from simdetr.reports.prediction_samples import prediction_samples, prediction_scores
from simdetr.reports.rival_recall import recall_row, rival_labels, rival_rows, rival_samples, side_by_side
from simdetr.training.relabel import AGREEMENT

MAX_BOXES_DRAWN = 15  # per picture and stage; the best-scored, so that a picture stays readable
MAX_CURVES = 12
MAX_RIVAL_SAMPLES = 4
MAX_RECALL_IMAGES = 2000  # beyond it the recall of a random part is within a percent of the whole
NOT_THERE = {
    "clustering": "no clustering of the mined regions has been kept (there is no stage0/clustering.json).",
    "comparison": "this run was not compared with other initialisations; fine-tune from both and keep the rows in "
    "comparison.json (simdetr compare does it).",
}
STEP_TITLES = {
    "mine": "Mine proposals",
    "take": "Take proposals",
    "cluster": "Cluster regions",
    "finetune": "Fine-tune",
    "compare": "Compare",
}
STAGE_STEP_TITLES = {
    "fit": "Train",
    "relabel": "Relabel by",
    "mine": "Mine by the backbone of",
    "cluster": "Cluster regions of",
}


def collect_run(
    run_dir: Path,
    source: ImageSource,
    truth: Labels | None = None,
    *,
    num_samples: int = 6,
    num_montages: int = 9,
    seed: int = 0,
    command: str = "",
) -> ReportData:
    """Gather what a run has made so far.

    Args:
        run_dir: the run's folder.
        source: the run's images.
        truth: human labels of some of these images (same ids), for recall per stage and as a column of the samples.
        num_samples: images shown, chosen at random among those with labels of stage 0.
        num_montages: pseudo-classes shown, spread from the most to the least frequent.
        seed: of these choices.
        command: the command line that made the run.

    Raises:
        FileNotFoundError: ``run_dir`` is no folder.
        ValueError: a file of the run that cannot be understood.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"run: expected the folder of a run, but {run_dir} does not exist")
    rng = np.random.default_rng(seed)
    paths = {int(path.parent.name[5:]): path for path in run_dir.glob("stage[0-9]*/labels.parquet")}
    stages = {stage: _of_source(read_labels(paths[stage]), source, run_dir) for stage in sorted(paths)}
    missing: dict[str, str] = {}
    steps = _read_steps(run_dir / "steps.jsonl", missing)
    no_stage = f"there are no labels of any stage yet ({run_dir.name}/stage0/labels.parquet is made by clustering)."
    if not stages:
        missing |= dict.fromkeys(("samples", "origins", "montages", "recall"), no_stage)
    know_births = all(labels.lineage is not None for labels in stages.values())
    columns = {stage_title(stage): labels for stage, labels in stages.items()}
    columns |= {} if truth is None else {stage_title(-1): truth}
    shown, colours = str(MAX_BOXES_DRAWN), birth_colours if know_births else _class_colours
    samples = side_by_side(source, columns, num_samples, rng, MAX_BOXES_DRAWN, shown, colours) if stages else []
    origins = origin_rows(stages)
    if stages and not origins:
        missing["origins"] = "these labels do not say where their boxes come from; those of older versions do not."
    if stages and not samples:
        count = len(next(iter(stages.values())))
        missing["samples"] = f"none of the {count} labelled images could be read below {source.root}."
    path = run_dir / "comparison.json"
    rows = _read_json(path, missing)
    if path.is_file() and not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise ValueError(f"{path}: expected a list of objects, one per fine-tuning run, got {type(rows).__name__}")
    rivals = rival_labels(run_dir, source.ids if truth is None else truth.image_ids)
    config = run_dir / "config.yaml"
    return ReportData(
        title=f"simdetr run “{run_dir.resolve().name}”",
        created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        command=command,
        steps=steps,
        samples=samples,
        births=births(stages, truth=truth is not None) if know_births else [],
        origins=origins,
        montages=_montages(stages, source, num_montages, seed, missing) if stages else [],
        agreement=_agreement(run_dir, [*stages]),
        clustering=_read_json(run_dir / "stage0" / "clustering.json", missing),
        recall=_recall(stages, truth, rng, missing) if stages else [],
        rivals=rival_rows(rivals, truth),
        rival_samples=rival_samples(rivals, source, min(num_samples, MAX_RIVAL_SAMPLES), np.random.default_rng(seed)),
        scores=prediction_scores(run_dir),
        predictions=prediction_samples(run_dir, source, truth, num_samples),
        curves=_curves(run_dir, missing),
        comparison=rows,
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        missing=missing,
    )


def _of_source(labels: Labels, source: ImageSource, run_dir: Path) -> Labels:
    """The labels of the images that are still there."""
    there = [image_id for image_id in labels.image_ids if image_id in source]
    if not there:
        raise ValueError(
            f"images: expected the images of {run_dir}, such as {labels.image_ids[0]}, got {len(source):,} others, "
            f"such as {source.ids[0]}"
        )
    return labels if len(there) == len(labels.image_ids) else labels.select(there)


def _read_json(path: Path, missing: dict[str, str]) -> Any:  # noqa: ANN401
    """What a file named after its part of the report holds; None, and why, if it is not there."""
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    missing[path.stem] = NOT_THERE[path.stem]
    return None


def _agreement(run_dir: Path, stages: list[int]) -> list[dict[str, Any]]:
    """One row per stage that has kept what its detector says of its labels: ``stage`` (its title), and the numbers."""
    paths = {stage: run_dir / f"stage{stage}" / AGREEMENT for stage in stages}
    return [
        {"stage": stage_title(stage)} | json.loads(path.read_text(encoding="utf-8"))
        for stage, path in paths.items()
        if path.is_file()
    ]


def _read_steps(path: Path, missing: dict[str, str]) -> list[StepRow]:
    if not path.is_file():
        missing["steps"] = f"no step of this run has finished yet (there is no {path.name})."
        return []
    rows: dict[str, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # a run killed while it wrote
                break
            raise ValueError(f"{path}, line {number}: expected one JSON object per line, got {line[:60]!r}") from error
        rows[row["name"]] = row  # a step that ran again replaces its first record
    return [
        StepRow(
            name=_step_title(name),
            count=f"{row['count']:,} {row.get('what', '')}".strip() if "count" in row else "",
            seconds=row.get("seconds"),
            note=str(row.get("note", "")),
        )
        for name, row in rows.items()
    ]


def _step_title(name: str) -> str:
    staged = re.fullmatch(r"(fit|relabel|mine|cluster)-stage(\d+)", name)
    if staged:
        return f"{STAGE_STEP_TITLES[staged[1]]} stage {staged[2]}"
    return STEP_TITLES.get(name, name.replace("-", " ").capitalize())


def _class_colours(boxes: ImageLabels, rows: NDArray[np.intp]) -> list[Colour]:
    return [class_colour(label) for label in boxes.classes[rows].tolist()]


def _montages(
    stages: dict[int, Labels], source: ImageSource, count: int, seed: int, missing: dict[str, str]
) -> list[tuple[str, Image.Image]]:
    """Sheets of crops of classes spread evenly over the ranking by frequency; classes of less than 3 boxes are left."""
    stage, labels = next(iter(stages.items()))
    boxes_of_class = np.bincount(labels.classes, minlength=labels.num_classes)
    ranked = np.argsort(-boxes_of_class, kind="stable")
    ranked = ranked[boxes_of_class[ranked] >= 3]
    picks = ranked[np.unique(np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int))]
    montages = []
    for index in picks.tolist():
        try:
            sheet = class_montage(source, labels, index, 12, seed, tile_px=84, columns=4)
        except ValueError:  # none of the class's images can be read
            continue
        montages.append((f"class {index}: {boxes_of_class[index]:,} boxes, {stage_title(stage)}", sheet))
    if not montages:
        missing["montages"] = f"no class of {stage_title(stage)} has 3 boxes on images that can be read."
    return montages


def _recall(
    stages: dict[int, Labels], truth: Labels | None, rng: np.random.Generator, missing: dict[str, str]
) -> list[dict[str, Any]]:
    if truth is None:
        missing["recall"] = "no ground truth was given; name a COCO file of these images to see it."
        return []
    shared = [image_id for image_id in truth.image_ids if all(image_id in labels for labels in stages.values())]
    if not shared:
        first = next(iter(stages.values()))
        missing["recall"] = (
            f"the ground truth covers none of the run's images (ids such as {list(truth.image_ids[:1])} there and "
            f"{list(first.image_ids[:1])} here)."
        )
        return []
    if len(shared) > MAX_RECALL_IMAGES:
        shared = [shared[index] for index in np.sort(rng.permutation(len(shared))[:MAX_RECALL_IMAGES])]
    return [recall_row(stage_title(stage), labels.select(shared), truth) for stage, labels in stages.items()]


def _curves(run_dir: Path, missing: dict[str, str]) -> list[Curve]:
    paths = sorted(run_dir.glob("**/metrics.csv"), key=lambda path: _natural(path.relative_to(run_dir).as_posix()))
    starts: dict[str, list[Path]] = {}  # a training that was resumed has one file per start
    for path in paths:
        parts = [p for p in path.parent.relative_to(run_dir).parts if not p.startswith(("logs", "version_"))]
        starts.setdefault(" / ".join(parts).replace("stage", "stage ") or "training", []).append(path)
    curves = [curve for name, files in starts.items() if panels(curve := read_curve(name, *files))]
    if not curves:
        missing["curves"] = f"no training run has logged losses or accuracies yet ({len(paths)} metrics.csv found)."
    return curves[:MAX_CURVES]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which stage10 comes after stage2."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


# ----------------------------------------------------------------------------------------------------------------------
# Where the boxes of each stage come from.


def stage_title(stage: int) -> str:
    """What a stage's boxes are called: mined for stage 0, stage j for those of the j-th detector."""
    return {-1: "labelled by people", 0: "mined"}.get(stage, f"stage {stage}")


def birth_colour(born: int) -> Colour:
    """Colour of the boxes that a stage found first, RGB 0..255."""
    return class_colour(born + 1)


def birth_colours(boxes: ImageLabels, rows: NDArray[np.intp]) -> list[Colour]:
    """Colour of some of an image's boxes by the stage that found them first; people's where nothing is known."""
    born = np.full(len(rows), -1) if boxes.lineage is None else boxes.lineage.born[rows]
    return [birth_colour(stage) for stage in born.tolist()]


def births(stages: Mapping[int, Labels], *, truth: bool) -> list[tuple[str, Colour]]:
    """Legend of `birth_colours`: the stages that found any box first, and people if there are boxes of theirs."""
    lineages = [labels.lineage for labels in stages.values() if labels.lineage is not None]
    found = {born for lineage in lineages for born in np.unique(lineage.born).tolist() if born >= 0}
    shown = [*sorted(found), -1] if truth else sorted(found)  # people last, as their pictures are
    return [(stage_title(born), birth_colour(born)) for born in shown]


def origin_rows(stages: Mapping[int, Labels]) -> list[dict[str, Any]]:
    """One row per stage, for the stages in which lineage is known.

    A row has ``stage`` (its title), ``boxes``, ``mined_left``: how many mined boxes a box of this stage goes on from,
    ``mined``: how many there were (None without stage 0), and ``shares``: fraction of the boxes by origin. Origins are
    ``stride 32, K 2`` for mined boxes, coarsest first, and the title of the first stage for all others.
    """
    mined = len(stages[0].classes) if 0 in stages else None
    rows = []
    for stage, labels in stages.items():
        lineage = labels.lineage
        if lineage is None:
            continue
        ancestors = _distinct(labels.owners, lineage.born_row)[lineage.born == 0]
        _, firsts, counts = np.unique(
            _distinct(lineage.born, -lineage.stride, lineage.k), return_index=True, return_counts=True
        )
        parts = (counts / len(lineage)).tolist()
        shares = {_title(lineage, box): part for box, part in zip(firsts, parts, strict=True)}
        left = len(np.unique(ancestors))
        row = {"stage": stage_title(stage), "boxes": len(lineage), "mined_left": left, "mined": mined}
        rows.append(row | {"shares": shares})
    return rows


def _distinct(*columns: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """One number per row, in the order of the rows: to count distinct rows by numbers is tenfold faster."""
    number = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        low, high = (int(column.min()), int(column.max())) if len(column) else (0, 0)
        number = number * (high - low + 1) + (column.astype(np.int64) - low)
    return number


def _title(lineage: Lineage, box: int) -> str:
    stride, k = int(lineage.stride[box]), int(lineage.k[box])
    return f"stride {stride}, K {k}" if k else stage_title(int(lineage.born[box]))

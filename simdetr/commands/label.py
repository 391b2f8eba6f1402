"""What ``autolabel`` does: a few labelled boxes and images in, a labelled set and a detector out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from simdetr.labelling import AutolabelSettings
from simdetr.labelling.autolabel import autolabel as run_autolabel

OUT = Console()


def autolabel(
    images: str,
    shots: Path,
    out: Path,
    init: Path,
    config: tuple[str, ...] = (),
    shot_images: Path | None = None,
    negatives: Path | None = None,
    people: Path | None = None,
    truth: Path | None = None,
    options: tuple[str, ...] = (),
    device: str | None = None,
    **settings: Any,
) -> None:
    """Label a set of images from a few boxes per class, and train a detector on the result.

    The same command again resumes a run that was stopped; with another threshold it repeats only what depends on it.

    Args:
        images: Folder, list file or COCO JSON of the images to label.
        shots: COCO JSON with a few boxes of every class; what else their images hold need not be labelled.
        out: Folder of this run.
        init: Run folder, detector folder or checkpoint of the pretraining.
        config: YAML files of the trainings; a recipe for few labels without any.
        shot_images: Folder of the images of the shots, where they are not among ``--images``.
        negatives: COCO JSON of boxes that look like a class and are none.
        people: COCO JSON of images that people labelled as a whole; they stay as they are.
        truth: COCO JSON with boxes for some of the images; only to measure by.
        options: ``--section.name=value`` strings; dotted options on the command line end here.
        device: Torch device; the GPU if there is one.
        settings: How few labels become many.
    """
    run = run_autolabel(
        images,
        shots,
        out,
        config,
        init=init,
        shot_images=shot_images,
        negatives=negatives,
        people=people,
        truth=truth,
        options=options,
        device=device,
        settings=AutolabelSettings(**settings),
    )
    for row in json.loads(run.stages.read_text(encoding="utf-8")):
        line = ", ".join(f"{count:,} {reason}" for reason, count in row["counts"].items())
        scores = row.get("quality", {})
        line += "".join(
            f"; {name} {scores[name]:.3f}" for name in ("precision", "recall", "mean_iou") if name in scores
        )
        OUT.print(f"{row['stage']:>8}: {line}", markup=False, highlight=False, soft_wrap=True)
    OUT.print(f"labels: {run.labels}", soft_wrap=True)
    OUT.print(f"detector: {run.detector}; look at {run.report}", soft_wrap=True)

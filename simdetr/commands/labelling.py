"""What ``autolabel``, ``label-order`` and ``label-simulate`` do: labels, by people and by machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from simdetr.labelling.choices import AutolabelSettings, LoopSettings, SelectionSettings

OUT = Console()


def autolabel_images(
    images: str,
    shots: Path,
    out: Path,
    init: Path,
    config: tuple[str, ...] = (),
    shot_images: Path | None = None,
    negatives: Path | None = None,
    people: Path | None = None,
    base: Path | None = None,
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
        base: COCO JSON of images among ``--images`` with boxes of the classes that ``--init`` knows and is to keep.
        truth: COCO JSON with boxes for some of the images; only to measure by.
        options: ``--section.name=value`` strings; dotted options on the command line end here.
        device: Torch device; the GPU if there is one.
        settings: How few labels become many.
    """
    from simdetr.labelling.autolabel import autolabel

    run = autolabel(
        images,
        shots,
        out,
        config,
        init=init,
        shot_images=shot_images,
        negatives=negatives,
        people=people,
        base=base,
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
    if base is not None:
        scores = json.loads(run.base.read_text(encoding="utf-8"))
        line = ", ".join(f"{name} {100 * value:.1f}" for name, value in scores.items())
        OUT.print(f"AP of the classes known before: {line}", highlight=False, soft_wrap=True)
    OUT.print(f"labels: {run.labels}", soft_wrap=True)
    OUT.print(f"detector: {run.detector}; look at {run.report}", soft_wrap=True)


def label_order(
    images: str,
    init: Path,
    out: Path = Path("order.csv"),
    people: Path | None = None,
    strategy: str | None = None,
    encoder: str | None = None,
    device: str | None = None,
    show: int = 10,
    **settings: Any,
) -> None:
    """Order images for a person to label, with a reason for each.

    Args:
        images: Folder, list file or COCO JSON of the images.
        init: Run folder, detector folder or checkpoint whose boxes are looked at.
        out: CSV file to write: place, image, priority, reason and flags. The features lie in a folder beside it.
        people: COCO JSON of images that people labelled already; they are not ordered again, unless the detector, if
            it knows people's classes, is sure of another class at an object.
        strategy: cluster, interleave, box_size, cluster_size, entropy, k_center, mixed or random; interleave while
            nothing is labelled, then mixed, when left out.
        encoder: What tells whether images are alike; that of the pretraining's mining when left out.
        device: Torch device; the GPU if there is one.
        show: Images that are printed.
        settings: How images are ordered.
    """
    from simdetr.labelling import loop

    choice = SelectionSettings(**settings)
    order = loop.label_order(
        images, out, init=init, people=people, strategy=strategy, encoder=encoder, device=device, settings=choice
    )
    for image_id, reason in zip(order.image_ids[:show], order.reasons, strict=False):
        OUT.print(f"{image_id}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if order.excluded:
        OUT.print(f"cannot be read: {', '.join(order.excluded)}", markup=False, highlight=False, soft_wrap=True)
    OUT.print(f"{len(order):,} images, by {order.strategy}: {out}", soft_wrap=True)


def label_simulate(
    images: str,
    truth: Path,
    val_images: Path,
    val_labels: Path,
    out: Path,
    init: Path,
    config: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
    encoder: str | None = None,
    device: str | None = None,
    misses: float = 0.0,
    accepts_wrong: float = 0.0,
    accept_iou: float = 0.7,
    keeps_boxes: bool = True,
    **settings: Any,
) -> None:
    """Run the loop of ordering, inspecting and training with a person who is simulated from truth.

    The same command again goes on after the last round.

    Args:
        images: The images to label.
        truth: COCO JSON with all of their boxes, which the person knows.
        val_images: Images to evaluate on.
        val_labels: Their boxes.
        out: Folder of the loop.
        init: Run folder, detector folder or checkpoint of the pretraining.
        config: YAML files of the trainings; a recipe for few labels without any.
        options: ``--section.name=value`` strings; dotted options on the command line end here.
        encoder: What tells whether images are alike; that of the pretraining's mining when left out.
        device: Torch device; the GPU if there is one.
        misses: Part of the objects without a proposal that the person does not see.
        accepts_wrong: Part of the wrong proposals that the person accepts.
        accept_iou: Overlap with its object from which a proposed box is good enough, at least 0.5; looser ones are
            drawn anew.
        keeps_boxes: An accepted box stays as proposed; else it becomes the object's, which flatters the labels.
        settings: Of the loop.
    """
    from simdetr.labelling import loop
    from simdetr.labelling.annotator import SimulatedAnnotator

    rows = loop.simulate_labelling(
        images,
        truth,
        val_images,
        val_labels,
        out,
        config,
        init=init,
        encoder=encoder,
        options=options,
        device=device,
        settings=LoopSettings(**settings),
        annotator=SimulatedAnnotator(
            misses=misses, accepts_wrong=accepts_wrong, accept_iou=accept_iou, keeps_boxes=keeps_boxes
        ),
    )
    OUT.print(Markdown(loop.loop_table(rows)))

"""What is done before any training: images and labels in, what would go wrong with them, or few labels of many, out."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from simdetr.commands import devices
from simdetr.data import protocols
from simdetr.data.annotations import LabelError
from simdetr.data.coco import load_coco
from simdetr.data.doctor import examine, summary
from simdetr.data.label_files import read_with_report, say
from simdetr.exchange.weights import load_detector
from simdetr.training.inference import check_classes
from simdetr.training.run_folder import detector_folder

LOG = logging.getLogger(__name__)
OUT = Console()


def doctor(path: Path, labels: Path | None = None, checkpoint: Path | None = None) -> None:
    """Look for what would go wrong: unreadable, duplicate and suspicious images, problems in labels; list the devices.

    Args:
        path: Folder, list file or COCO JSON of images.
        labels: Their boxes: any label file or folder.
        checkpoint: Run folder, detector folder or checkpoint that is to be evaluated on them, whose classes the labels
            must name.
    """
    result = examine(path, labels)
    if checkpoint is not None and result.labels is not None:
        known = load_detector(detector_folder(checkpoint)).categories
        try:
            check_classes(result.labels, labels or path, known, checkpoint)
        except LabelError as error:
            result = replace(result, fatal_reasons=(*result.fatal_reasons, str(error)))
    for lines in (summary(result), devices.summary()):
        OUT.print(lines, markup=False, highlight=False, soft_wrap=True)
    if result.fatal:
        sys.exit(1)


def split(
    labels: Path,
    out: Path,
    protocol: Literal["fractions", "shots", "classes", "rf20-vl-fsod"],
    amounts: tuple[float, ...] | None = None,
    seeds: tuple[int, ...] = tuple(range(10)),
    novel: tuple[str, ...] | int = (),
) -> None:
    """Draw few labels from many: fractions, shots per class, base and novel classes; the same everywhere.

    Args:
        labels: COCO JSON to draw from.
        out: Folder of the new COCO files; each says in ``info`` how it was drawn.
        protocol: ``fractions`` (1, 2, 5, 10, 100 % of the images), ``shots`` (1, 5, 10, 30 boxes per class),
            ``rf20-vl-fsod`` (10 boxes per class) or ``classes`` (base and novel ones).
        amounts: Other fractions, such as ``[0.01]``, or other numbers of boxes, such as ``[3, 10]``.
        seeds: One draw each; smaller draws of a seed lie inside its larger ones.
        novel: With ``classes``, the names of the novel ones, such as ``[cat, dog]``, or how many to draw.
    """
    try:
        say(read_with_report(labels)[1])
    except LabelError as error:  # what is drawn from it is no better, but the file is the user's
        LOG.warning("no training will take what is drawn from these labels: %s", error)
    for path in protocols.split(labels, out, protocol, amounts=amounts, seeds=seeds, novel=novel):
        drawn = load_coco(path)
        short = drawn["info"][protocols.RECORD].get("short_classes", {})
        fewer = ", ".join(f"{name} ({count})" for name, count in short.items())
        line = f"{path}: {len(drawn['images']):,} images, {len(drawn['annotations']):,} boxes"
        OUT.print(line + (f"; classes with fewer: {fewer}" if fewer else ""), soft_wrap=True, markup=False)

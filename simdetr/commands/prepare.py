"""What is done before any training: images and labels in, what would go wrong with them, or few labels of many, out."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from rich.console import Console

from simdetr.data import protocols
from simdetr.data.annotations import LabelError
from simdetr.data.coco import load_coco, write_coco
from simdetr.data.doctor import examine, summary
from simdetr.data.images import open_images
from simdetr.data.label_files import format_named, format_of, read_with_report, say
from simdetr.data.label_formats import conversion
from simdetr.data.label_formats.reading import Corners

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
        from simdetr.exchange.weights import load_detector
        from simdetr.training.inference import check_classes
        from simdetr.training.run_folder import detector_folder

        known = load_detector(detector_folder(checkpoint)).categories
        try:
            check_classes(result.labels, labels or path, known, checkpoint)
        except LabelError as error:
            result = replace(result, fatal_reasons=(*result.fatal_reasons, str(error)))
    from simdetr.commands import devices

    for lines in (summary(result), devices.summary()):
        OUT.print(lines, markup=False, highlight=False, soft_wrap=True)
    if result.fatal:
        sys.exit(1)


def split_labels(
    labels: Path,
    out: Path,
    protocol: Literal["fractions", "shots", "classes", "rf20-vl-fsod"],
    amounts: tuple[float, ...] | None = None,
    seeds: tuple[int, ...] = tuple(range(10)),
    novel: tuple[str, ...] | int = (),
) -> None:
    """Draw few labels from many: fractions, shots per class, base and novel classes; the same everywhere.

    Args:
        labels: File or folder of labels to draw from; those of other tools than COCO are made COCO first.
        out: Folder of the new COCO files; each says in ``info`` how it was drawn.
        protocol: ``fractions`` (1, 2, 5, 10, 100 % of the images), ``shots`` (1, 5, 10, 30 boxes per class),
            ``rf20-vl-fsod`` (10 boxes per class) or ``classes`` (base and novel ones).
        amounts: Other fractions, such as ``[0.01]``, or other numbers of boxes, such as ``[3, 10]``.
        seeds: One draw each; smaller draws of a seed lie inside its larger ones.
        novel: With ``classes``, the names of the novel ones, such as ``[cat, dog]``, or how many to draw.
    """
    with TemporaryDirectory() as folder:
        source = _as_coco(labels, Path(folder, "labels.json"))
        paths = protocols.split(source, out, protocol, amounts=amounts, seeds=seeds, novel=novel)
    for path in paths:
        drawn = load_coco(path)
        short = drawn["info"][protocols.RECORD].get("short_classes", {})
        fewer = ", ".join(f"{name} ({count})" for name, count in short.items())
        line = f"{path}: {len(drawn['images']):,} images, {len(drawn['annotations']):,} boxes"
        OUT.print(line + (f"; classes with fewer: {fewer}" if fewer else ""), soft_wrap=True, markup=False)


def _as_coco(labels: Path, made: Path) -> Path:
    """The COCO file of labels: the user's own, whatever is wrong in it, or ``made`` from those of another tool."""
    try:
        content, report = read_with_report(labels, masks=True)
        say(report)
    except LabelError as error:
        if not labels.exists() or format_of(labels).name != "coco":
            raise
        # what is drawn from it is no better, but the file is the user's
        LOG.warning("no training will take what is drawn from these labels: %s", error)
        return format_named("coco").file_of(labels)
    if report.format == "coco":
        return format_named("coco").file_of(labels)
    write_coco(content, made)
    return made


def convert(
    path: Path,
    out: Path,
    from_: str | None = None,
    to: str | None = None,
    images: Path | None = None,
    masks: bool = False,
    overwrite: bool = False,
    link_images: bool = False,
    voc_corners: Corners | None = None,
) -> None:
    """Write labels as files of another tool: COCO, YOLO, Pascal VOC, Label Studio, CVAT, CSV; says what is lost.

    Args:
        path: File or folder of labels.
        out: File or folder to write.
        from_: Typed as ``--from``: format of the labels, if their content does not say it: simdetr, coco, yolo, voc,
            label-studio, cvat or csv.
        to: Format to write, one of the same; by default the ending of OUT says it: .json COCO, .parquet simdetr, .csv
            CSV, .xml CVAT.
        images: Images that the labels are of: for their sizes, which YOLO does not say, and their names.
        masks: Write masks in place of boxes where a format has one or the other (YOLO, CVAT).
        overwrite: Replace what is at OUT.
        link_images: With YOLO, link the images beside the labels, where its trainers look for them.
        voc_corners: How the corners of Pascal VOC are counted, if its files do not show it: ``voc`` from 1, the last
            pixel included; ``zero`` from 0 to the far edge; ``shifted`` one more than that.
    """
    done = conversion.convert(
        path,
        out,
        source_format=from_,
        target_format=to,
        images=None if images is None else open_images(images),
        masks=masks,
        overwrite=overwrite,
        link_images=link_images,
        corners=voc_corners,
    )
    OUT.print("\n".join(done.lines()), markup=False, highlight=False, soft_wrap=True)

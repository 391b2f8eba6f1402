"""Labels of whole images: boxes, a CSV or one folder per class in, `Labels` with one whole-image box per class out.

What weakly supervised localisation learns from (KR 10-2022-0050617): which classes an image shows, and not where.
Letters: N images, M boxes, C categories.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.category_matching import match_names
from simdetr.data.images import ImageSource, find_images, upright_size
from simdetr.data.label_checks import ids_in
from simdetr.data.label_report import LabelReport
from simdetr.data.labels import Labels

LOG = logging.getLogger(__name__)

_COLUMNS = ("image", "label")
_READERS = 8  # of image headers at a time: disks and networks are slow to answer, not to send


def image_level(labels: Labels) -> Labels:
    """One whole-image box for each class that an image has; nothing of the objects' places, number or shape is left.

    Its score is the best of the class in the image. Images without objects stay.
    """
    keys, group = np.unique(labels.owners * max(1, labels.num_classes) + labels.classes, return_inverse=True)
    images, classes = np.divmod(keys, max(1, labels.num_classes))
    scores = np.zeros(len(keys), np.float32)
    np.maximum.at(scores, group.reshape(-1), labels.scores)
    heights, widths = labels.sizes_hw[images].T.astype(np.float32)
    return replace(
        labels,
        offsets=np.concatenate([[0], np.cumsum(np.bincount(images, minlength=len(labels)))]),
        boxes_xyxy=np.stack([0 * widths, 0 * heights, widths, heights], axis=1),
        classes=classes,
        scores=scores,
        areas=heights * widths,
        crowd=np.zeros(len(keys), np.bool_),
        lineage=None,
        masks=None,
        points=None,
    )


def read_image_level(path: str | Path, source: ImageSource, categories: Sequence[Category] | None = None) -> Labels:
    """Labels of whole images from a CSV (columns ``image``, ``label``) or a folder with one folder per class.

    In a CSV an image may have several rows, one for each of its classes, and a row without label says that an image has
    none. In a folder the first folder of an image's path is its class; an image that lies in several has several.

    Args:
        path: the file or the folder.
        source: the images; a CSV speaks of their ids, a class folder holds paths that are ids with or without it.
        categories: the classes, to speak of them as other labels do; by default those met, by name, numbered from 1.

    Returns:
        The labels of the images that have some, with one whole-image box per class; images that cannot be opened are
        left out and logged.

    Raises:
        LabelError: a file that cannot be read, an image that the source lacks, or a class that ``categories`` lacks.
    """
    path = Path(path)
    names_of = _of_folders(path, source) if path.is_dir() else _of_csv(path)
    same = ids_in(source, [*names_of], LabelReport(path, "image_level"))
    names_of = {same.get(image_id, image_id): names for image_id, names in names_of.items()}
    strangers = [image_id for image_id in names_of if image_id not in source]
    if strangers:
        raise LabelError(
            f"{path}: {len(strangers)} of {len(names_of)} images are not in {source.root} (first: {strangers[0]!r}, "
            f"there are ids like {next(iter(source.ids), None)!r})"
        )
    met = [
        Category(number + 1, name)
        for number, name in enumerate(sorted({name for names in names_of.values() for name in names}))
    ]
    known = met if categories is None else list(categories)
    match = match_names(met, known)
    if match.missing:
        missing, there = (", ".join(repr(c.name) for c in listed) for listed in (match.missing, known))
        raise LabelError(f"{path}: the class {missing} is none of {there}")
    index = {category.name: int(position) for category, position in zip(met, match.positions, strict=True)}
    classes_of = {image_id: [index[name] for name in names] for image_id, names in names_of.items()}
    return _whole_images(source, classes_of, known)


def _of_csv(path: Path) -> dict[str, list[str]]:
    """Class names by image id, in the order of the file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.reader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LabelError(f"{path} cannot be read as CSV: {error}") from error
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if not set(_COLUMNS) <= set(header):
        raise LabelError(f"{path}: expected a first line with the columns image and label, got {header}")
    image, label = map(header.index, _COLUMNS)
    names_of: dict[str, list[str]] = {}
    for number, row in enumerate(rows[1:], start=2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) <= image or not row[image].strip():
            raise LabelError(f"{path}: line {number} names no image: {row}")
        names = names_of.setdefault(row[image].strip(), [])
        name = row[label].strip() if len(row) > label else ""
        if name and name not in names:
            names.append(name)
    return names_of


def _of_folders(folder: Path, source: ImageSource) -> dict[str, list[str]]:
    names_of: dict[str, list[str]] = {}
    for path in find_images(folder):
        name, _, rest = path.partition("/")
        if not rest:
            raise LabelError(f"{folder}: {path} lies in no class folder; move it into one named as its class")
        names_of.setdefault(path if path in source else rest, []).append(name)
    if not names_of:
        raise LabelError(f"{folder}: expected one folder of images per class, got no images")
    return names_of


def _whole_images(source: ImageSource, classes_of: Mapping[str, list[int]], categories: Sequence[Category]) -> Labels:
    images, unreadable = [], []
    with ThreadPoolExecutor(_READERS) as pool:
        sizes = pool.map(upright_size, map(source.record, classes_of))
        for (image_id, classes), size_hw in zip(classes_of.items(), sizes, strict=True):
            if size_hw is None:
                unreadable.append(image_id)
            else:
                boxes = [[0, 0, size_hw[1], size_hw[0]]] * len(classes)
                images.append(ImageLabels.build(image_id, size_hw, boxes, sorted(classes)))
    if unreadable:
        LOG.warning("%d images cannot be opened and are left out, the first is %s", len(unreadable), unreadable[0])
    return Labels.from_images(images, categories)

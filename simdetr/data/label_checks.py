"""Labels held against the images they are of, and against what they are used for.

Ids spelt otherwise, images that are not there, sizes of other images or of images before EXIF turned them, boxes that
are no ``[x, y, width, height]`` in pixels, nothing left to train on. The commands and `simdetr.data.doctor` call the
same functions: what doctor does not complain of stops no run.

Letters: N images, m boxes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simdetr.data.annotations import LabelError
from simdetr.data.category_matching import CategoryMatch, shortened
from simdetr.data.images import ImageSource, upright_size
from simdetr.data.label_report import LabelReport
from simdetr.data.labels import Labels
from simdetr.data.spellings import Spellings

LOG = logging.getLogger(__name__)
MAX_MISSING = 0.05
"""Share of the labelled images that may be missing, as of those that cannot be read."""
_MANY = 0.5  # share of the boxes or images from which on the whole file is of another kind
_FEWEST_BOXES = 3  # from which on a layout can be told
_FEW_PIXELS = 16  # a side of an image that may hold boxes of less than a pixel
_LEAVES_PX, _LEAVES = 2.0, 0.02  # a box leaves its image by so many pixels and this part of its side
_AREA_SLACK, _AREA_SLACK_PX = 1.05, 1.0  # an area may be larger than its box by rounding
_AS_STORED = "boxes are of the image as it is stored, not as it is shown (EXIF turns it)"
_OTHER_SIZE = "labels are of an image of another size"
_SAMPLED_FILES, _SAMPLED_FAR = 1000, 32  # image headers looked at: of files of this machine, and of others
_READERS = 8  # of image headers at a time: disks and networks are slow to answer, not to send


# ----------------------------------------------------------------------------------------------------------------------
# Which image


def with_ids_of(labels: Labels, images: ImageSource, report: LabelReport) -> Labels:
    """The same labels under the ids that their images have in a source, see `ids_in`."""
    renamed = ids_in(images, labels.image_ids, report)
    if not renamed:
        return labels
    return replace(labels, image_ids=tuple(renamed.get(name, name) for name in labels.image_ids))


def ids_in(images: ImageSource, names: Sequence[str], report: LabelReport) -> dict[str, str]:
    """The ids that a source has for images which a file spells otherwise; other names are not in it.

    See `simdetr.data.spellings`; what was matched so is noted.
    """
    strangers = [name for name in names if name not in images]
    if not strangers:
        return {}
    spellings = Spellings(images.ids, str(images.root))
    found = {name: same for name in strangers if (same := spellings(name)) is not None}
    taken = Counter([*found.values(), *(name for name in names if name in images)])
    renamed = {name: same for name, same in found.items() if taken[same] == 1}
    for name, same in renamed.items():
        report.note("image found by another spelling of its path", f"{name!r} as {same!r}")
    return renamed


def without_missing(labels: Labels, images: ImageSource, path: str | Path) -> Labels:
    """The labels of the images that are there, if few are missing, which is logged; else a LabelError."""
    missing = [image_id for image_id in labels.image_ids if image_id not in images]
    if not missing:
        return labels
    said = (
        f"{len(missing)} of its {len(labels)} images are not in {images.root} (first: {missing[0]!r}, there are ids "
        f"like {next(iter(images.ids), None)!r})"
    )
    if len(missing) == len(labels):
        said = f"none of its {len(labels)} images is in {images.root} ({said.partition(' (')[2]}"
    if len(missing) > MAX_MISSING * len(labels):
        raise LabelError(
            f"{path}: {said}; give --images the folder that its file names are relative to, or take the missing images "
            f"out of the file: up to {MAX_MISSING:.0%} are left out without asking"
        )
    LOG.warning("%s: %s; they are left out", path, said)
    return labels.select(image_id for image_id in labels.image_ids if image_id in images)


# ----------------------------------------------------------------------------------------------------------------------
# Which size


def settled_sizes(
    ids: Sequence[str],
    sizes_hw: NDArray[np.int64],
    reach_hw: NDArray[np.float64],
    images: ImageSource,
    report: LabelReport,
) -> NDArray[np.int64]:
    """The sizes that labels say their images have, corrected by the images where that can be known.

    Looked at are all images of which nothing is said, those that a box leaves, and as many others as cost no time; all
    of them if one differs. Where height and width are exchanged, as of a photograph that EXIF turns, the boxes tell
    which way they are meant: those that leave the one frame are of the other, and tell it for the others of the file.
    Of any other size, nothing is changed.

    Args:
        ids: N images.
        sizes_hw: [N, 2] as the file has them, zeros where it says nothing.
        reach_hw: [N, 2], the lowest and rightmost edge of each image's boxes in pixels.
        images: where the images are.
        report: where to count what differs.

    Returns:
        [N, 2]; zeros remain where the file says nothing and the image cannot be opened.

    Raises:
        LabelError: most images have another size than the labels say, or most boxes are of images that are not turned.
    """
    there = np.array([image_id in images for image_id in ids], np.bool_)
    leaving = (reach_hw > sizes_hw + np.maximum(_LEAVES_PX, _LEAVES * sizes_hw)).any(axis=1)
    count = _SAMPLED_FILES if isinstance(images.root, Path) and images.members is None else _SAMPLED_FAR
    sampled = np.zeros(len(ids), np.bool_)
    sampled[np.linspace(0, len(ids) - 1, min(count, len(ids)), dtype=np.int64) if len(ids) else []] = True
    wanted = there & (leaving | sampled | (sizes_hw == 0).any(axis=1))
    actual = _actual_sizes(ids, wanted, images)
    if any(actual[row] != tuple(sizes_hw[row].tolist()) for row in actual):
        actual |= _actual_sizes(ids, there & ~wanted, images)
    settled = sizes_hw.copy()
    shown: list[int] = []
    either: list[int] = []
    stored, other = [], []
    for row, (height, width) in actual.items():
        said = (int(sizes_hw[row, 0]), int(sizes_hw[row, 1]))
        if 0 in said:
            settled[row] = height, width
        elif said == (width, height) != (height, width):
            reach = reach_hw[row] - _LEAVES_PX
            fits_said, fits_shown = bool((reach <= said).all()), bool((reach <= (height, width)).all())
            if fits_said and not fits_shown:
                stored.append(row)
            else:
                (shown if fits_shown and not fits_said else either).append(row)
        elif said != (height, width):
            other.append(row)
    if bool(shown) != bool(stored):  # the file was made one way
        (shown or stored).extend(either)
        either = []
    for row in (*shown, *either):
        settled[row] = actual[row]
    for row in shown:
        report.note("height and width exchanged, as before a turn by EXIF; the image's own taken", ids[row])
    for row in either:
        report.add(
            "height and width exchanged, as before a turn by EXIF; its boxes fit either way and are taken as of the "
            "image as it is shown",
            ids[row],
        )
    kinds = (
        (
            _AS_STORED,
            stored,
            "take the orientation out of the files' EXIF, so that they are shown as labelled",
        ),
        (_OTHER_SIZE, other, "give the images that were labelled, or scale the boxes as the images were"),
    )
    for kind, rows, cure in kinds:
        examples = [_size_difference(ids[row], sizes_hw[row].tolist(), actual[row]) for row in rows]
        if len(rows) > _MANY * len(actual):
            raise LabelError(
                f"{report.path}: {kind}: {len(rows)} of {len(actual)} images, such as {examples[0]}. Boxes are pixels "
                f"of the images as a viewer shows them: {cure}"
            )
        for example in examples:
            report.add(kind, example)
    return settled


def _actual_sizes(ids: Sequence[str], wanted: NDArray[np.bool_], images: ImageSource) -> dict[int, tuple[int, int]]:
    """Height and width of some images as they are shown, by row, without those that cannot be opened."""
    rows = np.flatnonzero(wanted).tolist()
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda row: upright_size(images.record(ids[row])), rows)
        return {row: size_hw for row, size_hw in zip(rows, found, strict=True) if size_hw is not None}


def _size_difference(image_id: str, said_hw: Sequence[int], actual_hw: Sequence[int]) -> str:
    return f"{image_id}: labels say {said_hw[1]}×{said_hw[0]} px, the image has {actual_hw[1]}×{actual_hw[0]}"


# ----------------------------------------------------------------------------------------------------------------------
# Which boxes


def check_are_pixels(
    boxes_xywh: NDArray[np.float64], report: LabelReport, sizes_hw: NDArray[np.int64] | None = None
) -> None:
    """Refuse boxes [m, 4] that are parts of the image's sides, by a LabelError; a few among others are noted.

    An image of few pixels may hold such a box: with sizes [m, 2], zero where unknown, its boxes are passed over.
    """
    ends = boxes_xywh[:, :2] + boxes_xywh[:, 2:]
    within = (boxes_xywh >= 0).all(axis=1) & (boxes_xywh <= 1).all(axis=1) & (boxes_xywh[:, 2:] > 0).all(axis=1)
    within &= (ends <= 1.5).all(axis=1) & (boxes_xywh % 1 > 0).any(axis=1)  # also with the centre for the corner
    if sizes_hw is not None:
        within &= ((sizes_hw == 0) | (sizes_hw > _FEW_PIXELS)).all(axis=1)
    count = int(within.sum())
    if count > 1 and count > _MANY * len(boxes_xywh):
        raise LabelError(
            f"{report.path}: bbox looks like fractions of the image; COCO's are pixels: of {count} of "
            f"{len(boxes_xywh)} boxes all four numbers lie within 0 and 1, such as {_listed(boxes_xywh[within][0])}. "
            "Multiply them by width and height of the image"
        )
    for box in boxes_xywh[within]:
        report.note("box of at most a pixel in the first pixel of the image, a fraction?", str(_listed(box)))


def check_are_no_corners(boxes: NDArray[np.float64], sizes_hw: NDArray[np.int64], report: LabelReport) -> None:
    """Refuse boxes [m, 4] that make sense only as corners x0, y0, x1, y1, by a LabelError; sizes [m, 2] of the images.

    So they do if most leave their image as x, y, width, height, and as corners none does.
    """
    limits = sizes_hw[:, ::-1] + np.maximum(_LEAVES_PX, _LEAVES * sizes_hw[:, ::-1])
    leaving = ((boxes[:, :2] + boxes[:, 2:]) > limits).any(axis=1)
    as_corners = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & (boxes[:, 2:] <= limits).all(axis=1)
    if len(boxes) >= _FEWEST_BOXES and leaving.sum() > _MANY * len(boxes) and as_corners.all():
        raise LabelError(
            f"{report.path}: bbox looks like corners [x0, y0, x1, y1]; COCO's are [x, y, width, height]: so read, "
            f"{int(leaving.sum())} of {len(boxes)} boxes leave their image, such as {_listed(boxes[leaving][0])}, and "
            "as corners none does. Write x1 - x0 and y1 - y0 as the last two"
        )


def areas_of_no_box(areas: NDArray[np.float64], box_areas: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which given areas [m] cannot be those of objects in boxes of such areas, bool [m]; NaN and 0 are not given.

    Larger than the box, below a pixel in a larger box, or one number for boxes of all sizes.
    """
    given = areas > 0
    wrong = given & ((areas > _AREA_SLACK * box_areas + _AREA_SLACK_PX) | ((areas < 1) & (box_areas > 4)))
    of_boxes = box_areas[given & (box_areas > 0)]
    constant = len(of_boxes) >= _FEWEST_BOXES and np.ptp(areas[given]) == 0 and of_boxes.max() > 1.5 * of_boxes.min()
    return given if constant else wrong


def _listed(box: NDArray[np.float64]) -> list[float]:
    return [round(value, 4) for value in box.tolist()]


# ----------------------------------------------------------------------------------------------------------------------
# Use


def check_has_boxes(labels: Labels, path: str | Path, report: LabelReport | None = None) -> None:
    """Refuse labels without a box to train on or to find, by a LabelError that says what became of the file's."""
    count = len(labels.boxes_xyxy)
    if count and not labels.crowd.all():
        return
    if count:
        raise LabelError(
            f"{path}: every one of its {count} boxes is a crowd (iscrowd), which is neither trained on nor looked for; "
            "single objects have iscrowd 0"
        )
    why = f"; {'; '.join(report.lines())}" if report is not None and report.total else ""
    raise LabelError(f"{path}: there is no usable box in it ({labels.num_classes} categories){why}")


def say_match(match: CategoryMatch, labels: Labels, path: str | Path, others: object) -> None:
    """Log how the categories of labels were matched with those of a detector or of other labels, and what is left over.

    Args:
        match: of the labels' categories with the others.
        labels: the labels.
        path: their file.
        others: what the others are, such as ``"the detector"``.
    """
    for line in match.notes():
        LOG.warning("%s: %s", path, line)
    counts = Counter(labels.classes[~labels.crowd].tolist())
    lost = [
        f"{category.name!r} ({counts[row]:,})"
        for row, (category, position) in enumerate(zip(match.own, match.positions, strict=True))
        if position < 0 and counts[row]
    ]
    if lost:
        LOG.warning("%s: boxes of categories that %s does not have count as missed: %s", path, others, shortened(lost))


def complaints(labels: Labels, images: ImageSource, path: str | Path, report: LabelReport) -> Iterable[str]:
    """What would stop a training on these labels and images, a line each."""
    for check in (lambda: check_has_boxes(labels, path, report), lambda: without_missing(labels, images, path)):
        try:
            check()
        except LabelError as error:
            yield str(error)

"""COCO JSON in, `Labels` and a count of what was wrong out; and back, as annotations or results, with the ids they had.

Category ids of any kind (gaps, strings) become class indices 0, 1, … in the order of the ids, so that two files of one
data set that list the same categories agree. The id of an image is its ``file_name``. Problems are repaired or
dropped, and counted; ``strict`` makes the first one an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simdetr.data import masks as mask_codes
from simdetr.data import points as point_columns
from simdetr.data.annotations import LINEAGE_COLUMNS, MAX_SIDE, Category, LabelError, Lineage
from simdetr.data.images import ImageSource
from simdetr.data.label_checks import areas_of_no_box, check_are_no_corners, check_are_pixels, ids_in, settled_sizes
from simdetr.data.label_report import LabelReport
from simdetr.data.labels import Labels
from simdetr.data.storage import read_lists, write_json

SAME_AGAIN = "the same box of the same class again, dropped"
_ROUNDING_PX = 0.1  # a box may leave the image by this much without being called wrong: COCO writes two decimals
_BOX_DECIMALS = 4
_NO_AREA = -1.0  # of an annotation whose area is no number
_CROWD_TEXTS = {"": False, "0": False, "0.0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}
_KEYPOINT_OF_CATEGORY = {"keypoints": ["reference point"], "skeleton": []}
_RESULT_FIELDS = ("image_id", "category_id", "bbox", "score", "segmentation", "keypoints", "num_keypoints")


def read_coco(
    path: str | Path,
    *,
    strict: bool = False,
    image_ids: Iterable[str] | None = None,
    masks: bool = False,
    report: LabelReport | None = None,
    images: ImageSource | None = None,
) -> tuple[Labels, LabelReport]:
    """Read a COCO annotation file.

    Args:
        path: the JSON file with ``images``, ``annotations`` and ``categories``.
        strict: raise at the first problem instead of repairing or dropping, with the file and the annotation's id.
        image_ids: file names to keep, in this order; all of them by default.
        masks: read each ``segmentation`` too (polygons or run lengths). An annotation without one, or with one that
            cannot be read, gets a mask that fills its box, and is counted; a file without any gives labels without
            masks.
        report: where to count problems; a new one if left out.
        images: the images that the file is of: their ids are taken, and their sizes where the file has none or has
            height and width exchanged, as of photographs that EXIF turns.

    An annotation without ``bbox`` has the one around its ``segmentation``. Its one keypoint, if visible, becomes its
    point; with it, an annotation without ``bbox``, or with one of no width or height, is a landmark of which only the
    point is known: its box is (x, y, x, y). Files in which an annotation has several keypoints, as people have, give no
    points. An image whose every annotation had to be dropped is left out, since it would teach that it is empty.

    Returns:
        The labels (crowds are kept and marked; an annotation's ``score`` and lineage are kept) and the problems met.

    Raises:
        LabelError: the file cannot be used at all, its boxes are no pixels ``[x, y, width, height]``, it is of other
            images than ``images``, or it has a problem and ``strict`` is set.
    """
    path = Path(path)
    content = load_coco(path)
    problems = LabelReport(path, strict=strict) if report is None else report
    categories = _categories(content, problems)
    listed = _images(content, problems, images)
    found = _annotations(content["annotations"], listed, categories, problems)
    check_are_pixels(found.boxes_xywh[~found.boxless], problems, listed.sizes_hw[found.rows][~found.boxless])
    sizes_hw = _sizes(listed, found, images, problems)
    check_are_no_corners(found.boxes_xywh[~found.boxless], sizes_hw[found.rows][~found.boxless], problems)
    kept, boxes = _clipped(found, sizes_hw, problems)
    sized = np.asarray((sizes_hw > 0).all(axis=1))
    kept = kept[sized[found.rows[kept]]]
    undecided = ~listed.annotated & _is_label_studios(content)
    left_out = ~sized | undecided | (listed.annotated & ~np.isin(np.arange(len(sizes_hw)), found.rows[kept]))
    for row in np.flatnonzero(left_out).tolist():
        (problems.doubt if undecided[row] else problems.leave_out)(listed.ids[row])
    order = kept[np.argsort(found.rows[kept], kind="stable")]
    labels = _table(found, order, boxes[order], listed.ids, sizes_hw, left_out, categories, content, masks, problems)
    return (labels if image_ids is None else labels.select(image_ids)), problems


def _is_label_studios(content: Mapping[str, Any]) -> bool:
    """Whether Label Studio exported it, which gives images to tasks that nobody has touched."""
    info = content.get("info")
    return isinstance(info, dict) and info.get("contributor") == "Label Studio"


def load_coco(path: Path) -> dict[str, Any]:
    """The content of a COCO annotation file as it stands, with its three lists, or a `LabelError`."""
    return read_lists(path, "COCO annotation file", "annotations", "categories", "images")


def with_known_ids(content: dict[str, Any]) -> dict[str, Any]:
    """The same content, its annotations under the ids that images and categories have in it, and its crowds as 0 and 1.

    What `read_coco` would read alike stands alike then. Images without id or file name and annotations that are no
    objects are left out; all else stays as it is.
    """
    silent = LabelReport(Path())
    images = [
        image
        for image in content["images"]
        if isinstance(image, dict) and _plain_id(image.get("id")) is not None and "file_name" in image
    ]
    categories = [entry for entry in content["categories"] if isinstance(entry, dict) and "id" in entry]
    known = {
        "image_id": {image["id"]: row for row, image in enumerate(images)},
        "category_id": {category["id"]: row for row, category in enumerate(categories)},
    }
    listed = {"image_id": images, "category_id": categories}
    annotations = []
    for entry in content["annotations"]:
        if not isinstance(entry, dict):
            continue
        changed = {}
        for name, rows in known.items():
            row = _row(rows, entry.get(name), name, silent, "")
            if row is not None and entry[name] != listed[name][row]["id"]:
                changed[name] = listed[name][row]["id"]
        if isinstance(entry.get("iscrowd"), str):
            changed["iscrowd"] = int(_is_crowd(entry, silent, ""))
        annotations.append(entry | changed if changed else entry)
    named = [entry if "name" in entry else entry | {"name": str(entry["id"])} for entry in categories]
    return content | {"images": images, "annotations": annotations, "categories": named}


@dataclass
class _Images:
    """The images of a file, N of them, by column."""

    ids: list[str]
    sizes_hw: NDArray[np.int64]  # [N, 2], 0 where the file says nothing
    row_of: dict[int | str, int]  # by the file's own id
    ambiguous: set[int | str]  # ids that the file gives to several images
    annotated: NDArray[np.bool_]  # [N], whether the file has annotations of it, usable or not


@dataclass
class _Annotations:
    """The annotations that name an image, a category and a box, m of them, by column."""

    entries: list[dict[str, Any]]
    places: list[str]  # what to call each of them in a report
    rows: NDArray[np.int64]  # [m], their images
    classes: NDArray[np.int64]
    boxes_xywh: NDArray[np.float64]  # [m, 4], as the file has them, not clipped
    boxless: NDArray[np.bool_]  # landmarks of which only the point is known
    areas: NDArray[np.float64]  # NaN where the file says nothing
    scores: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    points: NDArray[np.float64]  # [m, 2], NaN where it has none


def _plain_id(value: object) -> int | str | None:
    """An id as it can be looked up: whole floats as integers, anything but numbers and strings as None."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) else None


def _respelt(key: int | str | None) -> int | str | None:
    """A number for the text of it, and the reverse; None for other texts."""
    if isinstance(key, str):
        number = key.strip().removeprefix("-")
        return int(key) if number.isdecimal() and number.isascii() else None
    return None if key is None else str(key)


def _row(table: Mapping[int | str, int], value: object, what: str, problems: LabelReport, where: str) -> int | None:
    """What an id stands for; '1' and 1 are the same where the table has only one of them."""
    key = _plain_id(value)
    if key in table:
        return table[key]  # type: ignore[index]
    other = _respelt(key)
    if other in table:
        problems.note(f"{what} given as text where the file has a number, or the reverse", where)
        return table[other]  # type: ignore[index]
    return None


def _categories(content: Mapping[str, Any], problems: LabelReport) -> list[Category]:
    found: dict[int | str, Category] = {}
    for position, entry in enumerate(content["categories"]):
        identity = _plain_id(entry.get("id")) if isinstance(entry, dict) else None
        if identity is None:
            problems.add("category without id, dropped", f"category number {position + 1}")
        elif identity in found:
            problems.add("category id repeated, first kept", f"category {identity!r}")
        else:
            found[identity] = Category(identity, str(entry.get("name", identity)))
    first: dict[str, Category] = {}
    for category in found.values():
        if first.setdefault(category.name, category) is not category:
            problems.add("category name repeated, kept as two classes", f"category {category.id!r} {category.name!r}")
    return [found[key] for key in sorted(found, key=lambda key: (isinstance(key, str), key))]


def _images(content: Mapping[str, Any], problems: LabelReport, images: ImageSource | None) -> _Images:
    """The images of the file in its order, under the ids that they have in a source."""
    names: dict[int | str, str] = {}
    sizes: dict[str, tuple[int, int]] = {}
    ambiguous: set[int | str] = set()
    for position, entry in enumerate(content["images"]):
        identity = _plain_id(entry.get("id")) if isinstance(entry, dict) else None
        file_name = entry.get("file_name") if identity is not None else None
        if identity is None or not isinstance(file_name, str):
            problems.add("image without id or file_name, dropped", f"image number {position + 1}")
            continue
        if identity in names:
            if names[identity] == file_name:
                problems.add("image id repeated, first kept", f"image {identity!r}")
            else:
                problems.add("image id given to two files, whose boxes cannot be told apart", f"image {identity!r}")
                problems.leave_out(file_name)
                ambiguous.add(identity)
            continue
        if file_name in sizes:
            problems.add("file_name repeated, annotations merged", f"image {identity!r}")
        names[identity] = file_name
        sizes.setdefault(file_name, _size(entry, problems.path, identity, required=images is None))
    for identity in ambiguous:
        problems.leave_out(names[identity])
        sizes.pop(names[identity], None)
    same = {} if images is None else ids_in(images, [*sizes], problems)
    place = {file_name: row for row, file_name in enumerate(sizes)}
    return _Images(
        ids=[same.get(file_name, file_name) for file_name in sizes],
        sizes_hw=np.array([*sizes.values()], np.int64).reshape(-1, 2),
        row_of={identity: place[name] for identity, name in names.items() if name in place},
        ambiguous=ambiguous,
        annotated=np.zeros(len(sizes), np.bool_),
    )


def _size(entry: Mapping[str, Any], path: Path, identity: int | str, *, required: bool) -> tuple[int, int]:
    """(height, width) of an image; zeros where the file says nothing and the image will tell."""
    try:
        height, width = int(float(entry["height"])), int(float(entry["width"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        height = width = 0
    if 0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE:
        return height, width
    if required:
        raise LabelError(
            f"{path}: image {identity!r:.60} ({entry['file_name']:.200}): expected a positive width and height in "
            f"pixels, got {entry.get('width')!r:.60} and {entry.get('height')!r:.60}; write them into the file"
        )
    return 0, 0


def _annotations(
    content: list[Any], images: _Images, categories: Sequence[Category], problems: LabelReport
) -> _Annotations:
    class_of = {category.id: index for index, category in enumerate(categories)}
    with_points = point_columns.one_each(content)
    seen: set[int | str] = set()
    boxes_seen: dict[tuple[Any, ...], Any] = {}
    entries, places, rows, classes, numbers, crowd, boxless, points = [], [], [], [], [], [], [], []
    for position, entry in enumerate(content):
        if not isinstance(entry, dict):
            problems.add("annotation is no object, dropped", f"annotation number {position + 1}")
            continue
        where = f"annotation {entry['id']!r}" if "id" in entry else f"annotation 'number {position + 1}'"
        if images.ambiguous and _plain_id(entry.get("image_id")) in images.ambiguous:
            problems.add("annotation of an image id given to two files, dropped", where)
            continue
        row = _row(images.row_of, entry.get("image_id"), "image_id", problems, where)
        if row is None:
            problems.add("unknown image, dropped", f"{where} with image_id {entry.get('image_id')!r}")
            continue
        images.annotated[row] = True
        own_class = _row(class_of, entry.get("category_id"), "category_id", problems, where)
        if own_class is None:
            problems.add("unknown category, dropped", f"{where} with category_id {entry.get('category_id')!r}")
            continue
        point = _point(entry, problems, where) if with_points else None
        bbox = entry.get("bbox")
        only_point = point is not None and (not bbox or (isinstance(bbox, list) and 0 in bbox[2:4]))
        box = (*point, 0.0, 0.0) if point and only_point else _box(entry, images.sizes_hw[row], problems, where)
        if box is None:
            continue
        score, area = _number(entry, "score", 1.0, problems, where), _number(entry, "area", math.nan, problems, where)
        if not math.isfinite(score):
            problems.add("box, score or area is no number, dropped", f"{where} with score {entry.get('score')!r}")
            continue
        if math.isnan(area) and entry.get("area") is not None:
            area = _NO_AREA
        is_crowd = _is_crowd(entry, problems, where)
        if "score" not in entry:  # of people: a detector may be as sure of two boxes as of one
            key, shape = (row, own_class, is_crowd, box), (entry.get("segmentation"), entry.get("keypoints"))
            if key in boxes_seen and boxes_seen[key] == shape:
                problems.add(SAME_AGAIN, where)
                continue
            boxes_seen[key] = shape
        identity = _plain_id(entry.get("id"))
        if identity is not None:
            if identity in seen:
                problems.add("annotation id repeated, both kept", where)
            seen.add(identity)
        entries.append(entry)
        places.append(where)
        rows.append(row)
        classes.append(own_class)
        numbers.append((*box, score, area))
        crowd.append(is_crowd)
        boxless.append(only_point)
        points.append(point or (math.nan, math.nan))
    table = np.array(numbers, np.float64).reshape(-1, 6)
    return _Annotations(
        entries=entries,
        places=places,
        rows=np.array(rows, np.int64),
        classes=np.array(classes, np.int64),
        boxes_xywh=table[:, :4],
        boxless=np.array(boxless, np.bool_),
        areas=table[:, 5],
        scores=table[:, 4],
        crowd=np.array(crowd, np.bool_),
        points=np.array(points, np.float64).reshape(-1, 2),
    )


def _box(
    entry: Mapping[str, Any], size_hw: NDArray[np.int64], problems: LabelReport, where: str
) -> tuple[float, float, float, float] | None:
    """x, y, width and height as the annotation has them, or as its segmentation or its rotation says; None if none."""
    bbox = entry.get("bbox")
    if not bbox and (segmentation := entry.get("segmentation")):
        try:
            x0, y0, x1, y1 = mask_codes.extent(segmentation, (int(size_hw[0]), int(size_hw[1])))[0]
        except LabelError as error:
            problems.add("no bbox, and the segmentation cannot be read, dropped", f"{where}: {error}")
            return None
        problems.note("no bbox, the one around its segmentation taken", where)
        return x0, y0, x1 - x0, y1 - y0
    try:
        x, y, width, height = map(float, bbox)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        x = y = width = height = math.nan
    if not (math.isfinite(x) and math.isfinite(y) and math.isfinite(width) and math.isfinite(height)):
        problems.add("box, score or area is no number, dropped", f"{where} with bbox {bbox!r}")
        return None
    if isinstance(bbox, list) and any(isinstance(value, str) for value in bbox):
        problems.note("number given as text", f"{where} with bbox {bbox!r}")
    turn = _rotation(entry)
    if turn:
        problems.note("rotated box, the upright box around it taken", where)
        cos, sin = abs(math.cos(turn)), abs(math.sin(turn))
        outer_width, outer_height = width * cos + height * sin, width * sin + height * cos
        x, y = x + (width - outer_width) / 2, y + (height - outer_height) / 2
        width, height = outer_width, outer_height
    return x, y, width, height


def _rotation(entry: Mapping[str, Any]) -> float:
    """Angle in radians by which the box is turned about its centre, as CVAT writes it; 0 if none is given."""
    attributes = entry.get("attributes")
    if not isinstance(attributes, dict) or entry.get("segmentation"):
        return 0.0
    try:
        degrees = float(attributes.get("rotation") or 0)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return math.radians(degrees) if math.isfinite(degrees) and degrees % 180 else 0.0


def _number(entry: Mapping[str, Any], name: str, default: float, problems: LabelReport, where: str) -> float:
    """A number of an annotation, also where it is given as text; NaN for anything else."""
    value = entry.get(name)
    if value is None:
        return default
    if isinstance(value, str):
        problems.note("number given as text", f"{where} with {name} {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _is_crowd(entry: Mapping[str, Any], problems: LabelReport, where: str) -> bool:
    value = entry.get("iscrowd", 0)
    if value is None or value == 0 or value == 1:
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in _CROWD_TEXTS:
        problems.note("number given as text", f"{where} with iscrowd {value!r}")
        return _CROWD_TEXTS[value.strip().lower()]
    problems.add("iscrowd is neither 0 nor 1, taken as 0", f"{where} with iscrowd {value!r}")
    return False


def _point(entry: Mapping[str, Any], problems: LabelReport, where: str) -> tuple[float, float] | None:
    if entry.get("keypoints") is None:
        return None
    try:
        return point_columns.of_keypoints(entry.get("keypoints"))
    except LabelError as error:
        problems.add("keypoint cannot be read, left out", f"{where}: {error}")
        return None


def _sizes(
    listed: _Images, found: _Annotations, images: ImageSource | None, problems: LabelReport
) -> NDArray[np.int64]:
    if images is None:
        return listed.sizes_hw
    reach_hw = np.zeros((len(listed.ids), 2))
    corners = found.boxes_xywh[:, :2] + found.boxes_xywh[:, 2:]
    rows = np.flatnonzero(~found.boxless)
    np.maximum.at(reach_hw, found.rows[rows], corners[rows][:, ::-1])
    return settled_sizes(listed.ids, listed.sizes_hw, reach_hw, images, problems)


def _clipped(
    found: _Annotations, sizes_hw: NDArray[np.int64], problems: LabelReport
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Which annotations have a box in their image, and the boxes [m, 4] of all, clipped; landmarks stay where they are.

    Scores are clipped, and areas that cannot be those of the object taken anew, in ``found`` itself.
    """
    full = np.hstack([found.boxes_xywh[:, :2], found.boxes_xywh[:, :2] + found.boxes_xywh[:, 2:]])
    limits = np.tile(sizes_hw[found.rows][:, ::-1], 2)
    boxes = np.where(found.boxless[:, None], full, np.clip(full, 0, limits)).astype(np.float32)
    turned = (found.boxes_xywh[:, 2:] < 0).any(1) & ~found.boxless
    empty = ~(boxes[:, 2:] > boxes[:, :2]).all(1) & ~found.boxless & ~turned
    cut = (np.abs(full - boxes).max(axis=1, initial=0) > _ROUNDING_PX) & ~empty & ~turned
    for kind, rows in {
        "box of negative width or height, dropped": turned,
        "box without area in the image, dropped": empty,
        "box outside the image, clipped": cut,
    }.items():
        for row in np.flatnonzero(rows).tolist():
            problems.add(kind, f"{found.places[row]} with bbox {found.entries[row].get('bbox')!r}")
    unsure = ~((found.scores >= 0) & (found.scores <= 1))
    for row in np.flatnonzero(unsure).tolist():
        problems.add("score outside 0 to 1, clipped", f"{found.places[row]} with score {found.scores[row]:g}")
    found.scores = found.scores.clip(0, 1)
    sides = boxes[:, 2:].astype(np.float64) - boxes[:, :2]
    wrong = (found.areas < 0) | areas_of_no_box(found.areas, found.boxes_xywh[:, 2:].prod(axis=1))
    wrong &= ~found.boxless
    given = np.isfinite(found.areas) & (found.areas > 0) & ~wrong
    found.areas = np.where(given, found.areas, sides.prod(axis=1).clip(0))
    for row in np.flatnonzero(wrong).tolist():
        problems.add("area is not that of the object, taken anew", found.places[row])
        with suppress(LabelError):
            size_hw = (int(sizes_hw[found.rows[row], 0]), int(sizes_hw[found.rows[row], 1]))
            found.areas[row] = mask_codes.extent(found.entries[row].get("segmentation"), size_hw)[1]
    return np.flatnonzero(~empty & ~turned), boxes


def _table(
    found: _Annotations,
    order: NDArray[np.int64],
    boxes: NDArray[np.float32],
    ids: Sequence[str],
    sizes_hw: NDArray[np.int64],
    left_out: NDArray[np.bool_],
    categories: Sequence[Category],
    content: Mapping[str, Any],
    masks: bool,
    problems: LabelReport,
) -> Labels:
    """The labels: annotations ``order``, sorted by image, with their boxes; images of ``left_out`` are not there."""
    info = content.get("info")
    said = info.get("simdetr_stage") if isinstance(info, dict) else None
    stage = said if type(said) is int and -1 <= said <= np.iinfo(LINEAGE_COLUMNS["born"]).max else -1
    there = np.flatnonzero(~left_out)
    counts = np.bincount(found.rows[order], minlength=len(ids))[there]
    offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
    points = found.points[order].astype(np.float32)
    return Labels(
        image_ids=tuple(ids[row] for row in there.tolist()),
        sizes_hw=sizes_hw[there],
        offsets=offsets,
        boxes_xyxy=boxes,
        classes=found.classes[order],
        scores=found.scores[order].astype(np.float32),
        categories=tuple(categories),
        areas=found.areas[order].astype(np.float32),
        crowd=found.crowd[order],
        stage=stage,
        lineage=_lineage(found, order, offsets, stage, problems),
        masks=_masks(found, order, boxes, sizes_hw, problems) if masks else None,
        points=points if point_columns.known(points).any() else None,
    )


def _lineage(
    found: _Annotations, order: NDArray[np.int64], offsets: NDArray[np.int64], stage: int, problems: LabelReport
) -> Lineage | None:
    origins = {}
    for row, number in enumerate(order.tolist()):
        entry = found.entries[number]
        if "born" in entry and (origin := _origin(entry, problems, found.places[number])) is not None:
            origins[row] = origin
    if not origins:
        return None
    lineage = Lineage.first_seen(stage, offsets)
    for name, values in zip(LINEAGE_COLUMNS, zip(*origins.values(), strict=True), strict=True):
        getattr(lineage, name)[list(origins)] = values
    return lineage


def _origin(entry: Mapping[str, Any], problems: LabelReport, where: str) -> tuple[int, ...] | None:
    if not set(LINEAGE_COLUMNS) <= entry.keys():  # not ours
        return None
    given = [_plain_id(entry[name]) for name in LINEAGE_COLUMNS]
    values = tuple(value for value in given if isinstance(value, int))
    limits = [np.iinfo(dtype) for dtype in LINEAGE_COLUMNS.values()]
    if len(values) == len(limits) and all(limit.min <= v <= limit.max for v, limit in zip(values, limits, strict=True)):
        return values
    problems.add("lineage is no small whole number, left out", f"{where} with {given}")
    return None


def _masks(
    found: _Annotations,
    order: NDArray[np.int64],
    boxes: NDArray[np.float32],
    sizes_hw: NDArray[np.int64],
    problems: LabelReport,
) -> mask_codes.Masks | None:
    """Masks of the annotations, None if the file has none; a box stands in for what is missing among others."""
    codes: list[bytes | None] = []
    missing: list[int] = []
    for row, number in enumerate(order.tolist()):
        height, width = sizes_hw[found.rows[number]].tolist()
        try:
            code = mask_codes.of_segmentation(found.entries[number].get("segmentation"), (height, width))
        except LabelError as error:
            problems.add("segmentation cannot be read, the box stands in", f"{found.places[number]}: {error}")
            code = mask_codes.of_boxes(boxes[row][None], (height, width))[0]
        if code is None:
            missing.append(row)
        codes.append(code)
    if len(missing) == len(codes):
        return None
    for row in missing:
        problems.add("no segmentation, the box stands in", found.places[order[row]])
        height, width = sizes_hw[found.rows[order[row]]].tolist()
        codes[row] = mask_codes.of_boxes(boxes[row][None], (height, width))[0]
    return mask_codes.column(code for code in codes if code is not None)


def write_coco(labels: Labels, path: str | Path, image_numbers: Mapping[str, Any] | None = None) -> None:
    """Write labels as a COCO annotation file, with scores, the original category ids and the image ids as file names.

    Images and annotations are numbered from 1; ``image_numbers`` gives other ids of images, of any kind, by file name,
    such as `numbers_in` a truth's file. ``info.simdetr_stage`` keeps the stage. Boxes with a lineage have it in
    the fields ``stage``, ``born``, ``born_row``, ``stride``, ``k`` and ``cluster``, see `Lineage`.
    Masks are written as ``segmentation``, in compressed run lengths, points as the one keypoint of each annotation.
    """
    sizes = zip(labels.image_ids, labels.sizes_hw.tolist(), strict=True)
    keypoint = {} if labels.points is None else _KEYPOINT_OF_CATEGORY
    numbers = [*range(1, len(labels) + 1)]
    if image_numbers is not None:
        numbers = [image_numbers[image_id] for image_id in labels.image_ids]
    content = {
        "info": {"description": "written by simdetr", "simdetr_stage": labels.stage},
        "images": [
            {"id": number, "file_name": image_id, "height": height, "width": width}
            for number, (image_id, (height, width)) in zip(numbers, sizes, strict=True)
        ],
        "annotations": [
            {"id": number, **entry, "image_id": numbers[entry["image_id"] - 1]}
            for number, entry in enumerate(_entries(labels), start=1)
        ],
        "categories": [{"id": category.id, "name": category.name, **keypoint} for category in labels.categories],
    }
    write_json(path, content)


def write_detections(labels: Labels, path: str | Path, coco_truth: str | Path | None = None) -> None:
    """Write labels as a COCO results list: image_id, category_id, bbox (x, y, width, height) and score per box.

    Labels with masks have their ``segmentation`` too, those with points their ``keypoints``.

    Args:
        labels: the detections.
        path: the file to write.
        coco_truth: annotation file whose image ids are used, matched by file name. Without it images are numbered
            from 1 in the order of the labels and every entry names its ``file_name``.

    Raises:
        LabelError: an image with detections is not in ``coco_truth``.
    """
    image_numbers = None if coco_truth is None else _truth_ids(Path(coco_truth))
    results: list[dict[str, Any]] = []
    for entry in _entries(labels):
        file_name = labels.image_ids[entry["image_id"] - 1]
        result = {name: entry[name] for name in _RESULT_FIELDS if name in entry}
        if image_numbers is None:
            result["file_name"] = file_name
        elif file_name in image_numbers:
            result["image_id"] = image_numbers[file_name]
        else:
            raise LabelError(f"image {file_name!r} has detections but is not in {coco_truth}; give its own truth file")
        results.append(result)
    write_json(path, results)


def numbers_in(path: Path, file_names: Sequence[str]) -> dict[str, Any]:
    """The ids that a COCO file has for its images, by their names in ``open_images``, which are in the file's order."""
    numbers = _truth_ids(path)
    if len(numbers) == len(file_names):  # also where it speaks of ./a.jpg or of whole paths
        return dict(zip(file_names, numbers.values(), strict=True))
    return numbers


def _truth_ids(path: Path) -> dict[str, Any]:
    try:
        return {str(image["file_name"]): image["id"] for image in read_lists(path, "COCO file", "images")["images"]}
    except (LabelError, KeyError, TypeError) as error:
        raise LabelError(f"coco_truth: {path} cannot be read as a COCO annotation file: {error!r}") from error


def _entries(labels: Labels) -> Iterator[dict[str, Any]]:
    """All that is known of each box, as annotations have it; images count from 1."""
    owners = labels.owners
    corners = labels.boxes_xyxy.astype(np.float64)
    columns: dict[str, list[Any]] = {
        "image_id": (owners + 1).tolist(),
        "category_id": [labels.categories[index].id for index in labels.classes],
        "bbox": np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]]).round(_BOX_DECIMALS).tolist(),
        "area": labels.areas.astype(np.float64).round(_BOX_DECIMALS).tolist(),
        "iscrowd": labels.crowd.astype(int).tolist(),
        # through text: the shortest decimal that gives the same float32 again, not its 17 digits as a double
        "score": labels.scores.astype(str).astype(np.float64).tolist(),
    }
    if labels.masks is not None:
        coded = zip(labels.sizes_hw[owners].tolist(), labels.masks, strict=True)
        columns["segmentation"] = [{"size": size_hw, "counts": counts.decode()} for size_hw, counts in coded]
    if labels.points is not None:
        known = point_columns.known(labels.points)
        points = labels.points.astype(np.float64).round(_BOX_DECIMALS).tolist()
        # COCO's visibility: 2 is seen, 0 is not labelled
        columns["keypoints"] = [[*xy, 2] if there else [0, 0, 0] for xy, there in zip(points, known, strict=True)]
        columns["num_keypoints"] = known.astype(int).tolist()
    if labels.lineage is not None:
        columns["stage"] = [labels.stage] * len(owners)
        columns |= {name: getattr(labels.lineage, name).tolist() for name in LINEAGE_COLUMNS}
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))

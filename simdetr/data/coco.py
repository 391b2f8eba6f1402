"""COCO JSON in, `Labels` and a count of what was wrong out; and back, as annotations or results, with the ids they had.

Category ids of any kind (gaps, strings) become class indices 0, 1, … in the order of the ids, so that two files of one
data set that list the same categories agree. The id of an image is its ``file_name``. Problems are repaired or
dropped, and counted; ``strict`` makes the first one an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simdetr.data import masks as mask_codes
from simdetr.data import points as point_columns
from simdetr.data.annotations import LINEAGE_COLUMNS, Category, ImageLabels, LabelError, Lineage
from simdetr.data.label_report import LabelReport
from simdetr.data.labels import Labels
from simdetr.data.storage import read_lists, write_json

_ROUNDING_PX = 0.1  # a box may leave the image by this much without being called wrong: COCO writes two decimals
_BOX_DECIMALS = 4
_KEYPOINT_OF_CATEGORY = {"keypoints": ["reference point"], "skeleton": []}
_RESULT_FIELDS = ("image_id", "category_id", "bbox", "score", "segmentation", "keypoints", "num_keypoints")


def read_coco(
    path: str | Path,
    *,
    strict: bool = False,
    image_ids: Iterable[str] | None = None,
    masks: bool = False,
    report: LabelReport | None = None,
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

    An annotation's one keypoint, if visible, becomes its point; with it, an annotation without ``bbox``, or with one of
    no width or height, is a landmark of which only the point is known: its box is (x, y, x, y). Files in which an
    annotation has several keypoints, as people have, give no points.

    Returns:
        The labels (crowds are kept and marked; an annotation's ``score`` and lineage are kept) and the problems met.

    Raises:
        LabelError: the file cannot be used at all, or has a problem and ``strict`` is set.
    """
    path = Path(path)
    content = load_coco(path)
    problems = LabelReport(path, strict=strict) if report is None else report
    categories = _categories(content, problems)
    rows, sizes = _images(content, problems)
    class_of = {category.id: index for index, category in enumerate(categories)}
    boxes: dict[str, list[_Annotation]] = {file_name: [] for file_name in sizes}
    seen: set[Any] = set()
    points = point_columns.one_each(content["annotations"])
    for position, entry in enumerate(content["annotations"]):
        if not isinstance(entry, dict):
            problems.add("annotation is no object, dropped", f"annotation number {position + 1}")
            continue
        where = f"annotation {entry.get('id', f'number {position + 1}')!r}"
        identity = _plain_id(entry.get("id"))
        if identity is not None and identity in seen:
            problems.add("annotation id repeated, both kept", where)
        seen.add(identity)
        file_name = rows.get(_plain_id(entry.get("image_id")))
        if file_name is None:
            problems.add("unknown image, dropped", f"{where} with image_id {entry.get('image_id')!r}")
        elif _plain_id(entry.get("category_id")) not in class_of:
            problems.add("unknown category, dropped", f"{where} with category_id {entry.get('category_id')!r}")
        else:
            point = _point(entry, problems, where) if points else None
            annotation = _annotation(entry, point, sizes[file_name], class_of, problems, where)
            if annotation is not None:
                mask = _mask(entry, annotation, sizes[file_name], problems) if masks else None
                boxes[file_name].append(replace(annotation, mask=mask))
    _count_missing_masks(boxes.values(), problems)
    stage = int(content["info"].get("simdetr_stage", -1)) if isinstance(content.get("info"), dict) else -1
    images = (_stack(file_name, sizes[file_name], annotations, stage) for file_name, annotations in boxes.items())
    labels = Labels.from_images(images, categories, stage)
    return (labels if image_ids is None else labels.select(image_ids)), problems


def load_coco(path: Path) -> dict[str, Any]:
    """The content of a COCO annotation file as it stands, with its three lists, or a `LabelError`."""
    return read_lists(path, "COCO annotation file", "annotations", "categories", "images")


@dataclass(frozen=True)
class _Annotation:
    """One box, by the columns of `ImageLabels`."""

    boxes_xyxy: NDArray[np.float32]
    classes: int
    scores: float
    crowd: bool
    areas: float
    origin: tuple[int, ...] | None  # values of LINEAGE_COLUMNS
    where: str
    mask: bytes | None = None
    point: tuple[float, float] | None = None

    def filled_mask(self, size_hw: tuple[int, int]) -> bytes:
        """The mask, or one that fills the box."""
        return mask_codes.of_boxes(self.boxes_xyxy[None], size_hw)[0] if self.mask is None else self.mask


def _plain_id(value: object) -> int | str | None:
    """An id as it can be looked up: whole floats as integers, anything but numbers and strings as None."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) else None


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
    return [found[key] for key in sorted(found, key=lambda key: (isinstance(key, str), key))]


def _images(
    content: Mapping[str, Any], problems: LabelReport
) -> tuple[dict[int | str | None, str], dict[str, tuple[int, int]]]:
    """File name by image id, and (height, width) by file name in the file's order."""
    rows: dict[int | str | None, str] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for position, entry in enumerate(content["images"]):
        identity = _plain_id(entry.get("id")) if isinstance(entry, dict) else None
        if identity is None or not isinstance(entry.get("file_name"), str):
            problems.add("image without id or file_name, dropped", f"image number {position + 1}")
            continue
        if identity in rows:
            problems.add("image id repeated, first kept", f"image {identity!r}")
            continue
        try:
            height, width = int(entry["height"]), int(entry["width"])
        except (KeyError, TypeError, ValueError):
            height = width = 0
        if height <= 0 or width <= 0:
            raise LabelError(
                f"{problems.path}: image {identity!r} ({entry['file_name']}): expected a positive width and height in "
                f"pixels, got {entry.get('width')!r} and {entry.get('height')!r}; write them into the file"
            )
        rows[identity] = entry["file_name"]
        if entry["file_name"] in sizes:
            problems.add("file_name repeated, annotations merged", f"image {identity!r}")
        sizes.setdefault(entry["file_name"], (height, width))
    return rows, sizes


def _annotation(
    entry: Mapping[str, Any],
    point: tuple[float, float] | None,
    size_hw: tuple[int, int],
    class_of: Mapping[int | str, int],
    problems: LabelReport,
    where: str,
) -> _Annotation | None:
    bbox = entry.get("bbox")
    boxless = point is not None and (not bbox or (isinstance(bbox, list) and 0 in bbox[2:4]))
    try:
        x, y, width, height = (*point, 0.0, 0.0) if point and boxless else (float(value) for value in entry["bbox"])
        score, area = float(entry.get("score", 1.0)), float(entry.get("area") or math.nan)
    except (KeyError, TypeError, ValueError):
        x = y = width = height = score = area = math.nan
    if not all(math.isfinite(value) for value in (x, y, width, height, score)):
        problems.add("box, score or area is no number, dropped", f"{where} with bbox {entry.get('bbox')!r}")
        return None
    full = np.array([x, y, x + width, y + height])
    limits = np.array([size_hw[1], size_hw[0], size_hw[1], size_hw[0]])
    box = (full if boxless else np.clip(full, 0, limits)).astype(np.float32)
    if not boxless and not (box[2:] > box[:2]).all():
        problems.add("box without area in the image, dropped", f"{where} with bbox {entry['bbox']!r}")
        return None
    if np.abs(full - box).max() > _ROUNDING_PX:
        problems.add("box outside the image, clipped", f"{where} with bbox {entry['bbox']!r}")
    if not 0 <= score <= 1:
        problems.add("score outside 0 to 1, clipped", f"{where} with score {score}")
    return _Annotation(
        boxes_xyxy=box,
        classes=class_of[_plain_id(entry["category_id"]) or 0],
        scores=min(max(score, 0.0), 1.0),
        crowd=bool(entry.get("iscrowd", 0)),
        areas=area if area > 0 and math.isfinite(area) else float((box[2] - box[0]) * (box[3] - box[1])),
        origin=_origin(entry, problems, where),
        where=where,
        point=point,
    )


def _point(entry: Mapping[str, Any], problems: LabelReport, where: str) -> tuple[float, float] | None:
    try:
        return point_columns.of_keypoints(entry.get("keypoints"))
    except LabelError as error:
        problems.add("keypoint cannot be read, left out", f"{where}: {error}")
        return None


def _mask(entry: Mapping[str, Any], one: _Annotation, size_hw: tuple[int, int], problems: LabelReport) -> bytes | None:
    try:
        return mask_codes.of_segmentation(entry.get("segmentation"), size_hw)
    except LabelError as error:
        problems.add("segmentation cannot be read, the box stands in", f"{one.where}: {error}")
        return one.filled_mask(size_hw)


def _count_missing_masks(images: Iterable[list[_Annotation]], problems: LabelReport) -> None:
    """Only where others have one: a file of boxes alone lacks nothing."""
    annotations = [one for image in images for one in image]
    missing = [one.where for one in annotations if one.mask is None]
    if len(missing) < len(annotations):
        for where in missing:
            problems.add("no segmentation, the box stands in", where)


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


def _stack(file_name: str, size_hw: tuple[int, int], annotations: list[_Annotation], stage: int) -> ImageLabels:
    names = ("boxes_xyxy", "classes", "scores", "crowd", "areas")
    columns = {name: [getattr(one, name) for one in annotations] for name in names}
    lineage, masks, points = None, None, None
    origins = {row: one.origin for row, one in enumerate(annotations) if one.origin is not None}
    if origins:
        lineage = Lineage.first_seen(stage, np.array([0, len(annotations)]))
        for name, values in zip(LINEAGE_COLUMNS, zip(*origins.values(), strict=True), strict=True):
            getattr(lineage, name)[list(origins)] = values
    if any(one.mask is not None for one in annotations):
        masks = mask_codes.column(one.filled_mask(size_hw) for one in annotations)
    if any(one.point is not None for one in annotations):
        points = [one.point or (math.nan, math.nan) for one in annotations]
    return ImageLabels.build(file_name, size_hw, **columns, lineage=lineage, masks=masks, points=points)


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

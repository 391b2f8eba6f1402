"""COCO JSON in, `Labels` and a count of what was wrong out; and back, with the ids as they came.

Category ids of any kind (gaps, strings) become class indices 0, 1, … in the order of the ids, so that two files of one
data set that list the same categories agree. The id of an image is its ``file_name``. Problems are repaired or
dropped, and counted; ``strict`` makes the first one an error.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simdetr.data import masks as mask_codes
from simdetr.data import points as point_columns
from simdetr.data.annotations import LINEAGE_COLUMNS, Category, ImageLabels, LabelError, Lineage
from simdetr.data.labels import Labels
from simdetr.data.storage import atomic_path

_ROUNDING_PX = 0.1  # a box may leave the image by this much without being called wrong: COCO writes two decimals
_EXAMPLES_PER_KIND = 5


@dataclass
class LabelProblems:
    """What was wrong in a label file and what was done about it.

    Attributes:
        path: the file.
        strict: whether the first problem is raised as a `LabelError`.
        counts: number of problems by kind, such as ``"box clipped"``.
        examples: the first few places of each kind.
    """

    path: Path
    strict: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of problems of all kinds."""
        return self.counts.total()

    def add(self, kind: str, where: str) -> None:
        """Count a problem at a place such as ``annotation 17``; raise it when strict."""
        if self.strict:
            raise LabelError(f"{self.path}: {where}: {kind} (strict)")
        self.counts[kind] += 1
        self.examples.setdefault(kind, [])
        if len(self.examples[kind]) < _EXAMPLES_PER_KIND:
            self.examples[kind].append(where)

    def lines(self) -> list[str]:
        """One line per kind: count, kind and examples."""
        return [f"{count} × {kind}: {', '.join(self.examples[kind])}" for kind, count in sorted(self.counts.items())]


def read_coco(
    path: str | Path, *, strict: bool = False, image_ids: Iterable[str] | None = None, masks: bool = False
) -> tuple[Labels, LabelProblems]:
    """Read a COCO annotation file.

    Args:
        path: the JSON file with ``images``, ``annotations`` and ``categories``.
        strict: raise at the first problem instead of repairing or dropping, with the file and the annotation's id.
        image_ids: file names to keep, in this order; all of them by default.
        masks: read each ``segmentation`` too (polygons or run lengths). An annotation without one, or with one that
            cannot be read, gets a mask that fills its box, and is counted; a file without any gives labels without
            masks.

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
    problems = LabelProblems(path, strict)
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
                boxes[file_name].append(annotation if mask is None else replace(annotation, mask=mask))
    _count_missing_masks(boxes.values(), problems)
    stage = int(content["info"].get("simdetr_stage", -1)) if isinstance(content.get("info"), dict) else -1
    labels = Labels.from_images(
        (_stack(file_name, sizes[file_name], annotations, stage) for file_name, annotations in boxes.items()),
        categories,
        stage,
    )
    return (labels if image_ids is None else labels.select(image_ids)), problems


@dataclass(frozen=True)
class _Annotation:
    box_xyxy: NDArray[np.float32]
    class_index: int
    score: float
    crowd: bool
    area: float
    origin: tuple[int, ...] | None  # values of LINEAGE_COLUMNS
    where: str
    mask: bytes | None = None
    point: tuple[float, float] | None = None

    def filled_mask(self, size_hw: tuple[int, int]) -> bytes:
        """The mask, or one that fills the box."""
        if self.mask is not None:
            return self.mask
        filled: bytes = mask_codes.of_boxes(self.box_xyxy[None], size_hw)[0]
        return filled


def load_coco(path: Path) -> dict[str, Any]:
    """The content of a COCO annotation file as it stands, with its three lists, or a `LabelError`."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise LabelError(f"labels: {path} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise LabelError(f"{path} cannot be read as JSON: {error}") from error
    missing = {"images", "annotations", "categories"}
    if isinstance(content, dict):
        missing = {key for key in missing if not isinstance(content.get(key), list)}
    if missing:
        raise LabelError(f"{path} is no COCO annotation file: expected the lists {', '.join(sorted(missing))}")
    checked: dict[str, Any] = content
    return checked


def _plain_id(value: object) -> int | str | None:
    """An id as it can be looked up: whole floats as integers, anything but numbers and strings as None."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) else None


def _categories(content: Mapping[str, Any], problems: LabelProblems) -> list[Category]:
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
    content: Mapping[str, Any], problems: LabelProblems
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


def _point(entry: Mapping[str, Any], problems: LabelProblems, where: str) -> tuple[float, float] | None:
    try:
        return point_columns.of_keypoints(entry.get("keypoints"))
    except LabelError as error:
        problems.add("keypoint cannot be read, left out", f"{where}: {error}")
        return None


def _annotation(
    entry: Mapping[str, Any],
    point: tuple[float, float] | None,
    size_hw: tuple[int, int],
    class_of: Mapping[int | str, int],
    problems: LabelProblems,
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
        box_xyxy=box,
        class_index=class_of[_plain_id(entry["category_id"]) or 0],
        score=min(max(score, 0.0), 1.0),
        crowd=bool(entry.get("iscrowd", 0)),
        area=area if area > 0 and math.isfinite(area) else float((box[2] - box[0]) * (box[3] - box[1])),
        origin=_origin(entry, problems, where),
        where=where,
        point=point,
    )


def _mask(
    entry: Mapping[str, Any], annotation: _Annotation, size_hw: tuple[int, int], problems: LabelProblems
) -> bytes | None:
    try:
        return mask_codes.of_segmentation(entry.get("segmentation"), size_hw)
    except LabelError as error:
        problems.add("segmentation cannot be read, the box stands in", f"{annotation.where}: {error}")
        return annotation.filled_mask(size_hw)


def _count_missing_masks(images: Iterable[list[_Annotation]], problems: LabelProblems) -> None:
    """Only where others have one: a file of boxes alone lacks nothing."""
    annotations = [annotation for image in images for annotation in image]
    if any(annotation.mask is not None for annotation in annotations):
        for annotation in annotations:
            if annotation.mask is None:
                problems.add("no segmentation, the box stands in", annotation.where)


def _origin(entry: Mapping[str, Any], problems: LabelProblems, where: str) -> tuple[int, ...] | None:
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
    lineage = None
    origins = {row: annotation.origin for row, annotation in enumerate(annotations) if annotation.origin is not None}
    if origins:
        lineage = Lineage.first_seen(stage, np.array([0, len(annotations)]))
        for name, values in zip(LINEAGE_COLUMNS, zip(*origins.values(), strict=True), strict=True):
            getattr(lineage, name)[list(origins)] = values
    masks = None
    if any(annotation.mask is not None for annotation in annotations):
        masks = mask_codes.column(annotation.filled_mask(size_hw) for annotation in annotations)
    points = None
    if any(annotation.point is not None for annotation in annotations):
        points = [annotation.point or (math.nan, math.nan) for annotation in annotations]
    return ImageLabels.build(
        file_name,
        size_hw,
        boxes_xyxy=[annotation.box_xyxy for annotation in annotations],
        classes=[annotation.class_index for annotation in annotations],
        scores=[annotation.score for annotation in annotations],
        crowd=[annotation.crowd for annotation in annotations],
        areas=[annotation.area for annotation in annotations],
        lineage=lineage,
        masks=masks,
        points=points,
    )


# ----------------------------------------------------------------------------------------------------------------------
# `Labels` in, COCO JSON out: an annotation file with scores, or the results list that COCO evaluators read.


_BOX_DECIMALS = 4
_KEYPOINT_OF_CATEGORY = {"keypoints": ["reference point"], "skeleton": []}


def write_coco(labels: Labels, path: str | Path) -> None:
    """Write labels as a COCO annotation file, with scores, the original category ids and the image ids as file names.

    Images and annotations are numbered from 1. ``info.simdetr_stage`` keeps the stage. Boxes with a lineage have it in
    the fields ``stage``, ``born``, ``born_row``, ``stride``, ``k`` and ``cluster``, see `Lineage`.
    Masks are written as ``segmentation``, in compressed run lengths, points as the one keypoint of each annotation.
    """
    content = {
        "info": {"description": "written by simdetr", "simdetr_stage": labels.stage},
        "images": [
            {"id": row + 1, "file_name": image_id, "height": height, "width": width}
            for row, (image_id, (height, width)) in enumerate(
                zip(labels.image_ids, labels.sizes_hw.tolist(), strict=True)
            )
        ],
        "annotations": [
            {"id": number + 1, **box, **mask, **point, **origin}
            for number, (box, mask, point, origin) in enumerate(
                zip(_boxes(labels), _segmentations(labels), _keypoints(labels), _origins(labels), strict=True)
            )
        ],
        "categories": [
            {"id": category.id, "name": category.name, **({} if labels.points is None else _KEYPOINT_OF_CATEGORY)}
            for category in labels.categories
        ],
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


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
    entries: list[dict[str, Any]] = []
    for box, mask, point in zip(_boxes(labels), _segmentations(labels), _keypoints(labels), strict=True):
        file_name = labels.image_ids[box["image_id"] - 1]
        entry = {key: box[key] for key in ("image_id", "category_id", "bbox", "score")} | mask | point
        if image_numbers is None:
            entry["file_name"] = file_name
        elif file_name in image_numbers:
            entry["image_id"] = image_numbers[file_name]
        else:
            raise LabelError(f"image {file_name!r} has detections but is not in {coco_truth}; give its own truth file")
        entries.append(entry)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(entries), encoding="utf-8")


def _truth_ids(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        return {str(image["file_name"]): image["id"] for image in content["images"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabelError(f"coco_truth: {path} cannot be read as a COCO annotation file: {error!r}") from error


def _boxes(labels: Labels) -> Iterator[dict[str, Any]]:
    owners = np.repeat(np.arange(1, len(labels) + 1), np.diff(labels.offsets)).tolist()
    corners = labels.boxes_xyxy.astype(np.float64)
    bboxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).round(_BOX_DECIMALS).tolist()
    # through text: the shortest decimal that gives the same float32 again, not its 17 digits as a double
    scores = labels.scores.astype(str).astype(np.float64).tolist()
    areas = labels.areas.astype(np.float64).round(_BOX_DECIMALS).tolist()
    columns = zip(owners, labels.classes.tolist(), bboxes, scores, areas, labels.crowd.tolist(), strict=True)
    for image_number, class_index, bbox, score, area, crowd in columns:
        yield {
            "image_id": image_number,
            "category_id": labels.categories[class_index].id,
            "bbox": bbox,
            "area": area,
            "iscrowd": int(crowd),
            "score": score,
        }


def _segmentations(labels: Labels) -> Iterator[dict[str, Any]]:
    if labels.masks is None:
        yield from itertools.repeat({}, len(labels.boxes_xyxy))
        return
    sizes_hw = np.repeat(labels.sizes_hw, np.diff(labels.offsets), axis=0).tolist()
    for size_hw, counts in zip(sizes_hw, labels.masks, strict=True):
        yield {"segmentation": {"size": size_hw, "counts": counts.decode()}}


def _keypoints(labels: Labels) -> Iterator[dict[str, Any]]:
    if labels.points is None:
        yield from itertools.repeat({}, len(labels.boxes_xyxy))
        return
    for (x, y), known in zip(
        labels.points.astype(np.float64).round(_BOX_DECIMALS).tolist(), point_columns.known(labels.points), strict=True
    ):
        # COCO's visibility: 2 is seen, 0 is not labelled
        yield {"keypoints": [x, y, 2] if known else [0, 0, 0], "num_keypoints": int(known)}


def _origins(labels: Labels) -> Iterator[dict[str, int]]:
    if labels.lineage is None:
        yield from itertools.repeat({}, len(labels.boxes_xyxy))
        return
    for values in zip(*(getattr(labels.lineage, name).tolist() for name in LINEAGE_COLUMNS), strict=True):
        yield {"stage": labels.stage, **dict(zip(LINEAGE_COLUMNS, values, strict=True))}

"""`Labels` in, COCO JSON out: an annotation file with scores, or the results list that COCO evaluators read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from simdetr.data import points as point_columns
from simdetr.data.atomic_files import atomic_path
from simdetr.data.labels import LabelError, Labels
from simdetr.data.lineage import LINEAGE_COLUMNS

_BOX_DECIMALS = 4
_KEYPOINT_OF_CATEGORY = {"keypoints": ["reference point"], "skeleton": []}


def write_coco(labels: Labels, path: str | Path) -> None:
    """Write labels as a COCO annotation file, with scores, the original category ids and the image ids as file names.

    Images and annotations are numbered from 1. ``info.simdetr_stage`` keeps the stage. Boxes with a lineage have it in
    the fields ``stage``, ``born``, ``born_row``, ``stride``, ``k`` and ``cluster``, see `simdetr.data.lineage.Lineage`.
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

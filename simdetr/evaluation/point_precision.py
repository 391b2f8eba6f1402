"""Human and predicted points in, precision of the predictions at every recall out, as COCO has it for boxes.

COCO's matching and 101-point average (`simdetr.evaluation.coco_metric`), with a distance of at most a share of the
image's diagonal in place of an IoU: in every image and class the best-scored prediction takes the nearest human point
that is near enough and free, then the next one. Objects without a point (NaN) and crowds are not looked for; a
prediction of their class inside their box counts for nothing. Letters: n, m points.
Source: heads, section 1.7; https://cocodataset.org/#keypoints-eval for the matching.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from simdetr.data import points as point_columns
from simdetr.data.labels import Labels
from simdetr.evaluation.coco_metric import categories_in_truth, rows_of_images

MAX_POINTS = 100  # best-scored predictions of a class per image, as COCO has it


def point_precisions(truth: Labels, predictions: Labels, tolerances: Sequence[float]) -> NDArray[np.float64]:
    """Precision at the recalls 0.00, 0.01 .. 1.00, float64 [tolerances, 101, classes of the truth].

    Args:
        truth: human labels with points; images without predictions count as missed.
        predictions: scored points on these images.
        tolerances: farthest distances, as shares of the image's diagonal.

    Returns:
        0 where a recall is not reached, -1 for classes without human points; the mean over the second axis is a
        class's point-AP.

    Raises:
        ValueError: labels without points, predictions for images that the truth does not hold, no category in common,
            or tolerances that are not above 0.
    """
    if not tolerances or min(tolerances) <= 0:
        raise ValueError(f"tolerances: expected shares of the diagonal above 0, got {tuple(tolerances)}")
    shown = point_columns.known(points_of("predictions", predictions))
    columns = _columns(predictions, rows_of_images(truth, predictions), categories_in_truth(truth, predictions))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _PointMatching(
            _coco(truth, _columns(truth, images_of_rows(truth), truth.classes + 1)),
            _coco(truth, {name: values[shown] for name, values in columns.items()}),
            "keypoints",
        )
        evaluation.diagonals_px = diagonals_px(truth)
        evaluation.params.iouThrs = -np.asarray(tolerances)
        evaluation.params.maxDets = [MAX_POINTS]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1]], ["all"]  # the area of all is 1
        evaluation.evaluate()
        evaluation.accumulate()
    precision: NDArray[np.float64] = evaluation.eval["precision"][..., 0, 0]
    return precision


class _PointMatching(COCOeval):  # type: ignore[misc]  # pycocotools carries no types
    """COCOeval of points: how alike two are is minus their distance, as a share of the image's diagonal."""

    diagonals_px: NDArray[np.float64]

    def computeOks(self, imgId: int, catId: int) -> NDArray[np.float64] | list[float]:
        """Likeness [n, m] of the best-scored predictions of a class in an image and its human points."""
        truth, found = self._gts[imgId, catId], self._dts[imgId, catId]
        if not truth or not found:
            return []
        order = np.argsort([-row["score"] for row in found], kind="mergesort")[: self.params.maxDets[-1]]
        found_xy = np.array([found[index]["point"] for index in order])[:, None]
        boxes = np.array([row["box"] for row in truth])
        sought = np.array([row["num_keypoints"] > 0 for row in truth])
        likeness = -distances(found_xy, np.array([row["point"] for row in truth])[None]) / self.diagonals_px[imgId]
        inside = ((found_xy >= boxes[:, :2]) & (found_xy <= boxes[:, 2:])).all(2)
        return np.where(sought, likeness, np.where(inside, 0.0, -np.inf))


def _columns(labels: Labels, images: NDArray[np.int64], categories: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """What COCOeval reads of every row; COCO's ids of annotations start at 1, since it takes 0 for no match."""
    points = points_of("truth", labels)
    return {
        "id": np.arange(1, len(points) + 1),
        "image_id": images,
        "category_id": categories,
        "num_keypoints": (point_columns.known(points) & ~labels.crowd).astype(np.int64),
        "iscrowd": labels.crowd.astype(np.int64),
        "point": points.astype(np.float64),
        "box": labels.boxes_xyxy.astype(np.float64),
        "area": np.ones(len(points)),
        "score": labels.scores.astype(np.float64),
    }


def _coco(truth: Labels, columns: dict[str, NDArray[Any]]) -> COCO:
    """Points on the truth's images as an indexed pycocotools object; category ids are class indices + 1."""
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": index} for index in range(len(truth))],
        "categories": [{"id": index + 1} for index in range(len(truth.categories))],
        "annotations": [dict(zip(columns, row, strict=True)) for row in rows],
    }
    coco.createIndex()
    return coco


def points_of(name: str, labels: Labels) -> point_columns.Points:
    """The points of labels that must have them, none if there are no boxes at all.

    Raises:
        ValueError: boxes without points.
    """
    if labels.points is None and len(labels.boxes_xyxy):
        raise ValueError(f"{name}: expected labels with points, got {len(labels.boxes_xyxy)} boxes without them")
    return point_columns.unknown(0) if labels.points is None else labels.points


def images_of_rows(labels: Labels) -> NDArray[np.int64]:
    """Index of the image of every box."""
    return np.repeat(np.arange(len(labels)), np.diff(labels.offsets))


def diagonals_px(labels: Labels) -> NDArray[np.float64]:
    """Length of every image's diagonal."""
    lengths: NDArray[np.float64] = np.hypot(labels.sizes_hw[:, 0], labels.sizes_hw[:, 1])
    return lengths


def distances(first_xy: NDArray[Any], second_xy: NDArray[Any]) -> NDArray[np.float64]:
    """Distances of points [..., 2] that fit together by broadcasting."""
    apart = first_xy.astype(np.float64) - second_xy.astype(np.float64)
    lengths: NDArray[np.float64] = np.hypot(apart[..., 0], apart[..., 1])
    return lengths

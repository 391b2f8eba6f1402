"""How well are reference points found and named? Human and predicted points in, accuracy, errors and point-AP out.

Both sides are `Labels` with points. Two ways to pair them:

- by distance, whatever the class, for class accuracy, errors and PCK: in every image the two points nearest to each
  other become a pair, then the next two, until one side is used up. Only predictions with a score of at least
  ``min_score`` take part. There is no farthest distance, so that gross errors show.
- by score within a class, for point-AP: COCO's matching and 101-point average (`simdetr.evaluation.coco_metric`), with
  a distance of at most a share of the image's diagonal in place of an IoU: in every image and class the best-scored
  prediction takes the nearest human point that is near enough and free, then the next one.

Objects without a point (NaN) and crowds are not looked for; for point-AP a prediction of their class inside their box
counts for nothing. Errors in percent are of the image's diagonal. Letters: n, m points, P pairs.
Source: US 11,544,507, class and reference point, which reports no numbers to compare with; for the matching
https://cocodataset.org/#keypoints-eval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval

from simdetr.data import points as point_columns
from simdetr.data.labels import Labels
from simdetr.evaluation.coco_metric import (
    categories_in_truth,
    indexed,
    mean_of_present,
    rows_of_images,
    run_quietly,
)

MAX_POINTS = 100  # best-scored predictions of a class per image, as COCO has it
TOLERANCES = (0.01, 0.02, 0.05)  # shares of the image's diagonal


@dataclass(frozen=True)
class PointPairs:
    """Predicted points paired with human ones, by column."""

    truth_classes: NDArray[np.int64]  # [n], class of every human point, paired or not
    classes: NDArray[np.int64]  # [P], class of the pairs' human points
    same_class: NDArray[np.bool_]  # [P], whether the prediction has this class too
    errors_px: NDArray[np.float64]  # [P], distance between both
    diagonals_px: NDArray[np.float64]  # [P], of their images

    def of_class(self, index: int) -> PointPairs:
        """The human points of one class and their pairs."""
        rows = self.classes == index
        by_pair = (self.classes, self.same_class, self.errors_px, self.diagonals_px)
        return PointPairs(self.truth_classes[self.truth_classes == index], *(column[rows] for column in by_pair))


def point_metrics(
    truth: Labels,
    predictions: Labels,
    objects: Labels | None = None,
    *,
    tolerances: Sequence[float] = TOLERANCES,
    min_score: float = 0.5,
) -> dict[str, float]:
    """Numbers of all classes together.

    Args:
        truth: human labels with points; images without predictions count as missed.
        predictions: scored points on these images; boxes may be without area.
        objects: the same with one class for each point, to be paired by distance, where one point under two classes
            would be two; the predictions if left out.
        tolerances: shares of the image's diagonal at which a point counts as found, such as 0.02.
        min_score: predictions below it take part in point-AP only.

    Returns:
        ``class_accuracy``: share of the pairs with the right class; ``point_error_px`` and ``point_error_percent``,
        means over the pairs, and with ``_median``; ``PCK@2`` and so on: share of the human points whose partner is as
        near as that, whatever its class; ``point_recall``: share of the human points with a partner;
        ``point_AP@2`` and so on, and their mean ``point_AP``; ``points``: number of human points. Without
        human points all but the last are ``nan``; without predictions accuracy and errors are ``nan``, the rest 0.

    Raises:
        ValueError: labels without points, predictions for images that the truth does not hold, no category in common,
            or tolerances or a score outside their range.
    """
    pairs = pair_points(truth, predictions if objects is None else objects, min_score)
    return _numbers(pairs, point_precisions(truth, predictions, tolerances), tolerances)


def per_class_point_metrics(
    truth: Labels, predictions: Labels, *, tolerances: Sequence[float] = TOLERANCES, min_score: float = 0.5
) -> dict[int | str, dict[str, float]]:
    """The numbers of `point_metrics` for each category of the truth by its id; a pair belongs to the truth's class."""
    pairs = pair_points(truth, predictions, min_score)
    precisions = point_precisions(truth, predictions, tolerances)
    return {
        category.id: _numbers(pairs.of_class(index), precisions[:, :, index], tolerances)
        for index, category in enumerate(truth.categories)
    }


def pair_points(truth: Labels, predictions: Labels, min_score: float = 0.5) -> PointPairs:
    """Pair the points of both sides by distance, whatever their class; errors as in `point_metrics`."""
    if not 0 <= min_score <= 1:
        raise ValueError(f"min_score: expected 0 to 1, got {min_score}")
    sought, found = points_of("truth", truth), points_of("predictions", predictions)
    counted = point_columns.known(sought) & ~truth.crowd
    shown = point_columns.known(found) & (predictions.scores >= min_score)
    rows_of_images(truth, predictions)  # refuses predictions for other images
    pairs = [np.zeros((0, 2), np.int64)]
    for image, image_id in enumerate(truth.image_ids):
        if image_id in predictions:
            first = _rows(truth, image, counted)
            second = _rows(predictions, predictions.row_of(image_id), shown)
            rows, columns = nearest_pairs(sought[first], found[second])
            pairs.append(np.stack([first[rows], second[columns]], axis=1))
    sought_rows, found_rows = np.concatenate(pairs).T
    classes = truth.classes[sought_rows]
    return PointPairs(
        truth_classes=truth.classes[counted],
        classes=classes,
        same_class=(categories_in_truth(truth, predictions) - 1)[found_rows] == classes,
        errors_px=distances(sought[sought_rows], found[found_rows]),
        diagonals_px=diagonals_px(truth)[truth.owners[sought_rows]],
    )


def nearest_pairs(
    first_xy: NDArray[np.floating[Any]], second_xy: NDArray[np.floating[Any]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of points [n, 2] and [m, 2] that belong together: the nearest two first, each point once."""
    table = distances(first_xy[:, None], second_xy[None])
    rows: list[int] = []
    columns: list[int] = []
    for nearest in np.argsort(table, axis=None, kind="stable").tolist():
        row, column = divmod(nearest, table.shape[1])
        if row not in rows and column not in columns:
            rows.append(row)
            columns.append(column)
    return np.array(rows, np.int64), np.array(columns, np.int64)


def _rows(labels: Labels, image: int, wanted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Rows of an image that are wanted."""
    rows = np.arange(*labels.offsets[image : image + 2])
    return rows[wanted[rows]]


def _numbers(pairs: PointPairs, precisions: NDArray[np.float64], tolerances: Sequence[float]) -> dict[str, float]:
    """The row of a table from pairs and a point-AP's precisions, whose first axis are the tolerances."""
    shares = pairs.errors_px / pairs.diagonals_px
    points = len(pairs.truth_classes)
    within = {f"{100 * tolerance:g}": tolerance for tolerance in tolerances}

    def found(number: int) -> float:
        return number / points if points else float("nan")

    def typical(average: Callable[[NDArray[Any]], Any], of_pairs: NDArray[Any]) -> float:
        return float(average(of_pairs)) if len(of_pairs) else float("nan")

    return {
        "class_accuracy": typical(np.mean, pairs.same_class),
        "point_error_px": typical(np.mean, pairs.errors_px),
        "point_error_px_median": typical(np.median, pairs.errors_px),
        "point_error_percent": 100 * typical(np.mean, shares),
        "point_error_percent_median": 100 * typical(np.median, shares),
        **{f"PCK@{percent}": found(int((shares <= tolerance).sum())) for percent, tolerance in within.items()},
        "point_recall": found(len(pairs.classes)),
        **{f"point_AP@{percent}": mean_of_present(precisions[row]) for row, percent in enumerate(within)},
        "point_AP": mean_of_present(precisions),
        "points": float(points),
    }


def point_precisions(truth: Labels, predictions: Labels, tolerances: Sequence[float]) -> NDArray[np.float64]:
    """Precision at the recalls 0.00, 0.01 .. 1.00, float64 [tolerances, 101, classes of the truth].

    It is 0 where a recall is not reached, -1 for classes without human points; the mean over the second axis is a
    class's point-AP. Arguments and errors are those of `point_metrics`.
    """
    if not tolerances or min(tolerances) <= 0:
        raise ValueError(f"tolerances: expected shares of the diagonal above 0, got {tuple(tolerances)}")
    shown = point_columns.known(points_of("predictions", predictions))
    columns = _columns(predictions, rows_of_images(truth, predictions), categories_in_truth(truth, predictions))
    category_ids = range(1, len(truth.categories) + 1)
    evaluation = _PointMatching(
        indexed(_columns(truth, truth.owners, truth.classes + 1), len(truth), category_ids),
        indexed({name: values[shown] for name, values in columns.items()}, len(truth), category_ids),
        "keypoints",
    )
    evaluation.diagonals_px = diagonals_px(truth)
    evaluation.params.iouThrs = -np.asarray(tolerances)
    evaluation.params.maxDets = [MAX_POINTS]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1]], ["all"]  # the area of all is 1
    run_quietly(evaluation)
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
    """What COCOeval reads of every point."""
    points = points_of("truth", labels)
    return {
        "image_id": images,
        "category_id": categories,
        "num_keypoints": (point_columns.known(points) & ~labels.crowd).astype(np.int64),
        "iscrowd": labels.crowd.astype(np.int64),
        "point": points.astype(np.float64),
        "box": labels.boxes_xyxy.astype(np.float64),
        "area": np.ones(len(points)),
        "score": labels.scores.astype(np.float64),
    }


def points_of(name: str, labels: Labels) -> point_columns.Points:
    """The points of labels, none if there are no boxes at all; a ValueError for boxes without points."""
    if labels.points is None and len(labels.boxes_xyxy):
        raise ValueError(f"{name}: expected labels with points, got {len(labels.boxes_xyxy)} boxes without them")
    return point_columns.unknown(0) if labels.points is None else labels.points


def diagonals_px(labels: Labels) -> NDArray[np.float64]:
    """Length of every image's diagonal."""
    lengths: NDArray[np.float64] = np.hypot(labels.sizes_hw[:, 0], labels.sizes_hw[:, 1])
    return lengths


def distances(first_xy: NDArray[Any], second_xy: NDArray[Any]) -> NDArray[np.float64]:
    """Distances of points [..., 2] that fit together by broadcasting."""
    apart = first_xy.astype(np.float64) - second_xy.astype(np.float64)
    lengths: NDArray[np.float64] = np.hypot(apart[..., 0], apart[..., 1])
    return lengths

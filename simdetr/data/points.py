"""The column of points in `Labels`: one pixel position (x, y) per box, in and checked out; NaN where a box has none.

A point is where an object is touched or measured, such as the foot of a post; what it means for which class is said by
`simdetr.data.reference_points`. A landmark of which only the point is known has the box (x, y, x, y), without area.
Letters: n boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simdetr.data.annotations import LabelError

Points = NDArray[np.float32]
"""Positions [n, 2] in pixels, both NaN where a box has none."""


def of_keypoints(keypoints: Any) -> tuple[float, float] | None:  # noqa: ANN401
    """The point of a COCO annotation's ``keypoints``, [x, y, visibility]; None if empty or of visibility 0.

    Raises:
        LabelError: anything else than three finite numbers.
    """
    if keypoints is None or keypoints == []:
        return None
    try:
        x, y, visibility = (float(value) for value in keypoints)
    except (TypeError, ValueError):
        x = y = visibility = math.nan
    if not all(map(math.isfinite, (x, y, visibility))):
        raise LabelError(f"expected one keypoint [x, y, visibility] of finite numbers, got {keypoints!r}")
    return (x, y) if visibility > 0 else None


def one_each(annotations: Iterable[Any]) -> bool:
    """Whether no COCO annotation has several keypoints, as those of people have: which of them would be the point?"""
    keypoints = (entry.get("keypoints") for entry in annotations if isinstance(entry, dict))
    return not any(isinstance(values, list) and len(values) >= 6 for values in keypoints)


def column(points: ArrayLike, rows: int) -> Points:
    """Points of a number of boxes as an array.

    Raises:
        LabelError: another number of them, infinite ones, or a known x with an unknown y.
    """
    array = np.asarray(points, dtype=np.float32)
    array = array.reshape(0, 2) if array.size == 0 == rows else array
    if array.shape != (rows, 2):
        raise LabelError(f"points: expected (x, y) of {rows} boxes, got shape {array.shape}; select both alike")
    unknown = np.isnan(array)
    bad = np.isinf(array).any(1) | (unknown[:, 0] != unknown[:, 1])
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise LabelError(f"points: expected finite (x, y), or NaN for both, got {array[row].tolist()} in row {row}")
    return array


def known(points: Points) -> NDArray[np.bool_]:
    """Which of the points [n, 2] there are, bool [n]."""
    return ~np.isnan(points[:, 0])


def unknown(rows: int) -> Points:
    """Points of boxes that have none."""
    return np.full((rows, 2), np.nan, np.float32)


def only_points(boxes_xyxy: NDArray[np.float32], points: Points) -> NDArray[np.bool_]:
    """Which landmarks have a point but no box, bool [n]: a box without area counts as none."""
    return known(points) & ~(boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(1)

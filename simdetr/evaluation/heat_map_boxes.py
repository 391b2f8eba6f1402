"""Score map of one image in, boxes around its high values out: the last step of weakly supervised localisation.

Two rules. ``exact`` is the library's own: boxes of connected components, half-open pixels as everywhere. ``parity`` is
that of the public evaluation code (Choe et al., Evaluating Weakly Supervised Object Localization Methods Right, 2020),
which numbers are compared with: it thresholds the map in 8 bits and takes OpenCV's contours. Each component has an
outer contour and one per hole in it; components hang together by edges and corners, holes by edges only. OpenCV itself
is not needed. Letters: H × W pixels of the map, n boxes.
Source: KR 10-2022-0050617, estimating the position from the mask.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from torch.nn import functional

Rule = Literal["exact", "parity"]
RULES: tuple[Rule, ...] = ("exact", "parity")
EDGES_AND_CORNERS = np.ones((3, 3), np.int64)


def heat_map_boxes(
    score_map: ArrayLike, threshold: float = 0.2, *, rule: Rule = "exact", largest: bool = True
) -> NDArray[np.float32]:
    """Boxes around the parts of a score map that lie above a threshold.

    Args:
        score_map: [H, W] in [0, 1].
        threshold: fraction of the map's maximum in [0, 1); pixels strictly above it count.
        rule: ``exact``: the half-open boxes (x0, y0, x1, y1) of the components, sorted by their number of pixels.
            ``parity``: boxes of all contours as the public evaluation code has them, the one of the largest polygon
            first; their x1 and y1 are half-open too, but cut to W - 1 and H - 1.
        largest: give the first box only.

    Returns:
        float32 [n, 4] in pixels of the map, at least one; a constant map, or one without a contour, has (0, 0, 0, 0).

    Raises:
        ValueError: a map that is not 2-D, not finite or outside [0, 1], a threshold outside [0, 1), unknown rule.

    Example:
        >>> ring = np.zeros((5, 5))
        >>> ring[1:4, 1:4] = 1
        >>> heat_map_boxes(ring).tolist()
        [[1.0, 1.0, 4.0, 4.0]]
    """
    values = check_score_map(score_map)
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold: expected a fraction of the maximum in [0, 1), got {threshold}")
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if values.min() == values.max():
        boxes = np.zeros((1, 4), np.int64)
    elif rule == "exact":
        boxes = component_boxes(values > threshold * values.max())
    else:
        levels = eight_bit(values)
        boxes = contour_boxes(levels > int(threshold * int(levels.max())))
    return boxes[: 1 if largest else None].astype(np.float32)


def check_score_map(score_map: ArrayLike) -> NDArray[np.float64]:
    """The map as float64 [H, W]; a ValueError for one that is not 2-D or empty, not finite, or outside [0, 1]."""
    values = np.asarray(score_map, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"score_map: expected one map [H, W], got shape {list(values.shape)}")
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0].tolist()
        raise ValueError(f"score_map: expected finite values, got {values[row, column]} at row {row}, column {column}")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(
            f"score_map: expected values in [0, 1], got {values.min():g} to {values.max():g}; "
            "subtract the minimum and divide by the maximum"
        )
    return values


def resize_score_map(values: NDArray[np.float64], size_hw: tuple[int, int]) -> NDArray[np.float64]:
    """A checked map at another size: bicubic, then stretched to [0, 1]; one of that size already stays as it is.

    A constant map becomes all zeros, whatever its size.
    """
    if values.min() == values.max():
        return np.zeros(size_hw)
    if values.shape == size_hw:
        return values
    plane = torch.from_numpy(np.ascontiguousarray(values))[None, None]
    resized: NDArray[np.float64] = functional.interpolate(plane, size_hw, mode="bicubic")[0, 0].numpy()
    span = resized.max() - resized.min()
    return (resized - resized.min()) / span if span > 0 else np.zeros(size_hw)


def eight_bit(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """A map in [0, 1] as whole numbers 0 .. 255, rounded down."""
    return (values * 255).astype(np.uint8)


def component_boxes(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Half-open boxes [n, 4] of the components of a mask that is nowhere empty, those with most pixels first."""
    components, _ = ndimage.label(mask, EDGES_AND_CORNERS)
    pixels = np.bincount(components.ravel())[1:]
    return _extents(components)[np.argsort(-pixels, kind="stable")]


def contour_boxes(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Boxes [n, 4] of all contours of a mask [H, W], as OpenCV's tree of contours has them; at least one.

    That of the contour with the largest area comes first (of equal ones that which OpenCV lists first), then the other
    outer contours, then those around holes. x1 and y1 are half-open, but cut to W - 1 and H - 1; (0, 0, 0, 0) without a
    contour.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return np.zeros((1, 4), np.int64)
    top, left = int(rows[0]), int(columns[0])
    part = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    components, number = ndimage.label(part, EDGES_AND_CORNERS)
    background, backgrounds = ndimage.label(np.pad(~part, 1, constant_values=True))
    boxes = _extents(components)
    if number > 1:
        first = _largest_component(components, background if backgrounds > 1 else None)
        boxes[[0, first]] = boxes[[first, 0]]
    if backgrounds > 1:
        # a contour around a hole runs through the pixels beside it; the padding has moved the hole by one already
        holes = _extents(background)[1:] + np.array([-2, -2, 0, 0])
        boxes = np.concatenate([boxes, holes])
    boxes += np.array([left, top, left, top])
    boxes[:, 2:] = np.minimum(boxes[:, 2:], np.array(mask.shape)[::-1] - 1)
    return boxes


def _extents(labels: NDArray[Any]) -> NDArray[np.int64]:
    """Half-open boxes [n, 4] of the regions labelled 1 .. n."""
    slices = ndimage.find_objects(labels)
    return np.array([(x.start, y.start, x.stop, y.stop) for y, x in slices], np.int64).reshape(-1, 4)


def _largest_component(components: NDArray[Any], background: NDArray[Any] | None) -> int:
    """Index of the component whose outer contour has the largest area; it is never inside another one's hole.

    ``background`` has the labels [h + 2, w + 2] of the padded background, its outside labelled 1; None without holes.
    """
    filled = components
    if background is not None:
        filled, _ = ndimage.label(background[1:-1, 1:-1] != 1, EDGES_AND_CORNERS)
    areas = _polygon_areas(filled)
    label = len(areas) - int(areas[::-1].argmax())  # of equal ones OpenCV lists that which starts lowest first
    start = int((filled == label).argmax())  # the upper left pixel of a filled component is part of the component
    return int(components.flat[start]) - 1


def _polygon_areas(labels: NDArray[Any]) -> NDArray[np.float64]:
    """Area of the polygon through the centres of the border pixels of each region without holes, [n].

    Of the square between four neighbouring centres it covers all if all four pixels belong to it, half if three do.
    """
    inside = (labels > 0).view(np.uint8)
    beside = inside[:, :-1] + inside[:, 1:]
    pixels = beside[:-1] + beside[1:]
    own = np.maximum(labels[:-1, :-1], labels[1:, 1:])  # of three of the four pixels one is one of these two
    three, four = (np.bincount(own[pixels >= least], minlength=int(labels.max()) + 1) for least in (3, 4))
    return (three + four)[1:] / 2

"""Shapes other than boxes: the boxes around polygons, rotated boxes, ellipses and masks; the outline of a mask.

Coordinates are pixels, y grows downwards, and angles are degrees clockwise as one sees them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from simdetr.data import masks as mask_codes
from simdetr.data.labels import Labels

_ELLIPSE_CORNERS = 64

Box = tuple[float, float, float, float]


def around(points: Sequence[float]) -> Box:
    """The box xyxy around points x, y, x, y, …; nan without any."""
    xs, ys = points[::2], points[1::2]
    if not ys or not all(map(math.isfinite, points)):
        return (math.nan,) * 4
    return min(xs), min(ys), max(xs), max(ys)


def rotated_corners(left: float, top: float, width: float, height: float, degrees: float) -> list[float]:
    """Corners x, y, x, y, … of a box that is turned about its top left corner."""
    cos, sin = _turn(degrees)
    sides = ((0.0, 0.0), (width, 0.0), (width, height), (0.0, height))
    return [value for x, y in sides for value in (left + x * cos - y * sin, top + x * sin + y * cos)]


def rotated_about_centre(box: Box, degrees: float) -> list[float]:
    """Corners x, y, x, y, … of a box xyxy that is turned about its centre."""
    (x0, y0, x1, y1), (cos, sin) = box, _turn(degrees)
    centre_x, centre_y = (x0 + x1) / 2, (y0 + y1) / 2
    sides = [(x - centre_x, y - centre_y) for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))]
    return [value for x, y in sides for value in (centre_x + x * cos - y * sin, centre_y + x * sin + y * cos)]


def around_ellipse(centre: tuple[float, float], radii: tuple[float, float], degrees: float) -> Box:
    """The box around an ellipse that is turned about its centre."""
    cos, sin = _turn(degrees)
    half_width = math.hypot(radii[0] * cos, radii[1] * sin)
    half_height = math.hypot(radii[0] * sin, radii[1] * cos)
    return centre[0] - half_width, centre[1] - half_height, centre[0] + half_width, centre[1] + half_height


def ellipse_polygon(centre: tuple[float, float], radii: tuple[float, float], degrees: float) -> list[float]:
    """Points x, y, x, y, … on an ellipse, for its mask."""
    cos, sin = _turn(degrees)
    points: list[float] = []
    for step in range(_ELLIPSE_CORNERS):
        angle = 2 * math.pi * step / _ELLIPSE_CORNERS
        x, y = radii[0] * math.cos(angle), radii[1] * math.sin(angle)
        points += [centre[0] + x * cos - y * sin, centre[1] + x * sin + y * cos]
    return points


def _turn(degrees: float) -> tuple[float, float]:
    if not math.isfinite(degrees):
        return math.nan, math.nan
    return math.cos(math.radians(degrees)), math.sin(math.radians(degrees))


def boxes_of_masks(labels: Labels) -> NDArray[np.float32]:
    """The boxes xyxy around the masks of labels, float32 [M, 4]; the box itself where a mask is empty."""
    boxes = labels.boxes_xyxy.copy()
    assert labels.masks is not None
    for row, (code, image) in enumerate(zip(labels.masks, labels.owners.tolist(), strict=True)):
        lengths = mask_codes.unpack(code)
        height = int(labels.sizes_hw[image, 0])
        ends = np.cumsum(lengths)
        starts, ends = ends[0::2][: len(lengths) // 2], ends[1::2]  # of the runs of the object, column by column
        starts, ends = starts[ends > starts], ends[ends > starts]
        if len(starts):
            several = (ends - 1) // height > starts // height  # a run over a column's end touches top and bottom
            tops = np.where(several, 0, starts % height)
            bottoms = np.where(several, height, (ends - 1) % height + 1)
            boxes[row] = starts[0] // height, tops.min(), (ends[-1] - 1) // height + 1, bottoms.max()
    return boxes


def outlines(pixels: NDArray[np.uint8]) -> list[NDArray[np.int64]]:
    """The outer outlines of a mask [H, W] along the edges of its pixels: corners int64 [n, 2] as (x, y) of each part.

    Parts hang together by edges, not by corners alone; holes have no outline.
    """
    padded = np.pad(pixels.astype(np.int8), 1)
    follow: dict[tuple[int, int], list[tuple[int, int]]] = {}  # corner -> next corners, the object on the right
    for axis, forward in ((0, True), (0, False), (1, True), (1, False)):
        steps = np.diff(padded, axis=axis)
        rows, columns = np.nonzero(steps == (1 if forward else -1))
        rows, columns = (rows, columns - 1) if axis == 0 else (rows - 1, columns)
        ends = (1, 0) if axis == 0 else (0, 1)
        for y, x in zip(rows.tolist(), columns.tolist(), strict=True):
            here, there = (x, y), (x + ends[0], y + ends[1])
            if forward == (axis == 0):
                follow.setdefault(here, []).append(there)
            else:
                follow.setdefault(there, []).append(here)
    found = []
    while follow:
        loop = _walk(follow)
        xs, ys = loop[:, 0], loop[:, 1]
        if (xs * np.roll(ys, -1) - np.roll(xs, -1) * ys).sum() > 0:  # clockwise as seen: holes go the other way
            before, after = loop - np.roll(loop, 1, 0), np.roll(loop, -1, 0) - loop
            found.append(loop[(before * after).sum(1) == 0])  # without the points on straight edges
    return found


def _walk(follow: dict[tuple[int, int], list[tuple[int, int]]]) -> NDArray[np.int64]:
    """One closed loop of unit steps, taken out of ``follow``; where two ways part, the one to the right."""
    start = here = next(iter(follow))
    loop: list[tuple[int, int]] = []
    while True:
        ways = follow[here]
        if len(ways) > 1 and loop:
            step = here[0] - loop[-1][0], here[1] - loop[-1][1]
            right = here[0] - step[1], here[1] + step[0]
            there = right if right in ways else ways[0]
        else:
            there = ways[0]
        ways.remove(there)
        if not ways:
            del follow[here]
        loop.append(here)
        here = there
        if here == start:
            return np.array(loop, np.int64)


def one_outline(pixels: NDArray[np.uint8]) -> tuple[list[int], int]:
    """A mask [H, W] as one polygon x, y, x, y, …, and how many parts it joins by lines without width."""
    parts = sorted(outlines(pixels), key=len, reverse=True)
    if len(parts) < 2:
        return (parts[0].ravel().tolist() if parts else []), len(parts)
    start = parts[0][0]
    points = [*parts[0], start]
    for part in parts[1:]:  # there, around, and back
        points += [*part, part[0], start]
    return np.concatenate(points).tolist(), len(parts)

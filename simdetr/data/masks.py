"""Instance masks as COCO's compressed run lengths: pixels, boxes or a file's segmentations in, bytes out, and back.

A mask is the ``counts`` of its code as bytes, at the size of its whole image, some hundred bytes; pixels are made where
they are needed. pycocotools encodes; it does not decode, since it reads beyond the end of a broken code and is slower.
Letters: n masks of one image of H × W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_masks

from simdetr.data.annotations import LabelError

Masks = NDArray[np.object_]
"""Run lengths of n masks, an array of bytes [n]."""

_FAR = 10.0  # a polygon may leave the image by this many sides: pycocotools' memory grows with its length


def encode(pixels: NDArray[Any]) -> Masks:
    """Run lengths of masks bool or uint8 [n, H, W]."""
    planes = np.asfortranarray(pixels.astype(np.uint8, copy=False).transpose(1, 2, 0))
    return column(code["counts"] for code in coco_masks.encode(planes))


def decode(masks: Masks, size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Pixels of masks on an image of (height, width), 0 or 1, uint8 [n, H, W].

    Raises:
        LabelError: run lengths of an image of another size, or none at all.
    """
    height, width = size_hw
    pixels = np.empty((len(masks), height, width), dtype=np.uint8)
    for plane, packed in zip(pixels, masks, strict=True):
        lengths = unpack(packed)
        if (lengths < 0).any() or lengths.sum() != height * width:
            raise LabelError(
                f"masks: expected those of an image of {height} × {width} = {height * width} pixels, got run lengths "
                f"that sum to {lengths.sum()}; the masks belong to another image or another size of it"
            )
        values = np.arange(len(lengths), dtype=np.int64) % 2
        plane[:] = np.repeat(values.astype(np.uint8), lengths).reshape(width, height).T  # column by column
    return pixels


def of_boxes(boxes_xyxy: NDArray[np.floating[Any]], size_hw: tuple[int, int]) -> Masks:
    """Masks that fill boxes [n, 4], for objects whose shape nobody knows."""
    if len(boxes_xyxy) == 0:
        return column([])
    corners = boxes_xyxy.astype(np.float64)
    boxes_xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    return column(code["counts"] for code in coco_masks.frPyObjects(boxes_xywh, *size_hw))


def of_segmentation(segmentation: Any, size_hw: tuple[int, int]) -> bytes | None:  # noqa: ANN401
    """The mask of an annotation's ``segmentation``: polygons, run lengths as numbers or compressed ones; None if empty.

    Raises:
        LabelError: a segmentation that cannot be read, or one of an image of another size.
    """
    if segmentation is None or segmentation == [] or segmentation == {}:
        return None
    if isinstance(segmentation, list):
        return _of_polygons(segmentation, size_hw)
    if isinstance(segmentation, dict):
        return _of_run_lengths(segmentation, size_hw)
    raise LabelError("expected polygons or run lengths")


def extent(segmentation: Any, size_hw: tuple[int, int]) -> tuple[tuple[float, float, float, float], float]:  # noqa: ANN401
    """The box (x0, y0, x1, y1) around an annotation's ``segmentation`` and its area in square pixels.

    Corners of polygons are taken as they are, also outside the image; run lengths have the size that they say.

    Raises:
        LabelError: a segmentation that cannot be read, or an empty one.
    """
    if isinstance(segmentation, dict):
        size = segmentation.get("size")
        if not isinstance(size, list) or len(size) != 2 or not all(isinstance(side, int) for side in size):
            raise LabelError(f"expected run lengths with their size [height, width], got {size!r}")
        code = {"size": size, "counts": _of_run_lengths(segmentation, (size[0], size[1]))}
        x, y, width, height = coco_masks.toBbox(code).tolist()
        if width <= 0 or height <= 0:
            raise LabelError("expected run lengths of an object, got an empty mask")
        return (x, y, x + width, y + height), float(coco_masks.area(code))
    if not isinstance(segmentation, list):
        raise LabelError("expected polygons or run lengths")
    corners = [flat.reshape(-1, 2) for flat in _polygons(segmentation, size_hw)]
    low, high = (np.concatenate(corners).min(axis=0), np.concatenate(corners).max(axis=0))
    area = sum(abs(_doubled_area(points)) / 2 for points in corners)
    return (float(low[0]), float(low[1]), float(high[0]), float(high[1])), area


def column(masks: Iterable[bytes]) -> Masks:
    """Run lengths as an array; a LabelError for a mask that is no bytes, or empty ones."""
    codes = list(masks)
    for row, code in enumerate(codes):
        if not isinstance(code, bytes) or not code:
            raise LabelError(f"masks: expected COCO's compressed run lengths as bytes, got {code!r} in row {row}")
    array = np.empty(len(codes), dtype=np.object_)
    array[:] = codes
    return array


def _doubled_area(corners: NDArray[np.float64]) -> float:
    """Twice the signed area of a polygon [n, 2]."""
    following = np.roll(corners, -1, axis=0)
    return float((corners[:, 0] * following[:, 1] - corners[:, 1] * following[:, 0]).sum())


def _of_polygons(polygons: list[Any], size_hw: tuple[int, int]) -> bytes:
    areas = [flat.tolist() for flat in _polygons(polygons, size_hw)]
    counts: bytes = coco_masks.merge(coco_masks.frPyObjects(areas, *size_hw))["counts"]
    return counts


def _polygons(polygons: list[Any], size_hw: tuple[int, int]) -> list[NDArray[np.float64]]:
    """Those with an area, flat, [x, y, x, y, ...] each; one polygon may come without a list around it."""
    if all(isinstance(value, int | float) for value in polygons):
        polygons = [polygons]
    try:
        points = [np.asarray(polygon, dtype=np.float64) for polygon in polygons]
    except (TypeError, ValueError) as error:
        raise LabelError("a polygon is no list of numbers") from error
    limit = _FAR * max(size_hw) or math.inf
    for flat in points:
        if flat.ndim != 1 or len(flat) % 2 or not (np.abs(flat) <= limit).all():
            raise LabelError("expected polygons [x, y, x, y, ...] of numbers in or near the image")
    areas = [flat for flat in points if len(flat) >= 6]  # points and lines have none
    if not areas:
        raise LabelError("expected a polygon of at least three corners")
    return areas


def _of_run_lengths(segmentation: dict[str, Any], size_hw: tuple[int, int]) -> bytes:
    counts, size = segmentation.get("counts"), segmentation.get("size")
    if size != list(size_hw):
        raise LabelError(f"expected run lengths of size {list(size_hw)}, got {size}")
    if isinstance(counts, str):
        packed = counts.encode()
        lengths = unpack(packed)
    else:
        try:
            lengths = np.asarray(counts)
        except ValueError as error:
            raise LabelError("run lengths are no list of numbers") from error
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
            raise LabelError("expected run lengths as a text or as a list of whole numbers")
        packed = b""
    if (lengths < 0).any() or int(lengths.sum()) != math.prod(size_hw):
        raise LabelError(f"expected run lengths that sum to {math.prod(size_hw)} pixels, got {int(lengths.sum())}")
    return packed or coco_masks.frPyObjects({"size": size, "counts": lengths.tolist()}, *size_hw)["counts"]


def unpack(packed: bytes) -> NDArray[np.int64]:
    """Lengths of the runs of a compressed code, background first; int64 [runs].

    A number is written in groups of five bits, lowest first, of which all but the last have bit 5 set and the last has
    the sign in bit 4; from the fourth number on it is the difference to the last but one.

    Raises:
        LabelError: text that is no such code.
    """
    groups = np.frombuffer(packed, np.uint8).astype(np.int64) - ord("0")
    if not len(groups) or groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        raise LabelError("expected COCO's compressed run lengths")
    ends = np.flatnonzero(groups & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(groups)) - np.repeat(starts, ends - starts + 1)
    if place.max() > 6:
        raise LabelError("expected run lengths below 2 ** 34")
    numbers = np.add.reduceat((groups & 31) << 5 * place, starts)
    numbers -= np.where(groups[ends] & 16, 1 << 5 * (place[ends] + 1), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers

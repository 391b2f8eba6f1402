"""Other people's proposals, to compare ours with: images and their feature maps in, Regions out, best first.

Every rival has one signature, :data:`Baseline`, and a name in :data:`BASELINES`. Selective Search (Uijlings et al.
2013) looks at pixels only, random boxes at nothing, and LOST, TokenCut and MaskCut at the very maps that our mining
clusters (:mod:`simdetr.proposals.object_masks`). Features are averaged from the last level's map as ours are, so that
a rival's regions can go wherever ours go. The score only gives the order: 1 for the first box of an image, then less.

Letters: B images, D channels, n boxes of one image. Relative boxes are xyxy in 0..1 of width and height.
"""

from __future__ import annotations

import ctypes
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from einops import einsum
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torchvision.ops import masks_to_boxes

from simdetr.proposals.object_masks import lost, mask_cut, token_cut
from simdetr.proposals.regions import Regions

Baseline = Callable[[Sequence[Tensor], Mapping[int, Tensor], Sequence[tuple[int, int]], int, int], list[Regions]]
"""Shrunk images uint8 [3, h, w], maps [B, D, H_l, W_l] by stride, (height, width) of the originals, most boxes per
image, seed -> one record per image, boxes in pixels of the original."""

SMALLEST_SIDE = 1 / 32  # of random boxes: the geometric mean of their relative sides is at least this
LARGEST_ASPECT = 3.0  # of random boxes: one relative side is at most so many times the other


def selective_search(
    images: Sequence[Tensor],
    maps: Mapping[int, Tensor],
    sizes_hw: Sequence[tuple[int, int]],
    max_boxes: int,
    seed: int,
    *,
    side: int = 128,
) -> list[Regions]:
    """Selective Search in fast mode on the image resized to ``side`` x ``side`` pixels, in OpenCV's own order.

    Raises:
        RuntimeError: if OpenCV's contrib modules are not installed.
    """
    results = []
    for index, (image, size_hw) in enumerate(zip(images, sizes_hw, strict=True)):
        boxes = search_boxes(image, side, seed=_own_seed(image, seed))[:max_boxes]
        results.append(_of_boxes(boxes, maps, index, size_hw))
    return results


def search_boxes(image: Tensor, side: int = 128, *, seed: int = 0) -> NDArray[np.float64]:
    """All boxes of OpenCV's Selective Search, fast mode, best first.

    Args:
        image: uint8 [3, H, W], RGB.
        side: the image is resized to a square of so many pixels, as is usual.
        seed: of the order, which is drawn at random with the regions merged first before the others, more or less.

    Returns:
        Relative boxes, double [n, 4].

    Raises:
        RuntimeError: if OpenCV's contrib modules are not installed.
    """
    try:
        import cv2
        from cv2.ximgproc import segmentation
    except ImportError as error:
        raise RuntimeError(
            "selective_search: expected OpenCV with its contrib modules (cv2.ximgproc), which is not installed; "
            "run pip install 'simdetr[bench]', or leave this method out"
        ) from error
    # INTER_AREA averages; OpenCV works on blue, green, red
    square = cv2.resize(image.permute(1, 2, 0).numpy(), (side, side), interpolation=cv2.INTER_AREA)
    search = segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(square[:, :, ::-1]))
    search.switchToSelectiveSearchFast()
    # OpenCV orders the boxes by the C library's rand() and has no seed of its own. Nothing else here draws from it.
    ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None).srand(ctypes.c_uint(seed))
    xywh = np.asarray(search.process(), np.float64).reshape(-1, 4)
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1) / side


def random_boxes(
    images: Sequence[Tensor],
    maps: Mapping[int, Tensor],
    sizes_hw: Sequence[tuple[int, int]],
    max_boxes: int,
    seed: int,
) -> list[Regions]:
    """Boxes that know nothing: sizes and aspects log-uniform, places uniform within the image."""
    results = []
    for index, (image, size_hw) in enumerate(zip(images, sizes_hw, strict=True)):
        rng = np.random.default_rng(_own_seed(image, seed))
        size, aspect, place = np.split(rng.uniform(size=(max_boxes, 4)), [1, 2], axis=1)
        root, stretch = SMALLEST_SIDE**size, LARGEST_ASPECT ** (aspect - 0.5)
        sides = np.concatenate([root * stretch, root / stretch], axis=1).clip(max=1)
        corners = place * (1 - sides)
        results.append(_of_boxes(np.concatenate([corners, corners + sides], axis=1), maps, index, size_hw))
    return results


def objects(
    find: Callable[[Tensor], Tensor],
    images: Sequence[Tensor],
    maps: Mapping[int, Tensor],
    sizes_hw: Sequence[tuple[int, int]],
    max_boxes: int,
    seed: int,
    *,
    stride: int = 16,
) -> list[Regions]:
    """Regions of the masks [M, H, W] that ``find`` cuts out of each map [D, H, W] of one stride; no random numbers.

    Raises:
        ValueError: if there is no map of that stride.
    """
    if stride not in maps:
        raise ValueError(f"stride: expected one of the encoder's, {sorted(maps)}, got {stride}")
    return [
        _of_masks(find(level)[:max_boxes], maps, index, size_hw, stride)
        for index, (level, size_hw) in enumerate(zip(maps[stride], sizes_hw, strict=True))
    ]


BASELINES: dict[str, Baseline] = {
    "selective_search": selective_search,
    "lost": partial(objects, lost),
    "token_cut": partial(objects, token_cut),
    "mask_cut": partial(objects, mask_cut),
    "random": random_boxes,
}


def baseline(name: str) -> Baseline:
    """The rival of a name.

    Raises:
        ValueError: if there is none.
    """
    if name not in BASELINES:
        raise ValueError(f"methods: expected some of {', '.join(BASELINES)}, got {name!r}")
    return BASELINES[name]


def _own_seed(image: Tensor, seed: int) -> int:
    """A seed of the pixels, so that a result does not depend on what else is in the batch."""
    return zlib.crc32(image.contiguous().numpy().tobytes(), seed)


def _of_boxes(
    relative: NDArray[np.float64], maps: Mapping[int, Tensor], index: int, size_hw: tuple[int, int]
) -> Regions:
    """Regions of boxes without a mask: averages over the box, stride 0 because no level has found them."""
    last = maps[max(maps)][index].float()
    down, across = (
        _overlaps(relative[:, axis::2], cells).to(last) for axis, cells in ((1, last.shape[1]), (0, last.shape[2]))
    )
    features = einsum(down, across, last, "n h, n w, d h w -> n d") / einsum(down, across, "n h, n w -> n")[:, None]
    boxes_px = relative * np.tile(np.array(size_hw[::-1], np.float64), 2)
    return _regions(boxes_px, features, (boxes_px[:, 2:] - boxes_px[:, :2]).prod(axis=1), 0)


def _overlaps(spans: NDArray[np.float64], cells: int) -> Tensor:
    """How much of each of so many equal cells of 0..1 lies within the spans [n, 2], double [n, cells]."""
    edges = np.linspace(0, 1, cells + 1)
    inside = np.minimum(spans[:, 1:], edges[1:]) - np.maximum(spans[:, :1], edges[:-1])
    return torch.from_numpy(inside.clip(min=0) * cells)


def _of_masks(masks: Tensor, maps: Mapping[int, Tensor], index: int, size_hw: tuple[int, int], stride: int) -> Regions:
    """Regions of masks bool [n, H, W]: averages over the mask of the last level's map, resampled to the masks' grid."""
    height, width = masks.shape[-2:]
    last = functional.interpolate(
        maps[max(maps)][index : index + 1].float(), (height, width), mode="bilinear", align_corners=False
    )[0]
    cells = masks.sum(dim=(1, 2))
    features = einsum(masks.to(last), last, "n h w, d h w -> n d") / cells[:, None]
    corners = masks_to_boxes(masks) + masks.new_tensor([0, 0, 1, 1], dtype=torch.float32)
    cell_px = np.array([size_hw[1] / width, size_hw[0] / height])
    boxes_px = corners.double().cpu().numpy() * np.tile(cell_px, 2)
    return _regions(boxes_px, features, cells.cpu().numpy() * cell_px.prod(), stride)


def _regions(boxes_px: NDArray[np.float64], features: Tensor, area: NDArray[np.float64], stride: int) -> Regions:
    rows = len(boxes_px)
    return Regions(
        boxes_xyxy=boxes_px.astype(np.float32),
        features=features.cpu().numpy().astype(np.float32),
        area=area.astype(np.float32),
        stride=np.full(rows, stride, np.int16),
        k=np.zeros(rows, np.int16),
        cluster=np.arange(rows, dtype=np.int16),
        score=(1 - np.arange(rows) / max(rows, 1)).astype(np.float32),
    )

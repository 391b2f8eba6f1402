"""Instance masks as short vectors: pixels and boxes in, cosine coefficients out, and back.

A mask is cut out by its box at a fixed size; the coefficients of its cosine transform that vary least over the crop are
its vector, so that a detector predicts a shape as it predicts a box. Source: the unified query representation of SOLQ
(arXiv 2106.02351) in ViDT+ (arXiv 2204.07962); definitions of the published code.
Letters: N masks, H and W of their image, S side of the crop, D coefficients kept.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import dct
from torch import Tensor
from torchvision.ops import roi_align

CROP_PX = 128
"""Side of the crop S."""
NUM_COEFFICIENTS = 256
"""Coefficients of a vector D."""

_FLAT = 0.5  # a crop whose values differ by less has no edge: a real one spans about 1
_PIXELS_AT_ONCE = 2**24  # bounds the memory of crops and pastes to some 200 MB


@lru_cache
def zigzag(side: int) -> Tensor:
    """Places ``row * side + column`` of a square in JPEG's order, along the diagonals from one corner; int64 [side²].

    Starts (0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2): the direction turns at every diagonal.
    """
    row, column = np.indices((side, side)).reshape(2, -1)
    diagonal = row + column
    return torch.from_numpy(np.lexsort((np.where(diagonal % 2, row, -row), diagonal)))


@lru_cache
def cosine_matrix(side: int) -> Tensor:
    """The orthonormal DCT-II as a matrix, one frequency per row; float64 [side, side], its inverse is the transpose."""
    return torch.from_numpy(dct(np.eye(side), axis=0, norm="ortho"))


@torch.no_grad()
def encode_crops(crops: Tensor, coefficients: int = NUM_COEFFICIENTS) -> Tensor:
    """Vectors of masks that ``crop_masks`` cut out, [N, S, S] to float32 [N, D]."""
    crops = crops.float()
    with torch.autocast(crops.device.type, enabled=False):  # half precision would spoil the coefficients
        matrix = cosine_matrix(CROP_PX).to(crops)
        spectrum = matrix @ crops @ matrix.T
    return spectrum.flatten(1)[:, zigzag(CROP_PX)[:coefficients].to(crops.device)]


@torch.no_grad()
def crop_masks(masks: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """Masks [N, H, W] cut out by their own boxes [N, 4] and resized; bool [N, S, S], True where half is covered."""
    crops = masks.new_zeros(len(masks), CROP_PX, CROP_PX, dtype=torch.bool)
    for part in portions(*masks.shape):
        corners = boxes_xyxy[part].float()
        regions = torch.cat([torch.arange(len(corners)).to(corners)[:, None], corners], dim=1)
        crops[part] = roi_align(masks[part, None].float(), regions, CROP_PX, aligned=True)[:, 0] >= 0.5
    return crops


@torch.no_grad()
def decode_masks(vectors: Tensor, boxes_xyxy: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Masks bool [N, H, W] of vectors [N, D], drawn into their boxes [N, 4] on an image of (height, width)."""
    crops = decode_crops(vectors)
    masks = torch.zeros(len(vectors), *size_hw, dtype=torch.bool, device=vectors.device)
    for part in portions(*masks.shape):
        masks[part] = _paste(crops[part], boxes_xyxy[part].float(), size_hw)
    return masks


@torch.no_grad()
def decode_crops(vectors: Tensor) -> Tensor:
    """Masks of vectors [N, D] within their boxes, bool [N, S, S].

    The edge lies in the middle between the lowest and the highest value, as in the original, so that timid coefficients
    still have a shape. A crop without an edge, of an object that fills its box, is above or below one half all over.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        spectrum = vectors.new_zeros(len(vectors), CROP_PX**2, dtype=torch.float32)
        spectrum[:, zigzag(CROP_PX)[: vectors.shape[1]].to(vectors.device)] = vectors.float()
        matrix = cosine_matrix(CROP_PX).to(spectrum)
        values = matrix.T @ spectrum.view(-1, CROP_PX, CROP_PX) @ matrix
    low, high = values.amin(dim=(1, 2), keepdim=True), values.amax(dim=(1, 2), keepdim=True)
    return values > torch.where(high - low < _FLAT, 0.5, (low + high) / 2)


def _paste(crops: Tensor, boxes_xyxy: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Crops [N, S, S] stretched over their boxes [N, 4]; bool [N, H, W]."""
    x0, y0, x1, y1 = boxes_xyxy[:, :, None].unbind(dim=1)

    def along(side: int, low: Tensor, high: Tensor) -> Tensor:
        """Centres of pixels in grid_sample's measure, -1 to 1 over the box; [N, side]."""
        centres = torch.arange(side, device=low.device) + 0.5
        return 2.0 * (centres - low) / (high - low).clamp(min=1e-6) - 1.0

    x, y = along(size_hw[1], x0, x1), along(size_hw[0], y0, y1)
    shape = (len(crops), *size_hw)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=3)
    return F.grid_sample(crops[:, None].float(), grid, align_corners=False)[:, 0] >= 0.5


def portions(count: int, height: int, width: int) -> list[slice]:
    """Rows of masks [count, height, width] to work on at a time, so that float copies of them stay small."""
    step = max(1, _PIXELS_AT_ONCE // max(1, height * width))
    return [slice(start, start + step) for start in range(0, count, step)]

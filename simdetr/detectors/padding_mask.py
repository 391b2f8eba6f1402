"""Padding masks of feature maps: the mask of the images in, that of a map of any size out."""

from __future__ import annotations

import torch
from torch import Tensor


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest resize of bool masks, [B, H, W] to [B, *size].

    The pixels are those that ``F.interpolate(mode="nearest")`` takes, in its float32 arithmetic: spelt out because
    other runtimes of an exported graph round otherwise where a pixel ends at the border of a cell.
    """
    rows, columns = (_nearest(mask.shape[axis + 1], cells, mask.device) for axis, cells in enumerate(size))
    return mask[:, rows[:, None], columns]


def _nearest(pixels: int, cells: int, device: torch.device) -> Tensor:
    """One pixel for each cell, int64 [cells]."""
    scale = torch.full((), pixels, dtype=torch.float32, device=device) / cells
    return (torch.arange(cells, device=device) * scale).long()

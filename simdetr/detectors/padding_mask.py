"""Padding masks: that of the images in, that of a map of any size out; and more padding where a backbone wants it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


def pad_to_multiple(images: Tensor, mask: Tensor | None, multiple: int) -> tuple[Tensor, Tensor]:
    """Zero-pad to sides that are multiples; a mask without padding shrinks to one image to save work.

    Args:
        images: [B, 3, H, W].
        mask: bool [B, H, W], True = padding; None if no image is padded.
        multiple: in pixels.

    Returns:
        Images, and their mask [B, H, W], or [1, H, W] and all False if no image is padded.
    """
    height, width = images.shape[-2:]
    if mask is None:
        mask = torch.zeros(1, height, width, dtype=torch.bool, device=images.device)
    elif mask.shape != (images.shape[0], height, width):
        raise ValueError(f"mask must be [B, H, W] = {[images.shape[0], height, width]}, got {list(mask.shape)}")
    elif mask.device.type == "cpu" and not torch.compiler.is_compiling() and not mask.any():
        mask = mask[:1]
    extra_h, extra_w = -height % multiple, -width % multiple
    # a compiled or exported graph pads by 0 where eager mode would not pad: it serves every size
    if multiple > 1 and (torch.compiler.is_compiling() or extra_h or extra_w):
        images = F.pad(images, (0, extra_w, 0, extra_h))
        mask = F.pad(mask.expand(images.shape[0], -1, -1), (0, extra_w, 0, extra_h), value=True)
    return images, mask

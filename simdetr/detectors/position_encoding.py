"""Position encodings: a padding mask or boxes in, embeddings of their positions out. Nothing here depends on content.

Letters: B images, C channels, N boxes.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

TEMPERATURE = 10_000.0
"""Ratio of the longest to the shortest wavelength of all sine encodings."""


def sine_features(values: Tensor, num_features: int) -> Tensor:
    """Interleaved sines and cosines of values in radians at half as many wavelengths; [...] to [..., num_features]."""
    exponents = torch.arange(num_features // 2, device=values.device, dtype=values.dtype) * (2.0 / num_features)
    phases = values[..., None] / TEMPERATURE**exponents
    return torch.stack((phases.sin(), phases.cos()), dim=-1).flatten(-2)


def sine_cell_positions(mask: Tensor, num_channels: int, centred: bool = True) -> Tensor:
    """Sine encoding float32 [B, C, H, W] of every cell of a map, as a fraction of the valid part of its row and column.

    Args:
        mask: bool [B, H, W], True where the image is padding.
        num_channels: C, half of it for y (first) and half for x.
        centred: measure to the centre of a cell (Deformable DETR) instead of to its far edge (DETR, ViDT).
    """
    valid = (~mask).float()
    shift = 0.5 if centred else 0.0
    features = []
    for axis in (1, 2):
        count = valid.cumsum(axis)
        last = count.narrow(axis, count.shape[axis] - 1, 1)
        radians = (count - shift) / (last + 1e-6) * (2 * math.pi)
        features.append(sine_features(radians, num_channels // 2))
    return rearrange(torch.cat(features, dim=-1), "b h w c -> b c h w")


def sine_box_positions(boxes_cxcywh: Tensor, num_features: int) -> Tensor:
    """Sine encoding of normalised boxes, [B, N, 4] to [B, N, 4 · num_features], coordinate by coordinate."""
    return sine_features(boxes_cxcywh * (2 * math.pi), num_features).flatten(-2)


class SineEncoding(nn.Module):
    """Sine positions of the cells of a map, of C channels, a multiple of 4; see ``sine_cell_positions``."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_channels = num_channels

    def forward(self, mask: Tensor) -> Tensor:
        """Bool mask [B, H, W] (True = padding) to positions [B, C, H, W]."""
        return sine_cell_positions(mask, self.num_channels)


class LearnedEncoding(nn.Module):
    """Learned row and column positions, x first.

    Args:
        num_channels: C, an even number.
        max_cells: longest side of a map, in cells; 50 in DETR.
    """

    def __init__(self, num_channels: int, max_cells: int = 50) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(max_cells, num_channels // 2)
        self.col_embed = nn.Embedding(max_cells, num_channels // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, mask: Tensor) -> Tensor:
        """Bool mask [B, H, W] to positions [B, C, H, W]; raises ValueError for a map with a side past ``max_cells``."""
        batch, height, width = mask.shape
        if max(height, width) > self.row_embed.num_embeddings:
            raise ValueError(
                f"a feature map has {height} x {width} cells, but the learned position encoding has "
                f"{self.row_embed.num_embeddings} per side; use smaller images or position_encoding='sine'"
            )
        columns = repeat(self.col_embed.weight[:width], "w c -> b c h w", b=batch, h=height)
        rows = repeat(self.row_embed.weight[:height], "h c -> b c h w", b=batch, w=width)
        return torch.cat((columns, rows), dim=1)

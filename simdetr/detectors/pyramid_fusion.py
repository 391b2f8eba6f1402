"""Fusion of feature maps from coarse to fine: maps of several widths in, maps of C channels out, the coarsest first.

Source: the efficient pyramid feature fusion of ViDT+ (arXiv 2204.07962), numerics and names of specs/detectors.md B4.
Letters: B images, C channels, h_l and w_l cells of level l.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualUnit(nn.Module):
    """Three convolutions through a quarter of the channels, added to their input.

    Args:
        dim: C, a multiple of 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim // 4, 1)
        self.conv2 = nn.Conv2d(dim // 4, dim // 4, 3, padding=1)
        self.conv3 = nn.Conv2d(dim // 4, dim, 1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, h, w] to the same."""
        hidden = features
        for convolution in (self.conv1, self.conv2, self.conv3):
            hidden = convolution(F.relu(hidden))
        return features + hidden


class FusionBlock(nn.Module):
    """Joins a map with the fused coarser one; names are the original's.

    Args:
        dim: C.
        coarsest: there is nothing to join, the map is only refined.
    """

    def __init__(self, dim: int, coarsest: bool) -> None:
        super().__init__()
        self.smoothing = None if coarsest else nn.Conv2d(dim, dim, 1)
        self.resConfUnit1 = None if coarsest else ResidualUnit(dim)
        self.resConfUnit2 = ResidualUnit(dim)

    def forward(self, features: Tensor, coarser: Tensor | None) -> Tensor:
        """Fused map [B, C, h, w]; ``coarser`` is of any size and None at the coarsest level."""
        if self.smoothing is not None and self.resConfUnit1 is not None and coarser is not None:
            enlarged = F.interpolate(coarser, size=features.shape[-2:], mode="bilinear", align_corners=True)
            features = self.smoothing(enlarged) + self.resConfUnit1(features)
        fused: Tensor = self.resConfUnit2(features)
        return fused


class PyramidFusion(nn.Module):
    """Projects every map to C channels and hands what coarse maps know to the finer ones.

    Args:
        channels: channels of the maps, fine to coarse.
        dim: C, a multiple of 4.
    """

    def __init__(self, channels: Sequence[int], dim: int) -> None:
        super().__init__()
        self.num_levels = len(channels)
        self.multi_scaler = nn.ModuleDict()
        for level, width in enumerate(channels):
            self.multi_scaler[f"layer_{level}_rn"] = projection = nn.Conv2d(width, dim, 1)
            nn.init.xavier_uniform_(projection.weight)
            assert projection.bias is not None
            nn.init.zeros_(projection.bias)
            self.multi_scaler[f"p_norm_{level}"] = nn.GroupNorm(math.gcd(32, dim), dim)
            self.multi_scaler[f"refinenet_{level}"] = FusionBlock(dim, coarsest=level == len(channels) - 1)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Fuse the maps of one batch.

        Args:
            maps: [B, channels[l], h_l, w_l], fine to coarse.

        Returns:
            [B, C, h_l, w_l], **coarse to fine**.
        """
        fused: list[Tensor] = []
        for level in reversed(range(self.num_levels)):
            projected = self.multi_scaler[f"p_norm_{level}"](self.multi_scaler[f"layer_{level}_rn"](maps[level]))
            fused.append(self.multi_scaler[f"refinenet_{level}"](projected, fused[-1] if fused else None))
        return fused

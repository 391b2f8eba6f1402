"""Multi-scale deformable attention: every query reads a few points of every feature map.

In: queries, normalised reference points or boxes, flattened feature maps. Out: one vector per query.
Source: Deformable DETR (arXiv 2010.04159, equation 3), numerics of specs/detectors.md A3.
Letters: B batch, N queries, S cells of all levels together, C channels, M heads, D = C / M, L levels, P points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def multi_scale_deformable_attention(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear samples of several feature maps.

    A location (x, y) in [0, 1] spans the whole map: 0 and 1 are the outer edges of the first and last cell, and what
    lies outside counts as zero. Computed in float32 also under autocast, one level after the other to bound the memory.

    Args:
        value: [B, S, M, D], levels one after the other, each row by row.
        shapes: (height, width) of each level; their areas sum to S.
        locations: [B, N, M, L, P, 2].
        weights: [B, N, M, L, P].

    Returns:
        [B, N, M · D] in the dtype of ``value``.
    """
    dtype = value.dtype
    with torch.autocast(value.device.type, enabled=False):
        if dtype in (torch.float16, torch.bfloat16):
            value = value.float()
        grids = 2.0 * locations.to(value.dtype) - 1.0
        weights = weights.to(value.dtype)
        batch, _, heads, _ = value.shape
        total: Tensor | None = None
        levels = value.split_with_sizes([height * width for height, width in shapes], dim=1)
        for level, (cells, (height, width)) in enumerate(zip(levels, shapes, strict=True)):
            samples = F.grid_sample(
                rearrange(cells, "b (h w) m d -> (b m) d h w", h=height, w=width),
                rearrange(grids[:, :, :, level], "b n m p xy -> (b m) p n xy"),
                mode="bilinear",
                padding_mode="zeros",
                align_corners=False,
            )
            # points before queries: the sum over the few points then runs along long rows
            summed = (samples * rearrange(weights[:, :, :, level], "b n m p -> (b m) 1 p n")).sum(dim=2)
            total = summed if total is None else total + summed
        assert total is not None, "no levels"
        return rearrange(total, "(b m) d n -> b n (m d)", b=batch, m=heads).to(dtype)


class MSDeformAttn(nn.Module):
    """Deformable attention with its projections.

    Args:
        dim: C.
        num_levels: L.
        num_heads: M, a divisor of ``dim``.
        num_points: P, per head and level.
    """

    def __init__(self, dim: int, num_levels: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"hidden_dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Heads look in M directions on the unit square, point p at p + 1 cells, with equal weights (A7)."""
        angles = torch.arange(self.num_heads) * (2.0 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)[:, None]
        offsets = (directions[:, None, None] * steps).expand(-1, self.num_levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: Sequence[tuple[int, int]],
        padding: Tensor | None = None,
    ) -> Tensor:
        """Attend from queries to feature maps.

        Args:
            query: [B, N, C], positions already added.
            reference: points [B, N, L, 2] or boxes cxcywh [B, N, L, 4] in fractions of each padded map.
            memory: [B, S, C], without positions.
            shapes: (height, width) of each level.
            padding: bool [B, S], True at cells to read as zero; None if there are none.

        Returns:
            [B, N, C].
        """
        value = self.value_proj(memory)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        value = rearrange(value, "b s (m d) -> b s m d", m=self.num_heads)
        layout = {"m": self.num_heads, "l": self.num_levels, "p": self.num_points}
        offsets = rearrange(self.sampling_offsets(query), "b n (m l p xy) -> b n m l p xy", xy=2, **layout)
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(dim=-1)
        weights = rearrange(weights, "b n m (l p) -> b n m l p", l=self.num_levels)
        centres = reference[:, :, None, :, None, :2]
        if reference.shape[-1] == 2:
            sizes_wh = reference.new_tensor([(width, height) for height, width in shapes])
            locations = centres + offsets / sizes_wh[:, None]
        else:
            locations = centres + offsets * (reference[:, :, None, :, None, 2:] * (0.5 / self.num_points))
        attended = multi_scale_deformable_attention(value, shapes, locations, weights)
        projected: Tensor = self.output_proj(attended)
        return projected

"""The two kinds of layers of a deformable transformer: memory and queries in, refined states out.

Source: Deformable DETR (arXiv 2010.04159), numerics of specs/detectors.md A4 and A5. Post-norm; names of parameters are
the original's, so ``norm1`` of a decoder layer belongs to its cross-attention.
Letters: B images, C channels, L levels, S cells of all levels together, Q queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from simdetr.detectors.deformable_attention import MSDeformAttn


class Memory(NamedTuple):
    """Flattened feature maps, as decoder layers read them."""

    tokens: Tensor
    """[B, S, C], level after level, row by row."""
    shapes: list[tuple[int, int]]
    """(height, width) of each level."""
    valid_ratios: Tensor
    """Valid fraction of width and height, [B, L, 2]."""
    padding: Tensor | None
    """Bool [B, S], True = padding; None if no image is padded."""


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention of all cells, then a two-layer perceptron; each with residual and layer norm (A4).

    Args:
        dim: C.
        ffn_dim: width of the perceptron.
        dropout: probability at every residual and inside the perceptron.
        num_levels: L.
        num_heads: attention heads.
        num_points: points per head and level.
    """

    def __init__(
        self, dim: int, ffn_dim: int, dropout: float, num_levels: int, num_heads: int, num_points: int
    ) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(dim, num_levels, num_heads, num_points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, memory: Memory, positions: Tensor, references: Tensor) -> Tensor:
        """New tokens [B, S, C]; positions [B or 1, S, C], references [B, S, L, 2]."""
        tokens = memory.tokens
        attended = self.self_attn(tokens + positions, references, tokens, memory.shapes, memory.padding)
        tokens = self.norm1(tokens + self.dropout(attended))
        hidden = self.dropout(self.linear1(tokens).relu_())
        normed: Tensor = self.norm2(tokens + self.dropout(self.linear2(hidden)))
        return normed


class DeformableDecoderLayer(nn.Module):
    """Self-attention of the queries, deformable attention to the memory, perceptron (A5).

    Args:
        dim: C.
        ffn_dim: width of the perceptron.
        dropout: probability at every residual, inside the perceptron and in self-attention.
        num_levels: L.
        num_heads: attention heads.
        num_points: points per head and level.
    """

    def __init__(
        self, dim: int, ffn_dim: int, dropout: float, num_levels: int, num_heads: int, num_points: int
    ) -> None:
        super().__init__()
        self.cross_attn = MSDeformAttn(dim, num_levels, num_heads, num_points)
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, target: Tensor, query: Tensor, references: Tensor, memory: Memory) -> Tensor:
        """New states [B, Q, C]; query positions [B, Q, C], references [B, Q, L, 2 or 4] on the padded maps."""
        placed = target + query
        attended = attend(self.self_attn, placed, target)
        target = self.norm2(target + self.dropout(attended))
        attended = self.cross_attn(target + query, references, memory.tokens, memory.shapes, memory.padding)
        target = self.norm1(target + self.dropout(attended))
        hidden = self.dropout(self.linear1(target).relu_())
        normed: Tensor = self.norm3(target + self.dropout(self.linear2(hidden)))
        return normed


def attend(attention: nn.MultiheadAttention, placed: Tensor, values: Tensor) -> Tensor:
    """Self-attention of queries, of which no table of weights is kept: two projections, the fused operator, one more.

    Args:
        attention: parameters, heads and dropout.
        placed: contents and positions of the queries [B, Q, C], what they are compared by.
        values: their contents [B, Q, C].
    """
    dim, heads = values.shape[-1], attention.num_heads
    both, value = attention.in_proj_weight.split_with_sizes((2 * dim, dim))
    both_bias, value_bias = attention.in_proj_bias.split_with_sizes((2 * dim, dim))
    asked, found = rearrange(F.linear(placed, both, both_bias), "b q (two m d) -> two b m q d", two=2, m=heads)
    read = rearrange(F.linear(values, value, value_bias), "b q (m d) -> b m q d", m=heads)
    dropout = attention.dropout if attention.training else 0.0
    attended = F.scaled_dot_product_attention(asked, found, read, dropout_p=dropout)
    return F.linear(rearrange(attended, "b m q d -> b q (m d)"), attention.out_proj.weight, attention.out_proj.bias)

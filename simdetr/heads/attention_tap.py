"""What a localisation head looks at on a level: its attention, the masks, and what lies under them as unit vectors.

Source: seed 002 [0021] to [0025]; specs/heads.md sections 2.2 and 2.4.
Letters: B images, C channels, h × w positions, E channels of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from simdetr.detectors.features import Level
from simdetr.detectors.matcher import at_least_float32
from simdetr.heads.foreground_masks import foreground_masks, have_all_parts, normalised_attention
from simdetr.heads.head import check_finite
from simdetr.heads.non_local_attention import NonLocalAttention, averaged

EmbedFrom = Literal["attended", "input"]


class Tap(NamedTuple):
    """Notes of one level."""

    raw: Tensor
    """a [B, h, w], 0 at padded positions."""
    attention: Tensor
    """A [B, h, w] in [0, 1], 0 at padded positions."""
    padding: Tensor
    """bool [B, h, w]."""
    masks: Tensor
    """Dropped foreground, foreground and background [B, 3, h, w]."""
    usable: Tensor
    """bool [B]: no mask is empty."""
    embeddings: Tensor | None
    """Unit vectors of the three masks [B, 3, E]; None where they were not asked for."""


class AttentionTap(nn.Module):
    """Attention block of a level, with the projector of its embeddings.

    Args:
        channels: C.
        embed_channels: of θ and φ; None for C / 8.
        value_channels: of g; None for C.
        embedding_size: E; None for a tap that embeds nothing.
        embed_from: features under the masks: ``attended`` by the block, or its ``input``, which is as it comes.
        foreground_threshold: θ_fg.
        background_threshold: θ_bg.
        soft_masks: see ``foreground_masks``.
    """

    def __init__(
        self,
        channels: int,
        embed_channels: int | None = None,
        value_channels: int | None = None,
        embedding_size: int | None = 128,
        embed_from: EmbedFrom = "attended",
        foreground_threshold: float = 0.8,
        background_threshold: float = 0.2,
        soft_masks: bool = False,
    ) -> None:
        super().__init__()
        self.block = NonLocalAttention(channels, embed_channels, value_channels)
        self.embed_from = embed_from
        width = self.block.g.out_channels if embed_from == "attended" else channels
        self.projector = None if embedding_size is None else nn.Linear(width, embedding_size)
        self.thresholds = (foreground_threshold, background_threshold)
        self.soft_masks = soft_masks

    def forward(self, level: Level, *, embed: bool) -> Tap:
        """Look at a level; ``embed`` asks for embeddings, which only losses need."""
        weights, raw = self.block(level.features, level.mask)
        attention = normalised_attention(raw, level.mask)
        hard = foreground_masks(attention, level.mask, *self.thresholds)
        usable = have_all_parts(hard)
        masks = foreground_masks(attention, level.mask, *self.thresholds, soft=True) if self.soft_masks else hard
        embeddings = self._embedded(level.features, weights, masks) if embed and self.projector is not None else None
        return Tap(raw, attention, level.mask, masks, usable, embeddings)

    def _embedded(self, features: Tensor, weights: Tensor, masks: Tensor) -> Tensor:
        """Unit vectors [B, 3, E] of the mean features under each mask; of an empty mask, of anything."""
        flat = masks.flatten(2)
        averages = flat / flat.sum(dim=2, keepdim=True).clamp(min=1e-6)
        if self.embed_from == "attended":
            means = self.block.attended(weights, features, averages)
        else:
            means = averaged(features, averages)
        assert self.projector is not None
        return F.normalize(at_least_float32(self.projector(means)), dim=2)


def checked_taps(taps: Sequence[int] | None, num_levels: int) -> tuple[int, ...]:
    """The taps, ascending.

    Raises:
        ValueError: none, not ascending, or levels that are not there.
    """
    chosen = tuple(range(num_levels) if taps is None else taps)
    if not chosen or any(a >= b for a, b in pairwise((-1, *chosen, num_levels))):
        raise ValueError(f"taps: expected ascending levels among 0 to {num_levels - 1}, got {list(chosen)}")
    return chosen


def check_level(index: int, level: Level, channels: int) -> None:
    """Raise a ValueError for features that are no map of these channels, not finite, or smaller than 2 × 2."""
    shape = list(level.features.shape)
    if len(shape) != 4 or shape[1] != channels:
        raise ValueError(f"features of level {index}: expected [B, {channels}, h, w], got {shape}")
    if min(shape[2:]) < 2:
        raise ValueError(
            f"features of level {index}: expected a map of at least 2 x 2, got {shape[2]} x {shape[3]}; use larger "
            "images or tap finer levels (taps)"
        )
    check_finite(f"features of level {index}", level.features)

"""What a localisation head looks at on a level: its attention, the masks, and what lies under them as unit vectors.

A non-local attention block takes the place of channel pooling. Three embeddings θ, φ, g of the features; position i
looks at all positions j with w_ij = softmax_j(θ_iᵀφ_j), its new features are y_i = Σ_j w_ij g_j, and their mean over
the channels is its attention a_i. Neither g nor y is ever computed at every position. Both are linear, so the channel
mean of g is one convolution to one channel, and a mean of y over some positions is g of a mean of the features: of
three vectors per image instead of N. Normalised attention, masks and importance exclude padding.
Source: KR 10-2022-0050617 [0021] to [0025], equation 1.
Letters: B images, C channels, d channels of θ and φ, G of g, N = h · w positions, M masks, E channels of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from simdetr.detectors.detector import Level
from simdetr.detectors.matcher import at_least_float32
from simdetr.heads.head import check_finite

EmbedFrom = Literal["attended", "input"]

DROPPED, FOREGROUND, BACKGROUND = range(3)  # places of the masks in what ``foreground_masks`` gives
TEMPERATURE = 0.05
CONSTANT = 1e-5  # Maps whose values differ by less than this share of the largest are constant but for rounding
START_LOGIT = 4.0  # θᵀφ of two equal positions whose features have unit mean square, at the start


class Attention(NamedTuple):
    """What the block says of a map."""

    weights: Tensor  # w [B, N, N], rows i sum to 1 and are 0 in padded columns j
    raw: Tensor  # a [B, h, w]; 0 at padded positions


class NonLocalAttention(nn.Module):
    """The block for maps of C channels.

    At the start θ = φ, so that positions look at those that are like them, and g hands the features on, so that the
    attention is their smoothed channel mean, which the block takes the place of. Memory grows with N²: 3,136 positions
    (an image of 448 px at stride 8) are 39 MB per image.

    Args:
        channels: C.
        embed_channels: d; None for C / 8.
        value_channels: G; None for C.

    Raises:
        ValueError: no channels.
    """

    def __init__(self, channels: int, embed_channels: int | None = None, value_channels: int | None = None) -> None:
        super().__init__()
        embed = max(1, channels // 8) if embed_channels is None else embed_channels
        value = channels if value_channels is None else value_channels
        for name, count in (("channels", channels), ("embed_channels", embed), ("value_channels", value)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self.theta = nn.Conv2d(channels, embed, 1, bias=False)
        self.phi = nn.Conv2d(channels, embed, 1, bias=False)
        self.g = nn.Conv2d(channels, value, 1)
        nn.init.normal_(self.theta.weight, std=(START_LOGIT / (channels * embed)) ** 0.5)
        nn.init.dirac_(self.g.weight)
        assert self.g.bias is not None
        nn.init.zeros_(self.g.bias)
        self.phi.load_state_dict(self.theta.state_dict())

    def forward(self, features: Tensor, padding: Tensor) -> Attention:
        """Of features [B, C, h, w], in float32 at least; positions in ``padding``, bool [B, h, w], weigh nothing."""
        with torch.autocast(features.device.type, enabled=False):
            mean_g = self.g.weight.mean(dim=0, keepdim=True)
            kernel = torch.cat([self.theta.weight, self.phi.weight, mean_g])
            embedded = F.conv2d(at_least_float32(features), kernel).flatten(2)
            sizes = [self.theta.out_channels, self.phi.out_channels, 1]
            theta, phi, values = torch.split(embedded, sizes, dim=1)
            logits = theta.transpose(1, 2) @ phi
            weights = logits.masked_fill(padding.flatten(1)[:, None], -torch.inf).softmax(dim=2)
            assert self.g.bias is not None
            raw = (weights @ values.transpose(1, 2)).squeeze(2) + self.g.bias.mean()
        return Attention(weights, raw.view(padding.shape).masked_fill(padding, 0.0))

    def attended(self, weights: Tensor, features: Tensor, averages: Tensor) -> Tensor:
        """Averages [B, M, G] of y over positions, from w and features; rows of ``averages`` [B, M, N] sum to 1."""
        with torch.autocast(features.device.type, enabled=False):
            means = averaged(features, averages.to(weights.dtype) @ weights)
            return F.linear(means, rearrange(self.g.weight, "g c 1 1 -> g c"), self.g.bias)


def averaged(features: Tensor, averages: Tensor) -> Tensor:
    """Averages [B, M, C] of features [B, C, h, w] over positions, weighted by ``averages`` [B, M, N]."""
    return averages @ at_least_float32(features).flatten(2).transpose(1, 2)


def check_thresholds(foreground: float, background: float) -> None:
    """Raise a ValueError unless 0 < background < foreground < 1."""
    for name, value in (("foreground_threshold", foreground), ("background_threshold", background)):
        if not 0 < value < 1:
            raise ValueError(f"{name}: expected a share of the highest attention within (0, 1), got {value}")
    if foreground <= background:
        raise ValueError(
            f"foreground_threshold: expected more than background_threshold ({background}), got {foreground}; nothing "
            "would lie between them"
        )


def normalised_attention(raw: Tensor, padding: Tensor) -> Tensor:
    """A = (a − min a) / (max a − min a) of each image [B, h, w] outside its padding; 0 there and for a constant a."""
    low = raw.masked_fill(padding, torch.inf).amin(dim=(1, 2), keepdim=True)
    high = raw.masked_fill(padding, -torch.inf).amax(dim=(1, 2), keepdim=True)
    span = high - low
    constant = span.detach() <= CONSTANT * torch.maximum(high.detach().abs(), low.detach().abs())
    scaled = (raw - low) / span.masked_fill(constant, 1.0)
    return scaled.masked_fill(padding | constant, 0.0)


def foreground_masks(
    attention: Tensor, padding: Tensor, foreground: float, background: float, *, soft: bool = False
) -> Tensor:
    """Dropped foreground (equation 1), foreground and background of each image, [B, 3, h, w] in [0, 1].

    Padding is in none of the masks. What reaches ``foreground``, θ_fg, is the most discriminative part, which is
    dropped; what does not exceed ``background``, θ_bg, is background. If ``soft``, the indicators 1[A > θ] become
    σ((A − θ) / 0.05), which passes a gradient.
    """
    if soft:
        kept = ((attention - background) / TEMPERATURE).sigmoid()
        below_peak = ((foreground - attention) / TEMPERATURE).sigmoid()
    else:
        kept = (attention > background).to(attention.dtype)
        below_peak = (attention < foreground).to(attention.dtype)
    masks = torch.stack([below_peak * kept, kept, 1 - kept], dim=1)
    return masks.masked_fill(padding[:, None], 0.0)


def importance_map(raw: Tensor, padding: Tensor) -> Tensor:
    """I = σ(a) [B, h, w] of raw attention; 0 at padded positions."""
    return raw.sigmoid().masked_fill(padding, 0.0)


def have_all_parts(masks: Tensor) -> Tensor:
    """Images whose three hard masks [B, 3, h, w] all have positions: bool [B]."""
    return masks.any(dim=3).any(dim=2).all(dim=1)


class Tap(NamedTuple):
    """Notes of one level."""

    raw: Tensor  # a [B, h, w], 0 at padded positions
    attention: Tensor  # A [B, h, w] in [0, 1], 0 at padded positions
    padding: Tensor  # bool [B, h, w]
    masks: Tensor  # Dropped foreground, foreground and background [B, 3, h, w]
    usable: Tensor  # bool [B]: no mask is empty
    embeddings: Tensor | None  # Unit vectors of the three masks [B, 3, E]; None where they were not asked for


class AttentionTap(nn.Module):
    """Attention block of a level, with the projector of its embeddings.

    It embeds features under the masks, ``attended`` by the block, or its ``input``, which is as it comes; nothing
    without an ``embedding_size`` E. The other arguments are those of ``NonLocalAttention`` and ``foreground_masks``.
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
        masks = foreground_masks(attention, level.mask, *self.thresholds, soft=True) if self.soft_masks else hard
        embeddings = self._embedded(level.features, weights, masks) if embed and self.projector is not None else None
        return Tap(raw, attention, level.mask, masks, have_all_parts(hard), embeddings)

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


def checked_taps(taps: Sequence[int] | None, num_levels: int, name: str = "taps") -> tuple[int, ...]:
    """The taps; a ValueError for none, for some that do not ascend, or for levels that are not there."""
    chosen = tuple(range(num_levels) if taps is None else taps)
    if not chosen or any(a >= b for a, b in pairwise((-1, *chosen, num_levels))):
        raise ValueError(f"{name}: expected ascending levels among 0 to {num_levels - 1}, got {list(chosen)}")
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

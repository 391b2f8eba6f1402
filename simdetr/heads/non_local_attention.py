"""Non-local attention block: a feature map in, how much each position speaks for the object out.

Three embeddings θ, φ, g of the features; position i looks at all positions j with w_ij = softmax_j(θ_iᵀφ_j), its new
features are y_i = Σ_j w_ij g_j, and their mean over the channels is its attention a_i. The block takes the place of
channel pooling. Source: seed 002 [0021]; specs/heads.md section 2.2.
Neither g nor y is ever computed at every position. Both are linear, so the channel mean of g is one convolution to one
channel, and a mean of y over some positions is g of a mean of the features: of three vectors per image instead of N.
Letters: B images, C channels, d channels of θ and φ, G of g, N = h · w positions, M masks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from simdetr.detectors.matcher import at_least_float32

START_LOGIT = 4.0
"""θᵀφ of two equal positions whose features have unit mean square, at the start."""


class Attention(NamedTuple):
    """What the block says of a map."""

    weights: Tensor
    """w [B, N, N], rows i sum to 1 and are 0 in padded columns j."""
    raw: Tensor
    """a [B, h, w]; 0 at padded positions."""


class NonLocalAttention(nn.Module):
    """The block for maps of one size C.

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
        with torch.no_grad():
            self.phi.weight.copy_(self.theta.weight)
            assert self.g.bias is not None
            self.g.bias.zero_()

    def forward(self, features: Tensor, padding: Tensor) -> Attention:
        """Attention of a map.

        Args:
            features: [B, C, h, w]; computed with in float32 at least.
            padding: bool [B, h, w]; padded positions weigh nothing.
        """
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
        """Averages of y over positions.

        Args:
            weights: w [B, N, N] of ``features``.
            features: [B, C, h, w].
            averages: [B, M, N], rows of weights that sum to 1.

        Returns:
            [B, M, G].
        """
        with torch.autocast(features.device.type, enabled=False):
            seen = averages.to(weights.dtype) @ weights
            means = averaged(features, seen)
            return F.linear(means, rearrange(self.g.weight, "g c 1 1 -> g c"), self.g.bias)


def averaged(features: Tensor, averages: Tensor) -> Tensor:
    """Averages [B, M, C] of features [B, C, h, w] over positions, weighted by ``averages`` [B, M, N]."""
    return averages @ at_least_float32(features).flatten(2).transpose(1, 2)

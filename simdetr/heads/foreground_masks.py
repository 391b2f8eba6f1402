"""Attention of a map in, normalised attention, three masks and an importance map out; all exclude padding.

Source: seed 002, equation 1 and [0022], [0024]; specs/heads.md section 2.2. Letters: B images, h × w positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

DROPPED, FOREGROUND, BACKGROUND = range(3)
"""Places of the masks in what ``foreground_masks`` gives."""
TEMPERATURE = 0.05
CONSTANT = 1e-5
"""Maps whose values differ by less than this share of the largest are constant but for rounding."""


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
    """A = (a − min a) / (max a − min a) of each image.

    Args:
        raw: a [B, h, w].
        padding: bool [B, h, w]; each image has positions outside it.

    Returns:
        [B, h, w] in [0, 1]; 0 at padded positions, and everywhere where a is constant.
    """
    low = raw.masked_fill(padding, torch.inf).amin(dim=(1, 2), keepdim=True)
    high = raw.masked_fill(padding, -torch.inf).amax(dim=(1, 2), keepdim=True)
    span = high - low
    constant = span.detach() <= CONSTANT * torch.maximum(high.detach().abs(), low.detach().abs())
    scaled = (raw - low) / span.masked_fill(constant, 1.0)
    return scaled.masked_fill(padding | constant, 0.0)


def foreground_masks(
    attention: Tensor, padding: Tensor, foreground: float, background: float, *, soft: bool = False
) -> Tensor:
    """Dropped foreground (equation 1), foreground and background of each image.

    Args:
        attention: A [B, h, w].
        padding: bool [B, h, w]; in none of the masks.
        foreground: θ_fg; what reaches it is the most discriminative part, which is dropped.
        background: θ_bg; what does not exceed it is background.
        soft: the indicators 1[A > θ] become σ((A − θ) / 0.05), which passes a gradient.

    Returns:
        [B, 3, h, w] in [0, 1], in the order of ``DROPPED``, ``FOREGROUND``, ``BACKGROUND``.
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

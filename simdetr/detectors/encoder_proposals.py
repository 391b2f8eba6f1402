"""Two-stage Deformable DETR: every cell of the encoder's output proposes a box, the best ones become queries.

In: padding masks of the levels. Out: one candidate box per cell; the transformer scores them and chooses.
Source: Deformable DETR section 4.2, numerics of specs/detectors.md A6.
Letters: B images, S cells of all levels, Q queries, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Proposals(NamedTuple):
    """Queries chosen among the encoder's cells, with what the encoder's own loss needs."""

    query: Tensor
    """Positions of the queries [B, Q, C]."""
    target: Tensor
    """Content of the queries [B, Q, C]."""
    reference: Tensor
    """Boxes of the queries, cxcywh [B, Q, 4], without gradient."""
    logits: Tensor
    """Objectness logits of all cells [B, S, 1]."""
    boxes: Tensor
    """Boxes of all cells, cxcywh [B, S, 4]; 1 where a cell may not propose."""


def cell_boxes(masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One box per cell, centred on it, with sides of 0.05 · 2^level of the image.

    Args:
        masks: bool [B, H_l, W_l] per level, True = padding.

    Returns:
        Logits of the boxes cxcywh [B, S, 4] relative to the valid image, +inf for cells that may not propose, and bool
        [B, S] of those that may: not padding, and all four coordinates within (0.01, 0.99).
    """
    boxes = []
    for level, mask in enumerate(masks):
        height, width = mask.shape[1:]
        valid_h = (~mask[:, :, 0]).sum(1)[:, None, None]
        valid_w = (~mask[:, 0, :]).sum(1)[:, None, None]
        rows = (torch.arange(height, device=mask.device) + 0.5)[:, None] / valid_h
        columns = (torch.arange(width, device=mask.device) + 0.5)[None, :] / valid_w
        side = torch.full_like(columns, 0.05 * 2.0**level).expand(-1, height, -1)
        boxes.append(torch.stack((columns.expand_as(side), rows.expand_as(side), side, side), dim=-1).flatten(1, 2))
    cxcywh = torch.cat(boxes, dim=1)
    padding = torch.cat([mask.flatten(1) for mask in masks], dim=1)
    usable = ((cxcywh > 0.01) & (cxcywh < 0.99)).all(-1) & ~padding
    return torch.logit(cxcywh).masked_fill(~usable[..., None], torch.inf), usable

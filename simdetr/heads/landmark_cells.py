"""Subregions of an image: which features they hold, which landmark they belong to, which of them are trained.

Pure functions of tensors. Source: seed 004, Figures 7 and 8; specs/heads.md 1.4. The valid (unpadded) image is divided
into rows × columns subregions that do not overlap, numbered row by row.
Letters: B images, C channels, G subregions, A anchor nodes of each, T landmarks of one image (padded).
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from simdetr.boxes import cxcywh_to_xyxy

Selection = Literal["balanced", "all", "positive"]

BACKGROUND_ALONE = 4
"""Background subregions that an image without landmarks is trained on."""
_TOUCH = 1e-5  # a box that overlaps by less of the image ends where the subregion begins


def pool_valid(features: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean of a map over each subregion of the valid image; cells that a border cuts count by their part.

    Args:
        features: [B, C, h, w].
        mask: bool [B, h, w], True = padding, at the bottom and right; the values there do not matter.
        grid: rows and columns of subregions.

    Returns:
        [B, C, rows, columns].
    """
    valid_rows, valid_columns = valid_cells(mask)
    down = _shares(valid_rows, grid[0], features.shape[2]).to(features.dtype)
    across = _shares(valid_columns, grid[1], features.shape[3]).to(features.dtype)
    clean = features.masked_fill(mask[:, None], 0.0)
    return torch.einsum("brh,bchw,bkw->bcrk", down, clean, across)


def valid_cells(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of a map that are not padding, int64 [B] each; mask bool [B, h, w]."""
    return (~mask[:, :, 0]).sum(dim=1), (~mask[:, 0, :]).sum(dim=1)


def _shares(valid: Tensor, parts: int, length: int) -> Tensor:
    """How much of each part's mean each of ``length`` cells is, of which the first ``valid`` [B] are divided.

    Returns:
        [B, parts, length], each row's sum is 1.
    """
    size = valid[:, None, None] / parts
    start = torch.arange(parts, device=valid.device)[:, None] * size
    cell = torch.arange(length, device=valid.device)
    shared = torch.minimum(start + size, cell + 1.0) - torch.maximum(start, cell.to(start.dtype))
    return shared.clamp(min=0) / size


def anchor_positions(grid: tuple[int, int], anchors: int, device: torch.device) -> Tensor:
    """Where the anchor nodes are, fractions of the valid image [G, A, 2]: the centre, and four a quarter away from it.

    Args:
        grid: rows and columns of subregions.
        anchors: A, 1 or 5.
        device: to make them on.
    """
    rows, columns = grid
    y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    corner = rearrange([x, y], "xy r k -> (r k) 1 xy")
    quincunx = [[0.5, 0.5], [0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    size = torch.tensor([columns, rows], device=device)
    return (corner + torch.tensor(quincunx[:anchors], device=device)) / size


def cell_owners(boxes: Tensor, points: Tensor, present: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which landmark each subregion belongs to: the one that covers most of it, of equals the smaller.

    A landmark without extent (a box without area) takes the subregion that holds its point, if no box reaches into it.

    Args:
        boxes: cxcywh, fractions of the valid image [B, T, 4].
        points: fractions of the valid image [B, T, 2], NaN where unknown.
        present: bool [B, T]; the others fill up.
        grid: rows and columns of subregions.

    Returns:
        Index of the landmark, int64 [B, G]; -1 for background.
    """
    rows, columns = grid
    corners = cxcywh_to_xyxy(boxes)
    high = _overlap(corners[..., 1], corners[..., 3], rows)
    wide = _overlap(corners[..., 0], corners[..., 2], columns)
    covered = rearrange(high[:, :, :, None] * wide[:, :, None, :], "b t r k -> b (r k) t")
    reached = rearrange((high > _TOUCH)[:, :, :, None] & (wide > _TOUCH)[:, :, None, :], "b t r k -> b (r k) t")
    held = _cell_of(points, grid)[:, None, :] == torch.arange(rows * columns, device=boxes.device)[:, None]
    has_extent = ((boxes[..., 2] > 0) & (boxes[..., 3] > 0))[:, None]
    candidate = torch.where(has_extent, reached, held) & present[:, None]
    share = torch.where(has_extent, covered, 0.0).masked_fill(~candidate, -1.0)
    most = share.amax(dim=2, keepdim=True)
    # equal but for rounding
    candidate = candidate & (share >= most * (1 - 1e-5))
    area = torch.where(has_extent, boxes[..., 2:].prod(dim=-1)[:, None], 0.0)
    smallest = area.expand_as(candidate).masked_fill(~candidate, torch.inf).argmin(dim=2)
    return torch.where(candidate.any(dim=2), smallest, -1)


def _overlap(low: Tensor, high: Tensor, parts: int) -> Tensor:
    """Length that intervals [B, T] share with each of the equal parts of 0..1; [B, T, parts]."""
    start = torch.arange(parts, device=low.device) / parts
    end = torch.arange(1, parts + 1, device=low.device) / parts
    return (torch.minimum(high[..., None], end) - torch.maximum(low[..., None], start)).clamp(min=0)


def _cell_of(points: Tensor, grid: tuple[int, int]) -> Tensor:
    """Subregion that holds a point, points [B, T, 2] to int64 [B, T]; -1 for unknown ones and those outside."""
    rows, columns = grid
    # the right and lower edges of the image belong to its last subregions
    column = (points[..., 0] * columns).floor().clamp(max=columns - 1).where(points[..., 0] <= 1, -1)
    row = (points[..., 1] * rows).floor().clamp(max=rows - 1).where(points[..., 1] <= 1, -1)
    inside = (column >= 0) & (row >= 0)
    return torch.where(inside, row * columns + column, -1).long()


def select_cells(positive: Tensor, selection: Selection, generator: torch.Generator | None = None) -> Tensor:
    """Which subregions are trained, bool [B, G].

    Args:
        positive: subregions of a landmark, bool [B, G].
        selection: ``balanced`` adds as many of the background as there are positive ones, drawn at random, and 4 to an
            image without any; ``all`` and ``positive`` draw nothing.
        generator: of the draw; by default torch's own.
    """
    if selection == "all":
        return torch.ones_like(positive)
    if selection == "positive":
        return positive
    found = positive.sum(dim=1, keepdim=True)
    wanted = torch.where(found > 0, found, BACKGROUND_ALONE)
    noise = torch.rand(positive.shape, generator=generator, device=positive.device)
    # ranks of a random order in which the background comes first
    rank = noise.masked_fill(positive, 2.0).argsort(dim=1).argsort(dim=1)
    return positive | (rank < wanted)


def select_anchors(confidence: Tensor, top: int | None = None, threshold: float = 0.0) -> Tensor:
    """Which anchor nodes of each subregion are trained, bool [..., A].

    Args:
        confidence: of each that there is a landmark [..., A].
        top: only the most confident ones, so many of each subregion; None for all.
        threshold: only those of this confidence or more.
    """
    used = confidence >= threshold
    if top is None or top >= confidence.shape[-1]:
        return used
    best = confidence.topk(top, dim=-1).indices
    return used & torch.zeros_like(used).scatter(-1, best, True)

"""Landmarks by subregion: one feature map in; class scores and points of the anchor nodes of every subregion out.

Literal to US 11,544,507, Figures 7 and 8: the valid (unpadded) image is divided into rows × columns subregions that do
not overlap, numbered row by row, and those that a landmark reaches into all learn its class and the same reference
point.
Letters: B images, C channels, G subregions, A anchor nodes of each, T landmarks of one image (padded), M classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from simdetr.boxes import cxcywh_to_xyxy
from simdetr.detectors.detector import Features, FeatureSizes, Level
from simdetr.detectors.matcher import at_least_float32
from simdetr.detectors.vidt import map_projection
from simdetr.heads.head import check_finite
from simdetr.heads.landmark_losses import LandmarkRule, landmark_losses, point_error, record_logits
from simdetr.heads.landmark_targets import LandmarkTargets, Samples, point_units, valid_cells

PointOutput = Literal["offset", "absolute"]
Selection = Literal["balanced", "all", "positive"]

BACKGROUND_ALONE = 4  # Background subregions that an image without landmarks is trained on
_TOUCH = 1e-5  # a box that overlaps by less of the image ends where the subregion begins


class GridOutputs(NamedTuple):
    """Of every anchor node of every subregion."""

    logits: Tensor  # Class scores, background last [B, G, A, M + 1]
    points: Tensor  # (x, y), fractions of the valid image, perhaps outside it [B, G, A, 2]


class GridLandmarks(nn.Module):
    """Scores and points per anchor node, and what they learn.

    A subregion is read as its four quarters, pooled each for itself: a mean over all of it would not tell where in it
    something is. What its place in the image says is learned too.

    Args:
        sizes: of the feature maps.
        rule: losses of a sample.
        dim: width of the hidden features; the other arguments are those of ``LandmarkHead``.
    """

    def __init__(
        self,
        sizes: FeatureSizes,
        rule: LandmarkRule,
        grid: tuple[int, int],
        anchors: int,
        level: int | None,
        point_output: PointOutput,
        selection: Selection,
        top_anchors: int | None,
        anchor_threshold: float,
        dim: int = 256,
    ) -> None:
        super().__init__()
        self.rule, self.grid, self.anchors, self.level = rule, grid, anchors, level
        self.offsets, self.selection = point_output == "offset", selection
        self.top_anchors, self.anchor_threshold = top_anchors, anchor_threshold
        self.num_classes, self.channels = sizes.num_classes, sizes.level_channels
        readable = range(len(self.channels)) if level is None else [level % len(self.channels)]
        # the map is chosen by its size, which depends on the images
        self.projections = nn.ModuleDict({str(index): map_projection(self.channels[index], dim) for index in readable})
        self.quarters = nn.Conv2d(dim, dim, 2, stride=2)
        self.place = nn.Parameter(torch.zeros(dim, *grid))
        self.class_embed = nn.Conv2d(dim, anchors * (self.num_classes + 1), 1)
        self.point_embed = nn.Conv2d(dim, anchors * 2, 1)
        nn.init.zeros_(self.point_embed.weight)
        assert self.point_embed.bias is not None
        # at the start every point is its anchor node, or the middle of the image
        nn.init.constant_(self.point_embed.bias, 0.0 if self.offsets else 0.5)

    def forward(self, features: Features) -> GridOutputs:
        """Scores and points; ValueError for maps smaller than the grid, other channels, or values not finite."""
        index = self._chosen(features.levels)
        level = features.levels[index]
        check_finite(f"levels[{index}]", level.features.masked_fill(level.mask[:, None], 0.0))
        pooled = pool_valid(level.features, level.mask, (2 * self.grid[0], 2 * self.grid[1]))
        hidden = self.quarters(self.projections[str(index)](pooled).relu()) + self.place + self._unread(index)
        hidden = hidden.relu()
        split = "b (a out) r k -> b (r k) a out"
        logits = at_least_float32(rearrange(self.class_embed(hidden), split, a=self.anchors))
        points = at_least_float32(rearrange(self.point_embed(hidden), split, a=self.anchors))
        if self.offsets:
            points = points + anchor_positions(self.grid, self.anchors, points.device)
        return GridOutputs(logits, points)

    def _chosen(self, levels: Sequence[Level]) -> int:
        """Index of the map that is read."""
        sizes = [(level.features.shape[2], level.features.shape[3]) for level in levels]
        rows, columns = self.grid
        tried = range(len(levels)) if self.level is None else [self.level % len(levels)]
        fitting = [index for index in tried if sizes[index][0] >= rows and sizes[index][1] >= columns]
        if not fitting:
            raise ValueError(
                f"grid: {rows} x {columns} subregions, but the feature maps have {[sizes[i] for i in tried]} rows and "
                "columns; take fewer subregions, a finer level, or larger images"
            )
        index = fitting[-1]
        shape, channels = list(levels[index].features.shape), self.channels[index]
        if shape[1] != channels:
            raise ValueError(f"levels[{index}]: expected [B, {channels}, h, w], got {shape}")
        return index

    def _unread(self, read: int) -> Tensor | float:
        """0, of the projections of the maps that were not read: in training all parameters take part."""
        others = [part for name, part in self.projections.items() if name != str(read)]
        if not (self.training and others):
            return 0.0
        return 0.0 * torch.stack([parameter.sum() for part in others for parameter in part.parameters()]).sum()

    def samples(self, outputs: GridOutputs, features: Features, targets: LandmarkTargets) -> Samples:
        """Losses of all anchor nodes, and which of them count; one sample per node."""
        owner = cell_owners(targets.boxes, targets.points, targets.present, self.grid)
        positive = owner >= 0
        chosen = owner.clamp(min=0)
        classes = torch.where(positive, targets.labels.gather(1, chosen), self.num_classes)
        points = targets.points.gather(1, chosen[..., None].expand(-1, -1, 2))

        confidence = 1 - outputs.logits.detach().softmax(dim=-1)[..., -1]
        used = select_anchors(confidence, self.top_anchors, self.anchor_threshold)
        used = used & select_cells(positive, self.selection)[..., None]

        units = point_units(features.levels, self.rule.unit, self.grid).to(outputs.points.dtype)[:, None, None]
        errors = point_error(outputs.points * units, points[:, :, None] * units, self.rule.beta)
        classes = classes[..., None].expand(errors.shape).flatten()
        losses = landmark_losses(outputs.logits.flatten(0, 2), classes, errors.flatten(), self.rule)
        return Samples(losses, used.flatten().to(errors.dtype), classes < self.num_classes, 0.0)

    def predictions(self, outputs: GridOutputs, features: Features) -> dict[str, Tensor]:
        """One record per anchor node, see ``record_logits``: standalone as a detector's boxes without size.

        Then ``point_cells`` [B, 2] goes with them, a subregion's width and height as fractions of the valid image: the
        subregions that a landmark reaches into all predict it, and that is how far its duplicates can lie apart. On a
        detector, whose boxes stay its own, they stand beside them as ``landmark_logits`` and ``landmark_points``, which
        files of predictions do not hold.
        """
        logits, points = record_logits(outputs.logits).flatten(1, 2), outputs.points.flatten(1, 2)
        if features.queries is not None:
            return {"landmark_logits": logits, "landmark_points": points}
        boxes = torch.cat((points, torch.zeros_like(points)), dim=-1)
        rows, columns = self.grid
        cells = points.new_tensor([1 / columns, 1 / rows]).expand(points.shape[0], -1)
        return {"pred_logits": logits, "pred_boxes": boxes, "pred_points": points, "point_cells": cells}


# ----------------------------------------------------------------------------------------------------------------------
# Subregions of an image: which features they hold, which landmark they belong to, which of them are trained.


def pool_valid(features: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean [B, C, rows, columns] of a map [B, C, h, w] over each subregion; cells that a border cuts count by part.

    The mask, bool [B, h, w], is True on padding, at the bottom and right; the values there do not matter.
    """
    valid_rows, valid_columns = valid_cells(mask)
    down = _shares(valid_rows, grid[0], features.shape[2]).to(features.dtype)
    across = _shares(valid_columns, grid[1], features.shape[3]).to(features.dtype)
    clean = features.masked_fill(mask[:, None], 0.0)
    return torch.einsum("brh,bchw,bkw->bcrk", down, clean, across)


def _shares(valid: Tensor, parts: int, length: int) -> Tensor:
    """How much of each part's mean each cell is, of which the first ``valid`` [B] are divided: [B, parts, length]."""
    size = valid[:, None, None] / parts
    start = torch.arange(parts, device=valid.device)[:, None] * size
    cell = torch.arange(length, device=valid.device)
    shared = torch.minimum(start + size, cell + 1.0) - torch.maximum(start, cell.to(start.dtype))
    return shared.clamp(min=0) / size


def anchor_positions(grid: tuple[int, int], anchors: int, device: torch.device) -> Tensor:
    """The anchor nodes [G, A, 2], fractions of the valid image: the centre, and four a quarter away from it."""
    rows, columns = grid
    y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    corner = rearrange([x, y], "xy r k -> (r k) 1 xy")
    quincunx = [[0.5, 0.5], [0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    size = torch.tensor([columns, rows], device=device)
    return (corner + torch.tensor(quincunx[:anchors], device=device)) / size


def cell_owners(boxes: Tensor, points: Tensor, present: Tensor, grid: tuple[int, int]) -> Tensor:
    """Index of the landmark that each subregion belongs to, int64 [B, G]; -1 for background.

    It is the one that covers most of it, of equals the smaller. A landmark without extent (a box without area) takes
    the subregion that holds its point, if no box reaches into it. Boxes, points and present are ``LandmarkTargets``'.
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
    candidate = candidate & (share >= share.amax(dim=2, keepdim=True) * (1 - 1e-5))  # equal but for rounding
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

    ``balanced`` adds as many of the background as there are positive ones (those of a landmark, bool [B, G]), drawn at
    random, and 4 to an image without any; ``all`` and ``positive`` draw nothing.
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
    """Which anchor nodes of each subregion are trained, bool [..., A], by their confidence that there is a landmark.

    Only those of ``threshold`` or more, and of each subregion only the ``top`` most confident ones; None for all.
    """
    used = confidence >= threshold
    if top is None or top >= confidence.shape[-1]:
        return used
    best = confidence.topk(top, dim=-1).indices
    return used & torch.zeros_like(used).scatter(-1, best, True)

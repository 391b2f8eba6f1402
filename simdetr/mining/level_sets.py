"""Finer than the grid: coarse cluster labels and the image itself in, shapes a few pixels fine out.

The document's regions are made of cells of 16 and 32 pixels, too coarse for the box of a small object. Here each
cluster becomes a normal distribution of colours, and the image is cut into cells of ``cell_px`` pixels. A cell belongs
to the clusters of a clustering with some probability; the connected components of the cells above each of several
probabilities (level sets), as they are and shrunk by ``erosion`` cells, are the shapes. Low levels join what belongs
together, high levels and shrinking part what touches. `benchmarks/results/sweep.json` has the gain of each choice.

Letters: B images of one shape, L clusterings, J clusters of all clusterings together, H x W fine cells, P planes per
image (cluster, level, shrunk or not), C colour channels; S shapes and M their runs, of all images in one list. A run
is a row of neighbouring cells of one shape: there are several times fewer of them than cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from simdetr.mining.colour_texture import rgb_to_lab, standardise
from simdetr.mining.regions import mask_components

SMOOTHING = 2.0  # divides log likelihoods: neighbouring channels and cells are not independent evidence
LEAST_VARIANCE = 5e-4
LEAST_CELLS = 2.0  # a cluster of less weight has no distribution
NEVER = -1e9


@dataclass(frozen=True)
class LevelSets:
    """Settings of the fine shapes and of their choice; chosen on training images (`benchmarks/sweep.py`).

    They are this library's own, in place of the document's regions and its five filters.

    Args:
        cell_px: Side of a fine cell in pixels of the encoded image; a divisor of 16.
        levels: Probabilities above which a cell belongs to a shape.
        erosion: Also look at every level set shrunk by this many cells, which parts objects that touch; 0 does not.
        min_cells: Smaller shapes are dropped.
        max_boxes: Boxes per image that are kept, at most.
        max_iou: Of two boxes that overlap more, the lower ranked goes; below, its score falls with the overlap.
        edge_power: How much the strength of the contour counts in the ranking.
        border_factor: Applied for every image border a box touches: background reaches the border, objects rarely do.
        recurrence_power: How much it counts that other clusterings and levels find a box again.
        distance_powers: Per stride of the encoder, how much it counts how far the features inside a box are from those
            around it; empty, like ``angle_powers``, ranks by the image alone, whatever the encoder sees.
        angle_powers: Likewise, how much their direction differs.
        balance: Scores are divided by this power of the image's best score, so that they compare between images: 0
            leaves them, at 1 every image's best box has the score 1.
        max_ranked: Shapes per image that are compared with each other, the best by their own looks.
        min_relative_score: Boxes whose score is below this share of the image's best are dropped; 0 keeps all.
    """

    cell_px: int = 4
    levels: tuple[float, ...] = (0.05, 0.15, 0.35, 0.7, 0.9)
    erosion: int = 0
    min_cells: int = 8
    max_boxes: int = 25
    max_iou: float = 0.8
    edge_power: float = 1.5
    border_factor: float = 0.5
    recurrence_power: float = 0.5
    distance_powers: dict[int, float] = field(default_factory=lambda: {32: 1.0, 16: 0.5})
    angle_powers: dict[int, float] = field(default_factory=lambda: {16: 0.5})
    balance: float = 0.75
    max_ranked: int = 512
    min_relative_score: float = 0.0

    def __post_init__(self) -> None:
        if self.cell_px < 1 or 16 % self.cell_px:
            raise ValueError(f"cell_px: expected 1, 2, 4, 8 or 16, got {self.cell_px}")
        if not self.levels or not all(0 < level < 1 for level in self.levels):
            raise ValueError(f"levels: expected probabilities between 0 and 1, got {list(self.levels)}")
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance: expected 0..1, got {self.balance}; 1 makes the best boxes of all images equal")
        if self.erosion < 0 or min(self.min_cells, self.max_boxes, self.max_ranked) < 1:
            raise ValueError(
                "erosion, min_cells, max_boxes, max_ranked: expected at least 0, 1, 1 and 1, got "
                f"{self.erosion}, {self.min_cells}, {self.max_boxes} and {self.max_ranked}"
            )


@dataclass(frozen=True)
class Shapes:
    """Connected shapes of a batch of images, in the order of image, plane and first cell."""

    grid: tuple[int, int]  # (H, W) in fine cells
    image: Tensor  # int64 [S]
    cluster: Tensor  # int64 [S], of the J
    count: Tensor  # int64 [S], cells
    boxes: Tensor  # float32 [S, 4], x0, y0, x1, y1 in fine cells, grown back by the erosion
    edge: Tensor  # float32 [S], mean strength of the image's edges along the contour
    starts: Tensor  # int64 [M], place y W + x of every run's first cell
    lengths: Tensor  # int64 [M], cells of every run
    shape_of: Tensor  # int64 [M], its shape; S for runs of what was too small for one


def colours(images: Tensor, cell_px: int) -> Tensor:
    """L*a*b* of each cell's mean, scaled by its spread in the image; RGB [B, 3, 16 h, 16 w] in 0..1 to [B, 3, H, W].

    Texture is left out: it is only known over a neighbourhood, and widens every shape by that.
    """
    return standardise(rgb_to_lab(functional.avg_pool2d(images, cell_px)))


def edge_strength(colour: Tensor) -> Tensor:
    """Largest difference of a cell's colour to its four neighbours', [B, 3, H, W] to [B, H, W]."""
    down = functional.pad((colour[:, :, 1:] - colour[:, :, :-1]).square().sum(dim=1), (0, 0, 1, 1))
    right = functional.pad((colour[:, :, :, 1:] - colour[:, :, :, :-1]).square().sum(dim=1), (1, 1))
    squares = torch.stack((down[:, 1:], down[:, :-1], right[:, :, 1:], right[:, :, :-1]))
    return squares.amax(dim=0).sqrt()


def memberships(colour: Tensor, labels: Tensor, num_clusters: int) -> Tensor:
    """Probability that a fine cell belongs to each cluster, by normal distributions with a diagonal covariance.

    From colour [B, C, H, W] and one clustering's labels int64 [B, h, w] on a coarser grid to [B, K, H, W]; a cluster
    without cells has probability 0.
    """
    height, width = colour.shape[-2:]
    member = rearrange(functional.one_hot(labels, num_clusters).to(colour), "b h w k -> b k h w")
    share = functional.interpolate(member, (height, width), mode="bilinear", align_corners=False).flatten(2)
    values = colour.flatten(2)
    powers = torch.cat((values, values.square()), dim=1)
    weight = share.sum(dim=2, keepdim=True)
    mean, square = (torch.bmm(share, powers.mT) / weight.clamp(min=LEAST_VARIANCE)).chunk(2, dim=2)
    precision = (square - mean.square()).clamp(min=LEAST_VARIANCE).reciprocal()
    constant = (mean.square() * precision - precision.log()).sum(dim=2, keepdim=True)
    distance = torch.bmm(torch.cat((-2 * mean * precision, precision), dim=2), powers) + constant
    evidence = (-0.5 / SMOOTHING * distance).masked_fill(weight < LEAST_CELLS, NEVER)
    return rearrange(evidence.softmax(dim=1), "b k (h w) -> b k h w", h=height)


def find_shapes(
    images: Tensor, labels: Mapping[tuple[int, int], Tensor], settings: LevelSets, *, connectivity: int = 4
) -> Shapes:
    """All shapes of a batch of images of one shape.

    Args:
        images: float [B, 3, 16 h, 16 w], RGB in 0..1.
        labels: per (stride, K) the cluster of every cell, int64 [B, h_l, w_l].
        settings: cells, levels, erosion.
        connectivity: 4 or 8 neighbours join cells.
    """
    colour = colours(images, settings.cell_px)
    probability = torch.cat([memberships(colour, label, k) for (_, k), label in labels.items()], dim=1)
    probabilities = [probability]
    if settings.erosion:
        probabilities.append(_erode(probability, settings.erosion))
    masks = torch.stack([values > level for values in probabilities for level in settings.levels], dim=2)
    eroded = torch.arange(masks.shape[2], device=masks.device) >= len(settings.levels)
    return _measure(masks, eroded * settings.erosion, edge_strength(colour), settings.min_cells, connectivity)


def _erode(probability: Tensor, cells: int) -> Tensor:
    """Lowest value within a square of 2 n + 1 cells; a level set of it is the level set, eroded."""
    return -functional.max_pool2d(-probability, 2 * cells + 1, stride=1, padding=cells)


def _contours(masks: Tensor) -> Tensor:
    """Cells of masks [..., H, W] with one of their four neighbours outside; the border of the grid is no contour."""
    inner = masks.clone()
    inner[..., 1:, :] &= masks[..., :-1, :]
    inner[..., :-1, :] &= masks[..., 1:, :]
    inner[..., 1:] &= masks[..., :-1]
    inner[..., :-1] &= masks[..., 1:]
    return masks & ~inner


def _measure(masks: Tensor, erosion: Tensor, edges: Tensor, min_cells: int, connectivity: int) -> Shapes:
    """Size, box and contour of every component of masks [B, J, V, H, W], without a loop over them."""
    _, clusters, variants, height, width = masks.shape
    numbers = mask_components(masks.flatten(0, 2), connectivity=connectivity).flatten()
    begins, ends = masks.clone(), masks.clone()
    begins[..., 1:] &= ~masks[..., :-1]
    ends[..., :-1] &= ~masks[..., 1:]
    first, last = _places(begins), _places(ends)
    owner = numbers[first].long() - 1
    found, area = int(owner.max()) + 1 if len(owner) else 0, height * width
    lengths, place = last - first + 1, first % area
    row, column = place // width, place % width
    plane = first.new_zeros(found).scatter_(0, owner, first // area)
    image, cluster = plane // (clusters * variants), plane // variants % clusters
    grown = erosion[plane % variants]
    low = [_extreme(values, owner, found, "amin") - grown for values in (column, row)]
    high = [_extreme(values, owner, found, "amax") + grown for values in (column + lengths, row + 1)]
    boxes = torch.stack([*(edge.clamp(min=0) for edge in low), high[0].clamp(max=width), high[1].clamp(max=height)], 1)
    contour = _places(_contours(masks))
    on = numbers[contour].long() - 1
    strength = edges.flatten()[contour // (clusters * variants * area) * area + contour % area]
    edge = torch.bincount(on, strength, minlength=found) / torch.bincount(on, minlength=found).clamp(min=1)
    size = first.new_zeros(found).index_add_(0, owner, lengths)
    large = size >= min_cells
    kept = torch.where(large, large.cumsum(0) - 1, int(large.sum()))
    return Shapes(
        grid=(height, width),
        image=image[large],
        cluster=cluster[large],
        count=size[large],
        boxes=boxes[large].float(),
        edge=edge[large].float(),
        starts=place,
        lengths=lengths,
        shape_of=kept[owner],
    )


def _places(mask: Tensor) -> Tensor:
    """Flat indices of the set cells, int64, ascending; on the host by numpy, which is three times faster."""
    if mask.is_cpu:
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero()[:, 0]


def _extreme(values: Tensor, numbers: Tensor, count: int, which: str) -> Tensor:
    return values.new_zeros(count).scatter_reduce_(0, numbers, values, which, include_self=False)

"""Shapes of a batch in, the few that look most like objects out, as regions with scores.

In place of the document's last rule, which looks at overlap and size alone. A shape ranks high if the image has an
edge along its contour, if the encoder sees other things inside its box than around it, if other clusterings and levels
find it again, and if it is not tiny; every image border that its box touches halves its rank. What each factor gives:
`benchmarks/results/sweep.json` and `proposal_ranking.json`.

Letters: as in :mod:`simdetr.mining.level_sets`; R ranked shapes per image (padded), h x w cells of a map, D its
channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from simdetr.boxes import batched_iou
from simdetr.mining.level_sets import LevelSets, Shapes
from simdetr.mining.regions import Regions, in_pixels

RECURRENCE_IOU = 0.6  # boxes that overlap more are the same finding
AREA_POWER = 0.5
LEAST_CONTRAST = 0.02  # in spreads of the features: a box around the whole image keeps its order among its like
TINY = 1e-12
GONE = -1.0  # rank of what is not to be chosen
RING = 0.5  # width of the ring in sides of the box, and at least
LEAST_RING = 1.0  # in cells of the map: thinner rings see the object itself
LEAST_SHARE = 0.05  # of the box's own area; a smaller ring, around a box that is nearly the image, is none
FLAT = 1e-6  # squared spread of a map below which nothing differs, in units of its mean square


def rank_shapes(
    shapes: Shapes, images: int, settings: LevelSets, maps: Mapping[int, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The shapes to keep, best first within each image, and the score of every shape.

    Args:
        shapes: of all images.
        images: B.
        settings: of the ranking.
        maps: features [B, D, h, w] by stride, of the settings' strides; None leaves the encoder out.

    Returns:
        Indices of the kept shapes, int64, in the order of image and rank; scores float32 [S], 0 where not kept.
    """
    height, width = shapes.grid
    sides = shapes.boxes[:, 2:] - shapes.boxes[:, :2]
    touched = (shapes.boxes == shapes.boxes.new_tensor([0, 0, width, height])).sum(dim=1)
    looks = shapes.edge**settings.edge_power * settings.border_factor**touched
    looks = looks * (sides.prod(dim=1) / (height * width)) ** AREA_POWER
    table = _best_of_images(looks, shapes.image, images, settings.max_ranked)
    valid = table >= 0
    iou = batched_iou(shapes.boxes[table])
    again = ((iou > RECURRENCE_IOU) & valid[:, None, :]).sum(dim=2)
    ranks = looks[table] * again.to(looks) ** settings.recurrence_power
    if maps is not None:
        ranks[valid] *= _seen(shapes.boxes[table[valid]], shapes.image[table[valid]], shapes.grid, maps, settings)
    chosen, decayed = suppress(iou, ranks.where(valid, GONE), settings.max_boxes, settings.max_iou)
    best = decayed[:, :1].clamp(min=TINY)
    good = (decayed >= 0) & (decayed >= settings.min_relative_score * best)
    kept = table.gather(1, chosen)[good]
    scores = torch.zeros_like(looks)
    scores[kept] = (decayed / best**settings.balance)[good]
    return kept, scores


def _seen(
    boxes: Tensor, image: Tensor, grid_hw: tuple[int, int], maps: Mapping[int, Tensor], settings: LevelSets
) -> Tensor:
    """Factor of what the encoder sees in and around each box, [S]."""
    factor = boxes.new_ones(len(boxes))
    for stride in sorted({*settings.distance_powers, *settings.angle_powers}):
        distance, angle = feature_contrast(boxes, image, maps[stride], grid_hw)
        factor *= (distance + LEAST_CONTRAST) ** settings.distance_powers.get(stride, 0.0)
        factor *= (angle + LEAST_CONTRAST) ** settings.angle_powers.get(stride, 0.0)
    return factor


def suppress(iou: Tensor, ranks: Tensor, count: int, max_iou: float) -> tuple[Tensor, Tensor]:
    """Choose the best box of every image again and again; each choice lowers the others by 1 - IoU² (soft NMS).

    Source: Bodla et al., Soft-NMS: improving object detection with one line of code, 2017, with the square, so that
    neighbours that hardly overlap keep their rank; what overlaps more than ``max_iou`` goes. From the boxes' IoU
    [B, R, R] and ranks [B, R], higher is better, negative is never chosen, to at most ``count`` rows of boxes, int64
    [B, C], and their lowered ranks [B, C], not ascending; negative where none was left.
    """
    left = ranks.clone()
    rows, lowered = [], []
    for _ in range(min(count, ranks.shape[1])):
        rank, row = left.max(dim=1)
        rows.append(row)
        lowered.append(rank)
        overlap = iou.gather(1, row[:, None, None].expand(-1, -1, ranks.shape[1]))[:, 0]
        left = (left * (1 - overlap.square())).where(overlap <= max_iou, GONE).scatter(1, row[:, None], GONE)
    if not rows:
        return ranks.new_zeros(len(ranks), 0, dtype=torch.int64), ranks.new_zeros(len(ranks), 0)
    return torch.stack(rows, dim=1), torch.stack(lowered, dim=1)


def _best_of_images(values: Tensor, image: Tensor, images: int, limit: int) -> Tensor:
    """Indices of the highest values of each image, int64 [B, R] with R <= limit, padded by -1."""
    order = values.argsort(descending=True, stable=True)
    order = order[image[order].argsort(stable=True)]
    place = _place_within_image(image[order], images)
    order, place = order[place < limit], place[place < limit]
    rows = int(place.max()) + 1 if len(place) else 0
    table = torch.full((images, rows), -1, device=values.device)
    table[image[order], place] = order
    return table


def _place_within_image(image: Tensor, images: int) -> Tensor:
    """Number of each row among those of its image; rows are sorted by image."""
    counts = torch.bincount(image, minlength=images)
    return torch.arange(len(image), device=image.device) - (counts.cumsum(0) - counts)[image]


def shapes_to_regions(
    shapes: Shapes,
    kept: Tensor,
    scores: Tensor,
    labels: Mapping[tuple[int, int], Tensor],
    last_map: Tensor,
    sizes_hw: Sequence[tuple[int, int]],
) -> list[Regions]:
    """Regions of each image in pixels of its original, best first.

    ``kept`` and ``scores`` are of :func:`rank_shapes`; the keys (stride, K) of ``labels`` say what the planes are;
    region features are averages of ``last_map`` [B, D, h, w]; originals have (height, width) pixels.
    """
    features = _pooled(shapes, kept, last_map).cpu().numpy()
    origin = np.array([(stride, k, c) for stride, k in labels for c in range(k)], np.int16)
    came = origin[shapes.cluster[kept].cpu().numpy()]
    boxes, counts, score = (values[kept].cpu().numpy() for values in (shapes.boxes, shapes.count, scores))
    ends = torch.bincount(shapes.image[kept], minlength=len(sizes_hw)).cumsum(0).tolist()
    regions, start = [], 0
    for end, size_hw in zip(ends, sizes_hw, strict=True):
        own = slice(start, end)
        regions.append(in_pixels(boxes[own], counts[own], features[own], came[own], score[own], shapes.grid, size_hw))
        start = end
    return regions


def _pooled(shapes: Shapes, kept: Tensor, last_map: Tensor) -> Tensor:
    """Average of the map over every kept shape, [kept, D]: each of its cells counts as the map's cell it lies in."""
    height, width = shapes.grid
    rows, columns = last_map.shape[-2:]
    image, place = shapes.image[kept], _place_within_image(shapes.image[kept], len(last_map))
    slots = int(place.max()) + 1 if len(kept) else 0
    slot = torch.full((len(shapes.image) + 1,), -1, device=kept.device)  # the last is for runs of no shape
    slot[kept] = image * slots + place
    member = slot[shapes.shape_of]
    starts, lengths, member = (values[member >= 0] for values in (shapes.starts, shapes.lengths, member))
    member = member.repeat_interleave(lengths)
    before = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    cells = starts.repeat_interleave(lengths) + torch.arange(len(member), device=kept.device) - before
    coarse = (cells // width * rows // height) * columns + cells % width * columns // width
    weights = last_map.new_zeros(len(last_map) * slots * rows * columns, dtype=torch.float32)
    weights.index_add_(0, member * (rows * columns) + coarse, torch.ones_like(coarse, dtype=torch.float32))
    cells_of_map = rearrange(last_map, "b d h w -> b (h w) d").float()
    sums = torch.bmm(weights.reshape(len(last_map), slots, rows * columns), cells_of_map)
    return sums[image, place] / shapes.count[kept][:, None]


# ----------------------------------------------------------------------------------------------------------------------
# How much each box stands out from its surroundings in the encoder's eyes.


def feature_contrast(boxes: Tensor, image: Tensor, level: Tensor, grid_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """How far the mean features inside a box and in the ring around it are apart.

    The difference is counted in the spreads of the image's own features, so that it has no unit and means the same for
    every encoder, image and stride.

    Args:
        boxes: float32 [S, 4], x0, y0, x1, y1 in cells of a grid over the whole image.
        image: int64 [S], which of the B images a box is in, in any order.
        level: [B, D, h, w], the feature map.
        grid_hw: (height, width) of the boxes' grid.

    Returns:
        Their distance in spreads of the image's features, and 1 minus their cosine after the image's mean is
        subtracted, 0..2; float32 [S] each, 0 for a box without surroundings and in an image without differences.
    """
    rows, columns = level.shape[-2:]
    cells = rearrange(level, "b d h w -> b (h w) d").float()
    centred = cells - cells.mean(dim=1, keepdim=True)
    variance, power = centred.square().sum(dim=2).mean(dim=1), cells.square().sum(dim=2).mean(dim=1)
    centred *= torch.where(variance > FLAT * power, variance, torch.inf).rsqrt()[:, None, None]
    step = boxes.new_tensor([columns / grid_hw[1], rows / grid_hw[0]]).repeat(2)
    inside, around = _inside_and_around(boxes * step, (rows, columns))
    distance, angle = boxes.new_zeros(len(boxes)), boxes.new_zeros(len(boxes))
    for index in range(len(level)):  # of a batch, or of the one image that the host works on
        own = image == index
        within, outside = inside[own] @ centred[index], around[own] @ centred[index]
        seen = around[own].any(dim=1)
        distance[own] = (within - outside).norm(dim=1) * seen
        cosine = functional.cosine_similarity(within, outside, dim=1)
        angle[own] = (1 - cosine).clamp(min=0) * (seen & bool(centred[index].any()))
    return distance, angle


def _inside_and_around(boxes: Tensor, size_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Weights of the cells for the mean inside each box and in its ring, [S, h w] each; none for a ring too small."""
    sides = boxes[:, 2:] - boxes[:, :2]
    margin = (RING * sides).clamp(min=LEAST_RING)
    inside = coverage(boxes, size_hw)
    around = coverage(torch.cat((boxes[:, :2] - margin, boxes[:, 2:] + margin), dim=1), size_hw) - inside
    area, ring = inside.sum(dim=1, keepdim=True), around.sum(dim=1, keepdim=True)
    return inside / area.clamp(min=FLAT), around / ring.clamp(min=FLAT) * (ring >= LEAST_SHARE * area)


def coverage(boxes: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Share of every cell that lies in each box, [S, h w]; boxes are xyxy [S, 4] in cells of a map of that size."""
    shares = []
    for axis, size in ((1, size_hw[0]), (0, size_hw[1])):
        begin = torch.arange(size, device=boxes.device, dtype=boxes.dtype)
        low = boxes[:, axis, None].maximum(begin)
        shares.append((boxes[:, axis + 2, None].minimum(begin + 1) - low).clamp(min=0))
    return (shares[0][:, :, None] * shares[1][:, None, :]).flatten(1)

"""Boxes and feature maps in, how much each box stands out from its surroundings in the encoder's eyes out.

An object has other features than the ring around it; ground and pieces of a large object have the same. The difference
of the mean features inside and around a box is counted in the spreads of the image's own features, so that it has no
unit and means the same for every encoder, image and stride.

Letters: B images of one shape, S boxes of all images in one list, h x w cells of a map, D its channels.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

RING = 0.5  # width of the ring in sides of the box, and at least
LEAST_RING = 1.0  # in cells of the map: thinner rings see the object itself
LEAST_SHARE = 0.05  # of the box's own area; a smaller ring, around a box that is nearly the image, is none
FLAT = 1e-6  # squared spread of a map below which nothing differs, in units of its mean square


def feature_contrast(boxes: Tensor, image: Tensor, level: Tensor, grid_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """How far the mean features inside a box and in the ring around it are apart.

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
    inside = _coverage(boxes, size_hw)
    around = _coverage(torch.cat((boxes[:, :2] - margin, boxes[:, 2:] + margin), dim=1), size_hw) - inside
    area, ring = inside.sum(dim=1, keepdim=True), around.sum(dim=1, keepdim=True)
    return inside / area.clamp(min=FLAT), around / ring.clamp(min=FLAT) * (ring >= LEAST_SHARE * area)


def _coverage(boxes: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Share of every cell that lies in each box, [S, h w]; a box is a product of two intervals."""
    shares = []
    for axis, size in ((1, size_hw[0]), (0, size_hw[1])):
        begin = torch.arange(size, device=boxes.device, dtype=boxes.dtype)
        low = boxes[:, axis, None].maximum(begin)
        shares.append((boxes[:, axis + 2, None].minimum(begin + 1) - low).clamp(min=0))
    return (shares[0][:, :, None] * shares[1][:, None, :]).flatten(1)

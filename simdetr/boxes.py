"""The only box arithmetic: format changes, overlap, clipping. Tensors in, tensors out.

Formats are in the names: ``xyxy`` = corners (x0, y0, x1, y1), ``xywh`` = corner and size as COCO writes them,
``cxcywh`` = centre and size. Pixel boxes lie on the upright original image with x to the right and y down, and the
right and lower edges are exclusive, so that width = x1 - x0. Normalised boxes are cxcywh divided by (W, H, W, H).
Overlaps are torchvision's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import (
    batched_nms,
    box_area,
    box_convert,
    box_iou,
    clip_boxes_to_image,
    nms,
)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Corners to centre and size; [..., 4] to [..., 4]."""
    return box_convert(boxes_xyxy, "xyxy", "cxcywh")


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Centre and size to corners; [..., 4] to [..., 4]."""
    return box_convert(boxes_cxcywh, "cxcywh", "xyxy")


def xyxy_to_xywh(boxes_xyxy: Tensor) -> Tensor:
    """Corners to COCO's corner and size; [..., 4] to [..., 4]."""
    return box_convert(boxes_xyxy, "xyxy", "xywh")


def xywh_to_xyxy(boxes_xywh: Tensor) -> Tensor:
    """COCO's corner and size to corners; [..., 4] to [..., 4]."""
    return box_convert(boxes_xywh, "xywh", "xyxy")


def area(boxes_xyxy: Tensor) -> Tensor:
    """Areas, [N, 4] to [N], in the square of the boxes' unit."""
    return box_area(boxes_xyxy)


def pairwise_iou(boxes_a_xyxy: Tensor, boxes_b_xyxy: Tensor) -> Tensor:
    """Intersection over union of all pairs, [N, 4] and [M, 4] to [N, M]; 0 where both boxes have no area."""
    return torch.nan_to_num(box_iou(boxes_a_xyxy, boxes_b_xyxy))


def batched_iou(boxes_xyxy: Tensor) -> Tensor:
    """Intersection over union of all pairs within each set, [B, N, 4] to [B, N, N]; 0 where both have no area."""
    low = torch.maximum(boxes_xyxy[:, :, None, :2], boxes_xyxy[:, None, :, :2])
    high = torch.minimum(boxes_xyxy[:, :, None, 2:], boxes_xyxy[:, None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=3)
    size = (boxes_xyxy[:, :, 2:] - boxes_xyxy[:, :, :2]).prod(dim=2)
    union = size[:, :, None] + size[:, None, :] - shared
    return torch.where(union > 0, shared / union, 0.0)


def paired_iou(boxes_a_xyxy: Tensor, boxes_b_xyxy: Tensor) -> Tensor:
    """Intersection over union of box i of one set with box i of the other, [N, 4] and [N, 4] to [N]."""
    intersection, union = _paired_overlaps(boxes_a_xyxy, boxes_b_xyxy)
    return intersection / union


def paired_giou(boxes_a_xyxy: Tensor, boxes_b_xyxy: Tensor) -> Tensor:
    """Generalised IoU of box i of one set with box i of the other, [N, 4] and [N, 4] to [N]."""
    intersection, union = _paired_overlaps(boxes_a_xyxy, boxes_b_xyxy)
    low = torch.minimum(boxes_a_xyxy[:, :2], boxes_b_xyxy[:, :2])
    high = torch.maximum(boxes_a_xyxy[:, 2:], boxes_b_xyxy[:, 2:])
    hull = (high - low).clamp(min=0).prod(dim=1)
    return intersection / union - (hull - union) / hull


def _paired_overlaps(boxes_a_xyxy: Tensor, boxes_b_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of the intersection and of the union, [N] each."""
    low = torch.maximum(boxes_a_xyxy[:, :2], boxes_b_xyxy[:, :2])
    high = torch.minimum(boxes_a_xyxy[:, 2:], boxes_b_xyxy[:, 2:])
    intersection = (high - low).clamp(min=0).prod(dim=1)
    return intersection, box_area(boxes_a_xyxy) + box_area(boxes_b_xyxy) - intersection


def batched_giou(boxes_a_xyxy: Tensor, boxes_b_xyxy: Tensor) -> Tensor:
    """Generalised IoU of all pairs within each set of a batch, [..., N, 4] and [..., M, 4] to [..., N, M].

    Coordinate by coordinate: tensors of [..., N, M, 2] would be read and written at a fraction of the speed.
    """
    ax0, ay0, ax1, ay1 = boxes_a_xyxy[..., None].unbind(-2)
    bx0, by0, bx1, by1 = boxes_b_xyxy.mT.contiguous()[..., None, :].unbind(-3)
    width = torch.minimum(ax1, bx1).sub_(torch.maximum(ax0, bx0))
    height = torch.minimum(ay1, by1).sub_(torch.maximum(ay0, by0))
    # the two spans make up the hull's and what they share; where they share nothing, the gap between them is negative
    hull = ((ax1 - ax0) + (bx1 - bx0)).sub_(width).mul(((ay1 - ay0) + (by1 - by0)).sub_(height))
    intersection = width.clamp_(min=0) * height.clamp_(min=0)
    union = ((ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0)).sub_(intersection)
    return (intersection / union).add_(union / hull).sub_(1.0)


def clip(boxes_xyxy: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Boxes cut to an image of (height, width) pixels, [N, 4] to [N, 4]."""
    return clip_boxes_to_image(boxes_xyxy, size_hw)


def has_area(boxes_xyxy: Tensor, min_side: float = 0.0) -> Tensor:
    """Which boxes are finite and wider and higher than ``min_side``, [N, 4] to bool [N]."""
    sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    return (sides > min_side).all(dim=1) & torch.isfinite(boxes_xyxy).all(dim=1)


def normalise(boxes_xyxy: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Pixel corners to centre and size as fractions of an image of (height, width), [N, 4] to [N, 4]."""
    return xyxy_to_cxcywh(boxes_xyxy) / boxes_xyxy.new_tensor(size_hw[::-1] * 2)


def denormalise(boxes_cxcywh: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Centre and size as fractions of an image of (height, width) to pixel corners, [N, 4] to [N, 4]."""
    return cxcywh_to_xyxy(boxes_cxcywh) * boxes_cxcywh.new_tensor(size_hw[::-1] * 2)


def denormalise_points(points: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Points (x, y) as fractions of an image of (height, width) to pixels, [..., 2] to [..., 2]."""
    return points * points.new_tensor(size_hw[::-1])


def suppress_overlaps(
    boxes_xyxy: Tensor, scores: Tensor, iou_threshold: float, classes: Tensor | None = None
) -> Tensor:
    """Indices, best first, such that no two kept boxes have IoU above the threshold; the more confident one stays.

    Greedy, without a threshold of scores. Without ``classes`` [N] boxes suppress each other whatever their class, as
    the filter between self-training stages does; with them only within a class, as COCO's tools do.
    """
    if classes is None:
        return nms(boxes_xyxy, scores, iou_threshold)
    return batched_nms(boxes_xyxy, scores, classes, iou_threshold)

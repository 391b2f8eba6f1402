"""The one Hungarian matcher: predictions and targets in, the cheapest one-to-one assignment of every image out.

Source: DETR (arXiv 2005.12872, equation 1) with the focal class cost of Deformable DETR; specs/detectors.md A8.
Letters: N layers, B images, Q queries, K classes, T targets of one image (padded to the most of any image).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from simdetr.boxes import cxcywh_to_xyxy, paired_giou

Target = Mapping[str, Tensor]
"""Objects of one image: ``labels`` int64 [T] and ``boxes`` float [T, 4] cxcywh, fractions of the valid image."""

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0


class Matches(NamedTuple):
    """Assignments of N layers, one row per layer, the images of a row one after the other.

    All layers assign the same number of objects, M = Σ min(Q, T) over the images.
    """

    image: Tensor
    """Index of the image, int64 [N, M]."""
    query: Tensor
    """Index of the query in its image, int64 [N, M]."""
    target: Tensor
    """Index of the target in its image, int64 [N, M]."""


class HungarianMatcher(nn.Module):
    """Assign every target to a query of its own at the least total cost.

    Cost = class_cost · focal + box_cost · L1(cxcywh) − giou_cost · GIoU, where focal is the focal loss of the target's
    class if it is there less that if it is not. Costs that are not finite count as the highest, so that a broken
    prediction cannot stop the assignment; the loss then carries the NaN to the caller.

    Args:
        class_cost: weight of the class term.
        box_cost: weight of the L1 distance of boxes.
        giou_cost: weight of the generalised IoU.

    Raises:
        ValueError: all weights are zero.
    """

    def __init__(self, class_cost: float = 2.0, box_cost: float = 5.0, giou_cost: float = 2.0) -> None:
        super().__init__()
        if class_cost == box_cost == giou_cost == 0:
            raise ValueError("class_cost, box_cost and giou_cost are all 0; set at least one")
        self.class_cost, self.box_cost, self.giou_cost = class_cost, box_cost, giou_cost

    def forward(
        self, pred_logits: Tensor, pred_boxes: Tensor, targets: Sequence[Target]
    ) -> list[tuple[Tensor, Tensor]]:
        """Match one layer.

        Args:
            pred_logits: [B, Q, K].
            pred_boxes: [B, Q, 4] cxcywh.
            targets: one per image.

        Returns:
            Per image the indices of queries and of their targets, both int64 [min(Q, T)] on the CPU, queries ascending.
        """
        cost = self.costs(pred_logits[None], pred_boxes[None], targets)
        matches = self.assign([cost], [len(target["labels"]) for target in targets])[0]
        image, query, target = (indices[0] for indices in matches)
        return [(query[image == index], target[image == index]) for index in range(len(targets))]

    @torch.no_grad()
    def costs(self, logits: Tensor, boxes_cxcywh: Tensor, targets: Sequence[Target]) -> Tensor:
        """Costs of all pairs within each image.

        Args:
            logits: [N, B, Q, K].
            boxes_cxcywh: [N, B, Q, 4].
            targets: one per image.

        Returns:
            float [N, B, Q, T]; columns past an image's own number of targets mean nothing.
        """
        layers, _, queries, _ = logits.shape
        labels, target_boxes = pad_targets(targets)
        logits, boxes = at_least_float32(logits), at_least_float32(boxes_cxcywh)
        labels, target_boxes = labels.to(logits.device), target_boxes.to(boxes)
        # only the logits of classes that occur are needed: K can be thousands, T is a few dozen
        chosen = labels[None, :, None, :].expand(layers, -1, queries, -1)
        of_targets = logits.gather(3, chosen)
        pairs = (*chosen.shape, 4)
        predicted = cxcywh_to_xyxy(boxes)[:, :, :, None].expand(pairs)
        wanted = cxcywh_to_xyxy(target_boxes)[None, :, None].expand(pairs)
        giou = paired_giou(predicted.reshape(-1, 4), wanted.reshape(-1, 4)).view(pairs[:4])
        distance = torch.cdist(boxes, target_boxes[None].expand(layers, -1, -1, -1), p=1)
        cost = self.class_cost * focal_class_cost(of_targets) + self.box_cost * distance - self.giou_cost * giou
        return torch.nan_to_num(cost, nan=1e9, posinf=1e9, neginf=-1e9)

    @staticmethod
    def assign(costs: Sequence[Tensor], counts: Sequence[int]) -> list[Matches]:
        """Solve the assignment of several cost tensors with one transfer from the device.

        Args:
            costs: [N, B, Q, T] each; N and Q may differ.
            counts: number of targets of each image.

        Returns:
            Matches on the CPU, one per cost tensor.
        """
        flat = torch.cat([cost.flatten() for cost in costs]).cpu()
        pieces = flat.split_with_sizes([cost.numel() for cost in costs])
        return [
            _assign_layers(piece.view(cost.shape).numpy(), counts) for piece, cost in zip(pieces, costs, strict=True)
        ]


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision to float32, wider types as they are; any shape."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def pad_targets(targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
    """Labels [B, T] and boxes [B, T, 4] of a batch; class 0 and the whole image where an image has fewer targets."""
    most = max((len(target["labels"]) for target in targets), default=0)
    labels = torch.stack([F.pad(target["labels"], (0, most - len(target["labels"]))) for target in targets])
    whole = torch.tensor([0.5, 0.5, 1.0, 1.0], device=labels.device)
    boxes = [torch.cat((target["boxes"].float(), whole.expand(most - len(target["labels"]), -1))) for target in targets]
    return labels, torch.stack(boxes)


def focal_class_cost(logits: Tensor) -> Tensor:
    """Focal loss of a class as positive less that as negative, any shape; 1e-8 in the logarithms as in the original."""
    probability = logits.sigmoid()
    positive = FOCAL_ALPHA * (1 - probability) ** FOCAL_GAMMA * -(probability + 1e-8).log()
    negative = (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA * -(1 - probability + 1e-8).log()
    return positive - negative


def _assign_layers(costs: NDArray[np.floating[Any]], counts: Sequence[int]) -> Matches:
    """Solve [N, B, Q, T] layer by layer and image by image."""
    layers, _, queries, _ = costs.shape
    matched = sum(min(queries, count) for count in counts)
    found = np.empty((3, layers, matched), dtype=np.int64)
    for layer in range(layers):
        start = 0
        for image, count in enumerate(counts):
            rows, columns = linear_sum_assignment(costs[layer, image, :, :count])
            stop = start + len(rows)
            found[:, layer, start:stop] = np.full(len(rows), image), rows, columns
            start = stop
    return Matches(*torch.from_numpy(found))

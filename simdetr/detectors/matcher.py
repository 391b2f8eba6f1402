"""The one Hungarian matcher: predictions and targets in, the cheapest one-to-one assignment of every image out.

Source: DETR (arXiv 2005.12872, equation 1) with the focal class cost of Deformable DETR
Letters: N layers, B images, Q queries, K classes, T targets of one image (padded to the most of any image).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from simdetr.boxes import batched_giou, cxcywh_to_xyxy

Target = Mapping[str, Tensor]
"""Objects of one image: ``labels`` int64 [T], ``boxes`` float [T, 4] cxcywh, fractions of the valid image, and, unless
all are sure, ``scores`` float [T], the probability that each is an object."""

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

    def on(self, device: torch.device) -> Matches:
        """The same on another device, by one copy that the host does not wait for."""
        return Matches(*to_device(torch.stack(self), device).unbind())


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
        """Match one layer of logits [B, Q, K] and boxes cxcywh [B, Q, 4].

        Returns:
            Per image the indices of queries and of their targets, both int64 [min(Q, T)] on the CPU, queries ascending.
        """
        cost = self.costs(pred_logits[None], pred_boxes[None], targets)
        matches = self.assign([cost], [len(target["labels"]) for target in targets])[0]
        image, query, target = (indices[0] for indices in matches)
        return [(query[image == index], target[image == index]) for index in range(len(targets))]

    @torch.no_grad()
    def costs(self, logits: Tensor, boxes_cxcywh: Tensor, targets: Sequence[Target]) -> Tensor:
        """Costs [N, B, Q, T] of all pairs within each image, of logits [N, B, Q, K] and boxes [N, B, Q, 4].

        Columns past an image's own number of targets mean nothing.
        """
        logits, boxes = at_least_float32(logits), at_least_float32(boxes_cxcywh)
        labels, target_boxes = (to_device(padded, boxes.device) for padded in pad_targets(targets))
        wanted = target_boxes.to(boxes.dtype)
        corners, wanted_corners = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted)
        # a processor's caches hold the temporary tensors of one layer, and its allocator does not give them back
        parts = len(boxes) if boxes.device.type == "cpu" else 1
        costs = []
        for scores, centred, cornered in zip(*(t.chunk(parts) for t in (logits, boxes, corners)), strict=True):
            # only the logits of classes that occur are needed: K can be thousands, T is a few dozen
            chosen = labels[None, :, None, :].expand(len(scores), -1, scores.shape[2], -1)
            # [N, B, T, Q]: long rows for arithmetic on the CPU, and the solver wants the shorter side first
            cost = focal_class_cost(scores.gather(3, chosen).transpose(2, 3).contiguous()).mul_(self.class_cost)
            cost.add_(torch.cdist(wanted, centred, p=1), alpha=self.box_cost)
            cost.sub_(batched_giou(wanted_corners, cornered), alpha=self.giou_cost)
            costs.append(cost.nan_to_num_(nan=1e9, posinf=1e9, neginf=-1e9))
        return torch.cat(costs).transpose(2, 3)

    @staticmethod
    def assign(costs: Sequence[Tensor], counts: Sequence[int]) -> list[Matches]:
        """Matches on the CPU of several cost tensors [N, B, Q, T], by one transfer; N and Q may differ among them.

        ``counts`` are the numbers of targets of each image.
        """
        turned = [cost.transpose(2, 3) for cost in costs]
        flat = [cost.flatten() for cost in turned]
        together = (torch.cat(flat) if len(flat) > 1 else flat[0]).cpu()
        pieces = together.split_with_sizes([cost.numel() for cost in turned])
        return [_assign_layers(piece.view(cost.shape), counts) for piece, cost in zip(pieces, turned, strict=True)]


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision to float32, wider types as they are; any shape."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy from the host that it does not wait for: over pinned memory where the device is a GPU."""
    if values.device.type == "cpu" and device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def pad_targets(targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
    """Labels [B, T] and boxes [B, T, 4] of a batch; class 0 and a point where an image has fewer targets."""
    labels = pad_sequence([target["labels"] for target in targets], batch_first=True)
    # not 0: a matched box at the origin without any size would divide 0 by 0
    boxes = pad_sequence([target["boxes"].float() for target in targets], batch_first=True, padding_value=0.5)
    return labels, boxes


def pad_scores(targets: Sequence[Target]) -> Tensor:
    """Scores [B, T] of a batch, 1 where targets have none."""
    rows = [
        target["scores"].float() if "scores" in target else torch.ones_like(target["labels"], dtype=torch.float32)
        for target in targets
    ]
    return pad_sequence(rows, batch_first=True)


@torch.no_grad()
def focal_class_cost(logits: Tensor) -> Tensor:
    """Focal loss of a class as positive less that as negative, any shape; 1e-8 in the logarithms as in the original."""
    present = logits.sigmoid()
    absent = 1 - present
    positive, negative = (present + 1e-8).log_(), (absent + 1e-8).log_()
    positive.mul_(absent.pow_(FOCAL_GAMMA)).mul_(-FOCAL_ALPHA)
    return positive.add_(negative.mul_(present.pow_(FOCAL_GAMMA)), alpha=1 - FOCAL_ALPHA)


def _assign_layers(costs: Tensor, counts: Sequence[int]) -> Matches:
    """Solve [N, B, T, Q] layer by layer and image by image; queries ascending."""
    from scipy.optimize import linear_sum_assignment  # here, because only training pays for it

    layers, _, _, queries = costs.shape
    tables = costs.numpy()
    sizes = [min(queries, count) for count in counts]
    pairs = [linear_sum_assignment(tables[n, b, :count]) for n in range(layers) for b, count in enumerate(counts)]
    target, query = (np.concatenate(side).reshape(layers, sum(sizes)) for side in zip(*pairs, strict=True))
    image = np.broadcast_to(np.repeat(np.arange(len(counts)), sizes), query.shape)
    order = (image * queries + query).argsort(axis=1)
    found = [image, *(np.take_along_axis(side, order, axis=1) for side in (query, target))]
    return Matches(*torch.from_numpy(np.stack(found).astype(np.int64, copy=False)))

"""Landmarks by query: states and references of a decoder's queries in; class scores and a point of each query out.

Every prediction of the decoder is matched to the landmarks for itself, and learns. Source: US 11,544,507 with the
matching of detection transformers. Letters: N predictions, B images, Q queries, D width, T landmarks of one image, M
classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from simdetr.boxes import batched_giou, cxcywh_to_xyxy
from simdetr.detectors.deformable_detr import Perceptron
from simdetr.detectors.deformable_transformer import inverse_sigmoid
from simdetr.detectors.detector import Features, FeatureSizes, Queries
from simdetr.detectors.matcher import HungarianMatcher, at_least_float32, focal_class_cost
from simdetr.heads.head import check_finite
from simdetr.heads.landmark_losses import LandmarkRule, background_loss, landmark_losses, point_error, record_logits
from simdetr.heads.landmark_targets import LandmarkTargets, Samples, point_units

# weights of the terms of matching: class, L1 of points, and of boxes L1 and generalised IoU
CLASS_COST, POINT_COST, BOX_COST, GIOU_COST = 2.0, 5.0, 5.0, 2.0
_PRIOR = 0.01  # probability at the start that a query is a landmark: most are not


class QueryOutputs(NamedTuple):
    """Of every prediction of the decoder, first to last."""

    logits: Tensor  # Class scores: own ones, background last [N, B, Q, M + 1], or the detector's [N, B, Q, M]
    points: Tensor  # (x, y), fractions of the valid image [N, B, Q, 2]


class QueryLandmarks(nn.Module):
    """Scores and points of queries, and what they learn.

    Args:
        sizes: of the queries.
        rule: losses of a sample; the other arguments are those of ``LandmarkHead``.
    """

    def __init__(
        self,
        sizes: FeatureSizes,
        rule: LandmarkRule,
        grid: tuple[int, int],
        shared: bool,
        match_boxes: bool,
        background_weight: float,
    ) -> None:
        super().__init__()
        assert sizes.query_channels is not None
        self.rule, self.grid, self.width = rule, grid, sizes.query_channels
        self.match_boxes, self.background_weight = match_boxes, background_weight
        count = range(1 if shared else sizes.num_predictions)
        self.point_embed = nn.ModuleList(Perceptron(self.width, 2, start=torch.zeros(2)) for _ in count)
        self.class_embed = nn.ModuleList(
            _class_head(self.width, sizes.num_classes) for _ in (count if rule.class_weight == "softmax" else ())
        )

    def forward(self, features: Features) -> QueryOutputs:
        """Scores and points of every prediction; a ValueError for states of another width, or that are not finite."""
        queries = features.queries
        assert queries is not None
        logits, points = [], []
        for index, (states, references) in enumerate(zip(queries.states, queries.references, strict=True)):
            if states.shape[-1] != self.width:
                raise ValueError(f"queries.states[{index}]: expected [B, Q, {self.width}], got {list(states.shape)}")
            check_finite(f"queries.states[{index}]", states)
            head = min(index, len(self.point_embed) - 1)
            moves = at_least_float32(self.point_embed[head](states))
            points.append((inverse_sigmoid(references) + moves).sigmoid())
            scores = self.class_embed[head](states) if self.class_embed else queries.logits[index]
            logits.append(at_least_float32(scores))
        return QueryOutputs(torch.stack(logits), torch.stack(points))

    def samples(self, outputs: QueryOutputs, features: Features, targets: LandmarkTargets) -> Samples:
        """Losses of the matched queries, and the class loss of the others; one sample per match."""
        logits, points = outputs
        assert features.queries is not None
        costs = self.costs(outputs, features.queries, targets)
        image, query, target = HungarianMatcher.assign([costs], targets.counts)[0].on(logits.device)
        matched = (torch.arange(len(logits), device=logits.device)[:, None].expand_as(image), image, query)

        units = point_units(features.levels, self.rule.unit, self.grid).to(points.dtype)[image]
        errors = point_error(points[matched] * units, targets.points[image, target] * units, self.rule.beta)
        classes = targets.labels[image, target].flatten()
        losses = landmark_losses(logits[matched].flatten(0, 1), classes, errors.flatten(), self.rule)

        weight = torch.full_like(logits[..., 0], self.background_weight).index_put(matched, logits.new_zeros(()))
        others = (weight * background_loss(logits, self.rule)).sum()
        return Samples(losses, torch.ones_like(losses.total), torch.ones_like(losses.reversed), others)

    @torch.no_grad()
    def costs(self, outputs: QueryOutputs, queries: Queries, targets: LandmarkTargets) -> Tensor:
        """Costs of all pairs within each image, [N, B, Q, T]; terms of what a landmark lacks are 0.

        Class: -P^C of softmax scores, or the focal cost of a detector's. A cost that is not finite counts as the
        highest, so that a broken prediction cannot stop the assignment.
        """
        logits, points = outputs
        classes = targets.labels[None, :, None].expand(len(logits), -1, logits.shape[2], -1)
        if self.rule.class_weight == "softmax":
            cost = -CLASS_COST * logits.softmax(dim=-1).gather(3, classes)
        else:
            cost = CLASS_COST * focal_class_cost(logits.gather(3, classes))
        has_point = ~targets.points[:, None, :, 0].isnan()
        away = torch.cdist(points, targets.points.nan_to_num().to(points.dtype).expand(len(points), -1, -1, -1), p=1)
        cost = cost + torch.where(has_point, POINT_COST * away, 0.0)
        if self.match_boxes:
            has_box = (targets.boxes[:, None, :, 2:] > 0).all(dim=-1)
            boxes = at_least_float32(torch.stack(queries.boxes))
            wanted = targets.boxes.to(boxes.dtype)
            apart = BOX_COST * torch.cdist(boxes, wanted.expand(len(boxes), -1, -1, -1), p=1)
            apart = apart - GIOU_COST * batched_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted))
            cost = cost + torch.where(has_box, apart, 0.0)
        return cost.nan_to_num(nan=1e9, posinf=1e9, neginf=-1e9)

    def predictions(self, outputs: QueryOutputs, features: Features) -> dict[str, Tensor]:
        """Points of the last prediction, and own classes as ``record_logits`` gives them."""
        found = {"pred_points": outputs.points[-1]}
        if self.class_embed:
            found["point_logits"] = record_logits(outputs.logits[-1])
        return found


def _class_head(width: int, num_classes: int) -> nn.Linear:
    """From a state to scores, the background's last and at the start as likely as it is among queries."""
    head = nn.Linear(width, num_classes + 1)
    with torch.no_grad():
        head.bias.zero_()
        head.bias[-1] = math.log((1 - _PRIOR) / _PRIOR * num_classes)
    return head

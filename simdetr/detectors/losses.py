"""Detection losses: a detector's output and the targets of a batch in, a dictionary of scalars out.

Focal, L1 and generalised IoU losses of the last layer, of every earlier decoder layer and of the encoder's proposals,
each layer matched for itself. Source: Deformable DETR; definitions and weights of the published code.
Letters: N layers, B images, Q queries, K classes, T targets of one image, M matched pairs of one layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from simdetr.boxes import cxcywh_to_xyxy, paired_giou, pairwise_iou
from simdetr.detectors.matcher import (
    FOCAL_ALPHA,
    FOCAL_GAMMA,
    HungarianMatcher,
    Matches,
    Target,
    at_least_float32,
    pad_scores,
    pad_targets,
    to_device,
)

IGNORE_IOU = 0.5
"""Overlap with a region to ignore above which a query without an object counts as neither background nor object."""


class LayerLosses(NamedTuple):
    """Losses of N layers, not yet divided by the number of boxes, each [N]."""

    loss_ce: Tensor
    loss_bbox: Tensor
    loss_giou: Tensor
    loss_object: Tensor | None = None


class MatchedLayers(NamedTuple):
    """Which query of which layer answers for which target."""

    decoder: Matches
    """Of the decoder's layers [N, M], first to last; the last row is the detector's prediction."""
    encoder: Matches | None
    """Of the encoder's proposals [1, M] (two-stage)."""
    num_boxes: float | Tensor
    """Sum of the targets' scores per rank, averaged over all ranks, at least 1."""
    unmatched: float
    """Share of the targets that no query is left for."""


class DetectionLoss(nn.Module):
    """Matching and losses of a detection transformer.

    A target with a score s below 1 is an object with probability s: the class losses are their expectation, s times
    that of an object plus 1 - s times that of background, and its box counts s. With scores of 1 they are the
    original's. Where a target says that a region is to be ignored (``ignore``), a query without an object whose box
    overlaps the region by more than half (IoU) learns nothing about classes: what is there may be an object. So does
    Kaul et al., Label, Verify, Correct (2022), with proposals.

    Args:
        class_weight: of the focal loss in the total.
        box_weight: of the L1 loss of boxes in the total.
        giou_weight: of the generalised IoU loss in the total.
        class_cost: as those that follow, see ``HungarianMatcher``.
        box_cost: of L1.
        giou_cost: of generalised IoU.
        focal_alpha: weight of positives against negatives in the focal loss.
        focal_gamma: how much the focal loss plays down easy examples.
        object_weight: of the focal loss of objectness in the total, of detectors that have it.
        class_aware_encoder: let the encoder's proposals (two-stage) learn the targets' classes. By default, as in the
            original, they learn class 0 for every object, which is the class that the choice of queries looks at.
    """

    def __init__(
        self,
        class_weight: float = 2.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        class_cost: float = 2.0,
        box_cost: float = 5.0,
        giou_cost: float = 2.0,
        focal_alpha: float = FOCAL_ALPHA,
        focal_gamma: float = FOCAL_GAMMA,
        object_weight: float = 2.0,
        class_aware_encoder: bool = False,
    ) -> None:
        super().__init__()
        self.matcher = HungarianMatcher(class_cost, box_cost, giou_cost)
        self.weights = {
            "loss_ce": class_weight,
            "loss_bbox": box_weight,
            "loss_giou": giou_weight,
            "loss_object": object_weight,
        }
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        self.class_aware_encoder = class_aware_encoder

    def forward(self, outputs: Mapping[str, Any], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Match every layer and sum its losses.

        A prediction that is not finite makes ``loss`` not finite, wherever it is, so that the caller can stop.

        Args:
            outputs: ``pred_logits``, ``pred_boxes``, ``aux_outputs`` and, for two-stage detectors, ``enc_outputs``.
            targets: ``labels``, ``boxes`` and, unless all are 1, ``scores`` of each image; images may be empty;
                ``ignore`` [I, 4], boxes of regions to ignore.

        Returns:
            ``loss``, the weighted total, and its terms unweighted: ``loss_ce``, ``loss_bbox``, ``loss_giou`` and, with
            ``pred_objectness``, ``loss_object`` of the last layer, with suffix ``_0``, ``_1``, ... of the earlier
            layers and ``_enc`` of the encoder. ``unmatched``, no loss, is the share of targets that no query is left
            for.

        Raises:
            ValueError: targets that do not fit the batch or the number of classes.
        """
        return self.of_matched(outputs, targets, self.match(outputs, targets))

    def match(self, outputs: Mapping[str, Any], targets: Sequence[Target]) -> MatchedLayers:
        """Match every layer for itself, all with one transfer from the device; arguments as in ``forward``."""
        counts = _check_targets(targets, *outputs["pred_logits"].shape[::2])
        costs = [self.matcher.costs(*_stack(decoder_layers(outputs)), targets)]
        if "enc_outputs" in outputs:
            costs.append(self.matcher.costs(*_stack([outputs["enc_outputs"]]), self._encoder_targets(targets)))
        matches = self.matcher.assign(costs, counts)
        scored = any("scores" in target for target in targets)
        certainty = pad_scores(targets).sum() if scored else sum(counts)
        num_boxes = global_mean_count(certainty, outputs["pred_boxes"].device)
        unmatched = 1.0 - matches[0].query.shape[1] / sum(counts) if sum(counts) else 0.0
        return MatchedLayers(matches[0], matches[1] if len(matches) > 1 else None, num_boxes, unmatched)

    def of_matched(
        self, outputs: Mapping[str, Any], targets: Sequence[Target], matched: MatchedLayers
    ) -> dict[str, Tensor]:
        """The losses of layers that are matched already; as ``forward``."""
        layers = decoder_layers(outputs)
        suffixes = layer_suffixes(len(layers))
        present = torch.stack([p["pred_objectness"] for p in layers]) if "pred_objectness" in outputs else None
        parts = [self._layer_losses(*_stack(layers), matched.decoder, targets, present)]
        if matched.encoder is not None:
            suffixes.append("_enc")
            aims = self._encoder_targets(targets)
            parts.append(self._layer_losses(*_stack([outputs["enc_outputs"]]), matched.encoder, aims))
        total = outputs["pred_logits"].new_zeros((), dtype=torch.float32)
        losses: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            found = [value for value in (getattr(part, name) for part in parts) if value is not None]
            if not found:
                continue
            values = torch.cat(found) / matched.num_boxes
            total = total + weight * values.sum()
            losses |= {name + suffix: value for suffix, value in zip(suffixes, values.unbind(), strict=False)}
        return {"loss": total, **losses, "unmatched": total.new_full((), matched.unmatched)}

    def _encoder_targets(self, targets: Sequence[Target]) -> Sequence[Target]:
        """What the encoder's proposals learn: every object as class 0, unless they are to learn classes."""
        if self.class_aware_encoder:
            return targets
        return [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]

    def _layer_losses(
        self,
        logits: Tensor,
        boxes: Tensor,
        matches: Matches,
        targets: Sequence[Target],
        present: Tensor | None = None,
    ) -> LayerLosses:
        """Sums of the losses; logits [N, B, Q, K], boxes [N, B, Q, 4], objectness [N, B, Q, 1] if there is one."""
        logits, boxes = at_least_float32(logits), at_least_float32(boxes)
        image, query, target = matches.on(logits.device)
        labels, target_boxes = (to_device(padded, logits.device) for padded in pad_targets(targets))
        layer = torch.arange(logits.shape[0], device=logits.device)[:, None].expand_as(image)
        classes = labels[image, target]
        scores = to_device(pad_scores(targets), logits.device)[image, target]
        counted = _counted(boxes, targets)
        if counted is not None:
            counted[layer, image, query] = 1.0
        ce = self._focal(logits, (layer, image, query, classes), scores, counted)
        objects = None
        if present is not None:
            first = torch.zeros_like(classes)
            objects = self._focal(at_least_float32(present), (layer, image, query, first), scores, counted)

        predicted, wanted = boxes[layer, image, query], target_boxes[image, target].to(boxes.dtype)
        # 0 · Σ keeps the graph where nothing is matched, and spreads NaN and infinity of unmatched queries to the loss
        watch = 0.0 * boxes.flatten(1).sum(dim=1)
        l1 = ((predicted - wanted).abs().sum(dim=2) * scores).sum(dim=1) + watch
        giou = paired_giou(cxcywh_to_xyxy(predicted).flatten(0, 1), cxcywh_to_xyxy(wanted).flatten(0, 1))
        return LayerLosses(ce, l1, ((1.0 - giou).view(image.shape) * scores).sum(dim=1) + watch, objects)

    def _focal(
        self,
        logits: Tensor,
        positives: tuple[Tensor, Tensor, Tensor, Tensor],
        scores: Tensor,
        counted: Tensor | None = None,
    ) -> Tensor:
        """Sigmoid focal loss of all logits, summed per layer: all as negatives, then the few positives put right.

        A positive of scores [N, M] counts by its score, and by the rest as a negative; a query counts by ``counted``
        [N, B, Q], 1 without it.
        """
        negative = (1.0 - self.focal_alpha) * logits.sigmoid() ** self.focal_gamma * F.softplus(logits)
        if counted is not None:
            negative = negative * counted[..., None]
        matched = logits[positives]
        correct = self.focal_alpha * (-matched).sigmoid() ** self.focal_gamma * F.softplus(-matched)
        return negative.flatten(1).sum(dim=1) + (scores * (correct - negative[positives])).sum(dim=1)


@torch.no_grad()
def _counted(boxes: Tensor, targets: Sequence[Target]) -> Tensor | None:
    """0 for the boxes [N, B, Q, 4] in a region to ignore, else 1, [N, B, Q]; None where there is nothing to ignore."""
    if not any(len(target.get("ignore", ())) for target in targets):
        return None
    corners = cxcywh_to_xyxy(boxes)
    counted = torch.ones_like(boxes[..., 0])
    for index, target in enumerate(targets):
        if len(target.get("ignore", ())):
            regions = cxcywh_to_xyxy(target["ignore"]).to(corners)
            overlaps = pairwise_iou(corners[:, index].flatten(0, 1), regions)
            inside = (overlaps > IGNORE_IOU).any(dim=1)
            counted[:, index] = (~inside).to(counted.dtype).view(counted.shape[0], -1)
    return counted


def _check_targets(targets: Sequence[Target], batch: int, num_classes: int) -> list[int]:
    """Number of targets of each image; labels are looked at on the CPU only, where that costs nothing."""
    if len(targets) != batch:
        raise ValueError(f"targets has {len(targets)} images, but outputs has {batch}")
    for index, labels in enumerate(target["labels"] for target in targets):
        if labels.device.type != "cpu" or not len(labels):
            continue
        if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(
                f"labels of image {index} of the batch lie in {int(labels.min())}..{int(labels.max())}, but the "
                f"detector has num_classes={num_classes}; number classes from 0 and link num_classes to the data"
            )
    return [len(target["labels"]) for target in targets]


def decoder_layers(outputs: Mapping[str, Any]) -> list[Mapping[str, Tensor]]:
    """Predictions of the decoder's layers, the detector's own last."""
    return [*outputs.get("aux_outputs", []), outputs]


def layer_suffixes(count: int) -> list[str]:
    """What follows the names of the layers' losses: a number, and nothing for the last."""
    return [*(f"_{layer}" for layer in range(count - 1)), ""]


def _stack(layers: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits [N, B, Q, K] and boxes [N, B, Q, 4] of layers of one shape; a view of a single layer."""
    logits, boxes = ([layer[name] for layer in layers] for name in ("pred_logits", "pred_boxes"))
    return (torch.stack(logits), torch.stack(boxes)) if len(layers) > 1 else (logits[0][None], boxes[0][None])


def global_mean_count(count: float | Tensor, device: torch.device) -> float | Tensor:
    """Targets per rank, averaged over all ranks, at least 1; without a host transfer where it is a tensor."""
    distributed = dist.is_available() and dist.is_initialized()
    if not distributed and not isinstance(count, Tensor):
        return max(float(count), 1.0)
    # unlike a tensor made on the host, neither is waited for
    total = to_device(count, device) if isinstance(count, Tensor) else torch.full((), float(count), device=device)
    if distributed:
        total = total.clone()
        dist.all_reduce(total)
        total = total / dist.get_world_size()
    return total.clamp(min=1.0)


# ----------------------------------------------------------------------------------------------------------------------
# What the adapters to other libraries share.


class _TakePart(torch.autograd.Function):
    """The identity of a loss, with a gradient of zero for every further argument."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:  # noqa: ANN401
        ctx.shapes = [parameter.shape for parameter in parameters]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        zero = gradients[0].new_zeros(())
        return gradients[0], *(zero.expand(shape) for shape in ctx.shapes)


def in_graph(loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """The loss, of the same value, in which every trainable parameter takes part.

    Ranks exchange gradients of all parameters; one whose batch has no objects leaves out heads and embeddings that the
    others use. Adding 0 · Σ would read every parameter; this only hands out zeros.
    """
    kept: Tensor = _TakePart.apply(loss, *(parameter for parameter in parameters if parameter.requires_grad))
    return kept


def likely_objects(target: Target) -> dict[str, Tensor]:
    """Labels and boxes of the objects that are more likely there than not, for losses that take all for certain."""
    likely = target["scores"] >= 0.5 if "scores" in target else torch.ones_like(target["labels"], dtype=torch.bool)
    return {name: target[name][likely] for name in ("labels", "boxes")}


def valid_sizes(mask: Tensor) -> Tensor:
    """Height and width of each image without its padding, int64 [B, 2], from a mask [B, H, W] (True = padding)."""
    return torch.stack([(~mask[:, :, 0]).sum(dim=1), (~mask[:, 0]).sum(dim=1)], dim=1)

"""Losses of ViDT and ViDT+: a detector's output and the targets of a batch in, a dictionary of scalars out.

To the detection losses of classes and boxes come, for outputs that have them, an estimate of each box's overlap, mask
vectors and token labels; all share the one matching. Source: ViDT+ (arXiv 2204.07962); specs/detectors.md B4.
Letters: N layers, B images, Q queries, K classes, T targets of one image, M matched pairs of one layer, D coefficients.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from simdetr.boxes import cxcywh_to_xyxy, denormalise, paired_iou
from simdetr.detectors.losses import DetectionLoss
from simdetr.detectors.mask_vectors import crop_masks, encode_crops
from simdetr.detectors.matcher import FOCAL_ALPHA, FOCAL_GAMMA, Matches, Target, at_least_float32
from simdetr.detectors.token_labels import token_losses, token_targets

_VECTOR_SCALE = 3.0  # of the original, within its loss

_logger = logging.getLogger(__name__)


class _Pairs(NamedTuple):
    """Where the matched pairs are, int64 [N, M] each, on the predictions' device."""

    layer: Tensor
    image: Tensor
    query: Tensor
    target_row: Tensor  # among the targets of all images, one image after the other


class VidtLoss(nn.Module):
    """Matching and losses of ViDT; its further terms apply to outputs that have them.

    Args:
        iou_weight: weight of the overlap estimates in the total.
        vector_weight: weight of the mask vectors in the total.
        token_weight: weight of the token labels' focal loss in the total.
        token_dice_weight: weight of the token labels' dice loss in the total.
        detach_iou: keep the overlap that an estimate is to learn out of the gradient. The original lets it flow, so
            that a confident estimate pulls its box towards the object and a doubtful one pushes it away.
        token_foreground: channel 0 of the token labels is foreground, as in the original; for data without a class 0.
        class_weight: as the weights that follow, see `DetectionLoss`.
        box_weight: L1 loss of boxes.
        giou_weight: generalised IoU loss.
        class_cost: class term in matching.
        box_cost: L1 term in matching.
        giou_cost: generalised IoU term in matching.
        focal_alpha: weight of positives against negatives in the focal losses.
        focal_gamma: how much the focal losses play down easy examples.
    """

    def __init__(
        self,
        iou_weight: float = 2.0,
        vector_weight: float = 1.0,
        token_weight: float = 2.0,
        token_dice_weight: float = 2.0,
        detach_iou: bool = True,
        token_foreground: bool = False,
        class_weight: float = 2.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        class_cost: float = 2.0,
        box_cost: float = 5.0,
        giou_cost: float = 2.0,
        focal_alpha: float = FOCAL_ALPHA,
        focal_gamma: float = FOCAL_GAMMA,
    ) -> None:
        super().__init__()
        self.detection = DetectionLoss(
            class_weight, box_weight, giou_weight, class_cost, box_cost, giou_cost, focal_alpha, focal_gamma
        )
        self.weights = {
            "loss_iouaware": iou_weight,
            "loss_vector": vector_weight,
            "loss_token_focal": token_weight,
            "loss_token_dice": token_dice_weight,
        }
        self.detach_iou, self.token_foreground = detach_iou, token_foreground
        self._said_off = False

    def forward(
        self, outputs: Mapping[str, Any], targets: Sequence[Target], canvas_hw: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Match every layer and sum its losses.

        Without masks in the targets the terms that need them are left out, which is logged once; what they would train
        stays part of the graph.

        Args:
            outputs: as of `DetectionLoss`; ``pred_ious`` [B, Q, 1] and ``pred_vectors`` [B, Q, D] of every decoder
                layer, if of one, and ``enc_tokens``, logits [B, h, w, K] of each feature map, where the detector has
                them.
            targets: ``labels``, ``boxes`` and perhaps ``masks``, bool or uint8 [T, h, w] at the valid image's size.
            canvas_hw: height and width of the padded batch in pixels.

        Returns:
            ``loss``, the weighted total, and its terms unweighted: those of `DetectionLoss`, ``loss_iouaware`` and
            ``loss_vector`` with the same suffixes, ``loss_token_focal`` and ``loss_token_dice``.

        Raises:
            ValueError: targets that do not fit the batch, the classes or the canvas; masks that are not one per box.
        """
        matched = self.detection.match(outputs, targets)
        losses = self.detection.of_matched(outputs, targets, matched)
        layers: list[Mapping[str, Tensor]] = [*outputs.get("aux_outputs", []), outputs]
        pairs = _pairs(matched.decoder, targets, outputs["pred_boxes"].device)
        with_masks = _all_have_masks(targets)
        terms: dict[str, Tensor] = {}
        silent: list[Tensor] = []
        if "pred_ious" in outputs:
            terms["loss_iouaware"] = self._iou_aware(layers, pairs, targets) / matched.num_boxes
        if "pred_vectors" in outputs:
            vectors = at_least_float32(torch.stack([layer["pred_vectors"] for layer in layers]))
            if with_masks:
                terms["loss_vector"] = _vector_loss(vectors, pairs, targets)
            else:
                silent.append(vectors)
        if "enc_tokens" in outputs:
            if with_masks:
                focal, dice = self._token_labels(outputs["enc_tokens"], targets, canvas_hw)
                terms["loss_token_focal"] = focal / matched.num_boxes
                terms["loss_token_dice"] = dice / matched.num_boxes
            else:
                silent.extend(outputs["enc_tokens"])
        if silent:
            self._say_off()
        return self._add(losses, terms, silent)

    def _add(
        self, losses: dict[str, Tensor], terms: Mapping[str, Tensor], silent: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Detection losses with further terms, scalars or one value per layer [N]."""
        total = losses["loss"]
        for unused in silent:
            total = total + 0.0 * unused.sum(dtype=torch.float32)  # distributed training wants every head in the graph
        for name, values in terms.items():
            total = total + self.weights[name] * values.sum()
            if values.ndim:
                suffixes = [*(f"_{layer}" for layer in range(len(values) - 1)), ""]
                losses |= {name + suffix: value for suffix, value in zip(suffixes, values.unbind(), strict=True)}
            else:
                losses[name] = values
        return {**losses, "loss": total}

    def _iou_aware(self, layers: Sequence[Mapping[str, Tensor]], pairs: _Pairs, targets: Sequence[Target]) -> Tensor:
        """Cross-entropy of the matched boxes' overlap estimates against their IoU, summed; [N]."""
        logits = at_least_float32(torch.stack([layer["pred_ious"] for layer in layers])).squeeze(-1)
        boxes = at_least_float32(torch.stack([layer["pred_boxes"] for layer in layers]))
        predicted = boxes[pairs.layer, pairs.image, pairs.query]
        wanted = torch.cat([target["boxes"] for target in targets]).to(predicted)[pairs.target_row]
        corners = (cxcywh_to_xyxy(side).flatten(0, 1) for side in (predicted, wanted))
        iou = paired_iou(*corners).view(pairs.query.shape)
        iou = iou.detach() if self.detach_iou else iou
        chosen = logits[pairs.layer, pairs.image, pairs.query]
        # 0 · Σ keeps the graph where nothing is matched, and spreads NaN and infinity of unmatched queries to the loss
        watch = 0.0 * logits.flatten(1).sum(dim=1)
        return F.binary_cross_entropy_with_logits(chosen, iou, reduction="none").sum(dim=1) + watch

    def _token_labels(
        self, tokens: Sequence[Tensor], targets: Sequence[Target], canvas_hw: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        maps_hw = [(level.shape[1], level.shape[2]) for level in tokens]
        placed = [
            {name: target[name].to(tokens[0].device, non_blocking=True) for name in ("masks", "labels")}
            for target in targets
        ]
        wanted = token_targets(placed, tokens[0].shape[3], canvas_hw, maps_hw, self.token_foreground)
        return token_losses(tokens, wanted, self.detection.focal_alpha, self.detection.focal_gamma)

    def _say_off(self) -> None:
        first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
        if first and not self._said_off:
            _logger.warning(
                "mask vectors (UQR) and token labelling are off: the labels have no masks, or were read without them"
            )
        self._said_off = True


def _all_have_masks(targets: Sequence[Target]) -> bool:
    """Whether all targets have masks.

    Raises:
        ValueError: masks that are not one per box.
    """
    for index, target in enumerate(targets):
        if "masks" in target and (target["masks"].ndim != 3 or len(target["masks"]) != len(target["boxes"])):
            raise ValueError(
                f"masks of image {index} of the batch: expected [{len(target['boxes'])}, height, width], one per box, "
                f"got {list(target['masks'].shape)}"
            )
    return all("masks" in target for target in targets)


def _pairs(matches: Matches, targets: Sequence[Target], device: torch.device) -> _Pairs:
    counts = torch.tensor([len(target["labels"]) for target in targets])
    rows = (counts.cumsum(0) - counts)[matches.image] + matches.target
    layer = torch.arange(len(rows))[:, None].expand_as(rows)
    places = (indices.to(device, non_blocking=True) for indices in (layer, matches.image, matches.query, rows))
    return _Pairs(*places)


def _vector_loss(vectors: Tensor, pairs: _Pairs, targets: Sequence[Target]) -> Tensor:
    """Mean distance of the matched vectors' coefficients, times 3 as in the original; vectors [N, B, Q, D], to [N]."""
    crops = torch.cat([_target_crops(target, vectors.device) for target in targets])
    wanted = encode_crops(crops, vectors.shape[-1]).to(vectors)
    distance = (vectors[pairs.layer, pairs.image, pairs.query] - wanted[pairs.target_row]).abs()
    watch = 0.0 * vectors.flatten(1).sum(dim=1)  # as of the overlap estimates
    return _VECTOR_SCALE * distance.sum(dim=(1, 2)) / max(1, distance[0].numel()) + watch


def _target_crops(target: Target, device: torch.device) -> Tensor:
    """Masks of one image within their boxes, [T, S, S]."""
    masks, boxes = (target[name].to(device, non_blocking=True) for name in ("masks", "boxes"))
    return crop_masks(masks, denormalise(boxes, (masks.shape[1], masks.shape[2])))

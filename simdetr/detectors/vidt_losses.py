"""Losses of ViDT and ViDT+: a detector's output and the targets of a batch in, a dictionary of scalars out.

To the detection losses of classes and boxes come, for outputs that have them, an estimate of each box's overlap, mask
vectors and token labels; all share the one matching. The ViDT without a neck has DETR's softmax loss instead.
Source: ViDT+ (arXiv 2204.07962), DETR (arXiv 2005.12872); definitions and weights of the published code.
Letters: N layers, B images, Q queries, K classes, T targets of one image, M matched pairs of one layer, D coefficients,
h and w of a feature map.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import sigmoid_focal_loss

from simdetr.boxes import cxcywh_to_xyxy, denormalise, paired_iou
from simdetr.detectors.detector import DetectorOutput
from simdetr.detectors.losses import DetectionLoss, decoder_layers, layer_suffixes
from simdetr.detectors.mask_vectors import crop_masks, encode_crops, portions
from simdetr.detectors.matcher import (
    FOCAL_ALPHA,
    FOCAL_GAMMA,
    HungarianMatcher,
    Target,
    at_least_float32,
    pad_targets,
)

_VECTOR_SCALE = 3.0  # of the original, within its loss
_PROBABILITY_COST = 2.0  # of the class in the matching of the ViDT without a neck
_NO_OBJECT_WEIGHT = 0.1  # of queries without an object in its cross-entropy

_logger = logging.getLogger(__name__)

_Places = tuple[Tensor, Tensor, Tensor]
"""Layer, image and query of the matched pairs, int64 [N, M] each, on the predictions' device."""


class VidtLoss(nn.Module):
    """Matching and losses of ViDT; its further terms, weighted by ``weights``, apply to outputs that have them.

    Args:
        detach_iou: keep the overlap that an estimate is to learn out of the gradient. The original lets it flow, so
            that a confident estimate pulls its box towards the object and a doubtful one pushes it away.
        token_foreground: channel 0 of the token labels is foreground, as in the original; for data without a class 0.
        detection: matching and losses of classes and boxes, whose focal settings the token labels share.
    """

    def __init__(
        self,
        detach_iou: bool = True,
        token_foreground: bool = False,
        detection: DetectionLoss | None = None,
    ) -> None:
        super().__init__()
        self.detection = DetectionLoss() if detection is None else detection
        self.weights = {"loss_iouaware": 2.0, "loss_vector": 1.0, "loss_token_focal": 2.0, "loss_token_dice": 2.0}
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
        layers = decoder_layers(outputs)
        image, query, aim = matched.decoder.on(outputs["pred_boxes"].device)
        chosen = torch.arange(len(image), device=image.device)[:, None].expand_as(image), image, query
        with_masks = _all_have_masks(targets)
        terms: dict[str, Tensor] = {}
        silent: list[Tensor] = []
        if "pred_ious" in outputs:
            terms["loss_iouaware"] = self._iou_aware(layers, chosen, pad_targets(targets)[1], aim) / matched.num_boxes
        if "pred_vectors" in outputs:
            vectors = _stacked(layers, "pred_vectors")
            if with_masks:
                terms["loss_vector"] = _vector_loss(vectors, chosen, targets, aim)
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
                losses |= {name + suffix: v for suffix, v in zip(layer_suffixes(len(values)), values, strict=True)}
            else:
                losses[name] = values
        return {**losses, "loss": total}

    def _iou_aware(
        self, layers: Sequence[Mapping[str, Tensor]], chosen: _Places, target_boxes: Tensor, aim: Tensor
    ) -> Tensor:
        """Cross-entropy of the matched boxes' overlap estimates against their IoU, summed; [N]."""
        logits, boxes = _stacked(layers, "pred_ious").squeeze(-1), _stacked(layers, "pred_boxes")
        sides = boxes[chosen], target_boxes.to(boxes)[chosen[1], aim]
        iou = paired_iou(*(cxcywh_to_xyxy(side).flatten(0, 1) for side in sides)).view(aim.shape)
        iou = iou.detach() if self.detach_iou else iou
        # 0 · Σ keeps the graph where nothing is matched, and spreads NaN and infinity of unmatched queries to the loss
        watch = 0.0 * logits.flatten(1).sum(dim=1)
        return F.binary_cross_entropy_with_logits(logits[chosen], iou, reduction="none").sum(dim=1) + watch

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


def _stacked(layers: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
    """One output of all layers, [N, ...]."""
    return at_least_float32(torch.stack([layer[name] for layer in layers]))


def _all_have_masks(targets: Sequence[Target]) -> bool:
    """Whether all targets have masks; a ValueError for masks that are not one per box."""
    for index, target in enumerate(targets):
        if "masks" in target and (target["masks"].ndim != 3 or len(target["masks"]) != len(target["boxes"])):
            raise ValueError(
                f"masks of image {index} of the batch: expected [{len(target['boxes'])}, height, width], one per box, "
                f"got {list(target['masks'].shape)}"
            )
    return all("masks" in target for target in targets)


def _vector_loss(vectors: Tensor, chosen: _Places, targets: Sequence[Target], aim: Tensor) -> Tensor:
    """Mean distance of the matched vectors' coefficients, times 3 as in the original; vectors [N, B, Q, D], to [N]."""
    crops = []
    for target in targets:
        masks, boxes = (target[name].to(vectors.device, non_blocking=True) for name in ("masks", "boxes"))
        crops.append(crop_masks(masks, denormalise(boxes, (masks.shape[1], masks.shape[2]))))
    wanted = encode_crops(torch.cat(crops), vectors.shape[-1]).to(vectors).split_with_sizes([len(own) for own in crops])
    distance = (vectors[chosen] - pad_sequence(list(wanted), batch_first=True)[chosen[1], aim]).abs()
    watch = 0.0 * vectors.flatten(1).sum(dim=1)  # as of the overlap estimates
    return _VECTOR_SCALE * distance.sum(dim=(1, 2)) / max(1, distance[0].numel()) + watch


# ----------------------------------------------------------------------------------------------------------------------
# Loss of the ViDT without a neck.


class ProbabilityMatcher(HungarianMatcher):
    """DETR's matcher: the class term is the probability of the target's class, negative."""

    @torch.no_grad()
    def costs(self, logits: Tensor, boxes_cxcywh: Tensor, targets: Sequence[Target]) -> Tensor:
        """Costs [N, B, Q, T] of all pairs within each image; arguments as ``HungarianMatcher.costs``."""
        labels = pad_targets(targets)[0].to(logits.device)
        chosen = labels[None, :, None, :].expand(logits.shape[0], -1, logits.shape[2], -1)
        probability = at_least_float32(logits).sigmoid().gather(3, chosen)
        return super().costs(logits, boxes_cxcywh, targets) - _PROBABILITY_COST * probability.nan_to_num(0.0)


class NeckFreeLoss(nn.Module):
    """DETR's: cross-entropy with a class for "no object", L1 and generalised IoU losses of one layer of predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.box_loss = DetectionLoss(class_weight=0.0)
        self.box_loss.matcher = ProbabilityMatcher(class_cost=0.0)

    def forward(self, class_logits: Tensor, outputs: DetectorOutput, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Match and sum; targets, result and errors as of `DetectionLoss`.

        Args:
            class_logits: softmax logits [B, Q, K + 1], the last for "no object".
            outputs: ``pred_logits`` with the probabilities of ``class_logits``, and ``pred_boxes``.
            targets: of each image; images may be empty.
        """
        matched = self.box_loss.match(outputs, targets)
        terms = self.box_loss.of_matched(outputs, targets, matched)
        image, query, target = (indices[-1].to(class_logits.device) for indices in matched.decoder)
        no_object = class_logits.shape[-1] - 1
        wanted = torch.full(class_logits.shape[:2], no_object, device=class_logits.device)
        wanted[image, query] = pad_targets(targets)[0].to(class_logits.device)[image, target]
        weights = torch.ones(no_object + 1, device=class_logits.device)
        weights[no_object] = _NO_OBJECT_WEIGHT
        loss_ce = F.cross_entropy(class_logits.flatten(0, 1).float(), wanted.flatten(), weights)
        return {**terms, "loss_ce": loss_ce, "loss": terms["loss"] + loss_ce}


# ----------------------------------------------------------------------------------------------------------------------
# Token labelling: the classes that each cell of a feature map covers, and its losses.


@torch.no_grad()
def token_targets(
    targets: Sequence[Target],
    num_classes: int,
    canvas_hw: tuple[int, int],
    maps_hw: Sequence[tuple[int, int]],
    foreground_channel: bool = False,
) -> list[Tensor]:
    """Share of each cell's area that objects of each class cover, 0 to 1; float32 [B, h, w, K] of each map.

    All shares of a cell sum to that of foreground. Where masks overlap, the earlier one counts. Source: ViDT+, after
    token labelling (arXiv 2104.10858). The original has one class too many, 0, which no object has, and uses its
    channel for the foreground; ``foreground_channel`` does the same, for data whose classes start at 1.

    Args:
        targets: ``masks`` bool or uint8 [T, h, w] of each valid image, which lies at the top left of the canvas, and
            ``labels`` [T].
        num_classes: K.
        canvas_hw: height and width of the padded batch in pixels, which no mask exceeds.
        maps_hw: height and width of each feature map; it covers the canvas.
        foreground_channel: channel 0 is the share of all objects in place of class 0's.
    """
    images = [_image_targets(target, num_classes, canvas_hw, maps_hw) for target in targets]
    levels = [torch.stack(level).permute(0, 2, 3, 1) for level in zip(*images, strict=True)]
    if foreground_channel:
        for level in levels:
            level[..., 0] = level.sum(dim=3)
    return levels


def _image_targets(
    target: Target, num_classes: int, canvas_hw: tuple[int, int], maps_hw: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Shares of one image, float32 [K, h, w] per map: objects are pooled one by one, since K can be thousands."""
    masks, labels = target["masks"].bool(), target["labels"]
    below, right = canvas_hw[0] - masks.shape[1], canvas_hw[1] - masks.shape[2]
    if below < 0 or right < 0:
        raise ValueError(f"canvas_hw: expected at least the masks' {tuple(masks.shape[1:])}, got {tuple(canvas_hw)}")
    visible = F.pad(masks & (masks.cumsum(dim=0, dtype=torch.int16) == 1), (0, right, 0, below))
    found = [torch.zeros(num_classes, *size, device=masks.device) for size in maps_hw]
    for part in portions(*visible.shape):
        pixels = visible[part, None].float()
        for level, size in zip(found, maps_hw, strict=True):
            level.index_add_(0, labels[part], F.adaptive_avg_pool2d(pixels, size)[:, 0])
    return found


def token_losses(
    tokens: Sequence[Tensor], targets: Sequence[Tensor], alpha: float = FOCAL_ALPHA, gamma: float = FOCAL_GAMMA
) -> tuple[Tensor, Tensor]:
    """Focal and dice loss of logits [B, h, w, K] of feature maps against shares, summed over maps and images.

    The focal loss is a mean over cells and a sum over classes, with ``alpha`` and ``gamma`` as of `DetectionLoss`; the
    other is 1 - dice over all cells and classes. Neither is divided by the number of boxes yet.
    """
    focal, dice = [], []
    for cells, shares in zip(tokens, targets, strict=True):
        logits, wanted = at_least_float32(cells).flatten(1, 2), shares.flatten(1, 2)
        focal.append(sigmoid_focal_loss(logits, wanted.to(logits), alpha, gamma).mean(dim=1).sum())
        found, aim = logits.sigmoid().flatten(1), wanted.flatten(1)
        # 1 is added to both parts for images without objects
        ratio = (2.0 * (found * aim).sum(dim=1) + 1.0) / (found.sum(dim=1) + aim.sum(dim=1) + 1.0)
        dice.append((1.0 - ratio).sum())
    return torch.stack(focal).sum(), torch.stack(dice).sum()

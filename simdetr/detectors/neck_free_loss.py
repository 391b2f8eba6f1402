"""Loss of the ViDT without a neck: softmax classes, boxes and the targets of a batch in, a dictionary of scalars out.

Source: DETR (arXiv 2005.12872), definitions and weights of specs/detectors.md B2.
Letters: N layers, B images, Q queries, K classes, T targets of one image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simdetr.detectors.detector import DetectorOutput
from simdetr.detectors.losses import DetectionLoss
from simdetr.detectors.matcher import HungarianMatcher, Target, at_least_float32, pad_targets


class ProbabilityMatcher(HungarianMatcher):
    """A Hungarian matcher whose class term is the probability of the target's class, negative.

    Args:
        class_cost: weight of the class term.
        box_cost: weight of the L1 distance of boxes.
        giou_cost: weight of the generalised IoU.
    """

    def __init__(self, class_cost: float = 2.0, box_cost: float = 5.0, giou_cost: float = 2.0) -> None:
        super().__init__(0.0, box_cost, giou_cost)
        self.probability_cost = class_cost

    @torch.no_grad()
    def costs(self, logits: Tensor, boxes_cxcywh: Tensor, targets: Sequence[Target]) -> Tensor:
        """Costs [N, B, Q, T] of all pairs within each image; arguments as ``HungarianMatcher.costs``."""
        labels = pad_targets(targets)[0].to(logits.device)
        chosen = labels[None, :, None, :].expand(logits.shape[0], -1, logits.shape[2], -1)
        probability = at_least_float32(logits).sigmoid().gather(3, chosen)
        return super().costs(logits, boxes_cxcywh, targets) - self.probability_cost * probability.nan_to_num(0.0)


class NeckFreeLoss(nn.Module):
    """Cross-entropy with a class for "no object", L1 and generalised IoU losses of one layer of predictions.

    Args:
        class_weight: weight of the cross-entropy in the total.
        box_weight: weight of the L1 loss of boxes in the total.
        giou_weight: weight of the generalised IoU loss in the total.
        no_object_weight: weight of queries without an object in the cross-entropy.
    """

    def __init__(
        self,
        class_weight: float = 1.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        no_object_weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.box_loss = DetectionLoss(0.0, box_weight, giou_weight)
        self.box_loss.matcher = ProbabilityMatcher()
        self.class_weight, self.no_object_weight = class_weight, no_object_weight

    def forward(self, class_logits: Tensor, outputs: DetectorOutput, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Match and sum.

        Args:
            class_logits: softmax logits [B, Q, K + 1], the last for "no object".
            outputs: ``pred_logits`` with the probabilities of ``class_logits``, and ``pred_boxes``.
            targets: ``labels`` and ``boxes`` of each image; images may be empty.

        Returns:
            ``loss``, the weighted total, and its terms unweighted: ``loss_ce``, ``loss_bbox``, ``loss_giou``.

        Raises:
            ValueError: targets that do not fit the batch or the number of classes.
        """
        matched = self.box_loss.match(outputs, targets)
        terms = self.box_loss.of_matched(outputs, targets, matched)
        image, query, target = (indices[-1].to(class_logits.device) for indices in matched.decoder)
        no_object = class_logits.shape[-1] - 1
        wanted = torch.full(class_logits.shape[:2], no_object, device=class_logits.device)
        wanted[image, query] = pad_targets(targets)[0].to(class_logits.device)[image, target]
        weights = torch.ones(no_object + 1, device=class_logits.device)
        weights[no_object] = self.no_object_weight
        loss_ce = F.cross_entropy(class_logits.flatten(0, 1).float(), wanted.flatten(), weights)
        return {**terms, "loss_ce": loss_ce, "loss": terms["loss"] + self.class_weight * loss_ce}

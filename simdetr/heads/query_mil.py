"""Weakly supervised detection by the queries of a detector: image-level labels in training, class and box out.

An image shows a class where some of its queries do (multiple-instance learning): the image's logit is the log-mean-exp
of the queries' logits, and the box is that of the best query of the class. The contrastive attention loss on the
feature maps is that of ``LocalisationHead``. Source: KR 10-2022-0050617 for the loss, the rest is this library's.
Letters: B images, L predictions of the decoder, Q queries, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from simdetr.data.legal_values import check_choice
from simdetr.detectors.detector import Features, FeatureSizes
from simdetr.detectors.matcher import Target, at_least_float32
from simdetr.heads.attention import AttentionTap, check_level, check_thresholds, checked_taps
from simdetr.heads.head import Head, HeadLosses, check_targets
from simdetr.heads.localisation_losses import Distance, check_not_negative, class_loss, contrastive_loss, image_classes


class MILOutput(NamedTuple):
    """What the queries say of each image."""

    image_logits: Tensor  # After each prediction [L, B, K]
    query_logits: Tensor  # Of the last prediction [B, Q, K]
    boxes: Tensor  # Of the last prediction, cxcywh [B, Q, 4]


class QueryMILHead(Head):
    """Learns from image-level labels which queries of a detector show their classes.

    The boxes themselves get no lesson: the detector has to find objects already, as pretrained ones do. The class and
    box of the best query stand in the place of the detector's.

    Args:
        sizes: what it is built for.
        taps: indices of the levels for L_ca, fine to coarse; None for all. The block's memory grows with the square of
            a level's positions, so leave the fine ones out for large images.
        contrastive_weight: of L_ca; 0 builds no attention. Its other settings are explained at ``LocalisationHead``.
        num_boxes: most probable classes that get a box each.

    Raises:
        ValueError: options outside their range, or unknown ones.
    """

    name = "query_mil"
    needs = frozenset({"levels", "queries"})

    def __init__(
        self,
        sizes: FeatureSizes,
        taps: Sequence[int] | None = None,
        contrastive_weight: float = 1.0,
        margin: float = 0.5,
        distance: Distance = "euclidean",
        foreground_threshold: float = 0.8,
        background_threshold: float = 0.2,
        embedding_size: int = 128,
        num_boxes: int = 1,
    ) -> None:
        self.init_args = {name: v for name, v in locals().items() if name not in ("self", "__class__", "sizes")}
        super().__init__()
        self.taps = checked_taps(taps, len(sizes.level_channels))
        self.init_args["taps"] = None if taps is None else list(taps)
        check_choice("distance", distance, Distance)
        check_thresholds(foreground_threshold, background_threshold)
        check_not_negative({"margin": margin, "contrastive_weight": contrastive_weight})
        if not 1 <= num_boxes <= sizes.num_classes:
            raise ValueError(f"num_boxes: expected 1 to the number of classes ({sizes.num_classes}), got {num_boxes}")
        self.sizes, self.margin, self.distance, self.num_boxes = sizes, margin, distance, num_boxes
        self.contrastive_weight = contrastive_weight
        self.attention = nn.ModuleList(
            AttentionTap(
                sizes.level_channels[index],
                embedding_size=embedding_size,
                foreground_threshold=foreground_threshold,
                background_threshold=background_threshold,
            )
            for index in (self.taps if contrastive_weight > 0 else ())
        )

    def forward(self, features: Features) -> MILOutput:
        """Image logits after each prediction, and the last prediction of the queries."""
        assert features.queries is not None
        logits = [at_least_float32(found) for found in features.queries.logits]
        image_logits = torch.stack([found.logsumexp(dim=1) - math.log(found.shape[1]) for found in logits])
        return MILOutput(image_logits, logits[-1], at_least_float32(features.queries.boxes[-1]))

    def losses(self, outputs: MILOutput, features: Features, targets: Sequence[Target]) -> HeadLosses:
        """Binary cross-entropy of the image logits, mean over the predictions, and L_ca, mean over the taps.

        Of the targets only ``labels`` are read, a ValueError where they are no classes; images without teach nothing.
        """
        check_targets(targets, outputs.image_logits.shape[1], self.sizes.num_classes)
        classes = image_classes(targets, self.sizes.num_classes, outputs.image_logits.device)
        total = torch.stack([class_loss(logits, classes, "bce") for logits in outputs.image_logits]).mean()
        terms, diagnostics = {"cls": total}, {}
        taps = []
        for index, look in zip(self.taps, self.attention, strict=False):  # looks at nothing without L_ca
            check_level(index, features.levels[index], self.sizes.level_channels[index])
            taps.append(look(features.levels[index], embed=True))
        if taps:
            terms["ca"] = contrastive_loss(taps, classes.labelled, self.margin, self.distance)
            total = total + self.contrastive_weight * terms["ca"]
            diagnostics["empty_masks"] = torch.stack([~tap.usable & classes.labelled for tap in taps]).sum()
        return HeadLosses(total, terms, diagnostics)

    @torch.no_grad()
    def best_boxes(self, outputs: MILOutput, classes: Tensor) -> Tensor:
        """The boxes, cxcywh [B, n, 4], of the best query of each class, int64 [B, n] (given ones for GT-known)."""
        queries = outputs.query_logits.shape[1]
        best = outputs.query_logits.gather(2, classes[:, None].expand(-1, queries, -1)).argmax(dim=1)
        return outputs.boxes.gather(1, best[..., None].expand(-1, -1, 4))

    def predictions(self, outputs: MILOutput, features: Features) -> dict[str, Tensor]:
        """The most probable classes: ``pred_logits`` [B, n, K], each row -inf but for one, ``pred_boxes`` [B, n, 4]."""
        image_logits = outputs.image_logits[-1]
        logits, classes = image_logits.topk(self.num_boxes, dim=1)
        rows = torch.full_like(image_logits, -torch.inf)[:, None].repeat(1, self.num_boxes, 1)
        return {
            "pred_logits": rows.scatter(2, classes[..., None], logits[..., None]),
            "pred_boxes": self.best_boxes(outputs, classes),
        }

"""Weakly supervised localisation: image-level labels in training, class, score map and box of an image out.

Attention blocks on several feature maps learn which part of an image is object: what remains of it without its most
discriminative part shall resemble the whole and differ from the background, early attention shall agree with late
attention, and later maps see only that remainder, or the map weighted by importance. CAM is the same without blocks.
Source: KR 10-2022-0050617 (in-sample contrastive learning), claims 1 to 10.
Letters: B images, C channels, K classes, S pixels of a score map's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from simdetr.data.legal_values import check_choice
from simdetr.detectors.detector import Features, FeatureSizes, Level
from simdetr.detectors.matcher import Target, at_least_float32
from simdetr.heads.attention import (
    DROPPED,
    AttentionTap,
    EmbedFrom,
    Tap,
    check_level,
    check_thresholds,
    checked_taps,
    importance_map,
)
from simdetr.heads.head import Head, HeadLosses, check_targets
from simdetr.heads.localisation_losses import (
    ClassLoss,
    Distance,
    Reduction,
    check_not_negative,
    check_one_class,
    class_loss,
    contrastive_loss,
    foreground_consistency_loss,
    image_classes,
    log_odds,
)
from simdetr.heads.score_maps import (
    MapSource,
    chosen_classes,
    class_activation,
    score_map_boxes,
    stretched,
    upsampled_map,
)

Method = Literal["in_sample", "cam"]


class LocalisationHead(Head):
    """Classifies images and finds the object of the class, on the maps of a backbone or of a detector.

    The last tapped map is pooled for the class. In training every earlier one is multiplied by the dropped foreground
    mask or the importance map before the next stage reads it, one draw per batch and map; an image with an empty mask
    always gets its importance map. On a detector the head's class and box stand in the place of the detector's. The
    document leaves thresholds, margin, widths and the draw open: the defaults are this library's.

    Args:
        sizes: what it is built for.
        method: ``in_sample`` contrastive attention, or ``cam``: class activation maps alone, without attention.
        class_loss: ``softmax``, or ``bce`` for images of several classes.
        taps: indices of the levels to look at, fine to coarse; None for all.
        foreground_threshold: θ_fg, share of the highest attention; what reaches it is dropped.
        background_threshold: θ_bg, share of the highest attention; what does not exceed it is background.
        soft_masks: sigmoids in place of the thresholds' indicators, so that the masks pass gradients.
        mask_probability: of the dropped foreground mask in the draw; None multiplies by nothing.
        contrastive_weight: of L_ca (equation 2), at every tap.
        margin: m of L_ca.
        distance: of L_ca.
        embed_from: features that L_ca compares, ``attended`` by the block or its ``input``.
        embedding_size: of L_ca's projector.
        embed_channels: of the block's θ and φ; None for C / 8.
        value_channels: of the block's g; None for C.
        consistency_weight: of L_fc (equation 3), between first and last tap.
        consistency: L_fc over the positions, ``mean`` or the literal ``sum``.
        map_source: what the score map shows, see ``MapSource``; None for ``first_attention``, or ``cam``
            with CAM. The first map is that of claim 1; the last one, which nothing multiplies, learned little here.
        box_threshold: share of the score map's maximum that a box goes around.
        map_size: S, pixels of the square score map that stands for the valid image.

    Raises:
        ValueError: options outside their range, or that contradict one another.
    """

    name = "localisation"
    needs = frozenset({"levels"})

    def __init__(
        self,
        sizes: FeatureSizes,
        method: Method = "in_sample",
        class_loss: ClassLoss = "softmax",
        taps: Sequence[int] | None = None,
        foreground_threshold: float = 0.8,
        background_threshold: float = 0.2,
        soft_masks: bool = False,
        mask_probability: float | None = 0.75,
        contrastive_weight: float = 1.0,
        margin: float = 0.5,
        distance: Distance = "euclidean",
        embed_from: EmbedFrom = "attended",
        embedding_size: int = 128,
        embed_channels: int | None = None,
        value_channels: int | None = None,
        consistency_weight: float = 1.0,
        consistency: Reduction = "mean",
        map_source: MapSource | None = None,
        box_threshold: float = 0.2,
        map_size: int = 224,
    ) -> None:
        self.init_args = {name: v for name, v in locals().items() if name not in ("self", "__class__", "sizes")}
        super().__init__()
        self.taps = checked_taps(taps, len(sizes.level_channels))
        self.init_args["taps"] = None if taps is None else list(taps)
        kinds = {"method": Method, "class_loss": ClassLoss, "distance": Distance, "embed_from": EmbedFrom}
        for name, kind in (kinds | {"consistency": Reduction}).items():
            check_choice(name, self.init_args[name], kind)
        check_thresholds(foreground_threshold, background_threshold)
        weights = ("margin", "contrastive_weight", "consistency_weight")
        check_not_negative({name: self.init_args[name] for name in weights})
        for name, share in (("mask_probability", mask_probability), ("box_threshold", box_threshold)):
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name}: expected a share within [0, 1], got {share}")
        if map_size < 2:
            raise ValueError(f"map_size must be at least 2 pixels, got {map_size}")
        self.is_neck = method == "in_sample"
        if self.is_neck and consistency_weight > 0 and len(self.taps) < 2:
            raise ValueError(
                f"taps: expected at least 2 levels for the foreground consistency loss, got {list(self.taps)}; tap "
                "more, or set consistency_weight=0"
            )
        self.sizes, self.class_loss, self.distance, self.consistency = sizes, class_loss, distance, consistency
        self.contrastive_weight, self.margin, self.consistency_weight = contrastive_weight, margin, consistency_weight
        self.mask_probability, self.box_threshold, self.map_size = mask_probability, box_threshold, map_size
        self.map_source: MapSource = map_source or ("first_attention" if self.is_neck else "cam")
        check_choice("map_source", self.map_source, MapSource)
        if not self.is_neck and self.map_source != "cam":
            raise ValueError(f"map_source: method='cam' has no attention to show as {map_source!r}; leave it out")
        channels = [sizes.level_channels[index] for index in self.taps]
        self.classifier = nn.Linear(channels[-1], sizes.num_classes)
        embedding = (embed_channels, value_channels, embedding_size if contrastive_weight > 0 else None, embed_from)
        masks = (foreground_threshold, background_threshold, soft_masks)
        self.attention = nn.ModuleList(
            AttentionTap(width, *embedding, *masks) for width in (channels if self.is_neck else [])
        )

    def pass_level(self, index: int, level: Level) -> tuple[Tensor, Tap | None]:
        """Look at a tapped level, which ``check_level`` checks, and in training multiply it; see ``Head``."""
        first, last = self.taps[0], self.taps[-1]
        of_map = {"last_attention": [last], "product": [first, last], "cam": []}.get(self.map_source, [first])
        if not self.is_neck or index not in (self.taps if self.training else of_map):
            return level.features, None
        check_level(index, level, self.sizes.level_channels[index])
        tap: Tap = self.attention[self.taps.index(index)](level, embed=self.training)
        if not self.training or self.mask_probability is None or index == self.taps[-1]:
            return level.features, tap
        shown = importance_map(tap.raw, tap.padding)
        if float(torch.rand(())) < self.mask_probability:
            shown = torch.where(tap.usable[:, None, None], tap.masks[:, DROPPED], shown)
        return level.features * shown.to(level.features.dtype)[:, None], tap

    def forward(self, features: Features) -> Tensor:
        """Class logits [B, K] of the mean of the last tapped map over the valid image."""
        level = features.levels[self.taps[-1]]
        if not self.is_neck:
            check_level(self.taps[-1], level, self.classifier.in_features)
        valid = ~level.mask[:, None]
        means = (level.features * valid).sum(dim=(2, 3)) / valid.sum(dim=(2, 3))
        logits: Tensor = self.classifier(means)
        return logits

    def losses(self, outputs: Tensor, features: Features, targets: Sequence[Target]) -> HeadLosses:
        """Equation 4: L_cls + L_ca + L_fc, each the mean over the images with a label; reads their ``labels`` only.

        Raises:
            ValueError: labels that are no classes, several per image with ``softmax``, or features of evaluation mode.
        """
        check_targets(targets, len(outputs), self.sizes.num_classes)
        if self.class_loss == "softmax":
            check_one_class(targets)
        classes = image_classes(targets, self.sizes.num_classes, outputs.device)
        terms = {"cls": class_loss(outputs, classes, self.class_loss)}
        if not self.is_neck:
            return HeadLosses(terms["cls"], terms, {})
        taps: list[Tap] = [features.taps[index] for index in self.taps]
        if any(tap is None for tap in taps):
            raise ValueError("losses: expected features of training mode, got some of evaluation mode; call train()")
        terms["ca"] = contrastive_loss(taps, classes.labelled, self.margin, self.distance)
        terms["fc"] = self._consistency(taps[0], taps[-1], classes.labelled)
        # the blocks take part even where no term reads them, which several processes want
        unread = 0.0 * sum(tap.raw.sum() for tap in taps)
        total = terms["cls"] + self.contrastive_weight * terms["ca"] + self.consistency_weight * terms["fc"] + unread
        skipped = torch.stack([~tap.usable & classes.labelled for tap in taps])
        constant = torch.stack([tap.attention.detach().amax(dim=(1, 2)) == 0 for tap in taps])
        return HeadLosses(total, terms, {"empty_masks": skipped.sum(), "constant_maps": constant.sum()})

    def _consistency(self, first: Tap, last: Tap, labelled: Tensor) -> Tensor:
        """L_fc of first and last tap."""
        if self.consistency_weight == 0:
            return first.raw.new_zeros(())
        return foreground_consistency_loss(
            first.attention, last.attention, first.padding, last.padding, labelled, self.consistency
        )

    @torch.no_grad()
    def score_map(self, outputs: Tensor, features: Features, labels: Tensor | None = None) -> Tensor:
        """Where the object is: [B, 1, S, S] in [0, 1] over the valid image; 0 where the map is constant.

        Outputs are of ``forward`` in evaluation mode. ``labels`` are the images' classes [B] (GT-known), which a
        ValueError checks; None for the predicted ones. Only ``cam`` depends on them.
        """
        classes = chosen_classes(outputs, labels)
        product: tuple[MapSource, ...] = ("first_attention", "last_attention")
        sources = product if self.map_source == "product" else (self.map_source,)
        maps = [upsampled_map(*self._shown(source, features, classes), self.map_size) for source in sources]
        return stretched(torch.stack(maps).prod(dim=0))[:, None]

    def _shown(self, source: MapSource, features: Features, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Values of one source [B, h, w] and their padding."""
        if source == "cam":
            level = features.levels[self.taps[-1]]
            return class_activation(level.features, self.classifier.weight[classes]), level.mask
        tap: Tap = features.taps[self.taps[-1 if source == "last_attention" else 0]]
        if source == "importance":
            return importance_map(tap.raw, tap.padding), tap.padding
        return (tap.masks[:, DROPPED] if source == "dropped_foreground" else tap.attention), tap.padding

    def predictions(self, outputs: Tensor, features: Features) -> dict[str, Tensor]:
        """Box and score map of each image's predicted class, in evaluation mode.

        Returns:
            ``pred_logits`` [B, 1, K], of which the sigmoid is the class's probability, and -inf for the other classes:
            the box is not theirs; ``pred_boxes`` [B, 1, 4] (all 0 where the map is constant); ``score_maps``
            [B, 1, S, S].
        """
        maps = self.score_map(outputs, features)
        logits = at_least_float32(outputs)
        logits = log_odds(logits) if self.class_loss == "softmax" else logits
        predicted = logits.argmax(dim=1, keepdim=True)
        alone = torch.full_like(logits, -torch.inf).scatter(1, predicted, logits.gather(1, predicted))
        return {
            "pred_logits": alone[:, None],
            "pred_boxes": score_map_boxes(maps[:, 0], self.box_threshold)[:, None],
            "score_maps": maps,
        }

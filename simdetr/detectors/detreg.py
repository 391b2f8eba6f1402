"""DETReg, to compare with: a Deformable DETR on a frozen backbone that also learns to name the features of its boxes.

In: images, padding masks and boxes of one pseudo-class. Out: the losses of Deformable DETR, and how far each matched
query is from the self-supervised features of its box. Source: DETReg (arXiv 2106.04550); numerics and names of the
published code. Two departures:

- The original crops the unaugmented image and jitters the crop's colours for itself. Here boxes are cut out of the
  images of the batch, as they were augmented, so that any data that trains another detector trains this one.
- The original computes the features by a second copy of the frozen self-supervised backbone. Here it is the backbone.

Letters: B images, Q queries, C channels, D width of an embedding, M matched pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models import FeatureListNet
from torch import Tensor, nn
from torchvision.ops import roi_align

from simdetr.boxes import cxcywh_to_xyxy
from simdetr.detectors.backbone import Backbone, laid_out
from simdetr.detectors.deformable_detr import DeformableDETR, Perceptron
from simdetr.detectors.detector import Detector
from simdetr.detectors.losses import valid_sizes
from simdetr.detectors.matcher import Matches, Target


class DETReg(DeformableDETR):
    """Deformable DETR without refinement, on a backbone frozen with its batch norm, and one head more for pretraining.

    It detects as its base does, and its weights are the base's and ``feature_embed``: fine-tuning starts a
    ``DeformableDETR`` from them, which drops that head and replaces ``class_embed``. The backbone has to start from
    self-supervised weights (SwAV in the original), since its map of stride 8 is what the head learns.

    Args:
        num_classes: K; 1 where the boxes have no classes.
        embedding_weight: weight of the embedding loss in the total.
        crop_size: side in pixels to which each box's crop is resized.
        **settings: further arguments of ``DeformableDETR``, see there.

    Raises:
        ValueError: settings that the base rejects, or a backbone without a frozen map of stride 8.
    """

    def __init__(self, num_classes: int, embedding_weight: float = 1.0, crop_size: int = 128, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(num_classes, with_box_refine=False, two_stage=False, freeze_backbone=True, **settings)
        own = {"num_classes": num_classes, "embedding_weight": embedding_weight, "crop_size": crop_size}
        self.init_args = own | settings
        if self.backbone.pyramid is not None or len(self.backbone.channels) < 3:
            raise ValueError(
                "DETReg's embeddings are the backbone's own map of stride 8: expected a network with stages of strides "
                "8, 16 and 32, such as resnet50, and num_feature_levels of 3 or more; got strides "
                f"{self.backbone.strides}."
            )
        self.embedding_weight, self.crop_size = embedding_weight, crop_size
        dim = self.transformer.level_embed.shape[1]
        self.feature_embed = Perceptron(dim, self.backbone.channels[0], depth=2)

    @classmethod
    def finetuned_as(cls, init_args: Mapping[str, Any]) -> tuple[type[Detector], dict[str, Any]]:
        """A ``DeformableDETR`` whose backbone learns."""
        own = ("embedding_weight", "crop_size")
        return DeformableDETR, {name: value for name, value in init_args.items() if name not in own}

    def losses(self, images: Tensor, mask: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Losses of all layers, see ``DetectionLoss``, and ``loss_embedding`` of the last."""
        decoded = self.decode(images, mask)[0]
        outputs = self.predictions(decoded)
        matched = self.criterion.match(outputs, targets)
        terms = self.criterion.of_matched(outputs, targets, matched)
        last = Matches(*(indices[-1:] for indices in matched.decoder)).on(images.device)
        predicted, wanted = self.feature_embed(decoded.states[-1]), self.box_embeddings(images, mask, targets)
        terms["loss_embedding"] = embedding_loss(predicted, wanted, last)
        terms["loss"] = terms["loss"] + self.embedding_weight * terms["loss_embedding"]
        return terms

    @torch.no_grad()
    def box_embeddings(self, images: Tensor, mask: Tensor, targets: Sequence[Target]) -> list[Tensor]:
        """What the head learns: the frozen features of each box's crop, averaged over the crop; [T, D] per image."""
        sizes = valid_sizes(mask).flip(1).repeat(1, 2)
        boxes = [cxcywh_to_xyxy(target["boxes"].to(images)) * size for target, size in zip(targets, sizes, strict=True)]
        crops = roi_align(images, boxes, self.crop_size, aligned=True)
        features = crops.new_zeros(0, self.backbone.channels[0])
        if len(crops):
            features = _finest_map(self.backbone, crops).float().mean(dim=(2, 3))
        return list(features.split_with_sizes([len(of_image) for of_image in boxes]))


def embedding_loss(predicted: Tensor, wanted: Sequence[Tensor], matches: Matches) -> Tensor:
    """Mean absolute difference over the matched pairs and the D numbers of each; 0 without any pair.

    Of embeddings of all queries [B, Q, D] and of the boxes, [T, D] per image, and matches of one layer, [1, M].
    """
    image, query, target = (indices[0] for indices in matches)
    pairs = predicted[image, query].float() - nn.utils.rnn.pad_sequence(list(wanted), batch_first=True)[image, target]
    # 0 · Σ keeps the graph where nothing is matched
    return pairs.abs().sum() / max(pairs.numel(), 1) + 0.0 * predicted.float().sum()


def _finest_map(backbone: Backbone, images: Tensor) -> Tensor:
    """The map of stride 8 [B, D, H_l, W_l], where possible without what comes after it, which is most of the work."""
    body = backbone.body
    if not isinstance(body, FeatureListNet):
        finest: Tensor = backbone(images)[0]
        return finest
    images = laid_out(images)
    for name, part in body.items():
        images = part(images)
        if name in body.return_layers:
            break
    return images

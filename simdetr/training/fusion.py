"""Detections and mined boxes of the same images in, the labels of a stage that both speak for out.

Mined boxes follow an image's own edges and know nothing of the set; a detector has seen the whole set and draws its
boxes less exactly. So a detection takes over part of the mined box that it overlaps, and is as sure as the two
together; mined boxes that no detection repeats stay, with less trust. A detector repeats what size and borders alone
explain of the scores that it learned, more of it with every stage, so the fused scores become a certainty again as the
mined ones did (``simdetr.proposals.certainty``). The document trains stage j + 1 on the detections alone
(US 2025/0265826, [0040]): ``self_training.fusion: null`` does so.

Letters: D detections and M mined boxes of one image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

from simdetr.boxes import pairwise_iou
from simdetr.data.labels import ImageLabels, Labels
from simdetr.proposals.certainty import certainty


@dataclass(frozen=True)
class Fusion:
    """How detections and mined boxes become one set of labels.

    Args:
        iou: Overlap from which a detection and a mined box mean the same object.
        mined_box: Part of the mined box in the fused one, 0 to 1.
        mined_score: Exponent of the mined score in the fused one, 0 to 1; the detection's has the rest.
        unmatched: Score that stands in for that of a mined box where a detection has none, and the other way round.
        max_iou: Of two boxes that overlap more, the less certain goes. Mined boxes that overlap less have lost score in
            mining for that already, and often one of them is the better one.
    """

    iou: float = 0.5
    mined_box: float = 0.9
    mined_score: float = 0.8
    unmatched: float = 0.05
    max_iou: float = 0.8

    def __post_init__(self) -> None:
        for name in ("iou", "mined_box", "mined_score", "unmatched", "max_iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"fusion.{name}: expected 0 to 1, got {getattr(self, name)}")


def fuse(found: Labels, mined: Labels, settings: Fusion, *, max_boxes: int) -> Labels:
    """Fuse image by image, leave out what overlaps, and compare the scores over the whole set.

    Args:
        found: Detections of a stage with their objectness as scores; their classes, categories and stage stay.
        mined: Labels T0 with the same categories; of images that it does not hold, detections alone speak.
        settings: How.
        max_boxes: Most certain boxes kept per image.
    """
    rows = []
    for index, image_id in enumerate(found.image_ids):
        image = found.image(index)
        has_mined = image_id in mined and len(mined.of(image_id)) > 0
        rows.append(_fused(image, mined.of(image_id), settings, max_boxes) if has_mined else _alone(image, settings))
    labels = Labels.from_images(rows, found.categories, found.stage)
    return replace(labels, scores=certainty(labels.scores, labels.boxes_xyxy, labels.sizes_hw, labels.offsets))


def _fused(found: ImageLabels, mined: ImageLabels, settings: Fusion, max_boxes: int) -> ImageLabels:
    boxes, own_boxes = torch.from_numpy(found.boxes_xyxy), torch.from_numpy(mined.boxes_xyxy)
    scores, own_scores = torch.from_numpy(found.scores), torch.from_numpy(mined.scores)
    overlaps = pairwise_iou(boxes, own_boxes)
    same = overlaps >= settings.iou
    # of several mined boxes the one that is both near and certain
    choice = (overlaps * (own_scores + settings.unmatched)).masked_fill(~same, -1.0)
    partner = choice.argmax(dim=1) if len(boxes) else torch.zeros(0, dtype=torch.int64)
    has_partner = same.any(dim=1)
    part = settings.mined_box * has_partner[:, None].float()
    fused = (1 - part) * boxes + part * own_boxes[partner]
    partner_scores = torch.where(has_partner, own_scores[partner], 0.0)
    seconds = same.float() * scores[:, None]
    seen = seconds.max(dim=0).values if len(boxes) else torch.zeros(len(own_boxes))
    together = torch.cat([fused, own_boxes])
    joint = torch.cat([_joint(scores, partner_scores, settings), _joint(seen, own_scores, settings)])
    # the fused box comes before the mined one of the same score
    kept = nms(together, joint, settings.max_iou)[:max_boxes]
    classes = np.concatenate([found.classes, mined.classes])[kept.numpy()]
    return ImageLabels.build(found.image_id, found.size_hw, together[kept].numpy(), classes, joint[kept].numpy())


def _alone(found: ImageLabels, settings: Fusion) -> ImageLabels:
    """Detections of an image without mined boxes, trusted no more than one without a partner elsewhere."""
    scores = torch.from_numpy(found.scores)
    return replace(found, scores=_joint(scores, torch.zeros_like(scores), settings).numpy())


def _joint(detected: Tensor, mined: Tensor, settings: Fusion) -> Tensor:
    """Weighted geometric mean of two scores, neither below ``unmatched``."""
    power = settings.mined_score
    return detected.clamp(min=settings.unmatched) ** (1 - power) * mined.clamp(min=settings.unmatched) ** power

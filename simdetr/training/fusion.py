"""Detections and the labels before in, the labels of a stage that both speak for out.

Mined boxes follow an image's own edges and know nothing of the set; a detector has seen the whole set and draws its
boxes less exactly. So a detection takes over part of the labelled box that it overlaps, and is as sure as the two
together; boxes that no detection repeats stay, with less trust. A detector learned from the labels before and repeats
what they know, so each stage changes them less, as in a running mean. It also repeats what size and borders alone
explain of the scores that it learned, more of it with every stage: in stage 1 the fused scores become a certainty again
as the mined ones did (``simdetr.mining.certainty``), later those of the detections do. The document trains stage
j + 1 on the detections alone (US 2025/0265826, [0040]): ``self_training.fusion: null`` does so.

Letters: D detections and M boxes of the labels before of one image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

from simdetr.boxes import pairwise_iou
from simdetr.data.annotations import LINEAGE_COLUMNS, ImageLabels, Lineage
from simdetr.data.labels import Labels
from simdetr.mining.certainty import certainty


@dataclass(frozen=True)
class Fusion:
    """How detections and the labels before, mined at first, become one set of labels.

    Args:
        iou: Overlap from which a detection and a labelled box mean the same object.
        mined_box: Part of the labelled box in the fused one, 0 to 1.
        mined_score: Exponent of the mined score in that of stage 1, 0 to 1; the detection's has the rest, in stage j
            a j-th of it.
        unmatched: Score that stands in for that of a labelled box where a detection has none, and the other way round.
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


def fuse(found: Labels, before: Labels, settings: Fusion, *, max_boxes: int) -> Labels:
    """Fuse image by image, leave out what overlaps, and compare the scores over the whole set.

    Args:
        found: Detections of stage 1 or later, else a ValueError, with their objectness as scores; their classes,
            categories and stage stay.
        before: Labels of the stage before, T0 at first, with the same categories; of images that it does not hold,
            detections alone speak.
        settings: How.
        max_boxes: Most certain boxes kept per image.
    """
    if found.stage < 1:
        raise ValueError(f"found: expected detections of stage 1 or later, got stage {found.stage}")
    is_first = found.stage == 1
    if not is_first:
        found = _with_certainty(found)
    power = 1 - (1 - settings.mined_score) / found.stage
    rows = []
    for index, image_id in enumerate(found.image_ids):
        image = found.image(index)
        has_boxes = image_id in before and len(before.of(image_id)) > 0
        rows.append(
            _fused(image, before.of(image_id), settings, power, max_boxes)
            if has_boxes
            else _alone(image, settings, power)
        )
    labels = Labels.from_images(rows, found.categories, found.stage)
    return _with_certainty(labels) if is_first else labels


def _with_certainty(labels: Labels) -> Labels:
    return replace(labels, scores=certainty(labels.scores, labels.boxes_xyxy, labels.sizes_hw, labels.offsets))


def _fused(found: ImageLabels, before: ImageLabels, settings: Fusion, power: float, max_boxes: int) -> ImageLabels:
    boxes, own_boxes = torch.from_numpy(found.boxes_xyxy), torch.from_numpy(before.boxes_xyxy)
    scores, own_scores = torch.from_numpy(found.scores), torch.from_numpy(before.scores)
    overlaps = pairwise_iou(boxes, own_boxes)
    same = overlaps >= settings.iou
    # of several boxes before the one that is both near and certain
    choice = (overlaps * (own_scores + settings.unmatched)).masked_fill(~same, -1.0)
    partner = choice.argmax(dim=1) if len(boxes) else torch.zeros(0, dtype=torch.int64)
    has_partner = same.any(dim=1)
    part = settings.mined_box * has_partner[:, None].float()
    fused = (1 - part) * boxes + part * own_boxes[partner]
    partner_scores = torch.where(has_partner, own_scores[partner], 0.0)
    seconds = same.float() * scores[:, None]
    seen = seconds.max(dim=0).values if len(boxes) else torch.zeros(len(own_boxes))
    together = torch.cat([fused, own_boxes])
    joint = torch.cat(
        [_joint(*pair, power, settings.unmatched) for pair in ((scores, partner_scores), (seen, own_scores))]
    )
    # the fused box goes first where scores are equal
    kept = nms(together, joint, settings.max_iou)[:max_boxes]
    classes = np.concatenate([found.classes, before.classes])[kept.numpy()]
    return ImageLabels.build(found.image_id, found.size_hw, together[kept].numpy(), classes, joint[kept].numpy())


def _alone(found: ImageLabels, settings: Fusion, power: float) -> ImageLabels:
    """Detections of an image without labels before, trusted no more than one without a partner elsewhere."""
    scores = torch.from_numpy(found.scores)
    return replace(found, scores=_joint(scores, torch.zeros_like(scores), power, settings.unmatched).numpy())


def _joint(detected: Tensor, before: Tensor, power: float, least: float) -> Tensor:
    """Geometric mean of two scores, neither below ``least``, in which the one before has the weight ``power``."""
    return detected.clamp(min=least) ** (1 - power) * before.clamp(min=least) ** power


# ----------------------------------------------------------------------------------------------------------------------
# Lineage. A detector does not say which label taught it a box, so overlap decides: a box goes on from the one that it
# overlaps most, if that is at least half of their union; every other box is a find of its own stage.

MIN_IOU = 0.5


def inherit(labels: Labels, before: Labels) -> Labels:
    """The labels of stage j with the lineage of the boxes that they go on from.

    Image by image, so that it takes no more than about 40 bytes per box beside the labels; about 0.1 ms an image. The
    labels ``before``, of stage j - 1, need not hold all of the images, nor have a lineage themselves: their boxes then
    count as first seen by their stage.
    """
    earlier = Lineage.first_seen(before.stage, before.offsets) if before.lineage is None else before.lineage
    own = Lineage.first_seen(labels.stage, labels.offsets)
    parent = np.full(len(own), -1, np.int64)
    for image, image_id in enumerate(labels.image_ids):
        if image_id not in before:
            continue
        at = before.row_of(image_id)
        rows = slice(int(labels.offsets[image]), int(labels.offsets[image + 1]))
        candidates = slice(int(before.offsets[at]), int(before.offsets[at + 1]))
        if rows.start == rows.stop or candidates.start == candidates.stop:
            continue
        overlaps = pairwise_iou(
            torch.from_numpy(labels.boxes_xyxy[rows]), torch.from_numpy(before.boxes_xyxy[candidates])
        ).numpy()
        parent[rows] = np.where(overlaps.max(axis=1) >= MIN_IOU, candidates.start + overlaps.argmax(axis=1), -1)
    known = parent >= 0
    for name in LINEAGE_COLUMNS:
        getattr(own, name)[known] = getattr(earlier, name)[parent[known]]
    return replace(labels, lineage=own)

"""Boxes of a stage and of earlier ones in, the boxes with their lineage out.

A detector does not say which label taught it a box, so overlap decides: a box goes on from the one that it overlaps
most, if that is at least half of their union; every other box is a find of its own stage.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from simdetr.boxes import pairwise_iou
from simdetr.data.labels import Labels
from simdetr.data.lineage import LINEAGE_COLUMNS, Lineage

MIN_IOU = 0.5


def inherit(labels: Labels, *earlier: Labels) -> Labels:
    """The labels with the lineage of the boxes that they go on from.

    Image by image, so that it takes no more than about 40 bytes per box beside the labels; about 0.1 ms an image.

    Args:
        labels: of stage j.
        earlier: of stage j - 1, then those that a box may come back from after a stage left it out, such as T0; need
            not hold all of the images, nor have a lineage themselves: their boxes then count as first seen by their
            stage.
    """
    own = Lineage.first_seen(labels.stage, labels.offsets)
    is_open = np.ones(len(own), bool)
    for before in earlier:
        lineage = Lineage.first_seen(before.stage, before.offsets) if before.lineage is None else before.lineage
        parent = _parents(labels, before)
        goes_on = is_open & (parent >= 0)
        for name in LINEAGE_COLUMNS:
            getattr(own, name)[goes_on] = getattr(lineage, name)[parent[goes_on]]
        is_open &= ~goes_on
    return replace(labels, lineage=own)


def _parents(labels: Labels, before: Labels) -> NDArray[np.int64]:
    """Row among the boxes before that each box goes on from, -1 if none; shape of the labels' boxes [N]."""
    parent = np.full(len(labels.boxes_xyxy), -1, np.int64)
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
    return parent

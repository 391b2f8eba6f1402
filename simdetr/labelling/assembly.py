"""Candidates, shots and people's labels in, the labels that the detector is trained on again out.

What is neither a label nor surely background is an ignore region, stored as COCO's crowd: training gives no loss there,
see `simdetr.detectors.losses`. Source: Kaul et al., Label, Verify, Correct (2022), section 3.3.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from simdetr.boxes import pairwise_iou, suppress_overlaps
from simdetr.data.annotations import ImageLabels
from simdetr.data.labels import Labels
from simdetr.labelling.candidates import Candidates

LOG = logging.getLogger(__name__)
IGNORE_IOU = 0.5
"""Overlap with a label from which a rejected detection is about that object, and no ignore region."""


def without_duplicates(candidates: Candidates, boxes_xyxy: NDArray[np.float32], iou: float = 0.5) -> Candidates:
    """Reject the less sure of two kept candidates that lie on each other once corrected, whatever their classes.

    Args:
        candidates: M of them.
        boxes_xyxy: Their corrected boxes [M, 4].
        iou: Overlap above which two are one object.
    """
    labels, rows = candidates.labels, candidates.kept
    boxes, scores, owners = (torch.from_numpy(values[rows]) for values in (boxes_xyxy, labels.scores, labels.owners))
    stay = rows[suppress_overlaps(boxes, scores, iou, owners).numpy()]
    gone = np.zeros(len(labels.boxes_xyxy), bool)
    gone[np.setdiff1d(rows, stay)] = True
    return candidates.reject(gone, "duplicate")


def collapsed_classes(candidates: Candidates, max_ratio: float) -> dict[str, int]:
    """Classes with more than ``max_ratio`` times the median number of labels, and how many: a sign of a collapse."""
    counts = np.bincount(candidates.labels.classes[candidates.kept], minlength=candidates.labels.num_classes)
    if not counts.any():
        return {}
    limit = max_ratio * float(np.median(counts[counts > 0]))
    return {
        category.name: int(count)
        for category, count in zip(candidates.labels.categories, counts, strict=True)
        if count > limit
    }


def classes_without_labels(candidates: Candidates, shots: Labels) -> list[str]:
    """Names of the classes with shots of which no candidate was kept."""
    empty = np.setdiff1d(shots.classes[~shots.crowd], candidates.labels.classes[candidates.kept])
    return [shots.categories[own].name for own in empty]


def assemble(
    candidates: Candidates,
    boxes_xyxy: NDArray[np.float32],
    shots: Labels,
    people: Labels | None = None,
    *,
    ignore_above: float = 0.1,
    weights: NDArray[np.float32] | None = None,
) -> Labels:
    """The labels to train on: of every image with a kept candidate, of the shots and of what people labelled.

    What people made stays as it is, and stands for the whole image; an image of shots is labelled in part.

    Args:
        candidates: M detections and what became of them, of the categories of the shots.
        boxes_xyxy: Their boxes [M, 4] after correction.
        shots: Boxes that people drew; what else their images hold is open.
        people: Images that people labelled as a whole.
        ignore_above: Rejected detections of a higher score become ignore regions where no label is.
        weights: How much each candidate counts in training, [M] in 0..1; 1 by default.

    Returns:
        Labels whose crowd boxes are ignore regions; images in the order shots, people, candidates, each once.
    """
    found = candidates.labels
    weights = np.ones(len(boxes_xyxy), np.float32) if weights is None else weights
    kept, uncertain = candidates.reason == "", found.scores > ignore_above
    done = set(people.image_ids) if people is not None else set()
    images = [shots.image(row) for row, image_id in enumerate(shots.image_ids) if image_id not in done]
    images += [people.image(row) for row in range(len(people))] if people is not None else []
    rows_of = {image_id: slice(*found.offsets[row : row + 2].tolist()) for row, image_id in enumerate(found.image_ids)}
    made = [
        image if image.image_id in done else _filled(image, rows_of, kept, uncertain, boxes_xyxy, weights, found)
        for image in images
    ]
    there = {image.image_id for image in made}
    for row, image_id in enumerate(found.image_ids):
        if image_id not in there and kept[rows_of[image_id]].any():
            height, width = found.sizes_hw[row].tolist()
            empty = ImageLabels.build(image_id, (height, width), [], [])
            made.append(_filled(empty, rows_of, kept, uncertain, boxes_xyxy, weights, found))
    return Labels.from_images(made, shots.categories)


def _filled(
    image: ImageLabels,
    rows_of: Mapping[str, slice],
    kept: NDArray[np.bool_],
    uncertain: NDArray[np.bool_],
    boxes_xyxy: NDArray[np.float32],
    weights: NDArray[np.float32],
    found: Labels,
) -> ImageLabels:
    """Labels of an image with the kept candidates beside its own, and ignore regions where neither is."""
    rows = rows_of.get(image.image_id)
    if rows is None:
        return image
    labelled = np.flatnonzero(kept[rows]) + rows.start
    boxes = np.concatenate([image.boxes_xyxy, boxes_xyxy[labelled]])
    left = np.flatnonzero(~kept[rows] & uncertain[rows]) + rows.start
    if len(left) and len(boxes):
        overlaps = pairwise_iou(torch.from_numpy(found.boxes_xyxy[left]), torch.from_numpy(boxes)).numpy()
        left = left[(overlaps < IGNORE_IOU).all(axis=1)]
    return ImageLabels.build(
        image.image_id,
        image.size_hw,
        np.concatenate([boxes, found.boxes_xyxy[left]]),
        np.concatenate([image.classes, found.classes[labelled], found.classes[left]]),
        np.concatenate([image.scores, weights[labelled], np.ones(len(left), np.float32)]),
        np.concatenate([image.crowd, np.zeros(len(labelled), bool), np.ones(len(left), bool)]),
    )

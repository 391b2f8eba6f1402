"""How well does a detector know the pseudo-classes that it was trained on? Its labels and its detections in, ACC out.

The pseudo-class accuracy (ACC of US 2025/0265826, Table 9) is a share: of the labelled boxes that the detector finds
again, those to which it gives the class of the label. A box is found where a detection overlaps it with an IoU of at
least 0.5; of several the one that overlaps most is asked. With more classes it falls, for the task is harder, while
the detector learns more; compare it between runs of as many classes. Beside it stands how many boxes there are per
image to learn (the proposals of Table 10), which grows with the stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from simdetr.boxes import pairwise_iou
from simdetr.data.labels import Labels

MIN_IOU = 0.5


@dataclass(frozen=True)
class ClassAgreement:
    """Labels that a stage was trained on, and what its detector says of them.

    Attributes:
        images: Images that have labels, with boxes or without.
        boxes: Labelled boxes, of which each image has ``boxes / images`` on average.
        found: Those that a detection overlaps.
        agreeing: Those whose detection has their class.
        classes: Number of pseudo-classes.
    """

    images: int
    boxes: int
    found: int
    agreeing: int
    classes: int

    @property
    def proposals_per_image(self) -> float:
        """Boxes per image that were trained on."""
        return self.boxes / max(1, self.images)

    @property
    def accuracy(self) -> float | None:
        """ACC, 0..1; None where there is one class, which is always right, or no box was found."""
        return self.agreeing / self.found if self.found and self.classes > 1 else None

    def summary(self) -> str:
        """One line."""
        learnt = f"{self.proposals_per_image:.1f} proposals per image in training"
        if self.accuracy is None:
            return learnt
        return f"{learnt}, pseudo-class accuracy {100 * self.accuracy:.1f} % of the {self.found:,} found again"


def class_agreement(labels: Labels, found: Labels) -> ClassAgreement:
    """Compare the labels of a training with the detections of what was trained, whose classes have the same order.

    Images without detections count as found nothing on; those without labels are passed over.
    """
    hits = agreeing = 0
    for image_id in labels.image_ids:
        own = labels.of(image_id)
        if len(own) == 0 or image_id not in found or len(there := found.of(image_id)) == 0:
            continue
        overlaps, best = pairwise_iou(torch.from_numpy(own.boxes_xyxy), torch.from_numpy(there.boxes_xyxy)).max(dim=1)
        hit = (overlaps >= MIN_IOU).numpy()
        hits += int(hit.sum())
        agreeing += int((there.classes[best.numpy()] == own.classes)[hit].sum())
    return ClassAgreement(len(labels), len(labels.classes), hits, agreeing, labels.num_classes)

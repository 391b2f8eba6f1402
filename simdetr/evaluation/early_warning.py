"""Mined boxes in, signs that pretraining on them will not pay out: seconds, before anything is trained.

A sign is no verdict. Recall alone says little: on Aquarium mined boxes find a third of the fish, and pretraining on
them pays. What the warnings look for are images that there is nothing to learn from: without proposals, with proposals
that know nothing of the image they lie on, or with pseudo-classes that do not tell anything apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from simdetr.data.labels import Labels
from simdetr.evaluation.recall import proposal_recall

MAX_IMAGES = 2000
"""Labelled images that recall is measured on; that of a part is within a percent of the whole."""
MANY_EMPTY, FEW_BOXES, FEW_IMAGES = 0.25, 1.0, 200
LOW_RECALL, BEYOND_CHANCE = 0.1, 1.25
EVEN_CLASSES, ONE_CLASS = 0.1, 2.0
_BEST = 100


@dataclass(frozen=True)
class MiningFigures:
    """What mined labels look like.

    Attributes:
        images: Images that were mined.
        boxes_per_image: Mean.
        empty_share: Part of the images without any box.
        classes: Pseudo-classes that were asked for.
        effective_classes: As many equal classes would be as uneven: the exponential of the entropy of their shares.
        labelled_images: Images that are labelled by people too.
        objects: Their objects.
        label_classes: Classes of these.
        recall50: Share of the objects that a mined box covers with an IoU of at least 0.5; nan without any.
        chance50: The same with each image's boxes laid on the next one.
    """

    images: int
    boxes_per_image: float
    empty_share: float
    classes: int
    effective_classes: float
    labelled_images: int = 0
    objects: int = 0
    label_classes: int = 0
    recall50: float = math.nan
    chance50: float = math.nan


def mining_figures(mined: Labels, truth: Labels | None = None) -> MiningFigures:
    """The figures of mined labels; ``truth`` has human labels of some of their images, maybe of others too."""
    counts = np.diff(mined.offsets)
    shares = np.bincount(mined.classes, minlength=mined.num_classes) / max(len(mined.classes), 1)
    used = shares[shares > 0]
    figures = MiningFigures(
        images=len(mined),
        boxes_per_image=float(counts.mean()) if len(counts) else 0.0,
        empty_share=float((counts == 0).mean()) if len(counts) else 1.0,
        classes=mined.num_classes,
        effective_classes=float(np.exp(-(used * np.log(used)).sum())) if len(used) else 0.0,
    )
    shared = [] if truth is None else [name for name in truth.image_ids if name in mined][:MAX_IMAGES]
    if truth is None or not shared:
        return figures
    people, boxes = truth.select(shared), mined.select(shared)
    return replace(
        figures,
        labelled_images=len(shared),
        objects=int((~people.crowd).sum()),
        label_classes=people.used_classes,
        recall50=_recall50(people, boxes),
        chance50=_recall50(people, laid_on_the_next(boxes)),
    )


def _recall50(truth: Labels, boxes: Labels) -> float:
    return proposal_recall(truth, boxes, (_BEST,))[f"recall50@{_BEST}"]


def laid_on_the_next(labels: Labels) -> Labels:
    """Every image with the boxes of the one before, stretched to its size: the same boxes, blind to what is there."""
    count = len(labels)
    images = [labels.image(index) for index in range(count)]
    rows = []
    for index, own in enumerate(images):
        other = images[index - 1]
        (height, width), (other_height, other_width) = own.size_hw, other.size_hw
        stretch = np.array([width / other_width, height / other_height] * 2, np.float32)
        boxes = other.boxes_xyxy * stretch
        rows.append(replace(other, image_id=own.image_id, size_hw=own.size_hw, boxes_xyxy=boxes, masks=None))
    return Labels.from_images(rows, labels.categories, labels.stage)


def warnings_of(figures: MiningFigures) -> list[str]:
    """What speaks against pretraining on these boxes, in words; empty where nothing does."""
    found = []
    if figures.images < FEW_IMAGES:
        found.append(
            f"only {figures.images:,} images were mined: a detector learns little from so few; all sets on which "
            f"pretraining was seen to pay had more than {FEW_IMAGES}"
        )
    if figures.empty_share > MANY_EMPTY:
        found.append(
            f"{figures.empty_share:.0%} of the images have no proposal: they are blank, or what is on them is too "
            "small for the size that they are mined at (mining.image_size)"
        )
    elif figures.boxes_per_image < FEW_BOXES:
        found.append(f"there are {figures.boxes_per_image:.1f} proposals per image: too few to learn from")
    if 1 < figures.classes and figures.effective_classes < max(ONE_CLASS, EVEN_CLASSES * figures.classes):
        found.append(
            f"the {figures.classes:,} pseudo-classes are as uneven as {figures.effective_classes:.1f} equal ones: they "
            "tell hardly anything apart; compare with the arm class-unaware"
        )
    if not figures.objects:
        return found
    if figures.recall50 < LOW_RECALL:
        found.append(
            f"proposals cover {figures.recall50:.0%} of the {figures.objects:,} objects on {figures.labelled_images:,} "
            "labelled images (IoU 0.5): what is mined is not what you label; a larger mining.image_size or another "
            "encoder may find it"
        )
    elif figures.recall50 < BEYOND_CHANCE * figures.chance50:
        found.append(
            f"proposals cover {figures.recall50:.0%} of the {figures.objects:,} labelled objects (IoU 0.5), those of "
            f"another image {figures.chance50:.0%}: they know little of what is on an image"
        )
    if figures.label_classes == 1:
        found.append(
            "your labels have a single class: telling pseudo-classes apart teaches nothing that it needs, only where "
            "objects are; compare with the arm class-unaware"
        )
    return found


def figures_in_words(figures: MiningFigures) -> str:
    """One line for a terminal."""
    said = (
        f"{figures.images:,} images mined, {figures.boxes_per_image:.1f} proposals per image, "
        f"{figures.empty_share:.0%} of the images without any; {figures.classes:,} pseudo-classes, as even as "
        f"{figures.effective_classes:.0f} equal ones"
    )
    if figures.objects:
        said += (
            f"; proposals cover {figures.recall50:.0%} of {figures.objects:,} labelled objects (IoU 0.5; those of "
            f"another image {figures.chance50:.0%})"
        )
    return said

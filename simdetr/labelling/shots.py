"""What people give in, what a labelling works on out: shots, negative ones, labels that exist, classes known before.

Letters: C classes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from simdetr.boxes import pairwise_iou
from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.images import ImageSource, open_images
from simdetr.data.label_files import read_labels, read_with_report
from simdetr.data.labels import Labels
from simdetr.data.protocols import hash_order

LOG = logging.getLogger(__name__)
_COLUMNS = ("boxes_xyxy", "classes", "scores", "crowd", "areas")
_TRIES = 100  # places that are looked at for background
_SAME, _SAME_PLACE = 0.9, 0.5  # overlap above which two boxes are one, and are of one object
_APART = 0.1  # overlap with what may be an object, below which a place is background


@dataclass(frozen=True)
class LabellingInputs:
    """What a run works on, under one set of ids.

    Attributes:
        images: The unlabelled images and those of the shots; an image of another folder has its path as id.
        pool: Ids of the images to be labelled.
        shots: The few labelled boxes.
        negatives: Boxes that look like a class and are none; or None.
        people: Labels that people made of whole images of the pool; or None.
        base: Labels of images of the pool with the classes that were known before, and with none of the new; or None.
        truth: Of the images of the pool, to measure by; or None.
    """

    images: ImageSource
    pool: tuple[str, ...]
    shots: Labels
    negatives: Labels | None = None
    people: Labels | None = None
    base: Labels | None = None
    truth: Labels | None = None

    @classmethod
    def read(
        cls,
        images: str | Path | ImageSource,
        shots: str | Path,
        shot_images: str | Path | None = None,
        negatives: str | Path | None = None,
        people: str | Path | None = None,
        base: str | Path | None = None,
        truth: str | Path | None = None,
    ) -> LabellingInputs:
        """Read them; see ``autolabel`` for the arguments and errors."""
        pool = images if isinstance(images, ImageSource) else open_images(images)
        inside = shot_images is None and _all_in(pool, shots)
        exemplars = pool if inside else open_images(shots if shot_images is None else shot_images)
        labels = read_labels(shots, images=exemplars)
        before = None if base is None else read_labels(base, images=pool)
        if before is not None:
            labels = labels.with_categories(joined_categories(before.categories, labels.categories))
        missing = [image_id for image_id in labels.image_ids if image_id not in exemplars]
        if missing:
            raise LabelError(
                f"shots: {len(missing)} of {len(labels)} images are not in {exemplars.root}, such as {missing[0]!r}; "
                "give the folder that the file speaks of as --shot_images"
            )
        places = {str(record.path): record.id for record in pool}
        names = {}
        for image_id in exemplars.ids if not inside else ():
            path = str(exemplars.path_of(image_id))
            names[image_id] = places.get(path, path)
        outside = [name for image_id in labels.image_ids if (name := names.get(image_id, image_id)) not in pool]

        def own(found: Labels | None, *, of_pool: bool = True) -> Labels | None:
            if found is None:
                return None
            named = renamed(found.with_categories(labels.categories), {} if of_pool else names)
            return named.select(image_id for image_id in named.image_ids if image_id in pool or not of_pool)

        own_images = ((negatives, exemplars), (people, pool), (truth, pool))
        read = [None if path is None else read_labels(path, images=of) for path, of in own_images]
        return cls(
            ImageSource(pool.root, [*pool.ids, *dict.fromkeys(outside)]),
            tuple(pool.ids),
            renamed(labels, names),
            own(read[0], of_pool=False),
            own(read[1]),
            own(before),
            own(read[2]),
        )

    @property
    def is_base(self) -> NDArray[np.bool_]:
        """Which of the classes were known before, bool [C]."""
        known = np.zeros(self.shots.num_classes, bool)
        if self.base is not None:
            known[self.base.classes] = True
        known[self.shots.classes] = False
        return known

    def labelled(self) -> Labels:
        """What the few-shot detector learns: the shots and, of the classes known before, as many boxes each."""
        if self.base is None:
            return self.shots
        return merged(self.shots, few_of(self.base, int(np.bincount(self.shots.classes).max())))


def _all_in(pool: ImageSource, path: str | Path) -> bool:
    """Whether all images of a label file are in a source."""
    return all(image_id in pool for image_id in read_with_report(path, images=pool)[0].image_ids)


def renamed(labels: Labels, names: Mapping[str, str]) -> Labels:
    """The same labels under other ids of their images; those that are not in ``names`` keep theirs."""
    return replace(labels, image_ids=tuple(names.get(image_id, image_id) for image_id in labels.image_ids))


def joined_categories(before: Sequence[Category], new: Sequence[Category]) -> tuple[Category, ...]:
    """The classes known before, then the new ones, under ids that are free."""
    ids, names = {category.id for category in before}, {category.name for category in before}
    joined = list(before)
    for category in new:
        if category.name not in names:
            free = category.id if category.id not in ids else max([0, *(i for i in ids if isinstance(i, int))]) + 1
            ids.add(free)
            joined.append(Category(free, category.name))
    return tuple(joined)


def few_of(labels: Labels, count: int) -> Labels:
    """The first images, in the order of their names' hashes, that bring every class to at least ``count`` boxes."""
    found: list[str] = []
    counts = np.zeros(labels.num_classes, np.int64)
    for image_id in hash_order(labels.image_ids, 0):
        own = np.bincount(labels.of(image_id).classes, minlength=labels.num_classes)
        if ((own > 0) & (counts < count)).any():
            found.append(image_id)
            counts += own
    return labels.select(found)


def merged(first: Labels, second: Labels) -> Labels:
    """The boxes of both, of the same categories; an image of both has those of both."""
    images = []
    for image_id in dict.fromkeys([*first.image_ids, *second.image_ids]):
        own = [labels.of(image_id) for labels in (first, second) if image_id in labels]
        columns = [np.concatenate([getattr(image, name) for image in own]) for name in _COLUMNS]
        images.append(ImageLabels.build(image_id, own[0].size_hw, *columns))
    return Labels.from_images(images, first.categories)


def check_shots(
    shots: Labels, negatives: Labels | None = None, is_base: NDArray[np.bool_] | None = None
) -> tuple[Category, ...]:
    """The classes that have shots; warns of new ones without any, and of boxes that contradict each other.

    Raises:
        LabelError: No class has a shot.
    """
    counts = np.bincount(shots.classes[~shots.crowd], minlength=shots.num_classes)
    known = np.zeros(len(counts), bool) if is_base is None else is_base
    without = [shots.categories[row].name for row in np.flatnonzero((counts == 0) & ~known)]
    if not counts.any():
        raise LabelError("shots: expected at least one box of a class, got none; draw one and run again")
    if without:
        LOG.warning("shots: %d classes have none and are left out: %s", len(without), ", ".join(without))
    for contradiction in contradictions(shots, negatives):
        LOG.warning("shots: %s", contradiction)
    return tuple(category for category, count in zip(shots.categories, counts, strict=True) if count)


def contradictions(shots: Labels, negatives: Labels | None = None) -> list[str]:
    """Pairs of boxes that say different things of the same place of an image, a line each.

    Two shots of different classes do so from half an overlap on; one of two objects may hide the other, so that this
    is no error. A negative box may lie beside a shot, where only a part of the object is seen, but not on it.
    """
    found = []
    for image in map(shots.image, range(len(shots))):
        boxes = torch.from_numpy(image.boxes_xyxy)
        names = [shots.categories[c].name for c in image.classes]
        overlaps = pairwise_iou(boxes, boxes)
        for a, b in torch.triu(overlaps > _SAME_PLACE, diagonal=1).nonzero().tolist():
            if names[a] != names[b]:
                how = "the same box" if overlaps[a, b] > _SAME else f"boxes that overlap by {float(overlaps[a, b]):.2f}"
                found.append(f"{image.image_id} has {how} as {names[a]} and as {names[b]}")
        if negatives is not None and image.image_id in negatives:
            denied = torch.from_numpy(negatives.of(image.image_id).boxes_xyxy)
            rows = (pairwise_iou(boxes, denied) > _SAME).any(dim=1).nonzero().flatten().tolist()
            found += [f"{image.image_id} has a box of {names[row]} that is among the negative ones too" for row in rows]
    return found


def background_boxes(shots: Labels, detections: Labels, per_image: int, seed: int = 0, *, above: float = 0.1) -> Labels:
    """Boxes of the shots' sizes where their images show neither a shot nor, as far as is known, another object.

    As negative shots they let the votes say that a candidate is nothing at all; the published vote knows only classes.

    Args:
        shots: The few labelled boxes.
        detections: On the images of the shots.
        per_image: Most boxes per image; fewer where there is no room.
        seed: Of the places.
        above: Detections of a higher score may be objects.

    Returns:
        Labels of the images of the shots; what the classes say means nothing.
    """
    images = []
    for image in map(shots.image, range(len(shots))):
        if not len(image):
            continue
        rng = np.random.default_rng([seed, int.from_bytes(hashlib.sha256(image.image_id.encode()).digest()[:8], "big")])
        taken = image.boxes_xyxy
        if image.image_id in detections:
            found = detections.of(image.image_id)
            taken = np.concatenate([taken, found.boxes_xyxy[found.scores > above]])
        room = np.array(image.size_hw[::-1], np.float64)
        sides = (image.boxes_xyxy[:, 2:] - image.boxes_xyxy[:, :2])[rng.integers(len(image), size=(_TRIES,))]
        low = rng.random((_TRIES, 2)) * np.maximum(room - sides, 0)
        tried = np.concatenate([low, np.minimum(low + sides, room)], axis=1).astype(np.float32)
        free = (pairwise_iou(torch.from_numpy(tried), torch.from_numpy(taken)) < _APART).all(dim=1).numpy()
        boxes = tried[free][:per_image]
        images.append(ImageLabels.build(image.image_id, image.size_hw, boxes, np.zeros(len(boxes))))
    return Labels.from_images(images, shots.categories)

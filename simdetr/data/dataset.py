"""Images and labels in, samples and padded batches for a detector out.

A sample depends only on (seed, epoch, index): neither the worker that loads it nor what was loaded before matters, so
that a resumed run sees the same pixels. Letters: B images of a batch, H and W its padded size, T boxes of one image.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from simdetr.boxes import clip, normalise
from simdetr.data import masks as mask_codes
from simdetr.data.annotations import ImageLabels, LabelError
from simdetr.data.images import ImageSource, UnreadableImageError, read_image
from simdetr.data.labels import Labels
from simdetr.data.quarantine import Quarantine
from simdetr.data.reference_points import ReferencePoints, transformed_points, untransformed_points

Target = dict[str, Any]
Sample = tuple[Tensor, Target]
Transform = Callable[..., Any]

IGNORED = -1
"""The label of a box that is to be ignored, on its way through the transforms."""
OF_OBJECTS = ("labels", "boxes", "scores", "masks", "points")
"""What a finished target has a row of for every object."""

_logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Samples of different sizes in one tensor.

    Attributes:
        images: float [B, 3, H, W], zero below and to the right of each image.
        mask: bool [B, H, W], True on the padding.
        targets: one per image: ``labels`` int64 [T]; ``boxes`` float32 [T, 4], cxcywh as fractions of the image without
            its padding; ``scores`` float32 [T], how sure each is, 1 for human labels; ``orig_size`` and ``size`` int64
            [2], (height, width) of the file and of the transformed image;
            ``image_index`` int64 scalar, the row in the labels, or in the source where there are no labels; where masks
            are asked for, ``masks`` bool [T, h, w] at the transformed image's size; where reference points are,
            ``points`` float32 [T, 2], (x, y) as fractions of the image without its padding, NaN where a box has none;
            ``ignore`` float32 [I, 4], boxes like ``boxes`` of regions in which nothing is background, the labels'
            crowds; ``dropped`` int64 scalar, objects past ``max_objects`` that were left out; ``window`` float32 [4],
            where in the file's image its left, upper, right and lower edge lie, as fractions (left and right change
            places where it is mirrored), NaN for a mosaic; ``labelled`` False for an image that nobody has labelled.
    """

    images: Tensor
    mask: Tensor
    targets: list[Target]


class DetectionDataset(Dataset[Sample | None]):
    """The labelled images of a source, or all of its images where no labels are given.

    Args:
        source: where the image files are; it may hold more images than the labels.
        labels: boxes; row i of the labels is item i. Crowds are no objects but regions to ignore. None for prediction:
            item i is image i of the source and the targets are empty.
        transform: called with (tv_tensors.Image uint8 [3, H, W], target), where ``target["boxes"]`` are
            tv_tensors.BoundingBoxes in pixels; gives the same pair, see `simdetr.data.augmentation`.
        quarantine: where unreadable images are recorded; without one they are logged.
        replace_unreadable: take the next readable image in the place of an unreadable one, as training wants, instead
            of giving None, which `collate` leaves out.
        seed: seed of the augmentation.
        masks: give the objects' masks too; then ``target["masks"]`` is a tv_tensors.Mask uint8 [T, H, W] in transforms.
        max_objects: most objects of a sample; the least certain of more are left out. None keeps all.
        reference_points: give the objects' reference points by these rules, read from the transformed boxes or, where
            they are given ones, carried through the transforms of `simdetr.data.augmentation`.

    Raises:
        LabelError: a labelled image is not in the source, masks are asked for and the labels have none, or a landmark
            lacks what its rule of a reference point reads.
    """

    def __init__(
        self,
        source: ImageSource,
        labels: Labels | None,
        transform: Transform,
        *,
        quarantine: Quarantine | None = None,
        replace_unreadable: bool = False,
        seed: int = 0,
        masks: bool = False,
        max_objects: int | None = None,
        reference_points: ReferencePoints | None = None,
    ) -> None:
        self.source = source
        self.labels = labels
        self.image_ids: Sequence[str] = source.ids if labels is None else labels.image_ids
        missing = [image_id for image_id in self.image_ids if image_id not in source]
        if missing:
            raise LabelError(
                f"{len(missing)} of {len(self.image_ids)} labelled images are not in {source.root} (first: "
                f"{missing[0]!r}, there are ids like {next(iter(source.ids), None)!r}); give the folder that the "
                "labels' file names are relative to"
            )
        if masks and (labels is None or labels.masks is None):
            raise LabelError("masks: expected labels with masks, got none; leave data.masks false")
        if reference_points is not None and labels is not None:
            reference_points.check(labels)
        self.masks = masks
        self.max_objects = max_objects
        self.reference_points = reference_points if labels is not None else None
        self.transform = transform
        self.quarantine = quarantine
        self.replace_unreadable = replace_unreadable
        self.seed = seed
        # in shared memory, so that persistent workers see the epoch change
        self._epoch: Tensor = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    @property
    def epoch(self) -> int:
        """Epoch that the augmentation is drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the augmentation is drawn for; also seen by workers that already run."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Sample | None:
        sample = self.load(index)
        if sample is None:
            return None
        with item_randomness(self.seed, self.epoch, index):
            return self.finish(sample)

    def load(self, index: int) -> Sample | None:
        """The untransformed sample: uint8 tv_tensors.Image and target with boxes in pixels; None where unreadable.

        If a replacement is wanted and no image at all can be read, this is an UnreadableImageError.
        """
        for step in range(len(self) if self.replace_unreadable else 1):
            row = (index + step) % len(self)
            try:
                return self._raw_sample(row, read_image(self.source.record(self.image_ids[row])))
            except UnreadableImageError as error:
                if self.quarantine is not None:
                    self.quarantine.add(self.image_ids[row], error.reason)
                else:
                    _logger.warning("%s is left out: %s", self.image_ids[row], error.reason)
        if self.replace_unreadable:
            raise UnreadableImageError(self.source.root, f"none of its {len(self)} images can be read")
        return None

    def finish(self, sample: Sample) -> Sample:
        """Transform an untransformed sample and bring its target to the form that `Batch` describes."""
        image, target = self.transform(*sample)
        height, width = image.shape[-2:]
        if self.reference_points is not None:
            target = transformed_points(self.reference_points, target, (height, width))
        boxes = target["boxes"].as_subclass(Tensor).float().reshape(-1, 4)
        finished = {name: target[name] for name in ("labels", "scores", "orig_size", "image_index")}
        finished |= {"boxes": normalise(boxes, (height, width)), "size": torch.tensor([height, width])}
        if "masks" in target:
            finished["masks"] = target["masks"].as_subclass(Tensor).bool()
        if self.reference_points is not None:
            finished["points"] = target["points"] / target["points"].new_tensor([width, height])
        if IGNORED in finished["labels"]:
            _set_ignored_aside(finished)
        finished["window"] = _window(target.get("corners"), (height, width))
        finished["dropped"] = torch.tensor(0)
        if self.max_objects is not None and len(finished["labels"]) > self.max_objects:
            _keep_most_certain(finished, self.max_objects)
        return image.as_subclass(Tensor), finished

    def _raw_sample(self, row: int, pixels: Tensor) -> Sample:
        size_hw = (pixels.shape[-2], pixels.shape[-1])
        truth = ImageLabels.build("", size_hw, [], []) if self.labels is None else self.labels.image(row)
        # which point of a crowd a rule would mean nobody knows
        kept = ~truth.crowd if self.reference_points is not None else np.ones(len(truth), bool)
        boxes, classes = truth.boxes_xyxy[kept], np.where(truth.crowd, IGNORED, truth.classes)[kept]
        extra: dict[str, Tensor] = {}
        if self.masks and truth.masks is not None:
            # bytes: torchvision resizes them several times faster than bools
            masks = tv_tensors.Mask(torch.from_numpy(mask_codes.decode(truth.masks[kept], truth.size_hw)))
            # of another image size they are cut or filled up with zeros, as boxes are
            extra["masks"] = masks if truth.size_hw == size_hw else F.crop(masks, 0, 0, *size_hw)
        if self.reference_points is not None:
            given = None if truth.points is None else truth.points[kept]
            extra |= untransformed_points(self.reference_points, boxes, classes, given, size_hw)
        return tv_tensors.Image(pixels), {
            "boxes": pixel_boxes(clip(torch.from_numpy(boxes), size_hw), size_hw),
            "labels": torch.from_numpy(classes),
            "scores": torch.from_numpy(truth.scores[kept]),
            "orig_size": torch.tensor(size_hw),
            "image_index": torch.tensor(row),
            "corners": torch.tensor([[0.0, 0.0], [size_hw[1], size_hw[0]]]),
            **extra,
        }


def _set_ignored_aside(target: Target) -> None:
    """Move what is to be ignored from the objects of a finished target to ``ignore``."""
    objects = target["labels"] != IGNORED
    target["ignore"] = target["boxes"][~objects]
    for name in OF_OBJECTS:
        if name in target:
            target[name] = target[name][objects]


def _window(corners: Tensor | None, size_hw: tuple[int, int]) -> Tensor:
    """``window`` of a `Batch`: from where the corners (x, y) of the file's image have come to lie, in pixels [2, 2]."""
    if corners is None:
        return torch.full((4,), torch.nan)
    first, last = corners.float()
    edges = torch.tensor([[0, 0], [size_hw[1], size_hw[0]]])
    window: Tensor = ((edges - first) / (last - first)).flatten()
    return window


def _keep_most_certain(target: Target, limit: int) -> None:
    """Leave out all but so many objects of a finished target, the least certain first, and count them."""
    count = len(target["labels"])
    kept = target["scores"].argsort(descending=True, stable=True)[:limit].sort().values
    for name in OF_OBJECTS:
        if name in target:
            target[name] = target[name][kept]
    target["dropped"] = torch.tensor(count - limit)


def pixel_boxes(boxes_xyxy: Tensor, size_hw: tuple[int, int]) -> tv_tensors.BoundingBoxes:
    """Boxes [T, 4] in pixels on an image of (height, width), as torchvision's transforms want them."""
    return tv_tensors.BoundingBoxes(boxes_xyxy, format="XYXY", canvas_size=size_hw)


def item_seed(seed: int, epoch: int, index: int) -> int:
    """One well-mixed seed of 63 bits for an item of an epoch."""
    state = np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)
    return int(state[0]) >> 1


@contextmanager
def item_randomness(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Make torch's default CPU generator, which torchvision draws from, depend on the item alone inside the block."""
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed: that would reseed the accelerators too
        torch.default_generator.manual_seed(item_seed(seed, epoch, index))
        yield


class WithUnlabelled(Dataset[tuple[Sample | None, Sample | None]]):
    """Every labelled sample with one of an image that nobody has labelled, so that `collate_pairs` has as many of both.

    Unlabelled images come in an order of their own, drawn once, which goes on from epoch to epoch: each comes as often
    as any other.

    Args:
        labelled: the labelled samples, maybe mosaics.
        unlabelled: the others, without labels.
        seed: seed of the order.

    Raises:
        ValueError: no unlabelled image.
    """

    def __init__(self, labelled: Any, unlabelled: DetectionDataset, seed: int = 0) -> None:  # noqa: ANN401
        if not len(unlabelled):
            raise ValueError("unlabelled: expected at least 1 image that is not among the labelled ones, got none")
        self.labelled, self.unlabelled = labelled, unlabelled
        self._order = torch.randperm(len(unlabelled), generator=torch.Generator().manual_seed(seed))

    def set_epoch(self, epoch: int) -> None:
        """As of the datasets."""
        self.labelled.set_epoch(epoch)
        self.unlabelled.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, index: int) -> tuple[Sample | None, Sample | None]:
        place = (self.unlabelled.epoch * len(self) + index) % len(self._order)
        other = self.unlabelled[int(self._order[place])]
        if other is not None:
            other = (
                other[0],
                other[1]
                | {
                    "labelled": False,
                    "image_index": other[1]["image_index"] + len(self.labelled),
                },
            )
        return self.labelled[index], other


def collate_pairs(pairs: Sequence[tuple[Sample | None, Sample | None]]) -> Batch | None:
    """A padded batch of ``WithUnlabelled``'s items: labelled images first, then as many unlabelled ones."""
    return collate([*(pair[0] for pair in pairs), *(pair[1] for pair in pairs)])


def collate(samples: Sequence[Sample | None]) -> Batch | None:
    """Stack samples of different sizes into a padded batch, without unreadable images; None where no sample is left."""
    readable = [sample for sample in samples if sample is not None]
    if not readable:
        return None
    height = max(image.shape[-2] for image, _ in readable)
    width = max(image.shape[-1] for image, _ in readable)
    images = readable[0][0].new_zeros(len(readable), readable[0][0].shape[0], height, width)
    mask = torch.ones(len(readable), height, width, dtype=torch.bool)
    for position, (image, _) in enumerate(readable):
        images[position, :, : image.shape[-2], : image.shape[-1]] = image
        mask[position, : image.shape[-2], : image.shape[-1]] = False
    return Batch(images, mask, [target for _, target in readable])

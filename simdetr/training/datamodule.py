"""Images and labels of one training as a LightningDataModule.

In: a folder, list or COCO file of images and a labels file (COCO JSON or the Parquet of ``simdetr.data.labels``).
Out: resumable loaders of ``Batch``; ``num_classes`` and ``categories`` come from the labels, never from a config.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import DataLoader

from simdetr.data.annotations import Category, LabelError
from simdetr.data.augmentation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Mosaic,
    MosaicTiles,
    eval_transforms,
    train_transforms,
)
from simdetr.data.category_matching import check_comparable
from simdetr.data.dataset import DetectionDataset, WithUnlabelled, collate, collate_pairs
from simdetr.data.image_level import image_level as image_level_of
from simdetr.data.image_level import read_image_level
from simdetr.data.images import ImageSource, open_images
from simdetr.data.label_checks import check_has_boxes, say_match, without_missing
from simdetr.data.label_files import is_known, read_with_report, say
from simdetr.data.labels import Labels
from simdetr.data.machine import default_workers
from simdetr.data.protocols import first_images
from simdetr.data.quarantine import Quarantine
from simdetr.data.reference_points import ReferencePoints, with_reference_points
from simdetr.training.sampler import EpochBatchSampler, ResumableLoader, ShareBatchSampler

LOG = logging.getLogger(__name__)
SHORT_SIDES, MAX_SIDE = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800), 1333
"""Sizes in pixels of Deformable DETR's training."""


def read_training_labels(path: Path, images: ImageSource, *, strict: bool = False, masks: bool = False) -> Labels:
    """Labels that something can be learned from, of images that are there.

    Raises:
        LabelError: The file holds no labels or no box to learn from, is of other images, or has a problem and
            ``strict`` is set.
    """
    try:
        labels, report = read_with_report(path, images=images, strict=strict, masks=masks)
    except LabelError as error:
        if is_known(path) or not (path.is_dir() or path.suffix.lower() == ".csv"):
            raise
        hint = "classes of whole images, as a CSV or a folder per class gives them, are for data.image_level true"
        raise LabelError(f"labels: {path} has no boxes; {hint} ({error})") from error
    say(report)
    check_has_boxes(labels, path, report)
    return without_missing(labels, images, path)


def check_comparable_files(
    images: str | Path, labels: str | Path, val_images: str | Path, val_labels: str | Path
) -> None:
    """Refuse, before any training, validation labels that nothing can be found in, or that share no category.

    Raises:
        LabelError: It names what is wrong, and both files where their categories differ.
    """
    validation, report = read_with_report(val_labels, images=open_images(val_images))
    check_has_boxes(validation, val_labels, report)
    if is_known(Path(labels)):  # classes of whole images go by name
        training, report = read_with_report(labels, images=open_images(images))
        check_has_boxes(training, labels, report)
        check_comparable(validation.categories, training.categories, val_labels, labels)


def sizes_up_to(largest: int) -> list[int]:
    """The default short sides, scaled for the largest to be this one, in pixels."""
    return [round(side * largest / SHORT_SIDES[-1]) for side in SHORT_SIDES]


def queries_for(labels: Labels, mosaic: float = 0.0) -> int:
    """Number of queries that suits labels: twice the most objects of a sample, for most queries to learn background.

    A multiple of 50 from 100 to 900; where that is too few, samples lose their least certain objects. ``mosaic`` is the
    probability of samples that are made of four images.
    """
    most = int(np.bincount(labels.owners[~labels.crowd]).max(initial=0))
    return min(900, max(100, 50 * math.ceil(most * (4 if mosaic > 0 else 1) * 2 / 50)))


def _tell_of_few_queries(labels: Labels, num_queries: int, path: Path) -> None:
    """Warn of images with more objects than a training sample has, half as many as queries."""
    objects = np.bincount(labels.owners[~labels.crowd])
    kept = max(1, num_queries // 2)
    if (objects > kept).any():
        LOG.warning(
            "%s: %d of %d images have more than %d objects, up to %d, but %d queries find at most so many and "
            "learn from half as many: the others are left out of training. Raise --data.num_queries, to %d for all",
            path,
            int((objects > kept).sum()),
            len(labels),
            kept,
            int(objects.max()),
            num_queries,
            2 * int(objects.max()),
        )


class DetectionData(pl.LightningDataModule):
    """Training and validation images with their boxes.

    Args:
        images: Folder, list file or COCO JSON of the training images.
        labels: COCO JSON or Parquet with their boxes.
        val_images: Validation images; none means no validation.
        val_labels: Their boxes.
        batch_size: Images per step and rank.
        num_workers: Decoding processes; 0 decodes in the training process. By default, on a GPU the cores of this
            process but one, at most 8, and none on a CPU.
        short_sides: Sizes in pixels of the shorter side, one drawn per image in training; the largest is used in
            validation. Left out, those of the detector that training starts from, or 480 to 800.
        max_side: Longest side in pixels; left out, as for ``short_sides``, or 1333.
        crop: Random crop in half of the training images.
        flip: Mirror half of the training images; False where left and right make classes.
        colour: Strength of the colour augmentation.
        mosaic: Probability that a training sample is a mosaic of four images.
        mosaic_tiles: How they are put together: the canvas, tiles of a low resolution, colours; as published when left
            out.
        rotation: Largest angle in degrees by which training images are rotated, to either side; their boxes grow as
            ellipses in them do.
        noise: Largest deviation of noise that is added, as a part of the range of the values.
        brightness: Largest part by which training images become brighter or darker, beside ``colour``.
        label_fraction: Part of the labelled images to train on, drawn as `simdetr split` draws it.
        seed: Seed of order, subset and augmentation.
        strict: Turn problems in label files into errors.
        masks: Read the objects' masks for training, for detectors that learn from them; labels without any train
            without.
        reference_points: Which point of each class's boxes heads learn, as class name: rule, ``default`` for all other
            classes; rules are in `simdetr.data.reference_points`. Training targets and validation labels get points.
        point_margin: How far outside the image a point may lie, as a fraction of the image's side.
        image_level: Train on the classes that each image has, and not on where; ``labels`` may then be a CSV (columns
            image, label) or a folder with one folder per class too. Validation keeps its boxes.
        num_queries: Queries of the detector, which finds at most so many objects in an image; left out, enough for the
            labels, see ``queries_for``. A training sample has at most half as many objects, the most certain ones.
        min_score: Boxes of the training labels whose score is lower are background; for pseudo-labels.
        score_power: Exponent on their scores, which are how much a box counts; above 1, the certain ones count more.
        mean: Of the colours 0..1, for their normalisation; left out, that of the detector's weights.
        std: Their deviation, likewise.
        unlabelled: Folder, list file or COCO JSON of images that nobody has labelled, for heads that learn from them;
            as many of them as of labelled ones are added to every batch, so that it has 2 x ``batch_size`` images.
            Labelled images that are there too are left out where it is the folder of ``images``.
        max_unreadable: Share of unreadable images past which training stops; of a recipe, ``mining.max_unreadable``.

    Raises:
        ValueError: ``image_level`` with a mosaic or with reference points; a table that does not fit the classes;
            ``unlabelled`` images for a detector that has no use for them, or none that is not labelled.
        LabelError: Labels that cannot be read, or that lack what a reference point is read from.
    """

    def __init__(
        self,
        images: str,
        labels: str | None = None,
        val_images: str | None = None,
        val_labels: str | None = None,
        batch_size: int = 8,
        num_workers: int | None = None,
        short_sides: Sequence[int] | None = None,
        max_side: int | None = None,
        crop: bool = True,
        flip: bool = True,
        colour: Literal["none", "light", "strong"] = "light",
        mosaic: float = 0.0,
        mosaic_tiles: MosaicTiles | None = None,
        rotation: float = 0.0,
        noise: float = 0.0,
        brightness: float = 0.0,
        label_fraction: float = 1.0,
        seed: int = 0,
        strict: bool = False,
        masks: bool = False,
        reference_points: dict[str, str] | None = None,
        point_margin: float = 0.0,
        image_level: bool = False,
        num_queries: int | None = None,
        min_score: float = 0.0,
        score_power: float = 1.0,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        unlabelled: str | None = None,
        max_unreadable: float = 0.05,
    ) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.max_unreadable = max_unreadable
        self._images = (short_sides, max_side, mean, std)
        self.follow({})
        self.crop, self.flip, self.colour, self.mosaic, self.mosaic_tiles = crop, flip, colour, mosaic, mosaic_tiles
        self._changes = {"rotation": rotation, "noise": noise, "brightness": brightness}
        self._samples: DetectionDataset | Mosaic | WithUnlabelled
        self._loader: ResumableLoader | None = None
        self._val_loader: DataLoader[Any] | None = None
        self._position: dict[str, int] | None = None
        self.source = open_images(images)
        self.val_source: ImageSource | None = open_images(val_images) if val_images is not None else None
        self.val_labels: Labels | None = None
        self._label_files = tuple(str(path) for path in (labels or images, val_labels or val_images))
        if self.val_source is not None:
            self.val_labels = read_training_labels(Path(self._label_files[1]), self.val_source, strict=strict)
        path = Path(labels if labels is not None else images)
        if image_level:
            if mosaic > 0:
                raise ValueError(
                    f"mosaic: expected 0 with image_level, got {mosaic}; a tile's place would be a box that is known"
                )
            if reference_points is not None:
                raise ValueError(
                    "reference_points: expected none with image_level, where no box is left to read them from; leave "
                    "one out"
                )
            self.labels = self._read_image_level(path, strict)
        else:
            self.labels = read_training_labels(path, self.source, strict=strict, masks=masks)
        self.masks = masks and self.labels.masks is not None
        if masks and not self.masks:
            LOG.warning("%s has no masks: training goes on with boxes alone", path)
        if label_fraction < 1:
            drawn = set(first_images(self.labels.image_ids, label_fraction, seed))
            self.labels = self.labels.select(name for name in self.labels.image_ids if name in drawn)
        if min_score > 0 or score_power != 1:
            self.labels = self.labels.sharpened(min_score, score_power)
        self.unlabelled: ImageSource | None = None
        if unlabelled is not None:
            self.unlabelled = _without(open_images(unlabelled), self.source, self.labels)
        self.num_queries = queries_for(self.labels, mosaic) if num_queries is None else num_queries
        if self.labels.stage < 0:  # of pseudo-labels the least certain may go
            _tell_of_few_queries(self.labels, self.num_queries, path)
        self.reference_points: ReferencePoints | None = None
        if reference_points is not None:
            self.reference_points = ReferencePoints(reference_points, self.labels.categories, point_margin)
            self.labels = with_reference_points(self.labels, self.reference_points)
            if self.val_labels is not None:
                rules = self.reference_points.of(self.val_labels.categories)
                self.val_labels = with_reference_points(self.val_labels, rules)

    def check_validation(self) -> None:
        """Refuse validation labels without any category of the training labels, by a LabelError that names both."""
        if self.val_labels is None:
            return
        own, other = self._label_files
        match = check_comparable(self.val_labels.categories, self.categories, other, own)
        say_match(match, self.val_labels, other, own)

    def follow(self, image_settings: Mapping[str, Any]) -> None:
        """Prepare images as a detector wants them, wherever the arguments left that open; any setting may be absent."""
        short_sides, max_side, mean, std = self._images
        largest = image_settings.get("short_side", SHORT_SIDES[-1])
        self.short_sides = list(short_sides) if short_sides is not None else sizes_up_to(largest)
        # sizes belong together: that of another detector does not limit the user's own
        longest = image_settings.get("max_side", MAX_SIDE) if short_sides is None else MAX_SIDE
        self.max_side = max_side if max_side is not None else longest
        self.mean: Sequence[float] = mean if mean is not None else image_settings.get("mean", IMAGENET_MEAN)
        self.std: Sequence[float] = std if std is not None else image_settings.get("std", IMAGENET_STD)

    def setup(self, stage: str) -> None:
        """Follow the task that is about to run, and forget the loaders of another."""
        self._loader = self._val_loader = None
        task: Any = self.trainer.lightning_module if self.trainer is not None else None
        if self.unlabelled is not None and task is not None and not task.detector.takes_unlabelled:
            raise ValueError(
                f"unlabelled: {type(task.detector).__name__} would learn that there is nothing on images that nobody "
                "has labelled; put simdetr.heads.DomainAdversary on it, or leave unlabelled out"
            )
        self.follow(getattr(task, "image_settings", {}))

    @property
    def num_classes(self) -> int:
        """Number of classes in the training labels; linked to the detector."""
        return self.labels.num_classes

    @property
    def categories(self) -> tuple[Category, ...]:
        """Categories with the ids of the user's file."""
        return self.labels.categories

    @property
    def category_names(self) -> list[str]:
        """Names of the classes, in the order of their indices; linked to the task and to heads that speak of them."""
        return [category.name for category in self.categories]

    @property
    def image_settings(self) -> dict[str, object]:
        """How images are prepared at inference: sizes in pixels, mean and deviation."""
        sides = {"short_side": max(self.short_sides), "max_side": self.max_side}
        return {**sides, "mean": list(self.mean), "std": list(self.std)}

    def image_id(self, index: int) -> str:
        """Id of the training image in row ``index`` of the labels, after which the unlabelled ones are counted."""
        beyond = index - len(self.labels)
        return self.labels.image_ids[index] if beyond < 0 or self.unlabelled is None else self.unlabelled.ids[beyond]

    def train_dataloader(self) -> ResumableLoader:
        """Loader of the trainer's current epoch; Lightning asks again at every epoch, and gets the same one."""
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        if self._loader is None:
            self._loader = self._new_loader()
        self._samples.set_epoch(epoch)
        self._loader.begin(epoch)
        if self._position is not None:
            self._loader.load_state_dict(self._position)
        return self._loader

    def _new_loader(self) -> ResumableLoader:
        transform = train_transforms(
            self.short_sides,
            self.max_side,
            self.crop,
            self.colour,
            self.flip,
            mean=self.mean,
            std=self.std,
            **self._changes,
        )
        quarantine = None
        if self.trainer is not None:
            path = Path(self.trainer.default_root_dir) / "quarantine.csv"
            quarantine = Quarantine(path, len(self.labels), self.max_unreadable)
        dataset = DetectionDataset(
            self.source,
            self.labels,
            transform,
            quarantine=quarantine,
            replace_unreadable=True,
            seed=self.seed,
            masks=self.masks,
            max_objects=max(1, self.num_queries // 2),
            reference_points=self.reference_points,
        )
        self._samples = Mosaic(dataset, self.mosaic, self.mosaic_tiles, self.seed) if self.mosaic > 0 else dataset
        if self.unlabelled is not None:
            others = DetectionDataset(
                self.unlabelled, None, transform, quarantine=quarantine, replace_unreadable=True, seed=self.seed
            )
            self._samples = WithUnlabelled(self._samples, others, self.seed)
        return ResumableLoader(
            self._samples,
            batch_sampler=EpochBatchSampler(len(dataset), self.batch_size, self.seed, 0, *self._process),
            collate_fn=collate if self.unlabelled is None else collate_pairs,
            pin_memory=self._device == "cuda",
            **self._workers(),
        )

    @property
    def _process(self) -> tuple[int, int]:
        """Rank and number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    @property
    def _device(self) -> str:
        return self.trainer.strategy.root_device.type if self.trainer is not None else "cpu"

    def _workers(self) -> dict[str, Any]:
        """Decoding processes, which stay from epoch to epoch: they see its number, see ``DetectionDataset``."""
        count = default_workers(self._device) if self.num_workers is None else self.num_workers
        return {"num_workers": count, "persistent_workers": count > 0}

    def _read_image_level(self, path: Path, strict: bool) -> Labels:
        if is_known(path):
            return image_level_of(read_training_labels(path, self.source, strict=strict))
        # speaking of the same category ids, or no detection would match the truth of the validation
        categories = None if self.val_labels is None else self.val_labels.categories
        return read_image_level(path, self.source, categories)

    def state_dict(self) -> dict[str, int]:
        """Position in the epoch; Lightning's own place for it comes too late where the schedule asks for a length.

        Beside it, for a resume on another number of devices: ``step`` of the optimiser, images ``per_step``, and by how
        many steps the schedule is ``ahead`` of that count already.
        """
        if self._loader is None:
            return {}
        step = self.trainer.global_step if self.trainer is not None else 0
        return self._loader.state_dict() | {"step": step, "per_step": self.images_per_step, "ahead": self.steps_ahead()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Remember where an interrupted run stood; say so if its steps were of another size."""
        self._position = state_dict or None
        before = state_dict.get("per_step", self.images_per_step)
        if before != self.images_per_step:
            LOG.warning(
                "resumed with %d images per step (devices x data.batch_size x trainer.accumulate_grad_batches) instead "
                "of %d: every image still counts once per epoch, but learning rates were chosen for %d. To keep it, "
                "change data.batch_size or trainer.accumulate_grad_batches so that the product stays.",
                self.images_per_step,
                before,
                before,
            )

    @property
    def _accumulated(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer is not None else 1

    @property
    def images_per_step(self) -> int:
        """Images of one step of the optimiser: of all devices, and of all batches whose gradients are added."""
        return self.batch_size * self._process[1] * self._accumulated

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of a whole epoch."""
        batches = -(-len(self.labels) * self._accumulated // self.images_per_step)
        return -(-batches // self._accumulated)

    def steps_ahead(self) -> int:
        """Optimiser steps to add to the schedule's count after a resume with other ``images_per_step``; else 0.

        A training over epochs has another number of steps then. What was done counts as the steps that it would have
        taken with the present ones, so that the schedule goes on where it was and ends with the last epoch.
        """
        position, trainer = self._position, self.trainer
        if position is None or trainer is None or trainer.max_steps >= 0:
            return 0
        if position.get("per_step", self.images_per_step) == self.images_per_step:
            return position.get("ahead", 0)
        in_epoch = min(self.steps_per_epoch, position["seen"] // self.images_per_step)
        return position["epoch"] * self.steps_per_epoch + in_epoch - position["step"]

    def teardown(self, stage: str) -> None:
        """Forget position and loaders: the next training starts at its beginning, with its own processes."""
        self._position = self._loader = self._val_loader = None

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Loader of the validation images of this rank, in order; an empty list without any."""
        if self.val_source is None or self.val_labels is None:
            return []
        if self._val_loader is not None:
            return self._val_loader
        transform = eval_transforms(max(self.short_sides), self.max_side, self.mean, self.std)
        dataset = DetectionDataset(self.val_source, self.val_labels, transform)
        batches = ShareBatchSampler(len(dataset), self.batch_size, *self._process)
        self._val_loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, **self._workers())
        return self._val_loader

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The validation images."""
        return self.val_dataloader()


def _without(images: ImageSource, labelled_source: ImageSource, labels: Labels) -> ImageSource:
    """The images that the labels do not hold, if they are of the same place; a ValueError if none is left."""
    rest = images
    if images.root == labelled_source.root:
        rest = images.subset(name for name in images.ids if name not in labels)
    if not len(rest):
        raise ValueError(
            f"unlabelled: expected images without labels, got {len(images)} of {images.root}, of which all are labelled"
        )
    return rest

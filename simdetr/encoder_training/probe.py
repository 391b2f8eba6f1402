"""What are an encoder's features worth? While it learns, a row of numbers in ``probe.csv``; of any, a linear probe.

While it learns: a few images in, and where there are boxes for some, a function that mines with the encoder and gives
its recall; the spread and rank of its features (without labels), the recall, the mean loss since the last row out.
The linear probe (US 2025/0265826 [0093], Table 6): images with a class each in, the accuracy of a linear classifier on
their frozen features out.
"""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2 import functional as F

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.image_level import read_image_level
from simdetr.data.images import ImageSource, UnreadableImageError, open_images, read_image
from simdetr.data.label_files import is_known, read_labels
from simdetr.data.labels import Labels
from simdetr.data.storage import atomic_path
from simdetr.evaluation.recall import proposal_recall
from simdetr.mining.batch import MiningConfig, encode, images_ahead, load_image, mine_batch, shrink
from simdetr.mining.encoders import Encoder
from simdetr.mining.preview import evenly

Recall = Callable[[Encoder, torch.device], dict[str, float]]  # An encoder and its device to named recall numbers
Row = dict[str, float]
MAX_BOXES = 25
MIN_SPREAD, MIN_RANK = 0.02, 1.5
_READERS = 2  # threads that decode; an encoder is slower than one
LOG = logging.getLogger(__name__)


class EncoderProbe(Callback):
    """Writes a row at the start, every so many steps, and at the end; warns when the features collapse.

    Rows of an interrupted run are kept up to the step that it resumes from. Without truth there is no ``recall`` of
    what mining with the encoder finds.
    """

    def __init__(self, path: Path, images: Sequence[Tensor], every_n_steps: int, recall: Recall | None = None) -> None:
        self.path, self.images, self.every_n_steps, self.recall = path, images, every_n_steps, recall
        self._losses: list[Tensor] = []
        self._last_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The untrained encoder, to compare with."""
        if trainer.global_step == 0:
            self._probe(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:  # noqa: ANN401
        """A row when it is time."""
        self._losses.append(outputs["loss"].detach())
        if trainer.global_step % self.every_n_steps == 0:
            self._probe(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last row."""
        if trainer.global_step != self._last_step:
            self._probe(trainer, pl_module)

    @torch.no_grad()
    def _probe(self, trainer: pl.Trainer, pl_module: Any) -> None:  # noqa: ANN401
        self._last_step = trainer.global_step
        encoder = pl_module.learnt()
        was_training = encoder.training
        encoder.eval()
        row = {"step": float(trainer.global_step)}
        if self._losses:
            row["loss"] = float(torch.stack(self._losses).mean())
        row |= feature_spread(encoder, self.images, pl_module.device)
        if self.recall is not None:
            row |= self.recall(encoder, pl_module.device)
        encoder.train(was_training)
        self._losses = []
        write_row(self.path, row)
        LOG.info("probe: %s", ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
        warn_of_collapse(row)


def feature_spread(encoder: Encoder, images: Sequence[Tensor], device: str | torch.device = "cpu") -> Row:
    """How much the features of different images, and of different cells, differ; the encoder is in evaluation mode.

    ``spread``: standard deviation of the images' features of unit length, over dimensions, times the square root of
    their number: 0 = all alike, 1 = spread evenly (Chen and He 2021). ``rank`` and ``cell_rank``: effective number
    of dimensions (Roy and Vetterli 2007) among images, uint8 [3, H, W], and among all their cells at stride 32.
    """
    cells = [encode(image[None].to(device), encoder)[32][0].float().flatten(1).T for image in images]
    pooled = torch.stack([rows.mean(dim=0) for rows in cells])
    unit = functional.normalize(pooled, dim=1)
    return {
        "spread": float(unit.std(dim=0).mean()) * math.sqrt(unit.shape[1]),
        "rank": effective_rank(pooled),
        "cell_rank": effective_rank(torch.cat(cells)),
    }


def effective_rank(rows: Tensor) -> float:
    """Exponential of the entropy of the singular values of rows [N, D] around their mean; 0 if all are equal."""
    values = torch.linalg.svdvals((rows - rows.mean(dim=0)).double().cpu())
    if float(values.sum()) <= 1e-12 * max(1.0, float(rows.abs().max())):
        return 0.0
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())


def warn_of_collapse(row: Row) -> None:
    """Say so when all images look alike to an encoder that has been trained; some do so before."""
    if row["step"] > 0 and (row["spread"] < MIN_SPREAD or row["rank"] < MIN_RANK):
        LOG.warning(
            "the encoder collapses: at step %d its features of different images hardly differ (spread %.3f of 1, rank "
            "%.1f). Lower lr, raise batch_size, or take vicreg or vicregl, whose losses keep the variance.",
            row["step"],
            row["spread"],
            row["rank"],
        )


def write_row(path: Path, row: Row) -> None:
    """Append a row to a CSV file, without the rows of later steps, which an interrupted run has left."""
    kept = [before for before in read_rows(path) if before["step"] < row["step"]]
    names = list(dict.fromkeys(name for each in (*kept, row) for name in each))
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in each.items()} for each in (*kept, row))


def read_rows(path: Path) -> list[Row]:
    """The rows of ``probe.csv``; none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value != ""} for row in csv.DictReader(file)]


def probe_images(source: ImageSource, count: int, image_size: int) -> list[Tensor]:
    """Evenly spaced readable images, uint8 [3, H, W], ``image_size`` pixels long; a ValueError for fewer than two."""
    loaded = [load_image(source[position], image_size) for position in evenly(range(len(source)), count)]
    images = [image.pixels for image in loaded if image.pixels is not None]
    if len(images) < 2:
        raise ValueError(
            f"images: expected at least two readable ones, got {len(images)} of {len(loaded)} tried in {source.root}; "
            "`simdetr doctor` lists what is wrong"
        )
    return images


@dataclass(frozen=True)
class EncoderRecall:
    """Mines its images, which are decoded once, with encoder after encoder and compares the boxes with the truth."""

    truth: Labels
    images: tuple[Tensor, ...]  # uint8 [3, H, W], of the size that they are mined at, in the order of the truth
    mining: MiningConfig

    def __call__(self, encoder: Encoder, device: str | torch.device = "cpu") -> dict[str, float]:
        """Class-agnostic ``recall50@25`` and ``AR@25`` (IoU 0.50:0.95), fractions 0..1, and ``boxes`` per image."""
        rows = []
        mined = mine_batch(self.images, encoder, self.mining, device)
        for image_id, size_hw, image, found in zip(
            self.truth.image_ids, self.truth.sizes_hw.tolist(), self.images, mined, strict=True
        ):
            scale = np.array([size_hw[1] / image.shape[2], size_hw[0] / image.shape[1]] * 2)
            boxes = found.boxes_xyxy[np.argsort(-found.score, kind="stable")] * scale
            rows.append(ImageLabels.build(image_id, (size_hw[0], size_hw[1]), boxes, np.zeros(len(boxes))))
        labels = Labels.from_images(rows, (Category(1, "object"),), stage=0)
        recall = proposal_recall(self.truth, labels, (MAX_BOXES,))
        kept = {name: recall[name] for name in (f"recall50@{MAX_BOXES}", f"AR@{MAX_BOXES}")}
        return kept | {"boxes": sum(map(len, rows)) / len(rows)}


def load_encoder_recall(
    truth: str | Path, images: str | Path | None, count: int, mining: MiningConfig
) -> EncoderRecall:
    """Choose evenly spaced images of a labelled set and decode them.

    Args:
        truth: COCO JSON or Parquet with boxes.
        images: where its images are; found from the COCO JSON when left out.
        count: images at most.
        mining: settings.

    Raises:
        ValueError: the labels are not of these images.
        UnreadableImageError: one of them cannot be decoded.
    """
    source = open_images(images if images is not None else truth)
    labels = read_labels(truth, images=source)
    present = [image_id for image_id in labels.image_ids if image_id in source]
    if not present:
        raise ValueError(
            f"truth: none of its {len(labels)} images is in {source.root} (first: {labels.image_ids[0]!r}, there are "
            f"ids like {source.ids[0]!r}); give the folder that its file names are relative to"
        )
    chosen = labels.select(evenly(present, count))
    pixels = (read_image(record) for record in source.subset(chosen.image_ids))
    return EncoderRecall(chosen, tuple(shrink(image, mining.image_size) for image in pixels), mining)


# ----------------------------------------------------------------------------------------------------------------------
# The linear probe: frozen features, one per image, and a logistic regression on them.
#
# Letters: N images, D length of a feature.


STRENGTHS = tuple(10.0**power for power in range(-4, 3))
"""Values of C, the inverse strength of the classifier's penalty, that cross-validation chooses from."""
_FOLDS = 5
_LEAST_OF_A_CLASS = 2  # images that are trained on: one to learn from while another is predicted
_ITERATIONS = 5000
_LEVEL = 1.96  # of the normal distribution, two-sided 95 %


@dataclass(frozen=True)
class ClassedImages:
    """Images and the one class of each; classes are positions in ``names``."""

    source: ImageSource
    image_ids: tuple[str, ...]
    classes: NDArray[np.int64]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.image_ids)

    def at(self, rows: NDArray[np.intp]) -> ClassedImages:
        """Some of them."""
        ids = tuple(self.image_ids[row] for row in rows)
        return ClassedImages(self.source, ids, self.classes[rows], self.names)


@dataclass(frozen=True)
class LinearProbe:
    """What a linear classifier on frozen features gets right.

    Attributes:
        accuracy: Part of the validation images whose class is predicted, 0..1.
        low: Lower end of its 95 % interval (Wilson 1927).
        high: Upper end.
        chance: Accuracy of always saying the class that most training images have.
        strength: C, chosen by cross-validation on the training images.
        classes: Number of classes.
        train_images: Images trained on.
        val_images: Images predicted.
        feature_dim: D.
    """

    accuracy: float
    low: float
    high: float
    chance: float
    strength: float
    classes: int
    train_images: int
    val_images: int
    feature_dim: int

    def summary(self) -> str:
        """One line."""
        return (
            f"accuracy {100 * self.accuracy:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f}, 95 %), chance "
            f"{100 * self.chance:.1f} %: {self.classes} classes, {self.train_images:,} images to learn, "
            f"{self.val_images:,} to test, {self.feature_dim} features, C {self.strength:g}"
        )


def classed_images(images: str | Path, labels: str | Path | None) -> ClassedImages:
    """The one class of every image that has one, from boxes, a CSV of image classes or a folder per class.

    Of an image with boxes of several classes it is the class of most of its boxes. Images of which two classes are
    equally many, or which have none, have no class; they are left out, and counted in the log.

    Args:
        images: Folder, list file or COCO JSON.
        labels: Label file of any kind, a CSV (columns ``image``, ``label``) or a folder with one folder per class;
            ``images`` itself when left out.

    Raises:
        LabelError: The labels cannot be read, or speak of other images.
        ValueError: No image has one class.
    """
    source, path = open_images(images), Path(labels if labels is not None else images)
    table = read_labels(path, images=source) if is_known(path) else read_image_level(path, source)
    counts = np.zeros((len(table), table.num_classes), np.int64)
    np.add.at(counts, (table.owners, table.classes), 1)
    best = counts.max(axis=1, initial=0)
    chosen = (best > 0) & ((counts == best[:, None]).sum(axis=1) == 1)
    rows = [row for row in np.flatnonzero(chosen) if table.image_ids[row] in source]
    several, without = int(((best > 0) & ~chosen).sum()), len(source) - int((best > 0).sum())
    if several or without > 0:
        LOG.info("left out: %d images with several classes, none of most boxes, and %d without any", several, without)
    if not rows:
        raise ValueError(f"labels: expected images with one class each in {path}, got none of {len(table)}")
    names = tuple(category.name for category in table.categories)
    return ClassedImages(source, tuple(table.image_ids[row] for row in rows), counts[rows].argmax(axis=1), names)


def object_images(images: str | Path, labels: str | Path, out: Path, at_most: int = 2000) -> ClassedImages:
    """Labelled objects cut out along their boxes, each an image of its own: for the probe of a set for detection.

    Boxes without a whole pixel, those of groups, and those on images that cannot be read are left out.

    Args:
        images: Folder, list file or COCO JSON.
        labels: Their boxes.
        out: Folder that the cut out objects are written to.
        at_most: Objects, taken evenly over the file.

    Raises:
        LabelError: The labels cannot be read, or speak of other images.
        ValueError: There is no object to cut out.
    """
    source = open_images(images)
    table = read_labels(Path(labels), images=source)
    names, classes = [], []
    out.mkdir(parents=True, exist_ok=True)
    chosen = np.asarray(evenly(np.flatnonzero(~table.crowd).tolist(), at_most), np.int64)
    for owner in np.unique(table.owners[chosen]):
        try:
            pixels = read_image(source.record(table.image_ids[owner]))
        except UnreadableImageError as error:
            LOG.warning("left out: the objects on an image that cannot be read: %s", error)
            continue
        for row in chosen[table.owners[chosen] == owner]:
            left, top, right, bottom = table.boxes_xyxy[row].round().clip(0).astype(int).tolist()
            crop = pixels[:, top:bottom, left:right]
            if crop.numel():
                names.append(f"{row:06d}.png")
                classes.append(table.classes[row])
                F.to_pil_image(crop).save(out / names[-1])
    if not names:
        raise ValueError(f"labels: expected objects to cut out in {labels}, got none on images that can be read")
    kinds = tuple(category.name for category in table.categories)
    return ClassedImages(open_images(out), tuple(names), np.array(classes, np.int64), kinds)


def linear_probe(
    encoder: Encoder,
    train: ClassedImages,
    val: ClassedImages | None = None,
    *,
    val_fraction: float = 0.2,
    image_size: int = 224,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> LinearProbe:
    """Train a logistic regression of scikit-learn on frozen features of training images, and predict the others.

    An image's feature is the mean of the encoder's last map; the image is looked at once, whole, without augmentation.
    Features are centred and scaled by those of the training images.

    Args:
        encoder: Frozen; moved to ``device``.
        train: Images to learn from.
        val: Images to predict; when left out ``val_fraction`` of each class is drawn from ``train`` for it.
        val_fraction: See there.
        image_size: Longer side in pixels that images are shown at.
        seed: Of the draw and of cross-validation.
        device: Where features are computed.
        progress: Show a bar.

    Raises:
        ValueError: Fewer than two classes have enough images, ``val`` has images of ``train`` or none of its classes.
    """
    from sklearn.metrics import accuracy_score  # here, for it takes a second to import, which other commands save

    if val is None:
        train, val = _drawn(train, val_fraction, seed)
    train, val = _of_common_classes(train, val)
    if isinstance(encoder, nn.Module):
        encoder.to(device).eval()
    (features, known), (val_features, val_known) = (
        _features(encoder, images, image_size, device, progress=progress) for images in (train, val)
    )
    strength, classifier = fit_classifier(features, train.classes[known], seed)
    accuracy = float(accuracy_score(val.classes[val_known], classifier.predict(val_features)))
    most = np.bincount(train.classes[known]).argmax()
    low, high = wilson_interval(accuracy, len(val_known))
    return LinearProbe(
        accuracy=accuracy,
        low=low,
        high=high,
        chance=float((val.classes[val_known] == most).mean()),
        strength=strength,
        classes=len(np.unique(train.classes[known])),
        train_images=len(known),
        val_images=len(val_known),
        feature_dim=features.shape[1],
    )


def fit_classifier(features: NDArray[np.float64], classes: NDArray[np.int64], seed: int = 0) -> tuple[float, Any]:
    """C and scikit-learn's classifier of features [N, D], fitted on all of them.

    C is the value of ``STRENGTHS`` whose accuracy in cross-validation is best, the smallest of equals; 5 parts, or as
    many as the rarest class has images.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = min(_FOLDS, int(np.unique(classes, return_counts=True)[1].min()))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_ITERATIONS))
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed)

    def first_of_the_best(results: Mapping[str, Any]) -> int:
        means = results["mean_test_score"]  # sums in another order differ by rounding
        return int(np.flatnonzero(np.isclose(means, means.max()))[0])

    grid = {"logisticregression__C": STRENGTHS}
    search = GridSearchCV(model, grid, cv=splits, scoring="accuracy", refit=first_of_the_best)
    search.fit(features, classes)
    return float(search.best_params_["logisticregression__C"]), search.best_estimator_


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Ends of the 95 % interval of a probability, of which ``share`` was seen in ``count`` trials (Wilson 1927)."""
    centre, spread = share + _LEVEL**2 / (2 * count), share * (1 - share) / count + _LEVEL**2 / (4 * count**2)
    half, norm = _LEVEL * math.sqrt(spread), 1 + _LEVEL**2 / count
    return max(0.0, (centre - half) / norm), min(1.0, (centre + half) / norm)


def _drawn(images: ClassedImages, val_fraction: float, seed: int) -> tuple[ClassedImages, ClassedImages]:
    """A part of each class to train on and the rest to predict, rounded, but one of two images or more at least."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction: expected a part between 0 and 1, got {val_fraction}; 0.2 is a fifth")
    rng, chosen = np.random.default_rng(seed), np.zeros(len(images), bool)
    for number in np.unique(images.classes):
        own = rng.permutation(np.flatnonzero(images.classes == number))
        count = round(val_fraction * len(own)) if len(own) > 1 else 0
        chosen[own[: min(max(count, 1), len(own) - 1)]] = True
    return images.at(np.flatnonzero(~chosen)), images.at(np.flatnonzero(chosen))


def _of_common_classes(train: ClassedImages, val: ClassedImages) -> tuple[ClassedImages, ClassedImages]:
    """Images of the classes that have enough to train on, by name; others are counted in the log."""
    shared = set(train.image_ids) & set(val.image_ids) if train.source.root == val.source.root else set()
    if shared:
        raise ValueError(f"val_labels: {len(shared)} images are trained on as well, such as {min(shared)!r}")
    place = {name: number for number, name in enumerate(train.names)}
    renamed = np.array([place.get(name, -1) for name in val.names], np.int64)[val.classes]
    val = ClassedImages(val.source, val.image_ids, renamed, train.names)
    counts = np.bincount(train.classes, minlength=len(train.names))
    enough = counts >= _LEAST_OF_A_CLASS
    kept, predicted = enough[train.classes], (renamed >= 0) & enough[np.maximum(renamed, 0)]
    rare = int(((counts > 0) & ~enough).sum())
    if rare or not predicted.all():
        LOG.warning(
            "left out: %d classes with fewer than %d images to train on, and %d images to predict of classes not "
            "trained on",
            rare,
            _LEAST_OF_A_CLASS,
            int((~predicted).sum()),
        )
    if int(enough.sum()) < 2 or not predicted.any():
        raise ValueError(
            f"labels: expected two classes or more with at least {_LEAST_OF_A_CLASS} images each to train on, and "
            f"images of them to predict; got {int(enough.sum())} such classes and {int(predicted.sum())} images"
        )
    return train.at(np.flatnonzero(kept)), val.at(np.flatnonzero(predicted))


@torch.no_grad()
def _features(
    encoder: Encoder, images: ClassedImages, image_size: int, device: str | torch.device, *, progress: bool
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Features double [n, D] of the readable images, and which those are; a warning counts the others."""
    subset = images.source.subset(images.image_ids)
    rows, known = [], []
    with images_ahead(subset, range(len(subset)), image_size, _READERS, ahead=4 * _READERS) as loading:
        shown = track(loading, "features", len(subset), console=Console(stderr=True), disable=not progress)
        for row, image in enumerate(shown):
            if image.pixels is not None:
                maps = encode(image.pixels[None].to(device), encoder)
                rows.append(maps[max(maps)][0].float().mean(dim=(1, 2)).cpu().numpy())
                known.append(row)
    if len(known) < len(subset):
        LOG.warning("%d of %d images cannot be read and are left out", len(subset) - len(known), len(subset))
    return np.stack(rows).astype(np.float64), np.array(known)

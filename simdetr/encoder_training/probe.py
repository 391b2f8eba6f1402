"""Does the encoder learn, or collapse? Every so many steps, a row of numbers about it in ``probe.csv``.

In: a few images, and where there are boxes for some, a function that mines with the encoder and gives its recall. Out:
the spread and rank of its features (without labels), the recall, the mean loss since the last row.
"""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.nn import functional

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.images import ImageSource, open_images, read_image
from simdetr.data.label_files import read_labels
from simdetr.data.labels import Labels
from simdetr.data.storage import atomic_path
from simdetr.evaluation.recall import proposal_recall
from simdetr.mining.batch import MiningConfig, encode, load_image, mine_batch, shrink
from simdetr.mining.encoders import Encoder
from simdetr.mining.preview import evenly

Recall = Callable[[Encoder, torch.device], dict[str, float]]  # An encoder and its device to named recall numbers
Row = dict[str, float]
MAX_BOXES = 25
MIN_SPREAD, MIN_RANK = 0.02, 1.5
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

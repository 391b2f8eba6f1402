"""Scores of a validation run: detections of ``DetectionTask.validation_step`` in, COCO numbers in the log out.

A callback, so that the task knows nothing of metrics. Detections of all ranks are gathered; every rank logs the same.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from simdetr.data.labels import ImageLabels, Labels
from simdetr.detectors.predictions import Detections
from simdetr.evaluation.coco_metric import coco_metrics
from simdetr.evaluation.point_metric import point_metrics
from simdetr.evaluation.proposal_recall import proposal_recall


class CocoValidation(Callback):
    """Logs AP (or class-agnostic recall) of the validation images after each validation epoch, and scores of points.

    Args:
        class_agnostic: Log recall whatever the class, for pretraining on pseudo-classes.
    """

    def __init__(self, class_agnostic: bool = False) -> None:
        self.class_agnostic = class_agnostic
        self._rows: list[tuple[ImageLabels, ImageLabels]] = []

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last epoch."""
        self._rows = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch's detections."""
        image_ids = _validation_labels(trainer).image_ids
        for target, found in zip(batch.targets if batch is not None else [], outputs, strict=True):
            image_id = image_ids[int(target["image_index"])]
            size_hw = (int(target["orig_size"][0]), int(target["orig_size"][1]))
            self._rows.append((_as_labels(image_id, size_hw, found[0]), _as_labels(image_id, size_hw, found[1])))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather, score and log."""
        if trainer.sanity_checking:
            return
        truth = _validation_labels(trainer)
        rows = self._gathered(trainer)
        categories = trainer.datamodule.categories  # type: ignore[attr-defined]
        found, objects = (Labels.from_images((row[index] for row in rows), categories) for index in range(2))
        scores = proposal_recall(truth, objects) if self.class_agnostic else coco_metrics(truth, found)
        if truth.points is not None and found.points is not None:
            scores = scores | point_metrics(truth, found, objects)
        for name, value in scores.items():
            # every rank has the same value; without sync_dist Lightning warns
            pl_module.log(f"val/{name}", value, prog_bar=name in ("AP", "AR@100"), sync_dist=True)

    def _gathered(self, trainer: pl.Trainer) -> list[tuple[ImageLabels, ImageLabels]]:
        if trainer.world_size == 1:
            return self._rows
        parts: list[list[tuple[ImageLabels, ImageLabels]]] = [[] for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(parts, self._rows)
        return [row for part in parts for row in part]


def _as_labels(image_id: str, size_hw: tuple[int, int], found: Detections) -> ImageLabels:
    columns = (found[name].float().cpu().numpy() for name in ("boxes_xyxy", "labels", "scores"))
    points = found["points"].float().cpu().numpy() if "points" in found else None
    return ImageLabels.build(image_id, size_hw, *columns, points=points)


def _validation_labels(trainer: pl.Trainer) -> Labels:
    labels: Labels = trainer.datamodule.val_labels  # type: ignore[attr-defined]
    return labels

"""Run one training to its end, from where it stopped, and keep the detector.

In: a Trainer, a DetectionTask and a DetectionData. Out: ``detector/`` with the best weights if there was validation,
else the last ones. Until then ``checkpoints/`` has ``resume.ckpt``, from which a killed run goes on, replaced every so
many steps, and ``best.ckpt``. Files appear whole or not at all.
"""

from __future__ import annotations

import inspect
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback, Checkpoint, ModelCheckpoint

from simdetr.data.quarantine import Quarantine
from simdetr.data.storage import atomic_path
from simdetr.exchange.weights import averaged_state, checkpoint_config, save_detector
from simdetr.training.datamodule import DetectionData
from simdetr.training.detection_task import DetectionTask

LOG = logging.getLogger(__name__)
RESUME, BEST = "resume.ckpt", "best.ckpt"


class Training(Protocol):
    """What a training consists of; Lightning's CLI has these attributes."""

    trainer: pl.Trainer
    model: DetectionTask
    datamodule: DetectionData


def train(training: Training, out: Path) -> DetectionData:
    """Fit, resuming from ``checkpoints/resume.ckpt`` if a killed run left one, and write ``detector/``.

    The checkpoints are removed at the end: ``detector/`` holds the weights.
    """
    checkpoints = out / "checkpoints"
    resume = checkpoints / RESUME
    trainer, data = training.trainer, training.datamodule
    start = resume if resume.is_file() else None
    start_step = -1 if start is None else int(_read(start)["global_step"])
    path = None if start is None else str(start)
    trainer.fit(training.model, datamodule=data, ckpt_path=path, **safe_loading(trainer))
    if trainer.is_global_zero:
        detector = training.model.detector
        # resumed at its very end, a run has not passed the hook that puts averaged weights in place
        ended = start if trainer.global_step == start_step else None
        kept = checkpoints / BEST if (checkpoints / BEST).is_file() else ended
        if kept is not None:
            detector.load_state_dict(averaged_state(_read(kept)))
        save_detector(detector, checkpoint_config(detector, data), out / "detector")
        shutil.rmtree(checkpoints, ignore_errors=True)
        quarantine = Quarantine(out / "quarantine.csv", total=len(data.labels))
        if count := len(quarantine):
            LOG.warning("%d of %d training images are unreadable, see %s", count, quarantine.total, quarantine.path)
    trainer.strategy.barrier()
    return data


def _read(checkpoint: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return content


def safe_loading(trainer: pl.Trainer) -> dict[str, bool]:
    """``weights_only`` where this Lightning knows it (2.6 and later); before, its own loader is used."""
    return {"weights_only": True} if "weights_only" in inspect.signature(trainer.fit).parameters else {}


class ResumePoint(Checkpoint):
    """Keeps one checkpoint from which a resumed run ends with the weights of an uninterrupted one.

    The last batch of an epoch is followed by validation, which a checkpoint from in between would skip; there the
    checkpoint is taken at the end of the epoch, and speaks of that epoch as finished: from its own kind of
    end-of-epoch checkpoint Lightning (2.6) loses an epoch where ``max_steps`` is set.

    Args:
        path: The checkpoint.
        every_n_steps: Optimiser steps between two checkpoints.
    """

    def __init__(self, path: Path, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"checkpoint_every_steps: expected at least 1, got {every_n_steps}.")
        self.path, self.every_n_steps = path, every_n_steps
        self._last_step = 0
        self._epoch_ended = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from where the training starts or resumes."""
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:  # noqa: ANN401
        """Save when it is time, except after the last batch of an epoch."""
        if not trainer.is_last_batch:
            self._save_if_time(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if it was time at the last batch."""
        self._epoch_ended = True
        self._save_if_time(trainer)
        self._epoch_ended = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Make a checkpoint from the end of an epoch one from before the next."""
        if self._epoch_ended:
            loop = checkpoint["loops"]["fit_loop"]
            for counts in (loop["epoch_progress"]["total"], loop["epoch_progress"]["current"]):
                counts["completed"] = counts["processed"]
            batches = loop["epoch_loop.batch_progress"]
            batches["current"] = dict.fromkeys(batches["current"], 0)
            batches["is_last_batch"] = False

    def _save_if_time(self, trainer: pl.Trainer) -> None:
        if trainer.global_step - self._last_step >= self.every_n_steps:
            self._last_step = trainer.global_step
            trainer.save_checkpoint(self.path)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it; Lightning's own goes over the system's temporary folder."""

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any = None,  # noqa: ANN401
    ) -> None:
        """Write ``checkpoint`` to the local file ``path``."""
        with atomic_path(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


def checkpoint_callbacks(folder: Path, every_n_steps: int, *, validated: bool) -> list[Callback]:
    """The weights that validate best, if there is validation, and the point to resume from.

    In this order: a resume point must never be newer than the best weights it follows.
    """
    best = ModelCheckpoint(
        folder,
        filename=Path(BEST).stem,
        monitor="val/AP",
        mode="max",
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    return [*([best] if validated else []), ResumePoint(folder / RESUME, every_n_steps)]

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
import signal
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback, Checkpoint, ModelCheckpoint
from torch import Tensor

from simdetr.data.quarantine import Quarantine
from simdetr.data.storage import atomic_path
from simdetr.exchange.weights import averaged_state, checkpoint_config, save_detector
from simdetr.training.datamodule import DetectionData
from simdetr.training.detection_task import DetectionTask
from simdetr.training.run_folder import BEST, CHECKPOINTS, RESUME

LOG = logging.getLogger(__name__)
LONGEST, SHORTEST, PARTS = 500, 10, 10
"""Steps between two resume points where nobody says: a tenth of the training, within these bounds."""
TERMINATED = 128 + signal.SIGTERM
"""Exit status after SIGTERM, as shells have it."""


class Training(Protocol):
    """What a training consists of; Lightning's CLI has these attributes."""

    trainer: pl.Trainer
    model: DetectionTask
    datamodule: DetectionData


def train(training: Training, out: Path) -> DetectionData:
    """Fit, resuming from ``checkpoints/resume.ckpt`` if a killed run left one, and write ``detector/``.

    The checkpoints are removed at the end: ``detector/`` holds the weights. What a killed training has left
    without a point to resume from is removed at the start.
    """
    checkpoints = out / CHECKPOINTS
    resume = checkpoints / RESUME
    trainer, data = training.trainer, training.datamodule
    start = resume if resume.is_file() else None
    start_step = -1 if start is None else int(_read(start)["global_step"])
    if start is None and trainer.is_global_zero:
        shutil.rmtree(checkpoints, ignore_errors=True)
        (out / "quarantine.csv").unlink(missing_ok=True)
    fit(trainer, training.model, data, start)
    if trainer.is_global_zero:
        detector = training.model.detector
        # resumed at its very end, a run has not passed the hook that puts averaged weights in place
        ended = start if trainer.global_step == start_step else None
        kept = checkpoints / BEST if (checkpoints / BEST).is_file() else ended
        if data.val_labels is not None and not (checkpoints / BEST).is_file():
            LOG.warning("no validation had an AP: the last weights are kept")
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


def fit(trainer: pl.Trainer, task: pl.LightningModule, data: pl.LightningDataModule, start: Path | None) -> None:
    """Let a trainer fit, from a checkpoint if there is one; what stops it has the step as a note.

    Raises:
        SystemExit: SIGTERM came, also where it came so late that Lightning looks no more.
    """
    # Lightning knows it from 2.6 on; before, its own loader is used
    safe = {"weights_only": True} if "weights_only" in inspect.signature(trainer.fit).parameters else {}
    try:
        trainer.fit(task, datamodule=data, ckpt_path=None if start is None else str(start), **safe)
        if trainer.received_sigterm:
            raise SystemExit(TERMINATED)
    except (KeyboardInterrupt, SystemExit) as stop:
        stop.add_note(f"at step {trainer.global_step:,}")
        raise


class ResumePoint(Checkpoint):
    """Keeps one checkpoint from which a resumed run ends with the weights of an uninterrupted one.

    The last batch of an epoch is followed by validation, which a checkpoint from in between would skip; there the
    checkpoint is taken at the end of the epoch, and speaks of that epoch as finished: from its own kind of
    end-of-epoch checkpoint Lightning (2.6) loses an epoch where ``max_steps`` is set.

    Args:
        path: The checkpoint.
        every_n_steps: Optimiser steps between two checkpoints; left out, a tenth of the training, 10 to 500.
    """

    def __init__(self, path: Path, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"checkpoint_every_steps: expected at least 1, got {every_n_steps}.")
        self.path, self.every_n_steps = path, every_n_steps
        self._every = every_n_steps or LONGEST
        self._last_step = 0
        self._epoch_ended = self._asked = False

    @property
    def step(self) -> int:
        """The last step that was saved, or from which the training began."""
        return self._last_step

    def ask(self) -> None:
        """Save at the next moment that allows it: at the end of this step, or of the epoch where it was its last."""
        self._asked = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from where the training starts or resumes."""
        self._last_step = trainer.global_step
        if self.every_n_steps is None:
            self._every = min(LONGEST, max(SHORTEST, _total_steps(trainer) // PARTS))

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
        steps = trainer.global_step - self._last_step
        if steps >= self._every or (self._asked and steps > 0):
            self._asked = False
            self._last_step = trainer.global_step
            trainer.save_checkpoint(self.path)


def _total_steps(trainer: pl.Trainer) -> int:
    """Optimiser steps of the whole training, as far as it has an end."""
    ends = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        ends.append(trainer.max_epochs * trainer.datamodule.steps_per_epoch)  # type: ignore[attr-defined]
    return min(ends, default=LONGEST * PARTS)


class BestPoint(ModelCheckpoint):
    """The weights of the best AP so far; none as long as no validation has an AP, as without objects."""

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Whether the last validation was better than any before."""
        return current is not None and not bool(current.isnan()) and super().check_monitor_top_k(trainer, current)


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


def checkpoint_callbacks(folder: Path, every_n_steps: int | None, *, validated: bool) -> list[Callback]:
    """The weights that validate best, if there is validation, and the point to resume from.

    In this order: a resume point must never be newer than the best weights it follows.
    """
    best = BestPoint(
        folder,
        filename=Path(BEST).stem,
        monitor="val/AP",
        mode="max",
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    return [*([best] if validated else []), ResumePoint(folder / RESUME, every_n_steps)]

"""Run one training to its end, from where it stopped, and keep the detector.

In: a Trainer, a DetectionTask and a DetectionData. Out: ``detector/`` with the best weights if there was validation,
else the last ones.
"""

from __future__ import annotations

import inspect
import logging
import shutil
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch

from simdetr.data.quarantine import Quarantine
from simdetr.training.checkpoint_files import averaged_state
from simdetr.training.checkpoints import BEST, RESUME
from simdetr.training.datamodule import DetectionData
from simdetr.training.detection_task import DetectionTask
from simdetr.training.weights import checkpoint_config, save_detector

LOG = logging.getLogger(__name__)


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
    trainer.fit(
        training.model,
        datamodule=data,
        ckpt_path=None if start is None else str(start),
        **safe_loading(trainer),
    )
    if trainer.is_global_zero:
        detector = training.model.detector
        # resumed at its very end, a run has not passed the hook that puts averaged weights in place
        ended = start if trainer.global_step == start_step else None
        kept = checkpoints / BEST if (checkpoints / BEST).is_file() else ended
        if kept is not None:
            detector.load_state_dict(averaged_state(_read(kept)))
        save_detector(detector, checkpoint_config(detector, data), out / "detector")
        shutil.rmtree(checkpoints, ignore_errors=True)
        _count_unreadable(out / "quarantine.csv", data)
    trainer.strategy.barrier()
    return data


def _read(checkpoint: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return content


def _count_unreadable(path: Path, data: DetectionData) -> None:
    count = len(Quarantine(path, total=len(data.labels)))
    if count:
        LOG.warning("%d of %d training images are unreadable, see %s", count, len(data.labels), path)


def safe_loading(trainer: pl.Trainer) -> dict[str, bool]:
    """``weights_only`` where this Lightning knows it (2.6 and later); before, its own loader is used."""
    return {"weights_only": True} if "weights_only" in inspect.signature(trainer.fit).parameters else {}

"""Run one training to its end, from where it stopped, and keep the detector.

In: a Trainer, a DetectionTask and a DetectionData. Out: ``detector/`` with the best weights if there was validation,
else the last ones.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

import pytorch_lightning as pl
import torch

from simdetr.training.datamodule import DetectionData
from simdetr.training.detection_task import DetectionTask
from simdetr.training.weights import averaged_state, checkpoint_config, save_detector


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
    resume = checkpoints / "resume.ckpt"
    training.trainer.fit(
        training.model,
        datamodule=training.datamodule,
        ckpt_path=str(resume) if resume.is_file() else None,
        **_safe_loading(training.trainer),
    )
    best = checkpoints / "best.ckpt"
    if training.trainer.is_global_zero:
        detector = training.model.detector
        if best.is_file():
            checkpoint = torch.load(best, map_location="cpu", weights_only=True)
            detector.load_state_dict(averaged_state(checkpoint))
        save_detector(detector, checkpoint_config(detector, training.datamodule), out / "detector")
        shutil.rmtree(checkpoints, ignore_errors=True)
    training.trainer.strategy.barrier()
    return training.datamodule


def _safe_loading(trainer: pl.Trainer) -> dict[str, bool]:
    """``weights_only`` where this Lightning knows it (2.6 and later); before, its own loader is used."""
    return {"weights_only": True} if "weights_only" in trainer.fit.__code__.co_varnames else {}

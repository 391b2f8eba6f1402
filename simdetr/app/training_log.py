"""A training in, a line of JSON for the page now and then out: steps, losses, rates, memory, scores; or a pause."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import psutil
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from simdetr.app.run_files import STEPS, RunFiles
from simdetr.training.train import TERMINATED, ResumePoint
from simdetr.training.training_bar import total_steps

ZEROS = 10
"""After so many lines with a loss of 0 in a row the page warns."""
DENSE_S = 500.0
"""So long lines come as often as they may, then ever more rarely: days of training are some thousand lines, not a
million that are read again and again."""


class TrainingLog(Callback):
    """Tells of a training, and ends it where it is to pause, once its step is kept.

    Args:
        folder: The run's.
        every_s: Seconds between two lines at least, at first.
    """

    def __init__(self, folder: str, every_s: float = 0.5) -> None:
        self.files, self.every_s = RunFiles(Path(folder)), every_s
        self._told = self._began = 0.0
        self._first_step = self._zeros = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell how many steps there are, and how many a resumed training has done."""
        self._began, self._first_step = time.monotonic(), trainer.global_step
        self.files.tell(**self._done(trainer), message="training")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:  # noqa: ANN401
        """Tell of the step, unless the last line was a moment ago."""
        if self.files.pause.is_file():
            for point in _resume_points(trainer):
                point.ask()
        now, total = time.monotonic(), total_steps(trainer)
        if now < self._told + self.every_s * max(1.0, (now - self._began) / DENSE_S) and trainer.global_step != total:
            return
        self._told = now
        values = {name: _number(value) for name, value in trainer.callback_metrics.items()}
        losses = {name.removeprefix("train/"): value for name, value in values.items() if name.startswith("train/")}
        loss = losses.pop("loss", None)
        self._zeros = self._zeros + 1 if loss == 0 else 0
        steps = max(1, trainer.global_step - self._first_step)
        warning = {}
        if self._zeros > ZEROS:
            warning = {"message": "the loss has been 0 for a while: is there a box in the images that are trained on?"}
        self.files.tell(
            **self._count(trainer),
            loss=loss,
            losses=losses,
            lr=float(trainer.optimizers[0].param_groups[0]["lr"]) if trainer.optimizers else None,
            seconds_per_step=round((now - self._began) / steps, 4),
            memory=_memory(),
            **warning,
        )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:  # noqa: ANN401
        """End where the training is to pause, once its step is kept.

        Raises:
            SystemExit: it is.
        """
        step = trainer.global_step
        if self.files.pause.is_file() and any(point.step == step for point in _resume_points(trainer)):
            self.files.tell(**self._done(trainer), message=f"paused at step {step:,}")
            self.files.pause.unlink(missing_ok=True)
            raise SystemExit(TERMINATED)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell the scores."""
        values = {name: _number(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        scores = {name.removeprefix("val/"): value for name, value in values.items()}
        if scores and not trainer.sanity_checking:
            self.files.tell(**self._count(trainer), scores=scores)

    def _count(self, trainer: pl.Trainer) -> dict[str, Any]:
        step, total = trainer.global_step, total_steps(trainer)
        return {"step": step, "total_steps": total, "epoch": trainer.current_epoch} | self._done(trainer)

    def _done(self, trainer: pl.Trainer) -> dict[str, Any]:
        """How far it is, for a line that tells of no step."""
        return {"done": trainer.global_step, "total": total_steps(trainer) or 0, "unit": STEPS}


def _resume_points(trainer: pl.Trainer) -> list[ResumePoint]:
    return [one for one in trainer.callbacks if isinstance(one, ResumePoint)]  # type: ignore[attr-defined]


def _number(value: Any) -> float | None:  # noqa: ANN401
    number = float(value)
    return number if math.isfinite(number) else None


def _memory() -> int:
    """Bytes in use: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)

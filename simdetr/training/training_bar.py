"""The bar of a training in a terminal; elsewhere its lines of log, see ``simdetr.training.progress``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

from simdetr.mining.pace import RateColumn
from simdetr.training.progress import EVERY_S, PaceLog

_SPEED_OVER_S = 120.0  # steps of different image sizes, and validation in between


class TrainingProgress(ProgressBar):
    """Steps done of all, steps per second, time left and the losses of a training; batches of a validation.

    In place of Lightning's bar, which counts epochs that a training over steps does not have.

    Args:
        every_s: Seconds between two lines of log where there is no terminal.
    """

    def __init__(self, every_s: float = EVERY_S) -> None:
        super().__init__()
        self.every_s = every_s
        self._enabled = True
        self._bar: Progress | None = None
        self._steps: TaskID | None = None
        self._batches: TaskID | None = None
        self._pace: PaceLog | None = None

    def disable(self) -> None:
        """Say nothing: Lightning asks for it in all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Speak again."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin where the training does, or where it is resumed."""
        total, begun = total_steps(trainer), trainer.global_step
        self._pace = PaceLog("training", "steps", total, begun=begun, every_s=self.every_s)
        self._steps = self._begin("training", total, begun)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:  # noqa: ANN401
        """Show the step and its loss."""
        scores = scores_text(self.get_metrics(trainer, pl_module))
        if self._bar is not None and self._steps is not None:
            self._bar.update(self._steps, completed=trainer.global_step, scores=scores)
        elif self._enabled and self._pace is not None:
            self._pace.tell(trainer.global_step, scores)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A second bar while the validation lasts."""
        self._batches = self._begin("validating", sum(trainer.num_val_batches))

    def on_validation_batch_end(self, *_: Any) -> None:  # noqa: ANN401
        """A batch further."""
        if self._bar is not None and self._batches is not None:
            self._bar.advance(self._batches)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Back to the training, if there is one."""
        if self._bar is not None and self._batches is not None:
            self._bar.remove_task(self._batches)
            self._batches = None
            if self._steps is None:
                self._close()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As in validation."""
        self._batches = self._begin("testing", sum(trainer.num_test_batches))

    def on_test_batch_end(self, *_: Any) -> None:  # noqa: ANN401
        """As in validation."""
        self.on_validation_batch_end()

    on_test_end = on_validation_end

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, *_: Any) -> None:  # noqa: ANN401
        """Close the bar: Lightning does not come to the end then."""
        self._close()

    def _begin(self, what: str, total: float | None, begun: int = 0) -> TaskID | None:
        """A line of the bar, which is opened for it in a terminal; None elsewhere."""
        console = Console(stderr=True)
        if not self._enabled or not console.is_terminal:
            return None
        if self._bar is None:
            words = ("{task.description}", "{task.fields[scores]}")
            columns = (*words, BarColumn(20), MofNCompleteColumn(), RateColumn("steps"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, speed_estimate_period=_SPEED_OVER_S)
            self._bar.start()
        total = None if total == math.inf else total
        return self._bar.add_task(what, total=total, completed=begun, scores="")

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._steps = self._batches = None


def total_steps(trainer: pl.Trainer) -> int | None:
    """Optimiser steps of a whole training, whichever of steps and epochs ends it; None if nothing does."""
    total = trainer.estimated_stepping_batches
    return int(total) if math.isfinite(total) and total >= 0 else None


def scores_text(metrics: Mapping[str, Any]) -> str:
    """Losses first, then scores, by the last part of their names."""
    numbers = [(name.rpartition("/")[2], value) for name, value in metrics.items() if isinstance(value, float)]
    return " ".join(f"{name} {value:.3g}" for name, value in sorted(numbers, key=lambda row: "loss" not in row[0]))

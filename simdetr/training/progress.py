"""A bar with rate and time left for long work, in a terminal; elsewhere a line of log every half a minute."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from simdetr.mining.miner import RateColumn, rate_text

LOG = logging.getLogger(__name__)
EVERY_S = 30.0
"""Seconds between two lines of log."""
_SPEED_OVER_S = 120.0  # steps of different image sizes, and validation in between


class PaceLog:
    """What is done in; now and then a line of log with count, rate and time left out.

    Args:
        what: The word before the numbers; ``unit`` is what is counted.
        total: How many there are in all; None if there is no end.
        begun: How many were done before, by a run that is resumed.
        every_s: Seconds between two lines.
    """

    def __init__(self, what: str, unit: str, total: int | None, *, begun: int = 0, every_s: float = EVERY_S) -> None:
        self.what, self.unit, self.total, self.begun, self.every_s = what, unit, total, begun, every_s
        self._start = self._told = time.monotonic()

    def tell(self, done: int, scores: str = "") -> None:
        """So many are done, those of before included."""
        now = time.monotonic()
        if now < self._told + self.every_s or done <= self.begun:
            return
        self._told = now
        speed = (done - self.begun) / max(now - self._start, 1e-9)
        parts = [f"{done:,} {self.unit}", rate_text(speed, self.unit)]
        if self.total is not None:
            parts[0] = f"{done:,} of {self.total:,} {self.unit}"
            parts.append(f"{timedelta(seconds=round((self.total - done) / speed))} left")
        LOG.info("%s: %s", self.what, ", ".join([*parts, *([scores] if scores else [])]))


@contextmanager
def image_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Give a function that moves the bar of ``total`` images by so many; ``what`` is the word before it."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    pace, done = PaceLog(what, "images", total), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        bar.advance(task, count)
        if not console.is_terminal:
            pace.tell(done)

    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield advance


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

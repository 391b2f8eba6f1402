"""A bar with rate and time left for long work, in a terminal; elsewhere a line of log every half a minute."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from simdetr.mining.pace import RateColumn, rate_text

LOG = logging.getLogger(__name__)
EVERY_S = 30.0
"""Seconds between two lines of log."""


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

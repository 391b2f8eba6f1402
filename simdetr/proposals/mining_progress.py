"""Images mined so far in, one bar over the whole store out, whoever mines them."""

from __future__ import annotations

import time
from collections.abc import Container
from threading import Lock
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from simdetr.proposals.store import ProposalStore

_LOOK_EVERY_S = 2.0
_SPEED_OVER_S = 120.0  # shards of other processes come in one piece


class _RateColumn(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.1f} images/s")


class MiningBar:
    """Images done of all, images per second and time left, on stderr; a context manager.

    Args:
        store: looked at now and then for the shards that others have written.
        own: shards whose images are told one by one, by :meth:`advance`.
        shown: False keeps silent.
    """

    def __init__(self, store: ProposalStore, own: Container[int], shown: bool) -> None:
        self._store, self._own, self._shown = store, own, shown
        self._begun_with = frozenset(store.written())
        self._told = 0
        self._lock = Lock()  # several threads may tell
        self._looked = time.monotonic()
        columns = (TextColumn("mining"), BarColumn(), MofNCompleteColumn(), _RateColumn(), TimeRemainingColumn())
        self._bar = Progress(
            *columns, console=Console(stderr=True), disable=not shown, speed_estimate_period=_SPEED_OVER_S
        )
        self._there = self._images_of(self._begun_with)
        self._others = 0
        self._task = self._bar.add_task("mining", total=store.manifest.num_images, completed=self._there)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.look(0)
        self._bar.stop()

    def advance(self, count: int) -> None:
        """So many more images of the own shards."""
        with self._lock:
            self._told += count
            self.look()

    def look(self, every_s: float = _LOOK_EVERY_S) -> None:
        """Show what is done, with the shards of others unless one looked at them a moment ago."""
        if not self._shown:
            return
        if time.monotonic() >= self._looked + every_s:
            new = set(self._store.written()) - self._begun_with
            self._others = self._images_of(frozenset(shard for shard in new if shard not in self._own))
            self._looked = time.monotonic()
        done = self._there + self._told + self._others
        self._bar.update(self._task, completed=min(done, self._store.manifest.num_images))

    def _images_of(self, shards: frozenset[int]) -> int:
        return sum(len(self._store.manifest.images_of(shard)) for shard in shards)

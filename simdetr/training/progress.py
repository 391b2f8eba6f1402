"""A bar with rate and time left for long work, in a terminal; silence elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class RateColumn(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        """The rate as text."""
        return Text(f"{task.speed or 0:.1f} images/s")


@contextmanager
def image_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Give a function that moves the bar by so many images.

    Args:
        what: The word before the bar.
        total: Images in all.
    """
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)

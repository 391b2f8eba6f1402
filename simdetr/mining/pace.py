"""How fast work goes -> a column of a bar, and a text."""

from __future__ import annotations

from rich.progress import ProgressColumn, Task
from rich.text import Text


class RateColumn(ProgressColumn):
    """Images, or whatever the unit is, per second."""

    def __init__(self, unit: str = "images") -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """The rate as text."""
        return Text(rate_text(task.speed or 0, self.unit))


def rate_text(speed: float, unit: str) -> str:
    """So many per second, with the digits that tell."""
    return f"{speed:.1f} {unit}/s" if speed >= 1 or speed == 0 else f"{speed:.2g} {unit}/s"

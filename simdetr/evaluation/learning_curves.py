"""Lightning's ``metrics.csv`` in, inline SVG pictures of the learning curves out.

Text and axes take the page's text colour (``currentColor``), so that one picture serves light and dark pages.
"""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

MAX_LINES = 6  # per panel; more cannot be told apart
ACCURACIES = (
    "AP",
    "AP50",
    "AP75",
    "AR100",
    "AR@100",
    "recall50@100",
)  # drawn, whatever stands before the last slash
MAX_POINTS = 200  # per line; longer ones are averaged over as many equal pieces
LINE_COLOURS = ("#4477cc", "#dd7733", "#229966", "#cc4466", "#8866cc", "#998833")
INK = "#010203"  # stands for the page's text colour until the SVG is written


@dataclass(frozen=True)
class Curve:
    """What one training run logged: metric name -> (steps [n], values [n])."""

    name: str
    metrics: dict[str, tuple[Sequence[float], Sequence[float]]]


def read_curve(run_name: str, *metrics_csv: Path) -> Curve:
    """Read the Lightning CSVLogger files of one training: columns ``step``, ``epoch`` and one per metric, with holes.

    Args:
        run_name: what the curve is called.
        metrics_csv: one file per start of the training, in order; a resumed start replaces the steps it repeats.

    Raises:
        ValueError: no ``step`` column.
    """
    series: dict[str, dict[float, float]] = defaultdict(dict)
    for path in metrics_csv:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if "step" not in (reader.fieldnames or ()):
                raise ValueError(
                    f"{path}: expected a Lightning metrics file with a column 'step', got {reader.fieldnames}"
                )
            for row in reader:
                for name, text in row.items():
                    if row["step"] and text and name not in ("step", "epoch"):
                        series[name][float(row["step"])] = float(text)
    metrics: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        name: (sorted(points), [points[step] for step in sorted(points)]) for name, points in series.items()
    }
    return Curve(name=run_name, metrics=metrics)


def panels(curve: Curve) -> dict[str, list[str]]:
    """Which metrics are drawn together: the losses, and the accuracies of `ACCURACIES`.

    Per-layer losses (names ending in a number), learning rates and anything past `MAX_LINES` are left to the CSV.
    """
    losses = [name for name in curve.metrics if "loss" in name.lower() and not re.search(r"_\d+$", name)]
    accuracies = [name for last in ACCURACIES for name in curve.metrics if name.rsplit("/", 1)[-1] == last]
    found = {"loss": sorted(losses, key=lambda name: (len(name), name)), "accuracy": accuracies}
    return {title: names[:MAX_LINES] for title, names in found.items() if names}


def draw_curve(curve: Curve) -> str:
    """The curve's panels side by side as one SVG element.

    Raises:
        ValueError: nothing to draw in the curve.
    """
    drawn = panels(curve)
    if not drawn:
        raise ValueError(f"curve {curve.name!r}: no loss, AP or AR among its metrics {sorted(curve.metrics)}")
    figure = new_figure(len(drawn))
    for axes, (title, names) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        _draw_panel(axes, title, names, curve)
    return to_svg(figure, curve.name)


def new_figure(num_panels: int) -> Figure:
    """An empty figure for so many panels side by side, through which the page shows."""
    figure = Figure(figsize=(3.4 * num_panels, 2.5), layout="constrained")
    figure.patch.set_alpha(0)
    return figure


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element; equal figures of equal names are equal texts."""
    target = io.StringIO()
    # text stays text: smaller, selectable, in the page's font; a fixed salt makes equal curves equal files
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = target.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def _draw_panel(axes: Axes, title: str, names: list[str], curve: Curve) -> None:
    smallest, largest = np.inf, 0.0
    for name, colour in zip(names, LINE_COLOURS, strict=False):
        steps, values = _thin(curve.metrics[name])
        marker = "o" if len(steps) < 12 else ""
        axes.plot(steps, values, color=colour, label=name, linewidth=1.6, marker=marker, markersize=3.5)
        finite = values[np.isfinite(values)]
        smallest, largest = min(smallest, *finite, np.inf), max(largest, *finite, 0.0)
    if title == "loss" and 0 < smallest < largest / 30:
        axes.set_yscale("log")
    if title == "accuracy":
        axes.set_ylim(bottom=0)
    style_panel(axes, title, "step")
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)


def style_panel(axes: Axes, title: str, x_label: str) -> None:
    """Title, label and lines of a panel in the page's colour; integers along x."""
    axes.patch.set_alpha(0)
    axes.set_title(title, color=INK, fontsize=10, loc="left")
    axes.set_xlabel(x_label, color=INK, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
        spine.set_alpha(0.4)


def _thin(series: tuple[Sequence[float], Sequence[float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most `MAX_POINTS` points, each the mean of a stretch of neighbours."""
    steps, values = (np.asarray(column, np.float64) for column in series)
    if len(steps) <= MAX_POINTS:
        return steps, values
    edges = np.linspace(0, len(steps), MAX_POINTS + 1).astype(np.int64)[:-1]
    counts = np.diff(np.append(edges, len(steps)))
    return np.add.reduceat(steps, edges) / counts, np.add.reduceat(values, edges) / counts

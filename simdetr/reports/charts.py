"""Numbers in, inline SVG pictures out: learning curves of ``metrics.csv``, sizes of clusters, and how losses fall.

Text and axes take the page's text colour (``currentColor``), so that one picture serves light and dark pages.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import solve_ivp

MAX_LINES = 6  # per panel; more cannot be told apart
ACCURACIES = ("AP", "AP50", "AP75", "AR100", "AR@100", "recall50@100")  # drawn, whatever is before the last slash
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

    There is one file per start of the training, in order; a resumed start replaces the steps it repeats. ValueError for
    a file without a ``step`` column.
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
    """The curve's panels side by side as one SVG element; ValueError if there is nothing to draw."""
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


def draw_clustering(record: Mapping[str, Any]) -> str:
    """Histogram of cluster sizes by powers of two, and inertia per region by iteration, side by side.

    The record is what `simdetr.mining.kmeans.clustering_record` gives; ValueError if it lacks what is drawn.
    """
    for key in ("sizes", "inertia", "regions"):
        if key not in record:
            raise ValueError(f"clustering record: expected sizes, inertia and regions, got no {key}")
    figure = new_figure(2)
    sizes_axes, inertia_axes = figure.subplots(1, 2)
    histogram = size_histogram(np.asarray(record["sizes"], np.int64))
    bars = sizes_axes.barh(range(len(histogram)), list(histogram.values()), color=LINE_COLOURS[0])
    sizes_axes.bar_label(bars, [f"{count:,}" for count in histogram.values()], color=INK, fontsize=8, padding=2)
    style_panel(sizes_axes, "regions of a class", "classes")
    sizes_axes.set_yticks(range(len(histogram)), list(histogram))
    sizes_axes.margins(x=0.15)
    sizes_axes.grid(visible=False, axis="y")
    inertia = np.asarray(record["inertia"], np.float64) / record["regions"]
    inertia_axes.plot(inertia, color=LINE_COLOURS[0], linewidth=1.6, marker="o" if len(inertia) < 12 else "")
    style_panel(inertia_axes, "inertia per region", "iteration")
    return to_svg(figure, "clustering")


def size_histogram(sizes: NDArray[np.int64]) -> dict[str, int]:
    """Clusters without rows, with 1, with 2 to 3, with 4 to 7 and so on, up to the largest: label -> clusters."""
    powers = np.zeros(len(sizes), np.int64)
    powers[sizes > 0] = np.floor(np.log2(sizes[sizes > 0])).astype(np.int64) + 1
    counts = np.bincount(powers)
    first = int(np.flatnonzero(counts)[0])
    labels = ["0", "1", *(f"{2 ** (power - 1):,}–{2**power - 1:,}" for power in range(2, len(counts)))]
    return {labels[power]: int(counts[power]) for power in range(first, len(counts))}


# ----------------------------------------------------------------------------------------------------------------------
# Which loss falls first? A class loss and a localisation loss in, their way down under three total losses out.
#
# If training pushed the class loss u and the localisation loss v straight down the gradient of the total loss, the
# point (u, v) would flow along (u', v') = -(∂/∂u, ∂/∂v) of
#
# - equation 5: u + v, both fall alike;
# - equation 6: u + exp(-u)·v, the localisation loss weighs as much as the true class is probable;
# - equation 7: u + exp(-u)·v².
#
# No network is trained here; real losses are not free to move like this. A loss that has come to 0 stays there.
# Source: US 11,544,507, equations 5 to 7 and figures 11A to 11C, whose vertical axis is the class loss.


Equation = Literal["eq5", "eq6", "eq7"]
TITLES: dict[Equation, str] = {"eq5": "5: u + v", "eq6": "6: u + exp(-u)·v", "eq7": "7: u + exp(-u)·v²"}
BORDERS = ("above it the class loss falls faster", "below it the class loss rises")
STARTS = ((1.0, 1.0), (3.0, 1.0), (3.0, 2.0), (3.0, 3.0), (1.5, 3.0), (0.5, 2.0))


def gradient(u: ArrayLike, v: ArrayLike, equation: Equation) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Derivatives of the total loss by u and by v, of their common shape; ValueError for an unknown equation."""
    u, v = np.broadcast_arrays(np.asarray(u, np.float64), np.asarray(v, np.float64))
    if equation == "eq5":
        return np.ones_like(u), np.ones_like(v)
    weight = np.exp(-u)
    if equation == "eq6":
        return 1 - weight * v, weight
    if equation == "eq7":
        return 1 - weight * v**2, 2 * weight * v
    raise ValueError(f"equation: expected one of {', '.join(TITLES)}, got {equation!r}")


def flow(start: tuple[float, float], equation: Equation, times: ArrayLike) -> NDArray[np.float64]:
    """Where the losses (u, v) are at some times [T], ascending from 0 on: float64 [T, 2].

    Raises:
        ValueError: a negative start, times that fall or are negative, or an unknown equation.
    """
    moments = np.asarray(times, np.float64)
    if moments.ndim != 1 or not len(moments) or moments[0] < 0 or (np.diff(moments) < 0).any():
        raise ValueError(f"times: expected ascending numbers from 0 on, got {moments.tolist()}")
    if len(start) != 2 or not all(loss >= 0 and math.isfinite(loss) for loss in start):
        raise ValueError(f"start: expected finite (u, v) of at least 0, got {start}")
    if moments[-1] == 0:
        return np.tile(np.asarray(start, np.float64), (len(moments), 1))
    span = (0, moments[-1])
    solution = solve_ivp(_velocity, span, start, t_eval=moments, args=(equation,), rtol=1e-8, atol=1e-10)
    return np.maximum(solution.y.T, 0)


def draw_flow(starts: Sequence[tuple[float, float]] = STARTS, longest: float = 6.0) -> Figure:
    """The figure: a panel per equation with the ways down from some starts (dots), v to the right and u upwards.

    Equation 5 has no border where another loss begins to fall faster. ``longest`` is the time that is drawn.
    """
    figure = new_figure(len(TITLES))
    limit = 1.1 * max(map(max, starts))
    for axes, equation in zip(figure.subplots(1, len(TITLES)), TITLES, strict=True):
        for index, start in enumerate(starts):
            way = flow(start, equation, np.linspace(0, longest, 400))
            colour = LINE_COLOURS[index % len(LINE_COLOURS)]
            axes.plot(way[:, 1], way[:, 0], color=colour, linewidth=1.6)
            axes.plot(start[1], start[0], color=colour, marker="o", markersize=3.5)
        if equation != "eq5":
            v = np.linspace(1e-3, limit, 200)
            axes.plot(v, class_first_border(v, equation), color=INK, linewidth=1, linestyle="--")
            axes.plot(v, np.log(v) * (1 if equation == "eq6" else 2), color=INK, linewidth=1, linestyle=":")
        style_panel(axes, f"equation {TITLES[equation]}", "localisation loss v")
        axes.set_ylabel("class loss u", color=INK, fontsize=9)
        axes.set(xlim=(0, limit), ylim=(0, limit), aspect="equal")
    lines = figure.axes[-1].get_lines()[-2:]
    figure.legend(lines, BORDERS, loc="outside lower center", ncols=2, fontsize=8, frameon=False, labelcolor=INK)
    return figure


def class_first_border(v: ArrayLike, equation: Equation) -> NDArray[np.float64]:
    """The class loss above which it falls faster than the localisation loss v; infinite for equation 5: never."""
    values = np.asarray(v, np.float64)
    slope = gradient(0.0, values, equation)[1]  # of v at u = 0; the border is where exp(-u) brings both to the same
    if equation == "eq5":
        return np.full(values.shape, np.inf)
    return np.log(slope + (values if equation == "eq6" else values**2))


def _velocity(_: float, losses: NDArray[np.float64], equation: Equation) -> list[float]:
    """How fast both losses change at a time, as `solve_ivp` asks for it."""
    down = [-float(slope) for slope in gradient(losses[0], losses[1], equation)]
    return [0.0 if loss <= 0 and speed < 0 else speed for loss, speed in zip(losses, down, strict=True)]

"""The record of a clustering (``stage0/clustering.json``) -> sizes of its clusters and its inertia, as one SVG.

In: what `simdetr.proposals.kmeans_balance.clustering_record` gives. Text and axes take the page's text colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from simdetr.evaluation.learning_curves import INK, LINE_COLOURS, new_figure, style_panel, to_svg


def draw_clustering(record: Mapping[str, Any]) -> str:
    """Histogram of cluster sizes by powers of two, and inertia per region by iteration, side by side.

    Raises:
        ValueError: the record lacks what is drawn.
    """
    for key in ("sizes", "inertia", "regions"):
        if key not in record:
            raise ValueError(f"clustering record: expected sizes, inertia and regions, got no {key}")
    figure = new_figure(2)
    sizes_axes, inertia_axes = figure.subplots(1, 2)
    _draw_sizes(sizes_axes, np.asarray(record["sizes"], np.int64))
    inertia = np.asarray(record["inertia"], np.float64) / record["regions"]
    inertia_axes.plot(inertia, color=LINE_COLOURS[0], linewidth=1.6, marker="o" if len(inertia) < 12 else "")
    style_panel(inertia_axes, "inertia per region", "iteration")
    return to_svg(figure, "clustering")


def size_histogram(sizes: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, int]:
    """Clusters without rows, with 1, with 2 to 3, with 4 to 7 and so on, up to the largest: label -> clusters."""
    powers = np.zeros(len(sizes), np.int64)
    powers[sizes > 0] = np.floor(np.log2(sizes[sizes > 0])).astype(np.int64) + 1
    counts = np.bincount(powers)
    first = int(np.flatnonzero(counts)[0])
    return {_range(power): int(counts[power]) for power in range(first, len(counts))}


def _range(power: int) -> str:
    if power < 2:
        return str(power)
    return f"{2 ** (power - 1):,}–{2**power - 1:,}"


def _draw_sizes(axes: Axes, sizes: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    histogram = size_histogram(sizes)
    bars = axes.barh(range(len(histogram)), list(histogram.values()), color=LINE_COLOURS[0])
    axes.bar_label(bars, [f"{count:,}" for count in histogram.values()], color=INK, fontsize=8, padding=2)
    style_panel(axes, "regions of a class", "classes")
    axes.set_yticks(range(len(histogram)), list(histogram))
    axes.margins(x=0.15)
    axes.grid(visible=False, axis="y")

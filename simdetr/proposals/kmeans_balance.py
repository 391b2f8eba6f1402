"""Cluster sizes -> how evenly rows are spread over the clusters, as plain numbers.

A few clusters that hold most regions, or many that hold none, make pseudo-classes that teach little.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from simdetr.proposals.kmeans import KMeans


def cluster_balance(sizes: NDArray[np.int64]) -> dict[str, float]:
    """Numbers about the sizes of clusters.

    Args:
        sizes: rows of each of C clusters, [C]; at least one row in all.

    Returns:
        ``min``, ``median``, ``max`` (rows), ``empty`` (clusters), ``entropy`` (of the shares; 1 when all are equal, 0
        when one cluster has all), ``perplexity`` (how many equal clusters would have this entropy),
        ``perplexity_share`` (of C), ``largest_percent_share`` (rows in the largest 1 % of clusters, at least one
        cluster) and ``gini`` (0 when all are equal, towards 1 when one has all).

    Raises:
        ValueError: no rows.
    """
    total = int(sizes.sum())
    if total == 0:
        raise ValueError(f"sizes: expected at least one row, got none in {len(sizes)} clusters")
    ascending = np.sort(sizes)
    shares = ascending[ascending > 0] / total
    entropy = max(0.0, float(-(shares * np.log(shares)).sum()))
    largest = ascending[-max(1, round(len(sizes) / 100)) :]
    ranks = np.arange(1, len(sizes) + 1)
    return {
        "min": int(ascending[0]),
        "median": float(np.median(ascending)),
        "max": int(ascending[-1]),
        "empty": int((sizes == 0).sum()),
        "entropy": entropy / np.log(len(sizes)) if len(sizes) > 1 else 1.0,
        "perplexity": float(np.exp(entropy)),
        "perplexity_share": float(np.exp(entropy)) / len(sizes),
        "largest_percent_share": float(largest.sum() / total),
        "gini": float(((2 * ranks - len(sizes) - 1) * ascending).sum() / (len(sizes) * total)),
    }


def clustering_record(clustering: KMeans, settings: dict[str, Any]) -> dict[str, Any]:
    """What is worth keeping of a clustering beside its labels, as JSON can say it.

    Args:
        clustering: the result.
        settings: what it was made with.

    Returns:
        ``settings``, ``regions``, ``iterations``, ``inertia``, ``empty`` and ``seconds`` (one per pass), ``balance``
        and ``sizes`` (regions of each cluster).
    """
    sizes = clustering.counts.cpu().numpy()
    return {
        "settings": settings,
        "regions": int(sizes.sum()),
        "iterations": clustering.iterations,
        "inertia": [step.inertia for step in clustering.history],
        "empty": [step.empty for step in clustering.history],
        "seconds": [round(step.seconds, 3) for step in clustering.history],
        "balance": cluster_balance(sizes),
        "sizes": sizes.tolist(),
    }

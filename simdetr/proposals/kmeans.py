"""Feature blocks -> centroids: Lloyd's k-means over more rows than fit in memory, on one process or on many ranks.

The global clustering of region features into pseudo-classes (seed 003 [0054]-[0055], Algorithm 1 line 8). Rows come as
a tensor or as a repeatable iterable of blocks; an iteration is one pass over them; ranks add up their sums and counts,
so every rank ends with the same centroids. A journal lets a killed clustering go on after its last iteration.

Letters: M rows (all blocks, all ranks), D dimensions, C clusters, n rows of one rank or block.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from simdetr.proposals.kmeans_assignment import Backend, assign_blocks, nearest_cluster, prepare_rows
from simdetr.proposals.kmeans_journal import History, Iteration, Journal
from simdetr.proposals.kmeans_starts import sample_rows, spread_starts

__all__ = ["Backend", "Features", "KMeans", "fit_kmeans"]

Features = Tensor | Iterable[Tensor]
_BLOCK_ROWS = 1 << 13  # of a tensor that is given whole


@dataclass(frozen=True)
class KMeans:
    """A fitted clustering.

    Attributes:
        centroids: float32 [C, D], of unit length when spherical.
        counts: int64 [C], rows of each cluster, over all ranks.
        labels: int32 [n], cluster of each row that this rank gave, in their order.
        history: all passes over the rows, the last of which gave counts and labels.
        spherical: whether rows and centroids are compared by direction.
    """

    centroids: Tensor
    counts: Tensor
    labels: Tensor
    history: History
    spherical: bool

    @property
    def inertia(self) -> float:
        """Sum of squared distances of all rows (of unit length if spherical) to their nearest centroid."""
        return self.history[-1].inertia

    @property
    def iterations(self) -> int:
        """Times that the centroids moved."""
        return self.history[-1].number

    def assign(self, features: Tensor) -> Tensor:
        """Nearest cluster of each row, [n, D] to int64 [n]."""
        return nearest_cluster(prepare_rows(features, self.spherical), self.centroids.to(features.device))


def fit_kmeans(
    features: Features,
    num_clusters: int,
    *,
    seed: int = 0,
    spherical: bool = True,
    max_iterations: int = 50,
    tolerance: float = 1e-4,
    backend: Backend = "torch",
    journal: Journal | None = None,
) -> KMeans:
    """Cluster rows around centroids.

    Under an initialised process group every rank gives its own shard and gets the same result.

    Args:
        features: [M, D] float rows, or an iterable of such blocks that can be gone through again and again (a list or
            an object whose ``__iter__`` starts anew; not a generator). Blocks may be empty.
        num_clusters: C, at most M.
        seed: of the starts and of replacements for empty clusters.
        spherical: cluster directions (cosine) instead of positions.
        max_iterations: Lloyd iterations at most, each one pass over the rows.
        tolerance: stop when the inertia falls by less than this fraction.
        backend: what finds the nearest centroids: "torch" (about twice as fast on CPUs of AMD), or "faiss".
        journal: keeps every iteration, so that the same call goes on after the last one that ended.

    Raises:
        ValueError: for fewer rows than clusters, numbers out of range, rows that are not finite, or an iterable that
            cannot be repeated.
    """
    if num_clusters < 1 or max_iterations < 1:
        raise ValueError(
            f"num_clusters, max_iterations: expected at least 1 each, got {num_clusters}, {max_iterations}"
        )
    if isinstance(features, Iterator):
        raise ValueError(
            "features: expected an iterable that can be repeated, got an iterator; give a list or a loader"
        )
    if backend not in ("torch", "faiss"):
        raise ValueError(f"backend: expected 'torch' or 'faiss', got {backend!r}")
    blocks: Iterable[Tensor] = torch.split(features, _BLOCK_ROWS) if isinstance(features, Tensor) else features
    journal = journal or Journal()
    settings = f"{num_clusters=} {seed=} {spherical=} {max_iterations=} {tolerance=} {backend=}"
    sample = sample_rows(blocks, num_clusters, spherical, seed)
    centroids, history = journal.restore(settings) or (
        spread_starts(sample, num_clusters, torch.Generator().manual_seed(seed)),
        (),
    )
    centroids = centroids.to(sample.device)
    while True:
        began = time.perf_counter()
        found = assign_blocks(blocks, centroids, spherical, backend)
        means = _means(found.sums, found.counts, centroids, sample, spherical)
        empty = int((found.counts == 0).sum())
        history += (Iteration(len(history), found.inertia, empty, time.perf_counter() - began),)
        journal.report(history[-1])
        if _is_settled(history, max_iterations, tolerance):
            return KMeans(centroids, found.counts, found.labels, history, spherical)
        centroids = means
        journal.keep(centroids, history, settings)


def _is_settled(history: History, max_iterations: int, tolerance: float) -> bool:
    if len(history) == 1:
        return False
    before, now = history[-2].inertia, history[-1].inertia
    return history[-1].number == max_iterations or before - now <= tolerance * now


def _means(sums: Tensor, counts: Tensor, centroids: Tensor, sample: Tensor, spherical: bool) -> Tensor:
    """New centroids; an empty cluster starts again at the sampled row that is farthest from all centroids."""
    means = (sums / counts.clamp(min=1)[:, None]).to(centroids.dtype)
    if spherical:
        means = functional.normalize(means, dim=1)
    empty = counts == 0
    if bool(empty.any()):
        used = means[~empty]
        distances = (sample - used[nearest_cluster(sample, used)]).square().sum(dim=1)
        for cluster in empty.nonzero().flatten().tolist():
            farthest = int(distances.argmax())
            means[cluster] = sample[farthest]
            distances = torch.minimum(distances, (sample - sample[farthest]).square().sum(dim=1))
    return means

"""Feature blocks -> centroids: Lloyd's k-means over more rows than fit in memory, on one process or on many ranks.

The global clustering of region features into pseudo-classes (seed 003 [0054]-[0055], Algorithm 1 line 8). Rows come as
a tensor or as a repeatable iterable of blocks; assignment is one matrix product per block; ranks sum their sums and
counts, so every rank ends with the same centroids. On one process faiss can do the iterations instead.

Letters: M rows (all blocks, all ranks), D dimensions, C clusters, n rows of one block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import faiss
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from simdetr.proposals.kmeans_starts import prepare_rows, sample_rows, spread_starts, world_size

Backend = Literal["torch", "faiss"]
Features = Tensor | Iterable[Tensor]
_BLOCK_ROWS = 1 << 16  # of a tensor that is given whole
_TILE_ELEMENTS = 1 << 23  # of one block of distances: 32 MiB in float32


@dataclass(frozen=True)
class KMeans:
    """A fitted clustering.

    Attributes:
        centroids: float32 [C, D], of unit length when spherical.
        inertia: sum of squared distances of all rows (of unit length if spherical) to their nearest centroid.
        counts: int64 [C], rows of each cluster, over all ranks.
        iterations: Lloyd iterations done.
        spherical: whether rows and centroids are compared by direction.
    """

    centroids: Tensor
    inertia: float
    counts: Tensor
    iterations: int
    spherical: bool

    def assign(self, features: Tensor) -> Tensor:
        """Nearest cluster of each row, [n, D] to int64 [n]."""
        return nearest(prepare_rows(features, self.spherical), self.centroids.to(features.device))[0]


def fit_kmeans(
    features: Features,
    num_clusters: int,
    *,
    seed: int = 0,
    spherical: bool = True,
    max_iterations: int = 50,
    tolerance: float = 1e-4,
    starts: int = 1,
    backend: Backend = "torch",
) -> KMeans:
    """Cluster rows around centroids.

    Under an initialised process group every rank gives its own shard and gets the same result (backend "torch").

    Args:
        features: [M, D] float rows, or an iterable of such blocks that can be gone through again and again (a list or
            an object whose ``__iter__`` starts anew; not a generator). Blocks may be empty.
        num_clusters: C, at most M.
        seed: of the starts and of replacements for empty clusters.
        spherical: cluster directions (cosine) instead of positions.
        max_iterations: Lloyd iterations at most, each one pass over the rows.
        tolerance: stop when the inertia falls by less than this fraction.
        starts: independent starts, the best of which is returned.
        backend: "torch", or "faiss" (same starts) for one process whose rows fit in memory.

    Raises:
        ValueError: for fewer rows than clusters, numbers out of range, rows that are not finite, an iterable that
            cannot be repeated, or faiss under several ranks.
    """
    if num_clusters < 1 or max_iterations < 1 or starts < 1:
        raise ValueError(
            "num_clusters, max_iterations, starts: expected at least 1 each, "
            f"got {num_clusters}, {max_iterations}, {starts}"
        )
    if isinstance(features, Iterator):
        raise ValueError(
            "features: expected an iterable that can be repeated, got an iterator; give a list or a loader"
        )
    blocks: Iterable[Tensor] = torch.split(features, _BLOCK_ROWS) if isinstance(features, Tensor) else features
    if backend not in ("torch", "faiss"):
        raise ValueError(f"backend: expected 'torch' or 'faiss', got {backend!r}")
    if backend == "faiss" and world_size() > 1:
        raise ValueError("backend: expected 'torch' under several ranks, got 'faiss', which clusters on one process")
    runs = []
    for start in range(starts):
        generator = torch.Generator().manual_seed(seed + start)
        sample = sample_rows(blocks, num_clusters, spherical, seed + start)
        centroids = spread_starts(sample, num_clusters, generator)
        if backend == "faiss":
            runs.append(_lloyd_by_faiss(blocks, centroids, spherical, max_iterations))
        else:
            runs.append(_lloyd(blocks, centroids, sample, spherical, max_iterations, tolerance))
    return min(runs, key=lambda run: run.inertia)


def nearest(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid by Euclidean distance, in tiles so that memory does not grow with n times C.

    Args:
        rows: float [n, D].
        centroids: float [C, D].

    Returns:
        int64 [n] and the squared distances, float [n].
    """
    half_norms = centroids.square().sum(dim=1) / 2
    labels, distances = [], []
    for tile in torch.split(rows, max(1, _TILE_ELEMENTS // len(centroids))):
        # argmin |x - c|² = argmin |c|²/2 - x·c: one matrix product with the norms folded in
        half, label = torch.addmm(half_norms, tile, centroids.T, alpha=-1).min(dim=1)
        labels.append(label)
        distances.append((2 * half + tile.square().sum(dim=1)).clamp(min=0))
    if not labels:
        return torch.zeros(0, dtype=torch.int64, device=rows.device), rows.new_zeros(0)
    return torch.cat(labels), torch.cat(distances)


def _sum_over_ranks(value: Tensor) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def _lloyd(
    blocks: Iterable[Tensor],
    centroids: Tensor,
    sample: Tensor,
    spherical: bool,
    max_iterations: int,
    tolerance: float,
) -> KMeans:
    """Alternate assignment and means until the inertia settles; the result's counts belong to its centroids."""
    previous = float("inf")
    sums, counts, inertia = _pass(blocks, centroids, spherical)
    iteration = 0
    while iteration < max_iterations and previous - inertia > tolerance * inertia:
        centroids = _means(sums, counts, centroids, sample, spherical)
        previous = inertia
        sums, counts, inertia = _pass(blocks, centroids, spherical)
        iteration += 1
    return KMeans(centroids, inertia, counts, iteration, spherical)


def _pass(blocks: Iterable[Tensor], centroids: Tensor, spherical: bool) -> tuple[Tensor, Tensor, float]:
    """Sums [C, D] and counts [C] of the rows nearest to each centroid, and the inertia, over all blocks and ranks."""
    sums = torch.zeros_like(centroids, dtype=torch.float64)
    counts = torch.zeros(len(centroids), dtype=torch.int64, device=centroids.device)
    inertia = torch.zeros((), dtype=torch.float64, device=centroids.device)
    for block in blocks:
        if len(block) == 0:
            continue
        rows = prepare_rows(block, spherical)
        labels, distances = nearest(rows, centroids)
        sums += torch.zeros_like(centroids).index_add_(0, labels, rows).double()
        counts += torch.bincount(labels, minlength=len(centroids))
        inertia += distances.double().sum()
    return _sum_over_ranks(sums), _sum_over_ranks(counts), float(_sum_over_ranks(inertia))


def _means(sums: Tensor, counts: Tensor, centroids: Tensor, sample: Tensor, spherical: bool) -> Tensor:
    """New centroids; an empty cluster starts again at the sampled row that is farthest from all centroids."""
    means = (sums / counts.clamp(min=1)[:, None]).to(centroids.dtype)
    if spherical:
        means = functional.normalize(means, dim=1)
    empty = counts == 0
    if bool(empty.any()):
        distances = nearest(sample, means[~empty])[1]
        for cluster in empty.nonzero().flatten().tolist():
            farthest = int(distances.argmax())
            means[cluster] = sample[farthest]
            distances = torch.minimum(distances, (sample - sample[farthest]).square().sum(dim=1))
    return means


def _lloyd_by_faiss(blocks: Iterable[Tensor], centroids: Tensor, spherical: bool, max_iterations: int) -> KMeans:
    """All of faiss' iterations over all rows (no subsampling), then our own count and inertia of its centroids."""
    rows = torch.cat([prepare_rows(block, spherical).cpu() for block in blocks if len(block)])
    solver = faiss.Kmeans(
        rows.shape[1],
        len(centroids),
        niter=max_iterations,
        spherical=spherical,
        min_points_per_centroid=1,
        max_points_per_centroid=len(rows),
    )
    solver.train(rows.numpy(), init_centroids=centroids.cpu().numpy())
    found = torch.from_numpy(np.array(solver.centroids, dtype=np.float32)).to(centroids.device)
    _, counts, inertia = _pass(blocks, found, spherical)
    return KMeans(found, inertia, counts, max_iterations, spherical)

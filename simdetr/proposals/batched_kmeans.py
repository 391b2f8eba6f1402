"""k-means of many small point sets at once: embedded cells of B images in, one label per cell out.

Letters: B point sets, N points each, D dimensions, S starts, K clusters. All sets share the same random numbers, so the
labels of a set depend on its points and the seed, never on the rest of the batch. Points that coincide always share a
cluster; with fewer distinct points than clusters, the clusters left over stay empty. (The k-means over the regions of a
whole image collection is another problem: `kmeans.py`.)
"""

from __future__ import annotations

import torch
from torch import Tensor

SAME_POINT = 1e-5  # squared distance below which two points of an embedding on the unit sphere are one
DRAWS = 3  # candidates for each seed
SAME_COST = 1e-4  # rounding must not decide between two starts that are equally good


def batched_kmeans(points: Tensor, num_clusters: int, *, starts: int = 4, max_steps: int = 50, seed: int = 0) -> Tensor:
    """Best of several k-means++ starts (Arthur and Vassilvitskii 2007), refined by Lloyd's iteration.

    Args:
        points: float [B, N, D].
        num_clusters: K; may exceed N.
        starts: independent seedings; the one with the lowest sum of squared distances wins.
        max_steps: of Lloyd's iteration; a point set stops earlier when none of its labels change.
        seed: of the random numbers that all point sets share.

    Returns:
        Labels int64 [B, N]; clusters are numbered by their first point, so equal partitions have equal labels.
    """
    labels, inertia = kmeans_of_starts(points, num_clusters, starts=starts, max_steps=max_steps, seed=seed)
    return number_by_first_member(take_lowest(labels, inertia))


def kmeans_of_starts(
    points: Tensor, num_clusters: int, *, starts: int, max_steps: int = 50, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Labels int64 [B, N, S] and sums of squared distances [B, S] of every start; arguments as above."""
    batch, count, _ = points.shape
    centroids, used = _spread_seeds(points, num_clusters, starts, seed)
    squares = points.square().sum(dim=2)
    labels = torch.zeros(batch, count, starts, dtype=torch.int64, device=points.device)
    inertia = points.new_zeros(batch, starts)
    active = torch.arange(batch, device=points.device)
    current = torch.full_like(labels, -1)
    for step in range(max_steps + 1):
        assigned, gain = _assign(points, centroids, used)
        labels[active], inertia[active] = assigned, squares[active].sum(dim=1, keepdim=True) - gain
        moving = (assigned != current).flatten(1).any(dim=1)
        if step == max_steps or not bool(moving.any()):
            break
        if not bool(moving.all()):
            active, points, assigned = active[moving], points[moving], assigned[moving]
            centroids, used = centroids[moving], used[moving]
        centroids, current = _means(points, assigned, centroids), assigned
    return labels, inertia


def take_lowest(labels: Tensor, costs: Tensor) -> Tensor:
    """Of the starts' labels [B, N, S] those with the lowest cost [B, S], the first of equals; to [B, N]."""
    good = costs <= costs.amin(dim=1, keepdim=True) * (1 + SAME_COST) + SAME_COST
    best = good.int().argmax(dim=1)
    return labels.gather(2, best[:, None, None].expand(-1, labels.shape[1], 1))[:, :, 0]


def number_by_first_member(labels: Tensor) -> Tensor:
    """Renumber the clusters of every row in the order in which they first occur; int64 [B, N] to [B, N]."""
    batch, count = labels.shape
    clusters = int(labels.max()) + 1 if labels.numel() else 0
    position = torch.arange(count, device=labels.device).expand(batch, count)
    first = torch.full((batch, clusters), count, device=labels.device).scatter_reduce(1, labels, position, "amin")
    rank = first.argsort(dim=1, stable=True).argsort(dim=1)
    return rank.gather(1, labels)


def _spread_seeds(points: Tensor, num_clusters: int, starts: int, seed: int) -> tuple[Tensor, Tensor]:
    """k-means++ seeds [B, S, K, D], and which of them [B, S, K] differ from all earlier ones.

    Of several draws for a seed the one that leaves the least sum of squares is taken, as scikit-learn does.
    """
    batch, count, dims = points.shape
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(num_clusters, starts, DRAWS, generator=generator).to(points)
    rows = torch.arange(batch, device=points.device)[:, None]
    nearest = points.new_full((batch, starts, count), torch.inf)
    weights = points.new_ones(batch, starts, count)
    centroids, used = [], []
    for draw in draws:
        cumulative = weights.cumsum(dim=2)
        chosen = torch.searchsorted(cumulative, cumulative[:, :, -1:] * draw, right=True).clamp(max=count - 1)
        drawn = points[rows, chosen.flatten(1)]
        distances = _squared_distances(drawn, points).reshape(batch, starts, DRAWS, count)
        left = torch.minimum(nearest[:, :, None], distances)
        best = left.sum(dim=3).argmin(dim=2)
        used.append(weights.gather(2, chosen.gather(2, best[:, :, None]))[:, :, 0] > 0)
        centroids.append(_pick(drawn.reshape(batch, starts, DRAWS, dims), best))
        nearest = _pick(left, best)
        weights = torch.where(nearest > SAME_POINT, nearest, 0.0)
    return torch.stack(centroids, dim=2), torch.stack(used, dim=2)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """Of [B, S, T, X] the entry that [B, S] names, [B, S, X]."""
    return values.gather(2, index[:, :, None, None].expand(-1, -1, 1, values.shape[3]))[:, :, 0]


def _squared_distances(points: Tensor, centroids: Tensor) -> Tensor:
    """[B, N, D] and [B, M, D] to [B, N, M], never negative."""
    products = torch.bmm(points, centroids.mT)
    squares = points.square().sum(dim=2)[:, :, None] + centroids.square().sum(dim=2)[:, None, :]
    return (squares - 2 * products).clamp(min=0)


def _assign(points: Tensor, centroids: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest used centroid of every point [B, N, S], and what assignment takes off the sum of squares [B, S].

    A point x is nearest to the centroid c with the highest 2 x.c - |c|^2, which is |x|^2 less the squared distance.
    """
    batch, starts, clusters, dims = centroids.shape
    flat = centroids.reshape(batch, starts * clusters, dims)
    penalty = flat.square().sum(dim=2).masked_fill(~used.reshape(batch, -1), torch.inf)
    score = torch.baddbmm(penalty[:, None, :], points, flat.mT, beta=-1, alpha=2)
    nearest = score.reshape(batch, -1, starts, clusters).max(dim=3)
    return nearest.indices, nearest.values.sum(dim=1)


def _means(points: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """Mean of every cluster [B, S, K, D]; a cluster that lost all its points stays where it was."""
    batch, starts, clusters, dims = centroids.shape
    member = points.new_zeros(batch, points.shape[1], starts, clusters).scatter_(3, labels[..., None], 1.0)
    member = member.reshape(batch, -1, starts * clusters)
    counts = member.sum(dim=1).reshape(batch, starts, clusters, 1)
    sums = torch.bmm(member.mT, points).reshape(batch, starts, clusters, dims)
    return torch.where(counts > 0, sums / counts.clamp(min=1), centroids)

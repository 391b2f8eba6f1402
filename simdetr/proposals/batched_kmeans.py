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


def batched_kmeans(points: Tensor, num_clusters: int, *, starts: int = 3, max_steps: int = 12, seed: int = 0) -> Tensor:
    """Several k-means++ starts (Arthur and Vassilvitskii 2007), each refined by Lloyd's iteration.

    Args:
        points: float [B, N, D].
        num_clusters: K; may exceed N.
        starts: independent seedings.
        max_steps: of Lloyd's iteration; a point set stops earlier when none of its labels change.
        seed: of the random numbers that all point sets share.

    Returns:
        Labels int64 [B, N, S] of every start.
    """
    batch, count, _ = points.shape
    centroids, used = _spread_seeds(points, num_clusters, starts, seed)
    labels = torch.zeros(batch, starts, count, dtype=torch.int64, device=points.device)
    active = torch.arange(batch, device=points.device)
    for step in range(max_steps + 1):
        scores = _scores(points, centroids, used)
        member = (scores == scores.amax(dim=2, keepdim=True)).to(points)  # far cheaper than argmax; a tie counts twice
        means = _means(points, member, centroids)
        settled = (means == centroids).flatten(1).all(dim=1) | (step == max_steps)
        if bool(settled.any()):
            labels[active[settled]] = scores[settled].argmax(dim=2)
            active, points, means, used = (values[~settled] for values in (active, points, means, used))
        if not len(active):
            break
        centroids = means
    return labels.transpose(1, 2)


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


def _scores(points: Tensor, centroids: Tensor, used: Tensor) -> Tensor:
    """2 x.c - |c|^2, highest for the nearest centroid, [B, S, K, N]; minus infinity for centroids that are not used."""
    batch, starts, clusters, dims = centroids.shape
    flat = centroids.reshape(batch, starts * clusters, dims)
    penalty = flat.square().sum(dim=2).masked_fill(~used.reshape(batch, -1), torch.inf)
    scores = torch.baddbmm(penalty[:, :, None], flat, points.mT, beta=-1, alpha=2)
    return scores.reshape(batch, starts, clusters, -1)


def _means(points: Tensor, member: Tensor, centroids: Tensor) -> Tensor:
    """Mean of every cluster [B, S, K, D] by membership [B, S, K, N]; a cluster without points stays where it was."""
    counts = member.sum(dim=3, keepdim=True)
    sums = torch.bmm(member.flatten(1, 2), points).reshape(centroids.shape)
    return torch.where(counts > 0, sums / counts.clamp(min=1), centroids)

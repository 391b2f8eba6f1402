"""Spectral clustering of feature maps: maps of a batch of images in, one label per cell and number of clusters out.

Source: US 2025/0265826 [0032], [0053]; Ng, Jordan, Weiss 2001, "On spectral clustering". Letters: B images, graphs or
point sets, D channels or dimensions, H x W cells, N = H W nodes or points, K clusters, C wanted eigenvectors, S starts.
One eigen-decomposition per map serves all its K. Everything runs on the features' device, no loop goes over images or
cells, and the labels of an image do not depend on its batch: matrices and point sets share the random numbers, and each
stops on its own. (The k-means over the regions of a whole image collection is another problem: `kmeans.py`.)

A defined result for every graph: a node without neighbours (zero features) embeds at the origin; eigenvectors of
non-positive eigenvalues describe no group and are dropped, which leaves identical nodes identical in the embedding, so
that a flat image is one cluster whatever K is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import scipy.linalg
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

Affinity = Literal["clamp", "exp"]
NO_GROUP = 1e-4  # eigenvalues up to here are zero or negative but for rounding
CACHED_WEIGHTS = 4_000_000  # of the graphs that the host works on together, so that they stay in its cache
CUT_GAIN = 1e-6  # less is rounding
TINY = torch.finfo(torch.float32).tiny
FLAT = 1e-4  # a cell this close to its image's mean, relative to its own length, has no direction of its own
WHOLE_UP_TO = 128  # nodes; up to here a whole decomposition is as fast as the iteration
BLOCK = 4  # vectors per product: one pass over the matrix serves all, and up to 3 equal eigenvalues are told apart
FIRST_BASIS, MORE_BASIS, LARGEST_BASIS = 4, 2, 12  # basis vectors per wanted one: at first, per round, at most
VANISHED = 1e-5  # length of a new basis vector below which it is rounding
EQUAL = 1e-4  # difference of eigenvalues below which they may be one, with several vectors
SAME_POINT = 1e-5  # squared distance below which two points of an embedding on the unit sphere are one
DRAWS = 3  # candidates for each seed
SAME_COST = 1e-4  # rounding must not decide between two starts that are equally good


def spectral_clustering(
    features: Tensor,
    cluster_counts: Sequence[int],
    *,
    affinity: Affinity = "exp",
    temperature: float = 0.1,
    centre: bool = True,
    starts: int = 3,
    cut_steps: int = 2,
    seed: int = 0,
) -> dict[int, Tensor]:
    """Cluster the cells of every map, float [B, D, H, W], into each of the numbers of clusters, e.g. (2, 4, 8).

    The affinity, its temperature and ``centre`` are explained at :func:`cell_affinity`, the rest at
    :func:`cluster_graphs`.

    Returns:
        For each K the labels, int64 [B, H, W], in 0..K-1, numbered in reading order of their first cell. There are
        fewer than K where the graph has fewer distinct nodes.
    """
    batch, _, height, width = features.shape
    together = batch if not features.is_cpu else max(1, CACHED_WEIGHTS // (height * width) ** 2)
    parts = []
    for part in torch.split(features, together):
        weights = cell_affinity(part, affinity, temperature, centre=centre)
        parts.append(cluster_graphs(weights, cluster_counts, starts=starts, cut_steps=cut_steps, seed=seed))
    return {k: torch.cat([part[k] for part in parts]).reshape(batch, height, width) for k in cluster_counts}


def cell_affinity(features: Tensor, kind: Affinity = "exp", temperature: float = 0.1, *, centre: bool = True) -> Tensor:
    """Non-negative weights between all pairs of cells from their cosine; [B, D, H, W] to float32 [B, N, N].

    "clamp" is max(cos, 0). "exp" is exp((cos - 1) / temperature): 1 for equal directions, and the lower the
    temperature, the less far directions count. With ``centre`` the image's mean feature is subtracted before. A cell
    without direction, because it is zero or equals the mean, has cosine 0 with every cell. ValueError for an unknown
    kind or a temperature that is not positive.
    """
    if kind not in ("clamp", "exp"):
        raise ValueError(f"affinity must be 'clamp' or 'exp', got {kind!r}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}; 0.1 is a usual value")
    cells = rearrange(features, "b d h w -> b d (h w)").float()
    mean = cells.mean(dim=2, keepdim=True) * float(centre)
    cells = cells - mean if centre else cells
    products = torch.bmm(cells.mT, cells)
    own = products.diagonal(dim1=1, dim2=2).clone()
    before = own + 2 * torch.bmm(mean.mT, cells)[:, 0] + mean.square().sum(dim=1)
    scale = torch.where(own > FLAT**2 * before, own, torch.inf).rsqrt()
    cosine = products.mul_(scale[:, :, None]).mul_(scale[:, None, :])
    return cosine.clamp_(min=0) if kind == "clamp" else cosine.sub_(1).div_(temperature).exp_()


def cluster_graphs(
    weights: Tensor, cluster_counts: Sequence[int], *, starts: int = 3, cut_steps: int = 2, seed: int = 0
) -> dict[int, Tensor]:
    """Partition weighted graphs (Ng, Jordan, Weiss 2001) into each number of clusters K: labels int64 [B, N] by K.

    Args:
        weights: float [B, N, N], symmetric, not negative; the diagonal is ignored.
        cluster_counts: every K wanted, a ValueError below 1.
        starts: of k-means for each K; the one with the lowest normalised cut is taken.
        cut_steps: at most so many times, move cells between clusters on the graph itself, see :func:`lower_cut`.
        seed: of all random numbers.
    """
    if not cluster_counts or min(cluster_counts) < 1:
        raise ValueError(f"cluster_counts must be numbers of clusters of at least 1, got {list(cluster_counts)}")
    vectors = spectral_embedding(weights, max(cluster_counts), seed=seed)
    partitions = {}
    for k in cluster_counts:
        points = functional.normalize(vectors[:, :, :k], dim=2)
        labels = batched_kmeans(points, k, starts=starts, seed=seed + k)
        best = take_lowest(labels, _cuts_of_starts(weights, labels, k, empty=1.0))
        partitions[k] = number_by_first_member(lower_cut(weights, best, cut_steps))
    return partitions


def spectral_embedding(weights: Tensor, dims: int, *, seed: int = 0) -> Tensor:
    """Leading eigenvectors of D^-1/2 W D^-1/2 without self-loops; [B, N, N] to [B, N, min(dims, N)].

    Columns of eigenvalues that are not positive are zero.
    """
    own = weights.diagonal(dim1=1, dim2=2)
    degree = weights.sum(dim=2) - own
    scale = torch.where(degree > 0, degree, 1.0).rsqrt()
    matrices = weights * scale[:, :, None] * scale[:, None, :]
    matrices.diagonal(dim1=1, dim2=2).zero_()
    values, vectors = leading_eigenvectors(matrices, dims, seed=seed)
    # One more product with the self-loops restored: exact eigenvectors do not change, and identical nodes, which then
    # have identical rows, come out identical although the solver stopped at a finite tolerance.
    own, values = (own * scale.square())[:, :, None], values[:, None, :]
    smoothed = (torch.bmm(matrices, vectors) + own * vectors) / (values + own).clamp(min=NO_GROUP)
    return torch.where(values > NO_GROUP, smoothed, 0.0)


def lower_cut(weights: Tensor, labels: Tensor, steps: int) -> Tensor:
    """Move cells to the cluster that lowers the normalised cut, as weighted kernel k-means does (Dhillon et al. 2004).

    The k-means of the embedding minimises a relaxation of the cut; a few products with the graph itself, at most
    ``steps``, take back what the relaxation lost. A graph keeps a step only if its cut falls and no cluster vanishes,
    and stops otherwise. Weights [B, N, N], whose diagonal is ignored, and labels int64 [B, N] to labels [B, N].
    """
    own, clusters = weights.diagonal(dim1=1, dim2=2), int(labels.max()) + 1
    degree = weights.sum(dim=2) - own
    candidate, moving = labels, torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    lowest, groups = weights.new_full((len(labels),), torch.inf), weights.new_zeros(len(labels))
    for _ in range(steps + 1):
        member = functional.one_hot(candidate, clusters).to(weights)
        links = torch.bmm(member.mT, weights).mT - own[:, :, None] * member
        volume = torch.bmm(degree[:, None, :], member)
        share = (links * member).sum(dim=1, keepdim=True) / volume.clamp(min=TINY)
        present = member.amax(dim=1).sum(dim=1)
        cut = present - share.sum(dim=(1, 2))
        moving = moving & (cut < lowest - CUT_GAIN) & (present >= groups)
        if not bool(moving.any()):
            break
        labels = torch.where(moving[:, None], candidate, labels)
        lowest, groups = torch.where(moving, cut, lowest), torch.where(moving, present, groups)
        distance = (share - 2 * links / degree.clamp(min=TINY)[:, :, None]) / volume.clamp(min=TINY)
        nearest = distance.masked_fill(volume <= 0, torch.inf).argmin(dim=2)
        candidate = torch.where(moving[:, None] & (degree > 0), nearest, labels)
    return labels


def normalised_cut(weights: Tensor, labels: Tensor) -> Tensor:
    """Sum over clusters of cut(cluster, rest) / volume(cluster) (Shi and Malik 2000), [B, N, N] and [B, N] to [B].

    The diagonal is ignored; a cluster without volume counts nothing.
    """
    return _cuts_of_starts(weights, labels[:, :, None], int(labels.max()) + 1, empty=0.0)[:, 0]


def _cuts_of_starts(weights: Tensor, labels: Tensor, clusters: int, *, empty: float) -> Tensor:
    """Normalised cuts of several labellings of each graph, [B, N, N] and [B, N, S] to [B, S].

    A cluster without volume counts ``empty``: 1, the most a cluster can, where leaving clusters out must not pay.
    """
    own = weights.diagonal(dim1=1, dim2=2)
    member = rearrange(functional.one_hot(labels, clusters).to(weights), "b n s k -> b (s k) n").contiguous()
    links = torch.bmm(member, weights) - own[:, None] * member
    inside = rearrange((links * member).sum(dim=2), "b (s k) -> b s k", k=clusters)
    degree = weights.sum(dim=2) - own
    volume = rearrange(torch.bmm(member, degree[:, :, None]), "b (s k) 1 -> b s k", k=clusters)
    return torch.where(volume > 0, 1 - inside / volume.clamp(min=TINY), empty).sum(dim=2)


# ----------------------------------------------------------------------------------------------------------------------
# Leading eigenvectors of many symmetric matrices at once.


def leading_eigenvectors(
    matrices: Tensor, count: int, *, seed: int = 0, tolerance: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues, descending, and their orthonormal eigenvectors.

    Small matrices are decomposed whole by LAPACK, of larger ones block Lanczos with full reorthogonalisation (Golub,
    Underwood 1977) finds the few vectors that are wanted with the fewest products (measured in `benchmarks/LOG.md`).

    From symmetric matrices [B, N, N], with eigenvalues in [-1, 1] as D^-1/2 W D^-1/2 has them, to values [B, C] and
    vectors [B, N, C] with C = min(count, N); vectors of values that are not positive may be zero. ``seed`` is that of
    the starting block, ``tolerance`` the largest norm of A v - lambda v that is accepted.
    """
    nodes = matrices.shape[-1]
    count = min(count, nodes)
    if nodes <= max(WHOLE_UP_TO, LARGEST_BASIS * count + BLOCK):
        return _leading_of_whole(matrices, count)
    values = matrices.new_zeros(len(matrices), count)
    vectors = matrices.new_zeros(len(matrices), nodes, count)
    active = torch.arange(len(matrices), device=matrices.device)
    lanczos = _BlockLanczos(matrices, seed)
    for size in range(FIRST_BASIS * count, LARGEST_BASIS * count + 1, MORE_BASIS * count):
        lanczos.grow(size)
        values[active], vectors[active], residual = lanczos.leading(count)
        unfinished = residual > tolerance
        active = active[unfinished]
        if not len(active):
            break
        lanczos.select(unfinished)
    # A block of b vectors finds b copies of an eigenvalue at most, so b equal ones may be more.
    crowded = ((values[:, : 1 - BLOCK] - values[:, BLOCK - 1 :] < EQUAL) & (values[:, : 1 - BLOCK] > EQUAL)).any(dim=1)
    crowded[active] = True
    if bool(crowded.any()):
        values[crowded], vectors[crowded] = _leading_of_whole(matrices[crowded], count)
    return values, vectors


def _leading_of_whole(matrices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, vectors = symmetric_eigh(matrices)
    return values[:, -count:].flip(1), vectors[:, :, -count:].flip(2)


def symmetric_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` that survives LAPACK's divide-and-conquer failing on repeated eigenvalues.

    Float [B, N, N] to values [B, N], ascending, and vectors [B, N, N]. Where the batched routine fails, every matrix is
    decomposed in double precision by the slower QR iteration, which has no such failure.
    """
    try:
        values, vectors = torch.linalg.eigh(matrices)
        if not matrices.is_cpu or bool(torch.isfinite(vectors).all()):
            return values, vectors
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined] # the stubs forgot to export it
        pass
    pairs = [scipy.linalg.eigh(matrix, driver="ev") for matrix in matrices.detach().cpu().double().numpy()]
    values, vectors = (torch.from_numpy(np.stack(part)).to(matrices) for part in zip(*pairs, strict=True))
    return values, vectors


class _BlockLanczos:
    """Orthonormal bases of the Krylov spaces of a batch of matrices, and their projections, grown block by block."""

    def __init__(self, matrices: Tensor, seed: int) -> None:
        batch, nodes, _ = matrices.shape
        start = torch.randn(nodes, BLOCK, generator=torch.Generator().manual_seed(seed))
        block = torch.linalg.qr(start)[0].T.contiguous().to(matrices)
        self._matrices = matrices
        self._next = block.expand(batch, -1, -1)
        self._link = matrices.new_zeros(batch, BLOCK, BLOCK)  # of the next block to the last one of the basis
        self._basis = matrices.new_zeros(batch, 0, nodes)
        self._projected = matrices.new_zeros(batch, 0, 0)

    def grow(self, size: int) -> None:
        """Extend the bases to at least ``size`` vectors."""
        batch, start, nodes = self._basis.shape
        size = -(-size // BLOCK) * BLOCK
        basis = self._basis.new_zeros(batch, size, nodes)
        projected = self._basis.new_zeros(batch, size, size)
        basis[:, :start], projected[:, :start, :start] = self._basis, self._projected
        for end in range(start + BLOCK, size + 1, BLOCK):
            own, before = slice(end - BLOCK, end), slice(end - 2 * BLOCK, end - BLOCK)
            block = basis[:, own] = self._next
            if end > BLOCK:
                projected[:, own, before], projected[:, before, own] = self._link, self._link.mT
            product = torch.bmm(block, self._matrices)  # symmetric; rows times matrix is the faster side
            projected[:, own, own] = torch.bmm(product, block.mT)
            # In exact arithmetic the last two blocks would do; rounding errors grow from block to block, so all follow.
            for known in (basis[:, max(0, end - 2 * BLOCK) : end], basis[:, :end]):
                product = product - torch.bmm(torch.bmm(product, known.mT), known)
            rows, self._link = torch.linalg.qr(product.mT)
            lengths = self._link.diagonal(dim1=1, dim2=2).abs()
            self._next = (rows * (lengths > VANISHED)[:, None]).mT
        self._basis, self._projected = basis, projected

    def leading(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Best values [B, C], vectors [B, N, C] within the bases, and their largest residual norm [B]."""
        values, rotation = _leading_of_whole((self._projected + self._projected.mT) / 2, count)
        residual = torch.bmm(self._link, rotation[:, -BLOCK:]).norm(dim=1).amax(dim=1)
        return values, torch.bmm(self._basis.mT, rotation), residual

    def select(self, keep: Tensor) -> None:
        """Go on with some of the matrices only."""
        self._matrices, self._basis, self._projected = self._matrices[keep], self._basis[keep], self._projected[keep]
        self._next, self._link = self._next[keep], self._link[keep]


# ----------------------------------------------------------------------------------------------------------------------
# k-means of many small point sets at once, all with the same random numbers.


def batched_kmeans(points: Tensor, num_clusters: int, *, starts: int = 3, max_steps: int = 12, seed: int = 0) -> Tensor:
    """Several k-means++ starts (Arthur and Vassilvitskii 2007), each refined by Lloyd's iteration.

    From points [B, N, D] to labels int64 [B, N, S] of every start. Points that coincide always share a cluster; with
    fewer distinct points than clusters, those left over stay empty. A point set stops before ``max_steps`` when none of
    its labels change.
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
    norms = points.square().sum(dim=2)
    nearest = points.new_full((batch, starts, count), torch.inf)
    weights = points.new_ones(batch, starts, count)
    centroids, used = [], []
    for draw in draws:
        cumulative = weights.cumsum(dim=2)
        chosen = torch.searchsorted(cumulative, cumulative[:, :, -1:] * draw, right=True).clamp(max=count - 1)
        drawn = points[rows, chosen.flatten(1)]
        distances = drawn.square().sum(dim=2)[:, :, None] + norms[:, None] - 2 * torch.bmm(drawn, points.mT)
        left = torch.minimum(nearest[:, :, None], distances.clamp(min=0).reshape(batch, starts, DRAWS, count))
        best = left.sum(dim=3).argmin(dim=2)
        used.append(weights.gather(2, chosen.gather(2, best[:, :, None]))[:, :, 0] > 0)
        centroids.append(_pick(drawn.reshape(batch, starts, DRAWS, dims), best))
        nearest = _pick(left, best)
        weights = torch.where(nearest > SAME_POINT, nearest, 0.0)
    return torch.stack(centroids, dim=2), torch.stack(used, dim=2)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """Of [B, S, T, X] the entry that [B, S] names, [B, S, X]."""
    return values.gather(2, index[:, :, None, None].expand(-1, -1, 1, values.shape[3]))[:, :, 0]


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

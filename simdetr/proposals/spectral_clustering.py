"""Spectral clustering of feature maps: maps of a batch of images in, one label per cell and number of clusters out.

Source: seed 003 [0032], [0053]; Ng, Jordan, Weiss 2001, "On spectral clustering". Letters: B images, D channels, H x W
cells, N = H W nodes, K clusters. One eigen-decomposition per map serves all its K. Everything runs on the features'
device, no loop goes over images or cells, and the labels of an image do not depend on its batch.

A defined result for every graph: a node without neighbours (zero features) embeds at the origin; eigenvectors of
non-positive eigenvalues describe no group and are dropped, which leaves identical nodes identical in the embedding, so
that a flat image is one cluster whatever K is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from simdetr.proposals.batched_kmeans import batched_kmeans, number_by_first_member, take_lowest
from simdetr.proposals.eigenvectors import leading_eigenvectors

Affinity = Literal["clamp", "exp"]
NO_GROUP = 1e-4  # eigenvalues up to here are zero or negative but for rounding
CACHED_WEIGHTS = 4_000_000  # of the graphs that the host works on together, so that they stay in its cache
CUT_GAIN = 1e-6  # less is rounding
TINY = torch.finfo(torch.float32).tiny
FLAT = 1e-4  # a cell this close to its image's mean, relative to its own length, has no direction of its own


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
    """Cluster the cells of every map into each number of clusters.

    Args:
        features: float [B, D, H, W].
        cluster_counts: the K of this level, e.g. (2, 4, 8).
        affinity: how cosine similarity becomes a weight, see :func:`cell_affinity`.
        temperature: of the "exp" affinity.
        centre: subtract an image's mean feature before the cosine.
        starts: of k-means for each K.
        cut_steps: see :func:`cluster_graphs`.
        seed: of all random numbers.

    Returns:
        For each K the labels, int64 [B, H, W], in 0..K-1, numbered in reading order of their first cell. There are
        fewer than K where the graph has fewer distinct nodes.
    """
    height, width = features.shape[-2:]
    together = len(features) if not features.is_cpu else max(1, CACHED_WEIGHTS // (height * width) ** 2)
    parts = []
    for part in torch.split(features, together):
        weights = cell_affinity(part, affinity, temperature, centre=centre)
        parts.append(cluster_graphs(weights, cluster_counts, starts=starts, cut_steps=cut_steps, seed=seed))
    return {
        k: rearrange(torch.cat([part[k] for part in parts]), "b (h w) -> b h w", h=height, w=width)
        for k in cluster_counts
    }


def cell_affinity(features: Tensor, kind: Affinity = "exp", temperature: float = 0.1, *, centre: bool = True) -> Tensor:
    """Non-negative weights between all pairs of cells from their cosine; [B, D, H, W] to float32 [B, N, N].

    "clamp" is max(cos, 0). "exp" is exp((cos - 1) / temperature): 1 for equal directions, and the lower the
    temperature, the less far directions count. With ``centre`` the image's mean feature is subtracted before. A cell
    without direction, because it is zero or equals the mean, has cosine 0 with every cell.

    Raises:
        ValueError: for an unknown kind or a temperature that is not positive.
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
    """Partition weighted graphs (Ng, Jordan, Weiss 2001) into each number of clusters.

    Args:
        weights: float [B, N, N], symmetric, not negative; the diagonal is ignored.
        cluster_counts: every K wanted.
        starts: of k-means for each K; the one with the lowest normalised cut is taken.
        cut_steps: at most so many times, move cells between clusters on the graph itself, see :func:`lower_cut`.
        seed: of all random numbers.

    Returns:
        For each K the labels, int64 [B, N].

    Raises:
        ValueError: if a K is less than 1.
    """
    if not cluster_counts or min(cluster_counts) < 1:
        raise ValueError(f"cluster_counts must be numbers of clusters of at least 1, got {list(cluster_counts)}")
    vectors = spectral_embedding(weights, max(cluster_counts), seed=seed)
    partitions = {}
    for k in cluster_counts:
        points = torch.nn.functional.normalize(vectors[:, :, :k], dim=2)
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
    own = own * scale.square()
    values = values[:, None, :]
    smoothed = (torch.bmm(matrices, vectors) + own[:, :, None] * vectors) / (values + own[:, :, None]).clamp(
        min=NO_GROUP
    )
    return torch.where(values > NO_GROUP, smoothed, 0.0)


def lower_cut(weights: Tensor, labels: Tensor, steps: int) -> Tensor:
    """Move cells to the cluster that lowers the normalised cut, as weighted kernel k-means does (Dhillon et al. 2004).

    The k-means of the embedding minimises a relaxation of the cut; a few products with the graph itself take back what
    the relaxation lost. A graph keeps a step only if its cut falls and no cluster vanishes, and stops otherwise.

    Args:
        weights: float [B, N, N]; the diagonal is ignored.
        labels: int64 [B, N].
        steps: at most so many.

    Returns:
        Labels int64 [B, N].
    """
    own, clusters = weights.diagonal(dim1=1, dim2=2), int(labels.max()) + 1
    degree = weights.sum(dim=2) - own
    candidate, moving = labels, torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    lowest, groups = weights.new_full((len(labels),), torch.inf), weights.new_zeros(len(labels))
    for _ in range(steps + 1):
        member = torch.nn.functional.one_hot(candidate, clusters).to(weights)
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
    member = rearrange(torch.nn.functional.one_hot(labels, clusters).to(weights), "b n s k -> b (s k) n").contiguous()
    links = torch.bmm(member, weights) - own[:, None] * member
    inside = rearrange((links * member).sum(dim=2), "b (s k) -> b s k", k=clusters)
    degree = weights.sum(dim=2) - own
    volume = rearrange(torch.bmm(member, degree[:, :, None]), "b (s k) 1 -> b s k", k=clusters)
    return torch.where(volume > 0, 1 - inside / volume.clamp(min=TINY), empty).sum(dim=2)

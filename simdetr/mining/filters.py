"""Box filters: candidates and one limit in, fewer candidates out.

Source: US 2025/0265826 [0034], [0057]-[0063]. All five have one signature, ``(candidates, limit) -> candidates``,
so a recipe lists names with limits, in order. All work on a whole batch of images at once. "Smaller" is always the
region with fewer cells; of two equal ones the later in the list. Where the document removes the smaller of a pair,
every smaller partner goes, also when the larger one itself falls to a third: the outcome then depends on no order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from simdetr.boxes import batched_iou
from simdetr.mining.regions import Candidates, find_candidates

BoxFilter = Callable[[Candidates, float], Candidates]
SUBSET_SHARE = 0.95  # of a region's cells inside another make it a subset: grids of different levels never fit exactly


def merge_similar_clusters(candidates: Candidates, limit: float) -> Candidates:
    """(a) Within a clustering, join clusters whose centroids have a cosine above the limit; regions are found anew.

    A centroid is the mean of the level's features over the cluster. Joining is transitive. ValueError if an earlier
    filter has removed regions, which this one would bring back.
    """
    if int(candidates.components.amax(dim=(1, 2, 3)).sum()) + len(candidates) != int(candidates.valid.sum()):
        raise ValueError(
            "merge_similar_clusters must be the first filter: it finds the regions anew; move it to the top"
        )
    labels = candidates.labels.clone()
    height, width = labels.shape[-2:]
    for index, (stride, k) in enumerate(zip(candidates.strides, candidates.ks, strict=True)):
        level = candidates.maps[stride].float()
        step = height // level.shape[2]
        member = functional.one_hot(labels[:, index, ::step, ::step].flatten(1), k).to(level)
        sums = torch.bmm(level.flatten(2), member)
        counts = member.sum(dim=1, keepdim=True)
        centroids = sums / counts.clamp(min=1)
        if candidates.centre:
            centroids = (centroids - sums.sum(dim=2, keepdim=True) / counts.sum(dim=2, keepdim=True)) * (counts > 0)
        centroids = functional.normalize(centroids, dim=1)
        target = _closure(torch.bmm(centroids.mT, centroids) > limit).int().argmax(dim=2)
        labels[:, index] = target.gather(1, labels[:, index].flatten(1)).reshape(-1, height, width)
    levels = (candidates.strides, candidates.ks, candidates.maps)
    return find_candidates(labels, *levels, connectivity=candidates.connectivity, centre=candidates.centre)


def drop_fragmented_clusters(candidates: Candidates, limit: float) -> Candidates:
    """(b) Drop all regions of a cluster that falls into more than ``limit`` of them."""
    clusters = max(candidates.ks)
    key = candidates.clustering * clusters + candidates.cluster
    counts = torch.zeros(len(candidates), len(candidates.ks) * clusters, dtype=torch.int64, device=key.device)
    counts.scatter_add_(1, key, candidates.valid.long())
    return candidates.where(counts.gather(1, key) <= limit)


def drop_duplicate_boxes(candidates: Candidates, limit: float) -> Candidates:
    """(c) Of two regions whose boxes have an IoU above the limit, drop the smaller region."""
    return candidates.where(~(_is_smaller(candidates) & (batched_iou(candidates.boxes.float()) > limit)).any(dim=2))


def drop_similar_subsets(candidates: Candidates, limit: float) -> Candidates:
    """(d) Drop a region that lies within a larger one and whose feature has a cosine above the limit with it."""
    inside = mask_intersections(candidates) >= SUBSET_SHARE * candidates.cells[:, :, None]
    alike = torch.bmm(candidates.directions, candidates.directions.mT) > limit
    return candidates.where(~(_is_smaller(candidates) & inside & alike).any(dim=2))


def keep_most_diverse(candidates: Candidates, limit: float) -> Candidates:
    """(e) While more than ``limit`` regions remain, take the pair with the highest overlap and drop its smaller region.

    Overlap is the mean of box IoU and mask IoU. Of pairs with equal overlap, the one with the smallest smaller region
    goes first; in particular, when nothing overlaps any more, the smallest region goes.

    The overlaps never change, so the rule has a closed form. A region falls at its highest overlap with a larger
    region that is still there at that point, which is one that itself falls at no higher overlap. Going from the
    largest region to the smallest gives every region's point in R vectorised steps; those with the highest points fall.
    """
    ids = candidates.ids
    order = torch.where(candidates.valid, -candidates.cells, 1).argsort(dim=1, stable=True)
    shared, cells = mask_intersections(candidates), candidates.cells.float()
    of_masks = shared / (cells[:, :, None] + cells[:, None, :] - shared).clamp(min=1)
    overlaps = (batched_iou(candidates.boxes.float()) + of_masks) / 2
    overlaps = overlaps.gather(1, order[:, :, None].expand_as(overlaps))
    overlaps = overlaps.gather(2, order[:, None, :].expand_as(overlaps))
    falls_at = overlaps.new_full(ids.shape, -torch.inf)
    for row in range(1, ids.shape[1]):
        larger = overlaps[:, row, :row]
        falls_at[:, row] = torch.where(falls_at[:, :row] <= larger, larger, -torch.inf).amax(dim=1)
    padding = ~candidates.valid.gather(1, order)
    # Sorted by size, largest first, a stable sort leaves the smaller of equals last, so that it falls first.
    place = falls_at.masked_fill(padding, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    return candidates.where(torch.zeros_like(padding).scatter(1, order, place < limit))


_RULES = (
    merge_similar_clusters,
    drop_fragmented_clusters,
    drop_duplicate_boxes,
    drop_similar_subsets,
    keep_most_diverse,
)
FILTERS: dict[str, BoxFilter] = {rule.__name__: rule for rule in _RULES}


def apply_filters(candidates: Candidates, limits: Mapping[str, float]) -> Candidates:
    """Run the named filters in the order of ``limits``; ValueError for a name that is not in ``FILTERS``."""
    for name in limits:
        if name not in FILTERS:
            raise ValueError(f"filters: expected names out of {sorted(FILTERS)}, got {name!r}")
    for name, limit in limits.items():
        candidates = FILTERS[name](candidates, limit)
    return candidates


def mask_intersections(candidates: Candidates) -> Tensor:
    """Cells that all pairs of regions share, [B, R, R]."""
    masks = candidates.masks.float()
    return torch.bmm(masks, masks.mT)


def _is_smaller(candidates: Candidates) -> Tensor:
    """Whether row i is smaller than column j, by cells and then by place in the list; bool [B, R, R]."""
    own, other = candidates.cells[:, :, None], candidates.cells[:, None, :]
    later = torch.ones(own.shape[1], own.shape[1], dtype=torch.bool, device=own.device).tril(-1)
    return ((own < other) | (own == other) & later) & candidates.valid[:, :, None] & candidates.valid[:, None, :]


def _closure(joined: Tensor) -> Tensor:
    """Transitive closure of symmetric relations, bool [B, K, K]; every element is related to itself."""
    size = joined.shape[1]
    reach = (joined | torch.eye(size, dtype=torch.bool, device=joined.device)).float()
    for _ in range(max(1, (size - 1).bit_length())):
        reach = (torch.bmm(reach, reach) > 0).float()
    return reach > 0

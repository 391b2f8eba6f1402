"""Mined proposals -> training labels T0: every region's box, and the cluster of its feature as its class.

Seed 003 [0054]-[0055], Algorithm 1 lines 8-9. Shards are streamed; of several ranks each clusters its own share of them
and all end with the same labels. Letters: N images, M regions, D feature dimensions, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from simdetr.data.labels import Category, Labels
from simdetr.proposals.kmeans import Backend, KMeans, fit_kmeans
from simdetr.proposals.shards import ProposalShard
from simdetr.proposals.store import ProposalStore

_KEEP_IN_MEMORY_BYTES = 1 << 30  # features up to here are read once, larger sets are streamed from disk in every pass


def make_pseudo_labels(
    store: ProposalStore,
    num_classes: int = 2048,
    *,
    seed: int = 0,
    max_iterations: int = 50,
    backend: Backend = "torch",
    device: str | torch.device = "cpu",
) -> Labels:
    """Cluster all regions of a store into pseudo-classes.

    Args:
        store: mined proposals.
        num_classes: C; 1 makes class-unaware labels and needs no clustering.
        seed: of k-means.
        max_iterations: of k-means, each one pass over the features.
        backend: of k-means, see :func:`simdetr.proposals.kmeans.fit_kmeans`.
        device: where to cluster.

    Returns:
        Labels of stage 0 with C categories; images without regions are among its images.

    Raises:
        ValueError: when there are no regions, or fewer than classes.
    """
    if num_classes == 1:
        count_regions(store)
        return _to_labels(store, None, device)
    clustering = cluster_regions(
        store, num_classes, seed=seed, max_iterations=max_iterations, backend=backend, device=device
    )
    return _to_labels(store, clustering, device)


def cluster_regions(
    store: ProposalStore,
    num_classes: int,
    *,
    seed: int = 0,
    max_iterations: int = 50,
    backend: Backend = "torch",
    device: str | torch.device = "cpu",
) -> KMeans:
    """Spherical k-means over all region features; arguments and errors as in :func:`make_pseudo_labels`."""
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}; 1 makes class-unaware labels")
    regions = count_regions(store)
    if regions < num_classes:
        raise ValueError(
            f"num_classes: got {num_classes} classes for {regions} mined regions, expected at least as many regions "
            f"as classes; mine more images, lower num_classes to {regions} or less, or set it to 1 (class-unaware)"
        )
    stored_bytes = regions * store.manifest.region_dim * 4
    blocks = RegionBlocks(store, device)
    return fit_kmeans(
        list(blocks) if stored_bytes <= _KEEP_IN_MEMORY_BYTES else blocks,
        num_classes,
        seed=seed,
        spherical=True,
        max_iterations=max_iterations,
        backend=backend,
    )


def count_regions(store: ProposalStore) -> int:
    """Regions of all images, M.

    Raises:
        ValueError: when there are none.
    """
    regions = sum(int(shard.offsets[-1]) for shard in store.iter_shards(["stride"]))
    if regions == 0:
        raise ValueError(
            f"store: expected proposals in {store.folder}, got none in {len(store)} images; loosen the filters, take "
            "larger images or another encoder, and mine again"
        )
    return regions


class RegionBlocks:
    """This rank's region features, one block [n, D] per shard; every iteration starts anew.

    Args:
        store: mined proposals.
        device: where the blocks go.
    """

    def __init__(self, store: ProposalStore, device: str | torch.device = "cpu") -> None:
        self.store = store
        self.device = torch.device(device)

    def __iter__(self) -> Iterator[Tensor]:
        distributed = dist.is_available() and dist.is_initialized()
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        for shard in islice(self.store.iter_shards(["features"]), rank, None, ranks):
            yield self.block(shard)

    def block(self, shard: ProposalShard) -> Tensor:
        """The features of one shard, float32 [n, D]."""
        return torch.from_numpy(shard.features.astype(np.float32)).to(self.device)


def _to_labels(store: ProposalStore, clustering: KMeans | None, device: str | torch.device) -> Labels:
    """Boxes and areas as mined, classes by nearest centroid; without a clustering all are one class."""
    columns = ["boxes_xyxy", "area", *([] if clustering is None else ["features"])]
    blocks = RegionBlocks(store, device)
    ids: list[str] = []
    sizes, counts, boxes, areas, classes = [], [], [], [], []
    for shard in store.iter_shards(columns):
        ids += shard.image_ids
        sizes.append(shard.sizes_hw)
        counts.append(np.diff(shard.offsets))
        boxes.append(shard.boxes_xyxy)
        areas.append(shard.area)
        if clustering is None:
            classes.append(np.zeros(len(shard.area), dtype=np.int64))
        else:
            classes.append(clustering.assign(blocks.block(shard)).cpu().numpy())
    if clustering is None:
        categories: tuple[Category, ...] = (Category(1, "object"),)
    else:
        categories = tuple(Category(i + 1, f"cluster {i:04d}") for i in range(len(clustering.centroids)))
    boxes_xyxy = np.concatenate(boxes)
    return Labels(
        image_ids=tuple(ids),
        sizes_hw=np.concatenate(sizes),
        offsets=np.concatenate(([0], np.cumsum(np.concatenate(counts)))).astype(np.int64),
        boxes_xyxy=boxes_xyxy,
        classes=np.concatenate(classes),
        scores=np.ones(len(boxes_xyxy), dtype=np.float32),
        categories=categories,
        areas=np.concatenate(areas),
        crowd=np.zeros(len(boxes_xyxy), dtype=bool),
        stage=0,
    )

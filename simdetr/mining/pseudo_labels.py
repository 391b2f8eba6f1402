"""Mined proposals -> training labels T0: every region's box, and the cluster of its feature as its class.

US 2025/0265826 [0054]-[0055], Algorithm 1 lines 8-9. Of several ranks each clusters the regions of its own shards, and
all end with the same labels. Beside the labels lie ``clustering.safetensors`` (the centroids, after every iteration)
and ``clustering.json`` (inertia of every iteration, sizes of the clusters, their balance).

Letters: N images, M regions, D feature dimensions, C classes, n regions of a shard. Labels take 44 bytes per region in
memory.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simdetr.data.annotations import Category, Lineage
from simdetr.data.labels import Labels
from simdetr.data.storage import write_json
from simdetr.mining.certainty import certainty
from simdetr.mining.clustering_config import ClusteringConfig
from simdetr.mining.kmeans import (
    Iteration,
    Journal,
    KMeans,
    clustering_record,
    fit_kmeans,
    gather,
    on_single_cores,
    rank,
    world_size,
)
from simdetr.mining.store import ProposalStore

_log = logging.getLogger(__name__)
_KEEP_IN_MEMORY_BYTES = 1 << 30  # fp16 features of all ranks up to here are read once, more in every pass
CENTROIDS, RECORD = "clustering.safetensors", "clustering.json"
_NUMBERS = {"area": np.float32, "score": np.float32, "stride": np.int16, "k": np.int16, "cluster": np.int16}


def make_pseudo_labels(
    store: ProposalStore, config: ClusteringConfig, *, device: str | torch.device = "cpu", folder: Path | None = None
) -> Labels:
    """Cluster all regions of a store into pseudo-classes.

    Args:
        store: mined proposals.
        config: of the clustering; a single class needs none.
        device: where to cluster.
        folder: keeps the clustering, so that the same call goes on after the last iteration of a killed one.

    Returns:
        Labels of stage 0 with a category for every class; images without regions are among its images.

    Raises:
        ValueError: when there are no regions, or fewer than classes.
        StoreError: at a damaged shard.
    """
    if config.num_classes == 1:
        if folder is not None and rank() == 0:
            for name in (CENTROIDS, RECORD):  # of a clustering whose labels are replaced
                (folder / name).unlink(missing_ok=True)
        return to_labels(store, count_regions(store), None)
    clustering = cluster_regions(store, config, device=device, folder=folder)
    if folder is not None and rank() == 0:
        write_json(folder / RECORD, clustering_record(clustering, asdict(config)))
    return to_labels(store, int(clustering.counts.sum()), clustering)


def cluster_regions(
    store: ProposalStore, config: ClusteringConfig, *, device: str | torch.device = "cpu", folder: Path | None = None
) -> KMeans:
    """K-means over all region features; arguments and errors as in :func:`make_pseudo_labels`."""
    options = asdict(config)
    num_classes = options.pop("num_classes")
    regions = check_regions(store, num_classes)

    def tell(step: Iteration) -> None:
        left = (config.max_iterations - step.number) * step.seconds
        _log.info(
            f"iteration {step.number} of at most {config.max_iterations}: inertia {step.inertia / regions:.5f} per "
            f"region, {step.empty} empty, {step.seconds:.1f} s, at most {left:.0f} s left"
        )

    in_memory = 2 * regions * store.manifest.region_dim <= _KEEP_IN_MEMORY_BYTES
    blocks = RegionBlocks(store, device, in_memory=in_memory)
    journal = Journal(folder and folder / CENTROIDS, store.fingerprint(), tell)
    return fit_kmeans(blocks, num_classes, **options, journal=journal)


def check_regions(store: ProposalStore, num_classes: int) -> int:
    """Regions of all images, M; ValueError when they are fewer than the pseudo-classes."""
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}; 1 makes class-unaware labels")
    regions = count_regions(store)
    if regions < num_classes:
        raise ValueError(
            f"num_classes: got {num_classes} classes for {regions} mined regions, expected at least as many regions "
            f"as classes; mine more images, lower num_classes to {regions} or less, or set it to 1 (class-unaware)"
        )
    return regions


def to_labels(store: ProposalStore, regions: int, clustering: KMeans | None) -> Labels:
    """Boxes, areas and lineage of M regions as mined, scores by :func:`certainty`, classes from the clustering if any.

    Boxes are a tenth of what a shard holds: every rank reads those of all shards. Features are not read again.
    """
    ids: list[str] = []
    sizes, counts = [], [np.zeros(1, np.int64)]
    boxes, classes = np.empty((regions, 4), np.float32), np.zeros(regions, np.int64)
    numbers = {name: np.empty(regions, dtype) for name, dtype in _NUMBERS.items()}
    clusters_of = gather(clustering.labels.numpy()) if clustering is not None else []
    read_of = [0] * len(clusters_of)
    begin = 0
    for place, shard in enumerate(store.iter_shards(["boxes_xyxy", *_NUMBERS])):
        rows = slice(begin, begin + len(shard.area))
        begin = rows.stop
        ids += shard.image_ids
        sizes.append(shard.sizes_hw)
        counts.append(np.diff(shard.offsets))
        boxes[rows] = shard.boxes_xyxy
        for name in _NUMBERS:
            numbers[name][rows] = getattr(shard, name)
        if clusters_of:
            owner = place % len(clusters_of)  # as own_shards deals them out
            at = read_of[owner]
            read_of[owner] += rows.stop - rows.start
            classes[rows] = clusters_of[owner][at : read_of[owner]]
    offsets = np.cumsum(np.concatenate(counts), dtype=np.int64)
    sizes_hw = np.concatenate(sizes)
    found_in = {name: numbers[name] for name in ("stride", "k", "cluster")}
    return Labels(
        image_ids=tuple(ids),
        sizes_hw=sizes_hw,
        offsets=offsets,
        boxes_xyxy=boxes,
        classes=classes,
        scores=certainty(numbers["score"], boxes, sizes_hw, offsets),
        categories=_categories(clustering),
        areas=numbers["area"],
        crowd=np.zeros(regions, bool),
        stage=0,
        lineage=replace(Lineage.first_seen(0, offsets), **found_in),
    )


def _categories(clustering: KMeans | None) -> tuple[Category, ...]:
    """One per cluster; the name says which clustering too, for those of another one are other classes."""
    if clustering is None:
        return (Category(1, "object"),)
    which = hashlib.sha256(clustering.centroids.cpu().contiguous().numpy().tobytes()).hexdigest()[:4]
    return tuple(Category(i + 1, f"cluster {i:04d} of {which}") for i in range(len(clustering.centroids)))


# ----------------------------------------------------------------------------------------------------------------------
# A store's shards, as this rank reads them.


def own_shards(store: ProposalStore) -> list[int]:
    """Numbers of the written shards that are this rank's: every world_size-th."""
    return store.written()[rank() :: world_size()]


def count_regions(store: ProposalStore) -> int:
    """Regions of all images, M; ValueError when there are none."""
    own = (store.read_columns(shard, ["area"])["area"] for shard in own_shards(store))
    regions = sum(gather(sum(len(chunk.flatten()) for column in own for chunk in column.chunks)))
    if regions == 0:
        raise ValueError(
            f"store: expected proposals in {store.folder}, got none in {len(store)} images; loosen the filters, take "
            "larger images or another encoder, and mine again"
        )
    return regions


class RegionBlocks:
    """This rank's region features, one block fp16 [n, D] per shard on a device; every iteration starts anew.

    Features are read once and kept if ``in_memory``; else in every pass, by a thread while the last shard is worked on.
    """

    def __init__(self, store: ProposalStore, device: str | torch.device = "cpu", *, in_memory: bool = False) -> None:
        self.store = store
        self.device = torch.device(device)
        self._kept = list(self._read_all()) if in_memory else None

    def __iter__(self) -> Iterator[Tensor]:
        return self._read_all() if self._kept is None else iter(self._kept)

    def _read_all(self) -> Iterator[Tensor]:
        shards = own_shards(self.store)
        if not shards:  # more ranks than shards; the device is told all the same
            yield torch.zeros(0, self.store.manifest.region_dim, dtype=torch.float16, device=self.device)
        for block in on_single_cores(self._read, shards, threads=1):
            yield block.to(self.device)

    def _read(self, shard: int) -> Tensor:
        features = self.store.read_columns(shard, ["features"])["features"].combine_chunks().flatten()
        values = np.array(features.flatten().to_numpy(zero_copy_only=False))  # a copy that may be written to
        return torch.from_numpy(values.reshape(len(features), self.store.manifest.region_dim))

"""Mined proposals -> training labels T0: every region's box, and the cluster of its feature as its class.

Seed 003 [0054]-[0055], Algorithm 1 lines 8-9. Of several ranks each clusters the regions of its own shards, and all end
with the same labels. Beside the labels lie ``clustering.safetensors`` (the centroids, after every iteration) and
``clustering.json`` (inertia of every iteration, sizes of the clusters, their balance).

Letters: N images, M regions, D feature dimensions, C classes. Labels take 44 bytes per region in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from simdetr.data.atomic_files import atomic_path
from simdetr.data.labels import Category, Labels
from simdetr.data.lineage import Lineage
from simdetr.proposals.certainty import certainty
from simdetr.proposals.kmeans import Backend, KMeans, fit_kmeans
from simdetr.proposals.kmeans_balance import clustering_record
from simdetr.proposals.kmeans_journal import Iteration, Journal
from simdetr.proposals.kmeans_ranks import gather, rank
from simdetr.proposals.region_blocks import RegionBlocks, count_regions, read_columns
from simdetr.proposals.store import ProposalStore

__all__ = ["RegionBlocks", "cluster_regions", "count_regions", "make_pseudo_labels"]

_log = logging.getLogger(__name__)
_KEEP_IN_MEMORY_BYTES = 1 << 30  # fp16 features of all ranks up to here are read once, more in every pass
CENTROIDS, RECORD = "clustering.safetensors", "clustering.json"
_NUMBERS = {"area": np.float32, "score": np.float32, "stride": np.int16, "k": np.int16, "cluster": np.int16}
_BOX_COLUMNS = ["image_id", "height", "width", "boxes_xyxy", *_NUMBERS]


def make_pseudo_labels(
    store: ProposalStore,
    num_classes: int = 2048,
    *,
    seed: int = 0,
    spherical: bool = True,
    max_iterations: int = 50,
    backend: Backend = "torch",
    device: str | torch.device = "cpu",
    folder: Path | None = None,
) -> Labels:
    """Cluster all regions of a store into pseudo-classes.

    Args:
        store: mined proposals.
        num_classes: C; 1 makes class-unaware labels and needs no clustering.
        seed: of k-means.
        spherical: compare features by direction, not by distance.
        max_iterations: of k-means, each one pass over the features.
        backend: of k-means, see :func:`simdetr.proposals.kmeans.fit_kmeans`.
        device: where to cluster.
        folder: keeps the clustering, so that the same call goes on after the last iteration of a killed one.

    Returns:
        Labels of stage 0 with C categories; images without regions are among its images.

    Raises:
        ValueError: when there are no regions, or fewer than classes.
        StoreError: at a damaged shard.
    """
    if num_classes == 1:
        if folder is not None and rank() == 0:
            for name in (CENTROIDS, RECORD):  # of a clustering whose labels are replaced
                (folder / name).unlink(missing_ok=True)
        return to_labels(store, count_regions(store), None)
    clustering = cluster_regions(
        store,
        num_classes,
        seed=seed,
        spherical=spherical,
        max_iterations=max_iterations,
        backend=backend,
        device=device,
        folder=folder,
    )
    if folder is not None and rank() == 0:
        settings = {"num_classes": num_classes, "seed": seed, "spherical": spherical, "backend": backend}
        with atomic_path(folder / RECORD) as temporary:
            record = clustering_record(clustering, settings | {"max_iterations": max_iterations})
            temporary.write_text(json.dumps(record), encoding="utf-8")
    return to_labels(store, int(clustering.counts.sum()), clustering)


def cluster_regions(
    store: ProposalStore,
    num_classes: int,
    *,
    seed: int = 0,
    spherical: bool = True,
    max_iterations: int = 50,
    backend: Backend = "torch",
    device: str | torch.device = "cpu",
    folder: Path | None = None,
) -> KMeans:
    """K-means over all region features; arguments and errors as in :func:`make_pseudo_labels`."""
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}; 1 makes class-unaware labels")
    regions = count_regions(store)
    if regions < num_classes:
        raise ValueError(
            f"num_classes: got {num_classes} classes for {regions} mined regions, expected at least as many regions "
            f"as classes; mine more images, lower num_classes to {regions} or less, or set it to 1 (class-unaware)"
        )
    in_memory = 2 * regions * store.manifest.region_dim <= _KEEP_IN_MEMORY_BYTES

    def tell(iteration: Iteration) -> None:
        left = (max_iterations - iteration.number) * iteration.seconds
        _log.info(
            "iteration %d of at most %d: inertia %.5f per region, %d empty, %.1f s, at most %.0f s left",
            iteration.number,
            max_iterations,
            iteration.inertia / regions,
            iteration.empty,
            iteration.seconds,
            left,
        )

    return fit_kmeans(
        RegionBlocks(store, device, in_memory=in_memory),
        num_classes,
        seed=seed,
        spherical=spherical,
        max_iterations=max_iterations,
        backend=backend,
        journal=Journal(folder and folder / CENTROIDS, _fingerprint(store), tell),
    )


def _fingerprint(store: ProposalStore) -> str:
    """What a store holds, in few letters: how it was mined and the sizes of its shards."""
    shards = [(shard, store.shard_path(shard).stat().st_size) for shard in store.written()]
    return hashlib.sha256(json.dumps([vars(store.manifest), shards]).encode()).hexdigest()[:16]


def to_labels(store: ProposalStore, regions: int, clustering: KMeans | None) -> Labels:
    """Boxes, areas and lineage as mined, classes from the clustering; without one all regions are one class.

    Scores become how likely each box is an object, see :mod:`simdetr.proposals.certainty`.
    Boxes are a tenth of what a shard holds: every rank reads those of all shards. Features are not read again.

    Args:
        store: mined proposals.
        regions: M.
        clustering: of these regions, by all ranks.
    """
    ids: list[str] = []
    sizes, counts = [], [np.zeros(1, np.int64)]
    boxes, classes = np.empty((regions, 4), np.float32), np.zeros(regions, np.int64)
    numbers = {name: np.empty(regions, dtype) for name, dtype in _NUMBERS.items()}
    clusters_of = gather(clustering.labels.numpy()) if clustering is not None else []
    read_of = [0] * len(clusters_of)
    begin = 0
    for place, shard in enumerate(store.written()):
        table = read_columns(store, shard, _BOX_COLUMNS)
        own = {name: table[name].combine_chunks() for name in _NUMBERS}
        rows = slice(begin, begin + len(own["area"].flatten()))
        begin = rows.stop
        ids += table["image_id"].to_pylist()
        sizes.append(np.stack([table["height"].to_numpy(), table["width"].to_numpy()], axis=1))
        counts.append(own["area"].value_lengths().to_numpy())
        for name, column in own.items():
            numbers[name][rows] = column.flatten().to_numpy()
        boxes[rows] = table["boxes_xyxy"].combine_chunks().flatten().flatten().to_numpy().reshape(-1, 4)
        if clusters_of:
            owner = place % len(clusters_of)  # as own_shards deals them out
            at = read_of[owner]
            read_of[owner] += rows.stop - rows.start
            classes[rows] = clusters_of[owner][at : read_of[owner]]
    offsets = np.cumsum(np.concatenate(counts), dtype=np.int64)
    sizes_hw = np.concatenate(sizes).astype(np.int64)
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

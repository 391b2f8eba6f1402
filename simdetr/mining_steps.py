"""The first steps of ``pipeline.py`` alone: images in; a proposal store, a preview of one, or the labels T0 out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from simdetr.data.labels import Labels, write_labels
from simdetr.data.locations import locate
from simdetr.inference import default_device
from simdetr.mining_ranks import MiningJob
from simdetr.proposals.kmeans import Backend
from simdetr.proposals.kmeans_ranks import process_group, rank
from simdetr.proposals.pseudo_labels import make_pseudo_labels
from simdetr.proposals.store import ProposalStore
from simdetr.training.run_folder import RunFolder


def mine_proposals(
    images: str | Path,
    out: str | Path,
    config: Sequence[str | Path] = (),
    *,
    device: str | None = None,
    options: Sequence[str] = (),
    num_ranks: int = 1,
) -> ProposalStore:
    """Only the mining of ``pretrain``; arguments as there, and ``out`` may be a URL such as ``s3://bucket/run``.

    Returns:
        The proposal store in ``out``/proposals.
    """
    store = locate(out) / "proposals"
    job = MiningJob(str(images), str(store), tuple(str(path) for path in config), tuple(options), device)
    progress = sys.stderr.isatty()
    return job.run(progress=progress) if num_ranks == 1 else job.run_in_ranks(num_ranks, progress=progress)


def cluster_proposals(
    run: str | Path,
    *,
    num_classes: int = 2048,
    seed: int = 0,
    spherical: bool = True,
    max_iterations: int = 50,
    backend: Backend = "torch",
    device: str | None = None,
) -> Labels:
    """Only the global clustering of ``pretrain``: labels T0 from mined proposals, kept in the run folder.

    Under torchrun its processes share the shards, and the first one writes.

    Args:
        run: Run folder with mined proposals; an unfinished clustering in it is gone on with.
        num_classes: Pseudo-classes; 1 = class-unaware.
        seed: Seed of the starting centroids.
        spherical: Compare features by direction, not by distance.
        max_iterations: Passes over all features at most.
        backend: What finds the nearest centroid.
        device: Torch device; the GPU if there is one.
    """
    folder, device = RunFolder(Path(run)), device or default_device()
    with process_group(device):
        labels = make_pseudo_labels(
            ProposalStore(folder.proposals),
            num_classes=num_classes,
            seed=seed,
            spherical=spherical,
            max_iterations=max_iterations,
            backend=backend,
            device=device,
            folder=folder.stage(0),
        )
        if rank() == 0:
            write_labels(labels, folder.labels(0))
    return labels

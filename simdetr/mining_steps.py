"""The first steps of ``pipeline.py`` alone: images in; a proposal store, a preview of one, or the labels T0 out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from simdetr.data.images import open_images
from simdetr.data.labels import Labels, write_labels
from simdetr.data.locations import locate
from simdetr.evaluation import mining_preview
from simdetr.evaluation.preview_page import write_preview
from simdetr.evaluation.preview_record import Machine, preview_record
from simdetr.inference import default_device
from simdetr.machine import cores
from simdetr.mining_ranks import MiningJob
from simdetr.proposals.kmeans import Backend
from simdetr.proposals.kmeans_ranks import process_group, rank
from simdetr.proposals.pseudo_labels import make_pseudo_labels
from simdetr.proposals.shard_claims import Rank
from simdetr.proposals.store import ProposalStore
from simdetr.recipe_choice import for_mining
from simdetr.training.datamodule import read_training_labels
from simdetr.training.run_folder import RunFolder, RunMismatchError


def mine_proposals(
    images: str | Path,
    out: str | Path,
    config: Sequence[str | Path] = (),
    *,
    device: str | None = None,
    options: Sequence[str] = (),
    num_ranks: int = 1,
) -> ProposalStore:
    """Only the mining of ``pretrain``; arguments as there, without a config too, and ``out`` may be a URL such as ``s3://bucket/run``.

    Returns:
        The proposal store in ``out``/proposals.
    """
    store, chosen = locate(out) / "proposals", for_mining(config, images)
    job = MiningJob(str(images), str(store), chosen.configs, (*chosen.options, *options), device)
    progress = sys.stderr.isatty()
    return job.run(progress=progress) if num_ranks == 1 else job.run_in_ranks(num_ranks, progress=progress)


def preview_mining(
    images: str | Path,
    out: str | Path,
    config: Sequence[str | Path] = (),
    *,
    count: int = 50,
    truth: str | Path | None = None,
    device: str | None = None,
    options: Sequence[str] = (),
    num_ranks: int = 1,
) -> dict[str, Any]:
    """What ``mine_proposals`` would give and cost, from a few images mined in memory; ``out``/proposals is not touched.

    Args:
        images: As for ``pretrain``.
        out: Run folder or URL; ``out``/preview/ gets ``index.html`` and ``preview.json``.
        config: YAML files, later ones over earlier ones.
        count: Images to mine, evenly spaced.
        truth: COCO JSON with boxes for some of these images, for recall; those images are taken first.
        device: Torch device; the GPU if there is one.
        options: ``--section.name=value`` strings, over the files.
        num_ranks: Processes of the full run, for the estimate of its time.

    Returns:
        The content of ``preview.json``.
    """
    if num_ranks < 1 or Rank.from_environment().count > 1:
        raise ValueError("num_ranks: expected at least 1, and a preview in one process; leave torchrun or srun out")
    known = None if truth is None else read_training_labels(Path(truth))
    chosen = for_mining(config, images)
    job = MiningJob(str(images), "", chosen.configs, (*chosen.options, *options), device)
    sections, source = job.sections(), open_images(images)
    preview = mining_preview.preview_mining(
        source, sections.encoder, sections.mining, count, truth=known, device=job.own_device
    )
    record = preview_record(preview, Machine(cores(), torch.cuda.device_count()), num_ranks)
    write_preview(preview, record, locate(out) / "preview")
    return record


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

    Raises:
        RunMismatchError: A pretraining has begun in ``run``, whose settings and detectors speak of other classes.
    """
    folder, device = RunFolder(Path(run)), device or default_device()
    if folder.config.is_file():
        raise RunMismatchError(
            f"run: a pretraining has begun in {folder.path}, which clusters by itself. Go on with `simdetr pretrain`, "
            f"or copy {folder.proposals} to a new run folder and cluster there."
        )
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

"""What other methods find on a run's images: run folder and images in; their stores and the recall of all out.

The rivals get the run's own encoder and image size, so that the methods differ and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simdetr.data.images import ImageSource, open_images
from simdetr.data.labels import read_labels
from simdetr.evaluation.rival_recall import rival_folder, rival_labels, rival_rows
from simdetr.mining_ranks import MiningJob
from simdetr.proposals.baselines import BASELINES, baseline
from simdetr.proposals.rivals import mine_rival
from simdetr.proposals.store import Manifest, ProposalStore
from simdetr.recipe import PipelineSections
from simdetr.recipe_choice import for_mining
from simdetr.training.run_folder import RunFolder, RunMismatchError


def mine_rivals(
    images: str | Path,
    run: str | Path,
    config: Sequence[str | Path] = (),
    *,
    methods: Sequence[str] = (),
    truth: str | Path | None = None,
    device: str | None = None,
    options: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Mine a run's images with other methods too, for comparison only.

    Args:
        images: The run's images.
        run: Run folder with mined proposals; the rivals' go to ``run``/rivals/<method>. The report shows them.
        config: YAML files of the mining; those that the run was started with when left out: those it has kept, or
            the recipe of this machine.
        methods: Names of rivals; all when left out.
        truth: COCO JSON with boxes for some of these images, for recall.
        device: Torch device; the GPU if there is one.
        options: ``--section.name=value`` strings, over the files.

    Returns:
        One row per method that the run has proposals of, ours first: ``stage`` (the method), ``images``,
        ``boxes_per_image`` and, with truth, the recall of `simdetr.evaluation.proposal_recall`.

    Raises:
        StoreError: The run has no mined proposals, or a rival's are of other settings.
        RunMismatchError: They were mined with other settings or images than these.
    """
    for method in methods:
        baseline(method)
    folder, source = RunFolder(Path(run)), open_images(images)
    ours = ProposalStore(folder.proposals).manifest
    kept = [folder.config] if folder.config.is_file() and not config else []
    chosen = for_mining((*config, *kept), images)
    job = MiningJob(str(images), str(folder.proposals), chosen.configs, (*chosen.options, *options), device)
    sections = job.sections()
    _check_same(folder.path, ours, sections, source)
    known = read_labels(Path(truth)) if truth is not None else None
    for method in methods or BASELINES:
        mine_rival(
            method,
            source,
            sections.encoder,
            sections.mining,
            rival_folder(folder.path, method),
            device=job.own_device,
            progress=sys.stderr.isatty(),
        )
    return rival_rows(rival_labels(folder.path, source.ids if known is None else known.image_ids), known)


def _check_same(run: Path, ours: Manifest, sections: PipelineSections, source: ImageSource) -> None:
    """The rivals must get what our mining got."""
    pairs = {
        "images": (ours.source, source.fingerprint()),
        "encoder": (ours.encoder, sections.encoder.fingerprint),
        "image_size": (ours.config["image_size"], sections.mining.image_size),
    }
    differing = [f"{name} is {there!r} there, {here!r} asked" for name, (there, here) in pairs.items() if there != here]
    if differing:
        raise RunMismatchError(
            f"run: the proposals of {run} were mined with other settings ({'; '.join(differing)}). Give the images, "
            "config files and options that they were mined with."
        )

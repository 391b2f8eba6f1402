"""READ FIRST: the whole method, one call per step (seed 003, Algorithm 1).

In: a folder of images, and for the second half a handful of labels. Out: a run folder with proposals, the labels and
detector of every stage, and a report.

    images -> mine -> cluster -> (fit -> relabel) x stages -> finetune -> evaluate | compare | predict

Every step looks for its own output first: the same call again goes on where the last one stopped.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from simdetr.commands.method import json_ready
from simdetr.data.images import ImageSource, open_images
from simdetr.data.labels import Labels, read_labels, write_labels
from simdetr.data.machine import cores
from simdetr.data.storage import atomic_path, locate
from simdetr.evaluation.compare import BACKBONE_ONLY, SCRATCH
from simdetr.exchange.weights import is_saved, load_detector
from simdetr.mining import preview as mining_preview
from simdetr.mining.kmeans import Backend, process_group, rank
from simdetr.mining.miner import Rank, mine
from simdetr.mining.preview import Machine, preview_record
from simdetr.mining.processes import MiningJob
from simdetr.mining.pseudo_labels import count_regions, make_pseudo_labels
from simdetr.mining.rivals import BASELINES, baseline, mine_rival
from simdetr.mining.store import Manifest, ProposalStore
from simdetr.recipe import PipelineSections, Recipe, fit_to_device, is_chosen
from simdetr.reports.page import write_report
from simdetr.reports.preview_page import write_preview
from simdetr.reports.report import collect_run
from simdetr.reports.rival_recall import rival_folder, rival_labels, rival_rows
from simdetr.training.auto_batch import Scaling
from simdetr.training.datamodule import read_training_labels
from simdetr.training.inference import default_device, evaluate
from simdetr.training.progress import image_progress
from simdetr.training.recipe_choice import for_finetuning, for_mining, for_pretraining
from simdetr.training.relabel import InferenceSettings, relabel
from simdetr.training.run_folder import RunFolder, RunMismatchError, detector_folder, leads
from simdetr.training.run_time import say_time
from simdetr.training.train import RESUME, train

LOG = logging.getLogger(__name__)


def pretrain(
    images: str | Path,
    out: str | Path,
    config: Sequence[str | Path] = (),
    *,
    truth: str | Path | None = None,
    device: str | None = None,
    options: Sequence[str] = (),
    num_ranks: int = 1,
    auto_batch: bool | Scaling = False,
) -> RunFolder:
    """Pretrain a detector on unlabelled images.

    Args:
        images: Folder, list file (txt, CSV, Parquet) or COCO JSON of images; its boxes, if any, are not used.
        out: Run folder; an unfinished run in it is resumed.
        config: YAML files, later ones over earlier ones; the recipe that fits this machine and the images without any.
        truth: COCO JSON with boxes for some of these images; only for the recall in the report.
        device: Torch device of mining and relabelling; the GPU if there is one.
        options: ``--section.name=value`` strings, over the files.
        num_ranks: Processes on this machine that mine; under torchrun all of its processes do.
        auto_batch: Train with the largest batch that fits the device, and learning rates to go with it: ``linear``
            (True) in its size, or ``sqrt``.

    Returns:
        The run folder: ``detector(stage)`` and ``labels(stage)`` are its results.
    """
    run, source = RunFolder(Path(out)), open_images(images)
    chosen = for_pretraining(config, source, run, options)
    options = (*chosen.options, *options)
    recipe = Recipe(chosen.configs, (f"--data.images={images}", *options))
    sections = recipe.sections()
    job = MiningJob(str(images), str(run.proposals), recipe.configs, tuple(options), device)
    own_device = device or default_device()
    with run.led():
        resumed = is_chosen(run)
        if resumed:
            recipe = fit_to_device(recipe, run, auto_batch)
        if run.labels(0).is_file():
            _check_classes(run, sections.clustering.num_classes)
        else:
            recipe.check_detector(sections.clustering.num_classes)
        run.claim(recipe.resolved()[1], _settled(run))

        if not config and not run.labels(0).is_file():
            say_time(recipe, sections, source, run, own_device, num_ranks)
        labels = mine_and_cluster(run, source, sections, job, num_ranks)
        if not config:
            say_time(recipe, sections, source, run, own_device)
        if auto_batch and not resumed:
            recipe = fit_to_device(recipe, run, auto_batch, f"--data.labels={run.labels(0)}")
            run.claim(recipe.resolved()[1], _settled(run))
        for stage in range(1, sections.self_training.stages + 1):
            fit_stage(run, recipe, sections, stage, num_images=len(labels))
            labels = relabel_stage(run, source, sections, stage, own_device)
        if leads() and (truth is not None or _is_older(run.report, run.steps)):
            report(run.path, images, truth=truth)
    return run


def _settled(run: RunFolder) -> tuple[str, ...] | None:
    """Sections that a started run cannot change; the proposal store guards its own."""
    if not run.labels(0).is_file():
        return ()
    return None if run.stage(1).is_dir() else ("encoder", "mining", "clustering", "data.images")


def _check_classes(run: RunFolder, asked: int) -> None:
    there = read_labels(run.labels(0)).num_classes
    if there != asked:
        raise RunMismatchError(
            f"clustering.num_classes: {run.stage(0)} holds {there:,} pseudo-classes, {asked:,} asked. Give "
            f"--clustering.num_classes={there}, or delete that folder to cluster anew."
        )


def _is_older(result: Path, source: Path) -> bool:
    return not result.is_file() or result.stat().st_mtime < source.stat().st_mtime


def mine_and_cluster(
    run: RunFolder, source: ImageSource, sections: PipelineSections, job: MiningJob, num_ranks: int = 1
) -> Labels:
    """Proposals of every image, by all processes of the run, then one k-means over their features: the labels T0."""
    if run.labels(0).is_file():
        return read_labels(run.labels(0))
    with run.step("mine", "proposals") as step:
        progress = sys.stderr.isatty()
        if num_ranks > 1:
            store = job.run_in_ranks(num_ranks, progress=progress)
        else:
            store = mine(source, sections.encoder, sections.mining, run.proposals, job.own_device, progress=progress)
        step.count = count_regions(store)

    def make() -> None:
        with run.step("cluster", "pseudo-classes") as step:
            settings = vars(sections.clustering)
            labels = make_pseudo_labels(store, **settings, device=job.own_device, folder=run.stage(0))
            write_labels(labels, run.labels(0))
            step.count = labels.num_classes

    run.made_once(run.labels(0), make)
    return read_labels(run.labels(0))


def fit_stage(run: RunFolder, recipe: Recipe, sections: PipelineSections, stage: int, num_images: int) -> None:
    """Train the detector of a stage on the labels of the stage before."""
    if run.has_detector(stage):
        return
    trust = sections.self_training
    options = [
        f"--data.labels={run.labels(stage - 1)}",
        f"--data.min_score={trust.min_certainty}",
        f"--data.score_power={trust.sharpening}",
    ]
    if stage > 1 and not sections.self_training.from_scratch:
        options.append(f"--model.init_weights={run.detector(stage - 1)}")
    with run.step(f"fit-stage{stage}", "images trained on") as step:
        train(recipe.training(run.stage(stage), *options), run.stage(stage))
        step.count = num_images


def relabel_stage(run: RunFolder, source: ImageSource, sections: PipelineSections, stage: int, device: str) -> Labels:
    """Label all images with the detector of a stage: no confidence threshold, only an overlap filter."""

    def make() -> None:
        loaded = load_detector(run.detector(stage))
        settings = InferenceSettings.of(
            loaded.image_settings,
            iou_threshold=sections.self_training.iou_threshold,
            max_boxes=sections.self_training.max_boxes,
            **sections.inference.on(device, len(source)),
        )
        with (
            run.step(f"relabel-stage{stage}", "boxes") as step,
            image_progress("relabelling", len(source)) as progress,
        ):
            labels = relabel(
                loaded.detector,
                source,
                loaded.categories,
                settings,
                run.labels(stage),
                stage=stage,
                before=read_labels(run.labels(stage - 1)),
                fusion=sections.self_training.fusion,
                progress=progress,
            )
            step.count = len(labels.boxes_xyxy)

    run.made_once(run.labels(stage), make)
    return read_labels(run.labels(stage))


def finetune(
    images: str | Path,
    labels: str | Path,
    out: str | Path,
    config: Sequence[str | Path] = (),
    *,
    init: str | Path | None = None,
    val_images: str | Path | None = None,
    val_labels: str | Path | None = None,
    options: Sequence[str] = (),
    auto_batch: bool | Scaling = False,
) -> Path:
    """Train a detector on labelled images, from pretrained weights or from scratch.

    Args:
        images: Folder, list file or COCO JSON of the training images.
        labels: COCO JSON (or Parquet) with their boxes; class ids of any kind.
        out: Folder of this training; an unfinished one is resumed.
        config: YAML files, later ones over earlier ones; a recipe for few labels without any, with this machine's
            detector if there is no ``init``.
        init: Run folder, detector folder or checkpoint to start from; its detector replaces the one of the config.
        val_images: Validation images.
        val_labels: Their boxes.
        options: ``--section.name=value`` strings, over the files.
        auto_batch: As for ``pretrain``.

    Returns:
        The folder of the trained detector.
    """
    run = RunFolder(Path(out))
    data = [f"--data.images={images}", f"--data.labels={labels}"]
    if val_images is not None:
        data += [f"--data.val_images={val_images}", f"--data.val_labels={val_labels or val_images}"]
    chosen = for_finetuning(config, images, labels, init, options)
    recipe = Recipe(chosen.configs, (*data, *chosen.options, *options))
    if init is not None:
        recipe = recipe.starting_from(detector_folder(init), run.path)
    detector = run.path / "detector"
    with run.led():
        recipe = fit_to_device(recipe, run, auto_batch)
        begun = is_saved(detector) or (run.path / "checkpoints" / RESUME).is_file()
        run.claim(recipe.resolved()[1], None if begun else ())
        if not is_saved(detector):
            with run.step("finetune", "images trained on") as step:
                step.count = len(train(recipe.training(run.path), run.path).labels)
    return detector


def compare(
    images: str | Path,
    labels: str | Path,
    val_images: str | Path,
    val_labels: str | Path,
    init: str | Path,
    out: str | Path,
    config: Sequence[str | Path] = (),
    *,
    fractions: Sequence[float] = (0.01, 0.1),
    seeds: Sequence[int] = (0, 1),
    options: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """What the pretraining is worth: fine-tune with and without it, same architecture, labels, steps and seeds.

    Without it the detector starts as the pretraining did: from the weights of its backbone (``backbone only``), or,
    where it had none, from random ones (``scratch``).

    Args:
        images: Training images.
        labels: Their boxes.
        val_images: Images to evaluate on.
        val_labels: Their boxes.
        init: Run folder or detector folder of the pretraining.
        out: Folder of the comparison; ``comparison.json`` grows with every finished training.
        config: YAML files of the fine-tuning; a recipe for few labels without any.
        fractions: Parts of the labelled images to train on.
        seeds: Seeds of subset, order, augmentation and new weights; at least two tell noise from gain.
        options: ``--section.name=value`` strings, over the files.

    Returns:
        One row per training: ``initialisation``, ``label_budget``, ``seed`` and the metrics.
    """
    out, detector = Path(out), detector_folder(init)
    data = (f"--data.images={images}", f"--data.labels={labels}")
    chosen = for_finetuning(config, images, labels, detector, options)
    common = Recipe(chosen.configs, (*data, *chosen.options, *options)).starting_from(detector, out, weights=False)
    inputs = {"init": str(detector), "val_images": str(val_images), "val_labels": str(val_labels)}
    RunFolder(out).claim(common.resolved()[1] + yaml.safe_dump({"compare": inputs}))
    without = BACKBONE_ONLY if common.brings_weights() else SCRATCH
    rows_file = out / "comparison.json"
    rows: list[dict[str, Any]] = json.loads(rows_file.read_text(encoding="utf-8")) if rows_file.is_file() else []
    done = {(row["label_budget"], row["seed"], row["initialisation"]) for row in rows}
    trainings = list(itertools.product(map(float, fractions), seeds, (True, False)))
    for number, (fraction, seed, pretrained) in enumerate(trainings, 1):
        key = (fraction, seed, "pretrained" if pretrained else without)
        if key in done:
            continue
        if leads():
            LOG.info("%d of %d: %s, %g %% of the labels, seed %d", number, len(trainings), key[2], 100 * fraction, seed)
        folder = out / f"{fraction:g}-seed{seed}-{key[2].replace(' ', '-')}"
        chosen = for_finetuning(config, images, labels, detector, options, fraction)
        recipe = Recipe(chosen.configs, (*chosen.options, *options))
        recipe = recipe.starting_from(detector, folder, weights=pretrained)
        seeded = [*chosen.options, f"--data.label_fraction={fraction}", f"--data.seed={seed}", f"--model.seed={seed}"]
        trained = finetune(
            images, labels, folder, recipe.configs, options=(*options, *seeded, f"--seed_everything={seed}")
        )
        scores = evaluate(val_images, val_labels, trained)
        rows.append({"initialisation": key[2], "label_budget": fraction, "seed": seed, **json_ready(scores)})
        with atomic_path(rows_file) as temporary:
            temporary.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return rows


def report(run: str | Path, images: str | Path, *, truth: str | Path | None = None) -> Path:
    """Write the report of a run from what is in its folder.

    Args:
        run: Run folder.
        images: The run's images.
        truth: COCO JSON with boxes for some of these images, for recall per stage.

    Returns:
        The HTML page.
    """
    folder = RunFolder(Path(run))
    known = read_labels(Path(truth)) if truth is not None else None
    write_report(collect_run(folder.path, open_images(images), known), folder.report.parent)
    return folder.report


# ----------------------------------------------------------------------------------------------------------------------
# The first steps of ``pipeline.py`` alone: images in; a proposal store, a preview of one, or the labels T0 out.


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


# ----------------------------------------------------------------------------------------------------------------------
# What other methods find on a run's images: run folder and images in; their stores and the recall of all out.
#
# The rivals get the run's own encoder and image size, so that the methods differ and nothing else.


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
        ``boxes_per_image`` and, with truth, the recall of `simdetr.evaluation.recall`.

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

"""READ FIRST: the whole method, one call per step (US 2025/0265826, Algorithm 1).

In: a folder of images, and for the second half a handful of labels. Out: a run folder with proposals, the labels and
detector of every stage, and a report.

    images -> mine -> cluster -> (fit -> relabel | mine -> cluster) x stages -> finetune -> evaluate | compare | predict

Every step looks for its own output first: the same call again goes on where the last one stopped.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from simdetr.data.images import IMAGE_SUFFIXES, ImageSource, open_images, warn_if_dark
from simdetr.data.label_files import read_labels, write_labels
from simdetr.data.labels import Labels
from simdetr.data.machine import default_device
from simdetr.data.storage import content_hash, locate, write_json
from simdetr.evaluation.compare import BACKBONE_ONLY, PRETRAINED, SCRATCH, ComparisonRows
from simdetr.exchange.weights import is_saved, load_detector
from simdetr.mining.kmeans import process_group, rank
from simdetr.mining.pseudo_labels import ClusteringConfig, check_regions, count_regions, make_pseudo_labels
from simdetr.mining.store import MANIFEST, ProposalStore, StoreError
from simdetr.recipe import MiningJob, PipelineSections, Recipe, contents_of, fit_to_device, is_chosen, say_time
from simdetr.reports.page import write_report
from simdetr.reports.report import collect_run
from simdetr.training.auto_batch import Scaling
from simdetr.training.datamodule import check_comparable_files
from simdetr.training.fusion import inherit
from simdetr.training.inference import evaluate as evaluate
from simdetr.training.inference import predict as predict
from simdetr.training.recipe_choice import encoder_options, for_finetuning, for_mining, for_pretraining
from simdetr.training.relabel import InferenceSettings, relabel
from simdetr.training.run_folder import RunFolder, RunMismatchError, detector_folder, is_begun, leads
from simdetr.training.train import train

LOG = logging.getLogger(__name__)
SEEDS = ("data.seed", "model.seed", "seed_everything")


def pretrain(
    images: str | Path,
    out: str | Path,
    config: Sequence[str | Path] = (),
    *,
    truth: str | Path | None = None,
    device: str | None = None,
    options: Sequence[str] = (),
    num_ranks: int = 1,
    encoder: str | None = None,
    proposals: str | Path | None = None,
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
        encoder: Folder of ``simdetr encoder fit``, a run or a detector, or a timm model whose weights are fetched;
            over the config's.
        proposals: Folder of boxes mined before on these images, such as ``runs/x/rivals/lost`` of ``simdetr rivals``;
            they are taken into the run instead of mining, and clustered as ours are.
        auto_batch: Train with the largest batch that fits, with rates ``linear`` (True) in its size, or by ``sqrt``.

    Returns:
        The run folder: ``detector(stage)`` and ``labels(stage)`` are its results.

    Raises:
        StoreError: ``proposals`` holds none, or not those of all images.
        RunMismatchError: ``out`` holds a run of other images, settings or proposals.
    """
    run, source, options = RunFolder(Path(out)), open_images(images), (*encoder_options(encoder), *options)
    chosen = for_pretraining(config, source, run, options)
    options = (*chosen.options, *options)
    recipe = Recipe(chosen.configs, (f"--data.images={images}", *options))
    sections = recipe.sections()
    stages = sections.self_training.stages
    job = MiningJob(str(images), str(run.proposals), recipe.configs, tuple(options), device)
    own_device = device or default_device()
    given = None if proposals is None else check_proposals(proposals, source, sections.clustering)
    warn_if_dark(source)
    with run.led():
        claim_proposals(run, given)
        resumed = is_chosen(run)
        if resumed:
            recipe = fit_to_device(recipe, run, auto_batch)
        if run.labels(0).is_file():
            run.check_classes(sections.clustering.num_classes)
            check_images(run, source)
        else:
            recipe.check_detector(sections.clustering.num_classes)
        run.claim(recipe.resolved()[1], *run.settled(stages))

        if not config and not run.labels(0).is_file():
            say_time(recipe, sections, source, run, own_device, num_ranks, mined=given is not None)
        labels = mine_and_cluster(run, sections, job, num_ranks, given)
        if not config:
            say_time(recipe, sections, source, run, own_device)
        if auto_batch and not resumed:
            recipe = fit_to_device(recipe, run, auto_batch, f"--data.labels={run.labels(0)}")
            run.claim(recipe.resolved()[1], *run.settled(stages))
        for stage in range(1, stages + 1):
            fit_stage(run, recipe, sections, stage, num_images=len(labels))
            if sections.self_training.remine:
                labels = remine_stage(run, job, stage, num_ranks)
            else:
                labels = relabel_stage(run, source, sections, stage, own_device)
        if leads() and (truth is not None or run.is_newer_than_report()):
            report(run.path, images, truth=truth)
    return run


def check_images(run: RunFolder, source: ImageSource) -> None:
    """RunMismatchError unless these are the images that were mined: others would be relabelled than were trained on."""
    if not (run.proposals / MANIFEST).is_file():
        return
    mined = ProposalStore(run.proposals).manifest
    if mined.source != source.fingerprint():
        count = f"{len(source):,}" if len(source) != mined.num_images else "others, as many"
        raise RunMismatchError(
            f"images: {run.path} was mined from {mined.num_images:,} images, now there are {count}. Put the same "
            "images there again to go on, or choose another out."
        )


def check_proposals(proposals: str | Path, source: ImageSource, clustering: ClusteringConfig) -> ProposalStore:
    """The store of a folder, if it holds boxes of these images, of all of them, and enough to cluster.

    Raises:
        StoreError: It is no store, one of other images, or one whose mining has not ended.
        ValueError: There are fewer boxes than pseudo-classes.
    """
    store = ProposalStore(locate(proposals))
    mined, missing = store.manifest, [n for n in range(store.manifest.num_shards) if not store.is_sound(n, whole=False)]
    if mined.source != source.fingerprint():
        count = f"{len(source):,}" if len(source) != mined.num_images else "others, as many"
        raise StoreError(
            f"proposals: {proposals} was mined from {mined.num_images:,} images, those to pretrain on are {count}. "
            "Give the images that it was mined from, or mine these"
        )
    if missing:
        raise StoreError(
            f"proposals: {proposals} lacks {len(missing):,} of {mined.num_shards:,} shards (the first is "
            f"{store.shard_path(missing[0]).name}); run the command that mined it again, which goes on"
        )
    if mined.region_dim < 1:
        raise StoreError(f"proposals: the boxes of {proposals} have no features to cluster; mine them with an encoder")
    check_regions(store, clustering.num_classes)
    return store


def claim_proposals(run: RunFolder, given: ProposalStore | None) -> None:
    """Keep which proposals a run was given, or check that they are those it was begun with; none are its own."""
    contents = json.loads(run.contents.read_text(encoding="utf-8")) if run.contents.is_file() else {}
    before, asked = contents.pop("proposals", None), given and given.fingerprint()
    begun = run.labels(0).is_file() or (run.proposals / MANIFEST).is_file()
    if begun and before != asked:
        there = "mined by itself" if before is None else "begun with --proposals of another folder"
        if asked is None:
            there = "begun with --proposals, which are not given now"
        raise RunMismatchError(
            f"proposals: {run.path} was {there}. Repeat the first command to resume it, or choose another out."
        )
    if before != asked and leads():
        write_json(run.contents, contents if asked is None else {**contents, "proposals": asked}, indent=1)


def mine_and_cluster(
    run: RunFolder, sections: PipelineSections, job: MiningJob, num_ranks: int = 1, given: ProposalStore | None = None
) -> Labels:
    """Proposals of every image, by all processes of the run, then one k-means over their features: the labels T0.

    Proposals that are ``given`` take the place of mining: the run gets its own copy of them.
    """
    if run.labels(0).is_file():
        return read_labels(run.labels(0))
    if given is None:
        with run.step("mine", "proposals") as step:
            store = job.run(num_ranks, sections, progress=sys.stderr.isatty())
            step.count = count_regions(store)
    else:
        taken = given
        with run.step("take", "proposals") as step:
            run.made_once(run.proposals / MANIFEST, lambda: taken.copy_to(run.proposals))
            store = ProposalStore(run.proposals)
            step.count = count_regions(store)

    def make() -> None:
        with run.step("cluster", f"of {sections.clustering.num_classes:,} pseudo-classes have boxes") as step:
            labels = make_pseudo_labels(store, sections.clustering, device=job.own_device, folder=run.stage(0))
            write_labels(labels, run.labels(0))
            step.count = labels.used_classes

    return run.labels_once(0, make)


def mine_proposals(
    images: str | Path,
    out: str | Path,
    config: Sequence[str | Path] = (),
    *,
    device: str | None = None,
    options: Sequence[str] = (),
    num_ranks: int = 1,
    encoder: str | None = None,
) -> ProposalStore:
    """Only the mining of ``pretrain``, into ``out``/proposals; arguments as there, and ``out`` may be a URL too."""
    options = (*encoder_options(encoder), *options)
    store, chosen = locate(out) / "proposals", for_mining(config, images)
    warn_if_dark(open_images(images))
    job = MiningJob(str(images), str(store), chosen.configs, (*chosen.options, *options), device)
    return job.run(num_ranks, progress=sys.stderr.isatty())


def cluster_proposals(
    run: str | Path, clustering: ClusteringConfig | None = None, *, device: str | None = None
) -> Labels:
    """Only the global clustering of ``pretrain``: labels T0 from mined proposals, kept in the run folder.

    Args:
        run: Run folder with mined proposals; an unfinished clustering in it is gone on with.
        clustering: Number of pseudo-classes and the like.
        device: Torch device; the GPU if there is one.

    Raises:
        RunMismatchError: A pretraining has begun in ``run``.
    """
    folder, device = RunFolder(Path(run)), device or default_device()
    if folder.config.is_file():
        advice = f"Go on with `simdetr pretrain`, or copy {folder.proposals} to a new run folder and cluster there."
        raise RunMismatchError(f"run: a pretraining has begun in {folder.path}, which clusters by itself. {advice}")
    store = ProposalStore(folder.proposals)
    with process_group(device):
        labels = make_pseudo_labels(store, clustering or ClusteringConfig(), device=device, folder=folder.stage(0))
        if rank() == 0:
            write_labels(labels, folder.labels(0))
    return labels


def fit_stage(run: RunFolder, recipe: Recipe, sections: PipelineSections, stage: int, num_images: int) -> None:
    """Train the detector of a stage on the labels of the stage before."""
    if run.has_detector(stage):
        return
    own = sections.self_training
    options = [f"--data.labels={run.labels(stage - 1)}", *own.data_options()]
    if stage > 1 and not own.from_scratch:
        options.append(f"--model.init_weights={run.detector(stage - 1)}")
    with run.step(f"fit-stage{stage}", "images trained on") as step:
        train(recipe.training(run.stage(stage), *options), run.stage(stage))
        step.count = num_images


def relabel_stage(run: RunFolder, source: ImageSource, sections: PipelineSections, stage: int, device: str) -> Labels:
    """Label all images with the detector of a stage: no confidence threshold, only an overlap filter."""

    def make() -> None:
        loaded, own = load_detector(run.detector(stage)), sections.self_training
        kept = {"iou_threshold": own.iou_threshold, "max_boxes": own.max_boxes}
        settings = InferenceSettings.of(loaded.image_settings, **kept, **sections.inference.on(device, len(source)))
        before, fusion = read_labels(run.labels(stage - 1)), own.fusion
        with run.step(f"relabel-stage{stage}", "boxes") as step:
            labels = relabel(
                loaded,
                source,
                settings,
                run.labels(stage),
                stage=stage,
                before=before,
                fusion=fusion,
                min_certainty=own.min_certainty,
                max_unreadable=sections.mining.max_unreadable,
            )
            step.count = len(labels.boxes_xyxy)

    return run.labels_once(stage, make)


def remine_stage(run: RunFolder, job: MiningJob, stage: int, num_ranks: int = 1) -> Labels:
    """Mine and cluster anew with the backbone that a stage has trained, in the stage's own folder: its labels."""
    if run.labels(stage).is_file():
        return read_labels(run.labels(stage))
    encoder = encoder_options(str(run.detector(stage)))
    own = replace(job, out=str(run.stage(stage) / "proposals"), options=(*job.options, *encoder))
    sections = own.sections()
    with run.step(f"mine-stage{stage}", "proposals") as step:
        store = own.run(num_ranks, sections, progress=sys.stderr.isatty())
        step.count = count_regions(store)
    with run.step(f"cluster-stage{stage}", f"of {sections.clustering.num_classes:,} pseudo-classes have boxes") as step:
        with process_group(own.own_device):  # of a training on several devices, which is still there
            labels = make_pseudo_labels(store, sections.clustering, device=own.own_device, folder=run.stage(stage))
        step.count = labels.used_classes

    def write() -> None:
        before = read_labels(run.labels(stage - 1))
        write_labels(inherit(replace(labels, stage=stage), before), run.labels(stage))

    return run.labels_once(stage, write)


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
        config: YAML files, later ones over earlier ones; a recipe for few labels without any.
        init: Run folder, detector folder or checkpoint to start from; its detector replaces the one of the config.
        val_images: Validation images.
        val_labels: Their boxes.
        options: ``--section.name=value`` strings, over the files.
        auto_batch: Train with the largest batch that fits, with rates ``linear`` (True) in its size, or by ``sqrt``.

    Returns:
        The folder of the trained detector.
    """
    run, data = RunFolder(Path(out)), [f"--data.images={images}", f"--data.labels={labels}"]
    warn_if_dark(open_images(images))
    if val_images is not None:
        data += [f"--data.val_images={val_images}", f"--data.val_labels={val_labels or val_images}"]
    chosen = for_finetuning(config, images, labels, init, options)
    recipe = Recipe(chosen.configs, (*data, *chosen.options, *options))
    if init is not None:
        recipe = recipe.starting_from(detector_folder(init), run.path)
    detector = run.path / "detector"
    with run.led():
        recipe = fit_to_device(recipe, run, auto_batch)
        begun, (settings, text) = is_begun(run.path), recipe.resolved()
        run.claim(text, None if begun else ())
        run.claim_contents(contents_of(settings), begun=begun)
        if not is_saved(detector):
            with run.step("finetune", "images trained on") as step:
                step.count = len(train(recipe.training(run.path), run.path).labels)
        elif leads():
            LOG.info("%s is finished already, nothing was trained", detector)
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

    Without it the detector starts as the pretraining did: on its backbone's weights or, without any, from scratch.

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
    check_comparable_files(images, labels, val_images, val_labels)
    data = (f"--data.images={images}", f"--data.labels={labels}")
    chosen = for_finetuning(config, images, labels, detector, options)
    common = Recipe(chosen.configs, (*data, *chosen.options, *options)).starting_from(detector, out, weights=False)
    inputs = {"init": str(detector), "val_images": str(val_images), "val_labels": str(val_labels)}
    folder, (settings, text) = RunFolder(out), common.resolved()
    rows = ComparisonRows(out / "comparison.json", quiet=not leads())
    folder.claim(text + yaml.safe_dump({"compare": inputs}))
    contents = contents_of(settings) | {"val_labels": content_hash(Path(val_labels), IMAGE_SUFFIXES)}
    folder.claim_contents(contents, begun=bool(rows.rows))
    without = BACKBONE_ONLY if common.brings_weights() else SCRATCH
    for initialisation, fraction, seed in rows.missing(fractions, seeds, without):
        own = out / f"{fraction:g}-seed{seed}-{initialisation.replace(' ', '-')}"
        chosen = for_finetuning(config, images, labels, detector, options, fraction)
        recipe = Recipe(chosen.configs, (*chosen.options, *options))
        recipe = recipe.starting_from(detector, own, weights=initialisation == PRETRAINED)
        seeded = (f"--data.label_fraction={fraction}", *(f"--{name}={seed}" for name in SEEDS))
        trained = finetune(images, labels, own, recipe.configs, options=(*options, *chosen.options, *seeded))
        rows.add(initialisation, fraction, seed, evaluate(val_images, val_labels, trained))
    return rows.rows


def report(run: str | Path, images: str | Path, *, truth: str | Path | None = None) -> Path:
    """Write the report of a run from what is in its folder; returns the HTML page.

    Args:
        run: Run folder.
        images: The run's images.
        truth: COCO JSON with boxes for some of these images, for recall per stage.
    """
    folder = RunFolder(Path(run))
    source = open_images(images)
    known = read_labels(truth, images=source) if truth is not None else None
    write_report(collect_run(folder.path, source, known), folder.report.parent)
    return folder.report

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

import yaml

from simdetr.batch_choice import fit_to_device, is_chosen
from simdetr.data.atomic_files import atomic_path
from simdetr.data.images import ImageSource, open_images
from simdetr.data.labels import Labels, read_labels, write_labels
from simdetr.evaluation.compare import BACKBONE_ONLY, SCRATCH
from simdetr.evaluation.report import write_report
from simdetr.evaluation.run_folder import collect_run
from simdetr.inference import default_device, evaluate, predict
from simdetr.mining_ranks import MiningJob
from simdetr.mining_steps import cluster_proposals, mine_proposals, preview_mining
from simdetr.proposals.miner import mine
from simdetr.proposals.pseudo_labels import count_regions, make_pseudo_labels
from simdetr.recipe import PipelineSections, Recipe
from simdetr.recipe_choice import for_finetuning, for_pretraining
from simdetr.results import json_ready
from simdetr.rival_comparison import mine_rivals
from simdetr.run_time import say_time
from simdetr.training.auto_batch import Scaling
from simdetr.training.checkpoints import RESUME
from simdetr.training.progress import image_progress
from simdetr.training.relabel import InferenceSettings, relabel
from simdetr.training.run_folder import RunFolder, RunMismatchError, detector_folder, leads
from simdetr.training.train import train
from simdetr.training.weights import is_saved, load_detector

LOG = logging.getLogger(__name__)

__all__ = [
    "cluster_proposals",
    "compare",
    "evaluate",
    "finetune",
    "mine_proposals",
    "mine_rivals",
    "predict",
    "pretrain",
    "preview_mining",
    "report",
]


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

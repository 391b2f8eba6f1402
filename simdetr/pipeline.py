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
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from simdetr.data.images import ImageSource, open_images, warn_if_dark
from simdetr.data.label_files import read_labels, write_labels
from simdetr.data.labels import Labels
from simdetr.data.machine import default_device
from simdetr.data.storage import json_ready, locate, write_json
from simdetr.evaluation.early_warning import mining_figures, warnings_of
from simdetr.evaluation.verdict import Comparison
from simdetr.exchange.weights import is_saved, load_detector
from simdetr.mining.clustering_config import ClusteringConfig
from simdetr.mining.kmeans import process_group, rank
from simdetr.mining.pseudo_labels import check_regions, count_regions, make_pseudo_labels
from simdetr.mining.store import MANIFEST, ProposalStore, StoreError
from simdetr.recipe import (
    PREDICTIONS,
    ROW,
    ArmTraining,
    ComparisonJob,
    MiningJob,
    PipelineSections,
    Recipe,
    contents_of,
    fit_to_device,
    is_chosen,
    say_time,
    variant_configs,
)
from simdetr.reports.comparison_page import check_rows, conclude, mining_evidence, write_rows
from simdetr.reports.page import write_report
from simdetr.reports.report import collect_run
from simdetr.training.arms import Arm, run_settings
from simdetr.training.auto_batch import Scaling
from simdetr.training.datamodule import check_comparable_files
from simdetr.training.fusion import inherit
from simdetr.training.inference import evaluate as evaluate
from simdetr.training.inference import predict as predict
from simdetr.training.label_budgets import hold_out, read_budgets
from simdetr.training.recipe_choice import encoder_options, for_finetuning, for_mining, for_pretraining
from simdetr.training.relabel import InferenceSettings, relabel
from simdetr.training.run_folder import RunFolder, RunMismatchError, detector_folder, is_begun, leads
from simdetr.training.side_by_side import Task, Told, default_processes, device_in_words, in_processes, told, turns
from simdetr.training.train import train

LOG = logging.getLogger(__name__)
PRETRAINED_MARK = "pretrained.json"
"""In the run folder of a comparison's own arm, once it is pretrained."""
_COMPARE = "from simdetr import pipeline; pipeline.help_comparing()"


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
        if not run.has_detector(1):
            warn_early(labels, None if truth is None else read_labels(truth, images=source))
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


def warn_early(mined: Labels, truth: Labels | None) -> None:
    """Tell what speaks against pretraining on mined boxes before hours are spent on it."""
    for warning in warnings_of(mining_figures(mined, truth)) if leads() else []:
        LOG.warning("before any training: %s", warning)


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
    init: str | Path,
    out: str | Path,
    config: Sequence[str | Path] = (),
    *,
    val_images: str | Path | None = None,
    val_labels: str | Path | None = None,
    holdout: float = 0.3,
    arms: Sequence[str] = (),
    fractions: Sequence[float] | None = None,
    shots: Sequence[int] = (),
    seeds: Sequence[int] = (0, 1, 2),
    options: Sequence[str] = (),
    workers: int | None = None,
) -> Comparison:
    """Is pretraining worth it on these images? Fine-tune every arm alike, and answer in words with intervals.

    All arms of a seed have the same labels, steps, order and, but for those that bring their own, architecture.

    Args:
        images: Training images.
        labels: Their boxes.
        init: Run folder or detector folder of the pretraining.
        out: Folder of the comparison; ``comparison.json`` grows with every finished training, ``report/index.html`` is
            the page. Arms, budgets and seeds may be added later.
        config: YAML files of the fine-tuning; a recipe for few labels without any.
        val_images: Images to evaluate on; a part of the labelled ones is held out without any.
        val_labels: Their boxes.
        holdout: That part.
        arms: What to start from, see ``simdetr.training.arms``: random, backbone, stage1, stage2, pretrained,
            class-unaware, frozen-backbone, detreg, selective-search, from-scratch and checkpoint=FILE; any of them may
            be followed by =PLACE of its detector. By default the backbone's weights (random where it has none) and
            the last stage.
        fractions: Parts of the labelled images to train on; 1 and 10 % where no shots are given either.
        shots: Boxes per class to train on, as `simdetr split` draws them.
        seeds: Seeds of labels, order, augmentation and new weights; three or more tell gain from noise.
        options: ``--section.name=value`` strings, over the files.
        workers: Trainings side by side; without a GPU as many as there are cores, at most four, by default.

    Returns:
        Rows, paired differences with intervals, labels saved, costs and the verdict.
    """
    out, image_list = Path(out), str(images)
    budgets = read_budgets(fractions, shots)
    if val_images is None:
        labels, val_labels = hold_out(Path(labels), image_list, holdout, out / "labels")
        val_images = images
    job = ComparisonJob(
        images=image_list,
        labels=str(labels),
        val_images=str(val_images),
        val_labels=str(val_labels or val_images),
        init=str(init),
        out=str(out),
        config=tuple(map(str, config)),
        arms=tuple(arms),
        fractions=tuple(budget.amount for budget in budgets if budget.kind == "fraction"),
        shots=tuple(int(budget.amount) for budget in budgets if budget.kind == "shots"),
        seeds=tuple(seeds),
        options=tuple(options),
    )
    check_comparable_files(images, labels, job.val_images, job.val_labels)
    check_rows(out)
    trainings = job.trainings()
    job.claim(begun=any((training.folder / ROW).is_file() for training in trainings))
    evidence = mining_evidence(job)
    tasks = comparison_tasks(job)
    count = workers or default_processes(sum(not task.done.is_file() for task in tasks), job.devices)
    if count > 1:
        in_processes(_COMPARE, asdict(job), count, out / "processes", Told(tasks))
    else:
        work_off(job, tasks)
    return conclude(job, evidence)


def help_comparing() -> None:
    """What a process does that a comparison has started."""
    job = ComparisonJob.build(told())
    work_off(job, comparison_tasks(job))


def comparison_tasks(job: ComparisonJob) -> list[Task]:
    """All trainings of a comparison: the pretrainings of its own arms first, then seed by seed."""
    pretrainings = [
        Task(f"pretraining of {arm.name}", arm.run / PRETRAINED_MARK)
        for arm in job.own_arms
        if arm.variant is not None and arm.run is not None
    ]
    needs = {task.name: task.done for task in pretrainings}
    finetunings = [
        Task(one.title, one.folder / ROW, needs.get(f"pretraining of {one.arm.name}")) for one in job.trainings()
    ]
    return [*pretrainings, *finetunings]


def work_off(job: ComparisonJob, tasks: Sequence[Task]) -> None:
    """Do all trainings of a comparison that no other process does."""
    trainings = {training.folder / ROW: training for training in job.trainings()}
    arms = {arm.run / PRETRAINED_MARK: arm for arm in job.own_arms if arm.variant is not None and arm.run is not None}
    order = {task.done: number for number, task in enumerate(tasks, 1)}
    for task in turns(tasks):
        if leads():
            LOG.info("%d of %d: %s", order[task.done], len(tasks), task.name)
        if task.done in arms:
            pretrain_arm(job, arms[task.done])
            write_json(task.done, {"arm": arms[task.done].name})
        else:
            write_json(task.done, finetune_arm(job, trainings[task.done]), indent=1)
            write_rows(job)


def pretrain_arm(job: ComparisonJob, arm: Arm) -> RunFolder:
    """Pretrain what differs from the run of a comparison in one thing, on the same proposals with as many steps."""
    assert arm.variant is not None and arm.run is not None
    run, settings = RunFolder(Path(job.init)), run_settings(Path(job.init))
    proposals = run.proposals if arm.variant.rival is None else run.path / "rivals" / arm.variant.rival
    configs = variant_configs(run.path, detector_folder(run.path), arm.variant, arm.run)
    return pretrain(settings["data"]["images"], arm.run, configs, options=arm.variant.options, proposals=proposals)


def finetune_arm(job: ComparisonJob, training: ArmTraining) -> dict[str, Any]:
    """Fine-tune one arm on the labels of one seed and score it: a row of the comparison."""
    arm, labels, begun = training.arm, job.labels_of(training), time.perf_counter()
    start = detector_folder(arm.run) if arm.variant is not None and arm.run is not None else arm.detector
    recipe = job.recipe(training, start)
    trained = finetune(job.images, labels, training.folder, recipe.configs, options=recipe.options)
    seconds = time.perf_counter() - begun
    scores = evaluate(job.val_images, job.val_labels, trained, predictions=training.folder / PREDICTIONS)
    return {
        "initialisation": arm.name,
        "label_budget": training.budget.value,
        "seed": training.seed,
        **job.label_counts(training),
        "seconds": round(seconds, 1),
        "device": device_in_words(),
        **json_ready(scores),
    }


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

"""What ``pretrain``, ``finetune``, ``compare`` and ``report`` do: one call of ``pipeline.py``, a few printed lines."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markdown import Markdown

OUT = Console()


def pretrain_detector(
    images: str,
    out: Path,
    config: tuple[str, ...] = (),
    truth: Path | None = None,
    device: str | None = None,
    options: tuple[str, ...] = (),
    num_ranks: int = 1,
    encoder: str | None = None,
    auto_batch: bool | Literal["linear", "sqrt"] = False,
    proposals: Path | None = None,
) -> None:
    """Pretrain a detector on unlabelled images: mine, cluster, then train and relabel for each stage.

    The same command again resumes a run that was stopped.

    Args:
        images: Folder, list file (txt, CSV, Parquet) or COCO JSON of images; its boxes, if any, are not used.
        out: Run folder; an unfinished run in it is resumed.
        config: YAML files, later ones over earlier ones; the recipe that fits this machine and the images without any.
        truth: COCO JSON with boxes for some of these images; only for the recall in the report.
        device: Torch device of mining and relabelling; the GPU if there is one.
        options: ``--section.name=value`` strings; dotted options on the command line end here.
        num_ranks: Processes on this machine that mine; under torchrun all of its processes do.
        encoder: Folder of ``simdetr encoder fit``, or a timm model whose weights are fetched; over the config's.
        auto_batch: Train with the largest batch that fits, with rates ``linear`` (true) in its size, or by ``sqrt``.
        proposals: Folder of boxes mined before on these images, such as ``runs/x/rivals/lost`` of ``simdetr rivals``;
            they are taken into the run instead of mining, and clustered as ours are.
    """
    from simdetr import pipeline

    run = pipeline.pretrain(
        images,
        out,
        config,
        truth=truth,
        device=device,
        options=options,
        num_ranks=num_ranks,
        encoder=encoder,
        auto_batch=auto_batch,
        proposals=proposals,
    )
    trained = [run.detector(stage) for stage in run.stages() if run.has_detector(stage)]
    if trained:
        OUT.print(f"detector: {trained[-1]}; fine-tune it with simdetr finetune --init {run.path}", soft_wrap=True)
    OUT.print(f"report: {run.report}", soft_wrap=True)


def finetune_detector(
    images: str,
    labels: str,
    out: Path,
    config: tuple[str, ...] = (),
    init: Path | None = None,
    val_images: str | None = None,
    val_labels: str | None = None,
    options: tuple[str, ...] = (),
    auto_batch: bool | Literal["linear", "sqrt"] = False,
) -> None:
    """Train a detector on labelled images, from a pretrained one or from scratch.

    Args:
        images: Folder, list file or COCO JSON of the training images.
        labels: COCO JSON (or Parquet) with their boxes; class ids of any kind.
        out: Folder of this training; an unfinished one is resumed.
        config: YAML files, later ones over earlier ones; a recipe for few labels without any.
        init: Run folder, detector folder or checkpoint to start from; its detector replaces the one of the config.
        val_images: Validation images.
        val_labels: Their boxes.
        options: ``--section.name=value`` strings; dotted options on the command line end here.
        auto_batch: Train with the largest batch that fits, with rates ``linear`` (true) in its size, or by ``sqrt``.
    """
    from simdetr import pipeline

    detector = pipeline.finetune(
        images,
        labels,
        out,
        config,
        init=init,
        val_images=val_images,
        val_labels=val_labels,
        options=options,
        auto_batch=auto_batch,
    )
    OUT.print(f"detector: {detector}", soft_wrap=True)


def compare_arms(
    images: str,
    labels: str,
    init: Path,
    out: Path,
    config: tuple[str, ...] = (),
    val_images: str | None = None,
    val_labels: str | None = None,
    holdout: float = 0.3,
    arms: tuple[str, ...] = (),
    fractions: tuple[float, ...] | None = None,
    shots: tuple[int, ...] = (),
    seeds: tuple[int, ...] = (0, 1, 2),
    options: tuple[str, ...] = (),
    workers: int | None = None,
) -> None:
    """Is pretraining worth it here? Fine-tune several starts alike, print the answer and write a page of it.

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
        options: ``--section.name=value`` strings; dotted options on the command line end here.
        workers: Trainings side by side; without a GPU as many as there are cores, at most four, by default.
    """
    from simdetr import pipeline

    found = pipeline.compare(
        images,
        labels,
        init,
        out,
        config,
        val_images=val_images,
        val_labels=val_labels,
        holdout=holdout,
        arms=arms,
        fractions=fractions,
        shots=shots,
        seeds=seeds,
        options=options,
        workers=workers,
    )
    OUT.print(Markdown(found.text()))
    OUT.print(f"report: {found.page}", soft_wrap=True)


def report_run(run: Path, images: str, truth: Path | None = None) -> None:
    """Write the report page of a run from what is in its folder.

    Args:
        run: Run folder.
        images: The run's images.
        truth: COCO JSON with boxes for some of these images, for recall per stage.
    """
    from simdetr import pipeline

    OUT.print(f"report: {pipeline.report(run, images, truth=truth)}", soft_wrap=True)

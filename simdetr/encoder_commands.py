"""What ``simdetr encoder ...`` does: paths and options in, a folder with an encoder out.

Heavy packages are imported inside the functions, so that ``simdetr --help`` answers at once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from rich.console import Console

OUT = Console()
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
    from simdetr.evaluation.encoder_recall import load_encoder_recall
    from simdetr.training.encoder_fit import PROBE_NAME, fit_encoder
    from simdetr.training.encoder_objectives import require_lightly
    from simdetr.training.encoder_probe import read_rows
    from simdetr.training.encoder_settings import read_settings

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

"""Train a backbone on unlabelled images: images and settings (YAML and options) in, weights and their record out.

``encoder.safetensors`` holds the backbone under timm's names, ``encoder.json`` how it came about,
``probe.csv`` how it developed; :class:`simdetr.mining.FittedEncoder` takes the folder. A run killed at any point
goes on with the same call, and ends with the weights of one that was never interrupted.
"""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import ArgumentParser
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from safetensors.torch import save_file
from torch import Tensor

from simdetr.data.dataset import item_seed
from simdetr.data.images import ImageSource, open_images
from simdetr.data.storage import atomic_path, write_json
from simdetr.encoder_training.crops import EncoderData
from simdetr.encoder_training.objectives import (
    LearningEncoder,
    Objective,
    build_objective,
    make_crops,
    require_lightly,
    timm_weights,
)
from simdetr.encoder_training.probe import EncoderProbe, Recall, probe_images, read_rows
from simdetr.mining.batch import MiningConfig
from simdetr.mining.encoders import RECORD_NAME, WEIGHTS_NAME, is_fitted
from simdetr.training.detection_task import NonFiniteLossError
from simdetr.training.optimisation import Schedule, lr_factor
from simdetr.training.run_folder import CHECKPOINTS, RESUME, RunFolder
from simdetr.training.train import AtomicCheckpointIO, ResumePoint
from simdetr.training.train import fit as fit_from
from simdetr.training.training_bar import TrainingProgress

LOG = logging.getLogger(__name__)
PROBE_NAME = "probe.csv"
_PACKAGES = ("simdetr", "lightly", "timm", "torch")
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
_STRIDE = 32
# What may differ between a run and its continuation: it changes no weight.
_FREE = ("num_workers", "checkpoint_every_steps", "probe_every_steps", "probe_images", "mining")


@dataclass(frozen=True)
class EncoderFitConfig:
    """Self-supervised training of a backbone.

    Args:
        model: timm's name of the backbone.
        weights: File or URL to start from; random weights when left out.
        objective: ``vicreg``, ``dino``, ``vicregl`` (dense), or the class path of an Objective of your own.
        objective_args: Its arguments; see :mod:`simdetr.encoder_training.objectives`.
        views: Arguments of lightly's transform for that objective, such as ``cj_strength``.
        image_size: Side of the (large) crops in pixels, a multiple of 32.
        batch_size: Images per step; every one gives two or more crops.
        epochs: Passes over the images.
        max_steps: Steps, instead of epochs.
        lr: Learning rate of AdamW at this batch size.
        weight_decay: Of all weights but biases and norms.
        schedule: Of the learning rate after the warm-up: ``cosine``, ``constant`` or ``step``.
        warmup: Part of the training in which the learning rate rises.
        precision: Of the forward pass; losses are taken in 32 bits.
        num_workers: Processes that decode and crop; 0 does it in between.
        seed: Of new weights, order and crops.
        checkpoint_every_steps: Steps between two points that a killed run can resume from.
        probe_every_steps: Steps between two rows of ``probe.csv``.
        probe_images: Images that are probed, evenly spaced.
        mining: How the recall probe mines; as in the recipes of the pipeline.
    """

    model: str = "resnet18"
    weights: str | None = None
    objective: str = "vicregl"
    objective_args: dict[str, Any] = field(default_factory=dict)
    views: dict[str, Any] = field(default_factory=dict)
    image_size: int = 224
    batch_size: int = 64
    epochs: int = 100
    max_steps: int | None = None
    lr: float = 1e-3
    weight_decay: float = 1e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    precision: Precision = "32-true"
    num_workers: int = 2
    seed: int = 0
    checkpoint_every_steps: int = 200
    probe_every_steps: int = 500
    probe_images: int = 32
    mining: MiningConfig = field(default_factory=MiningConfig)

    def __post_init__(self) -> None:
        at_least = {"image_size": _STRIDE, "batch_size": 2, "epochs": 1, "max_steps": 1, "num_workers": 0}
        at_least |= {"checkpoint_every_steps": 1, "probe_every_steps": 1, "probe_images": 2}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                hint = "; the losses compare the images of a batch" if name == "batch_size" else ""
                raise ValueError(f"{name}: expected at least {least}, got {value}{hint}")
        if self.image_size % _STRIDE:
            nearest = max(2, round(self.image_size / _STRIDE)) * _STRIDE
            raise ValueError(f"image_size: expected a multiple of {_STRIDE}, got {self.image_size}; try {nearest}")
        if not 0 <= self.warmup < 1 or self.lr <= 0:
            raise ValueError(f"warmup, lr: expected 0 <= warmup < 1 and lr > 0, got {self.warmup} and {self.lr}")

    def settled(self) -> dict[str, Any]:
        """The settings that the weights depend on, as plain types."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}


def read_settings(configs: Sequence[str] = (), options: Sequence[str] = ()) -> EncoderFitConfig:
    """Settings from YAML files, later ones over earlier ones, and ``--name=value`` strings over them.

    Raises:
        ValueError: for a name or value that the settings do not have; the message names it.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(EncoderFitConfig)
    try:
        parsed = parser.parse_args([*(f"--config={path}" for path in configs), *options])
        given = parser.instantiate_classes(parsed).items()
        return EncoderFitConfig(**{name: value for name, value in given if name != "config"})
    except ArgumentError as error:
        raise ValueError(f"config: {error}") from error


class EncoderTask(pl.LightningModule):
    """A backbone and the objective that gives its loss, trained together."""

    def __init__(self, encoder: LearningEncoder, objective: Objective, config: EncoderFitConfig) -> None:
        super().__init__()
        self.encoder, self.objective, self.config = encoder, objective, config
        self.total_steps = 1

    def learnt(self) -> LearningEncoder:
        """The encoder to keep."""
        return self.objective.learnt(self.encoder)

    def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> None:
        """Dropout depends on (seed, epoch, batch) alone."""
        torch.manual_seed(item_seed(self.config.seed, self.current_epoch, batch_idx))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch of views."""
        self.objective.before_step(self.encoder, self.global_step / self.total_steps)
        loss: Tensor = self.objective(self.encoder, batch)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"the loss became NaN or infinite at step {self.global_step}. Lower lr (now {self.config.lr}) or use "
                "precision 32-true or bf16-mixed, then repeat the command in a new folder."
            )
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch[0]))
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW without decay of biases and norms, and the schedule per step."""
        from lightly.models.utils import get_weight_decay_parameters

        decayed, free = get_weight_decay_parameters([self.encoder, self.objective])
        groups = [
            {"params": [p for p in parameters if p.requires_grad], "weight_decay": decay}
            for parameters, decay in ((decayed, self.config.weight_decay), (free, 0.0))
        ]
        optimiser = torch.optim.AdamW(groups, lr=self.config.lr)
        self.total_steps = max(1, int(self.trainer.estimated_stepping_batches))
        warmup_steps = int(self.config.warmup * self.total_steps)
        factor = lr_factor(self.config.schedule, self.total_steps, warmup_steps=warmup_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit_encoder(
    images: str | Path | ImageSource,
    out: str | Path,
    config: EncoderFitConfig | None = None,
    *,
    device: str | None = None,
    recall: Recall | None = None,
) -> Path:
    """Train a backbone on unlabelled images; the same call again resumes, or returns what is finished.

    Args:
        images: What ``open_images`` takes, or its result.
        out: Folder of the result.
        config: Settings.
        device: Torch device; the GPU if there is one.
        recall: What mining with an encoder finds, for ``probe.csv``; see `load_encoder_recall`.

    Returns:
        ``out``, which :class:`simdetr.mining.FittedEncoder` takes.

    Raises:
        MissingExtraError: lightly is not installed.
        ValueError: fewer images than a batch, an unknown model or objective.
        RunMismatchError: ``out`` holds a run with other settings.
        NonFiniteLossError: training diverges.
    """
    require_lightly()
    config = config or EncoderFitConfig()
    source = images if isinstance(images, ImageSource) else open_images(images)
    run = RunFolder(Path(out))
    resume = run.path / CHECKPOINTS / RESUME
    encoder = LearningEncoder(config.model, weights=config.weights, seed=config.seed)
    objective = build_objective(config.objective, encoder, config.objective_args, seed=config.seed)
    crops = make_crops(objective, config.image_size, config.views)
    quarantine = run.path / "quarantine.csv"
    allowed = config.mining.max_unreadable
    data = EncoderData(source, crops, config.batch_size, config.num_workers, config.seed, quarantine, allowed)
    claim = {"encoder_fit": config.settled() | {"images": len(source), "images_fingerprint": source.fingerprint()}}
    begun = resume.is_file() or is_fitted(run.path)
    run.claim(yaml.safe_dump(claim, sort_keys=False), None if begun else ())
    if is_fitted(run.path):
        LOG.info("%s is finished already, nothing was trained", run.path)
        return run.path
    task = EncoderTask(encoder, objective, config)
    probed = probe_images(source, config.probe_images, config.image_size)
    probe = EncoderProbe(run.path / PROBE_NAME, probed, config.probe_every_steps, recall)
    trainer = make_trainer(run.path, config, device, probe)
    with run.step("encoder fit", "images") as step:
        fit_from(trainer, task, data, resume if resume.is_file() else None)
        step.count = trainer.global_step * config.batch_size
    save_encoder(run.path, task, source, trainer.global_step)
    shutil.rmtree(resume.parent, ignore_errors=True)
    if len(data.quarantine):
        LOG.warning("%d of %d images are unreadable, see %s", len(data.quarantine), len(source), data.quarantine.path)
    return run.path


def make_trainer(out: Path, config: EncoderFitConfig, device: str | None, probe: EncoderProbe) -> pl.Trainer:
    """A Trainer for one device that logs and checkpoints below ``out``."""
    place = torch.device(device) if device is not None else None
    kind = "auto" if place is None else {"cuda": "gpu"}.get(place.type, place.type)
    resume = ResumePoint(out / CHECKPOINTS / RESUME, config.checkpoint_every_steps)
    return pl.Trainer(
        default_root_dir=out,
        accelerator=kind,
        devices=1 if place is None or place.index is None else [place.index],
        precision=config.precision,
        max_epochs=config.epochs if config.max_steps is None else -1,
        max_steps=-1 if config.max_steps is None else config.max_steps,
        logger=CSVLogger(out, name="logs", flush_logs_every_n_steps=1),
        plugins=[AtomicCheckpointIO()],
        callbacks=[TrainingProgress(), probe, resume],
        reload_dataloaders_every_n_epochs=1,  # the loader of an epoch knows its epoch: exact resume
        use_distributed_sampler=False,
        log_every_n_steps=10,
        enable_model_summary=False,
    )


def save_encoder(folder: Path, task: EncoderTask, source: ImageSource, steps: int) -> None:
    """Write the weights, then the record, which says that both are there."""
    config, encoder = task.config, task.learnt()
    with atomic_path(folder / WEIGHTS_NAME) as temporary:
        save_file(timm_weights(encoder), temporary)
    record = {
        "model": config.model,
        "mean": [round(value, 6) for value in encoder.mean.flatten().tolist()],
        "std": [round(value, 6) for value in encoder.std.flatten().tolist()],
        "steps": steps,
        "images": len(source),
        "images_fingerprint": source.fingerprint(),
        "settings": config.settled(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "probe": read_rows(folder / PROBE_NAME),
    }
    write_json(folder / RECORD_NAME, record, indent=2)

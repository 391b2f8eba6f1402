"""Train a backbone on unlabelled images: images and settings in, weights for mining and their record out.

``encoder.safetensors`` holds the backbone under timm's names, ``encoder.json`` how it came about,
``probe.csv`` how it developed; :class:`simdetr.proposals.FittedEncoder` takes the folder. A run killed at any point
goes on with the same call, and ends with the weights of one that was never interrupted.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from safetensors.torch import save_file
from torch import Tensor

from simdetr.data.atomic_files import atomic_path
from simdetr.data.dataset import item_seed
from simdetr.data.images import ImageSource, open_images
from simdetr.proposals.fitted_encoder import RECORD_NAME, WEIGHTS_NAME, is_fitted
from simdetr.training.checkpoints import RESUME, AtomicCheckpointIO, ResumePoint
from simdetr.training.detection_task import NonFiniteLossError
from simdetr.training.encoder_backbone import LearningEncoder, timm_weights
from simdetr.training.encoder_data import EncoderData
from simdetr.training.encoder_objectives import Objective, build_objective, make_crops, require_lightly
from simdetr.training.encoder_probe import EncoderProbe, Recall, probe_images, read_rows
from simdetr.training.encoder_settings import EncoderFitConfig
from simdetr.training.optimisation import lr_factor
from simdetr.training.progress import image_progress
from simdetr.training.run_folder import RunFolder
from simdetr.training.train import safe_loading

LOG = logging.getLogger(__name__)
PROBE_NAME = "probe.csv"
_PACKAGES = ("simdetr", "lightly", "timm", "torch")


class EncoderTask(pl.LightningModule):
    """A backbone and an objective, trained together.

    Args:
        encoder: the backbone.
        objective: gives the loss.
        config: learning rate, weight decay, schedule, seed.
    """

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
        self.log("train/loss", loss.detach(), batch_size=len(batch[0]))
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW without decay of biases and norms, and the schedule per step."""
        from lightly.models.utils import get_weight_decay_parameters

        decayed, free = get_weight_decay_parameters([self.encoder, self.objective])
        groups = [{"params": [p for p in decayed if p.requires_grad], "weight_decay": self.config.weight_decay}]
        groups += [{"params": [p for p in free if p.requires_grad], "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(groups, lr=self.config.lr)
        self.total_steps = max(1, int(self.trainer.estimated_stepping_batches))
        warmup_steps = int(self.config.warmup * self.total_steps)
        factor = lr_factor(self.config.schedule, self.total_steps, warmup_steps=warmup_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ImageBar(Callback):
    """A bar with images per second and the time left.

    Args:
        batch_size: images per step.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._open = ExitStack()
        self._advance: Callable[[int], None] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:  # noqa: ANN401
        """Open it, for what is left to do."""
        steps = pl_module.total_steps - trainer.global_step
        self._advance = self._open.enter_context(image_progress("encoder fit", steps * self.batch_size))

    def on_train_batch_end(self, *_: Any) -> None:  # noqa: ANN401
        """Move it by a batch."""
        if self._advance is not None:
            self._advance(self.batch_size)

    def on_train_end(self, *_: Any) -> None:  # noqa: ANN401
        """Close it."""
        self._open.close()

    def on_exception(self, *_: Any) -> None:  # noqa: ANN401
        """Close it: Lightning does not come to the end of the training then."""
        self._open.close()


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
        recall: What mining with an encoder finds, for ``probe.csv``;
            see :func:`simdetr.evaluation.encoder_recall.load_encoder_recall`.

    Returns:
        ``out``, which :class:`simdetr.proposals.FittedEncoder` takes.

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
    resume = run.path / "checkpoints" / RESUME
    encoder = LearningEncoder(config.model, weights=config.weights, seed=config.seed)
    objective = build_objective(config.objective, encoder, config.objective_args, seed=config.seed)
    data = EncoderData(
        source,
        make_crops(objective, config.image_size, config.views),
        config.batch_size,
        config.num_workers,
        config.seed,
        run.path / "quarantine.csv",
    )
    claim = {"encoder_fit": config.settled() | {"images": len(source), "images_fingerprint": source.fingerprint()}}
    begun = resume.is_file() or is_fitted(run.path)
    run.claim(yaml.safe_dump(claim, sort_keys=False), None if begun else ())
    if is_fitted(run.path):
        return run.path
    task = EncoderTask(encoder, objective, config)
    images_to_probe = probe_images(source, config.probe_images, config.image_size)
    probe = EncoderProbe(run.path / PROBE_NAME, images_to_probe, config.probe_every_steps, recall)
    trainer = make_trainer(run.path, config, device, probe)
    with run.step("encoder fit", "images") as step:
        start = str(resume) if resume.is_file() else None
        trainer.fit(task, datamodule=data, ckpt_path=start, **safe_loading(trainer))
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
    return pl.Trainer(
        default_root_dir=out,
        accelerator=kind,
        devices=1 if place is None or place.index is None else [place.index],
        precision=config.precision,
        max_epochs=config.epochs if config.max_steps is None else -1,
        max_steps=-1 if config.max_steps is None else config.max_steps,
        logger=CSVLogger(out, name="logs", flush_logs_every_n_steps=1),
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            ImageBar(config.batch_size),
            probe,
            ResumePoint(out / "checkpoints" / RESUME, config.checkpoint_every_steps),
        ],
        reload_dataloaders_every_n_epochs=1,  # the loader of an epoch knows its epoch: exact resume
        use_distributed_sampler=False,
        log_every_n_steps=10,
        enable_progress_bar=False,  # ImageBar counts images, over all epochs
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
    with atomic_path(folder / RECORD_NAME) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

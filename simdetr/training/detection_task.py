"""Training of one detector on boxes and classes: a LightningModule around any detector of ``simdetr.detectors``.

In: batches of ``simdetr.data.dataset.collate``. Out: logged losses, detections in validation, checkpoints that
carry what is needed to rebuild the detector. Source: US 2025/0265826 Eq. 1-2.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from simdetr.data.annotations import ImageLabels
from simdetr.data.dataset import Batch, item_seed
from simdetr.data.labels import Labels
from simdetr.data.pretrained_weights import load_backbone_weights, load_into
from simdetr.detectors.detector import Detector
from simdetr.detectors.losses import DetectionLoss
from simdetr.detectors.predictions import Findings, findings
from simdetr.evaluation.coco_metric import coco_metrics
from simdetr.evaluation.point_metric import point_metrics
from simdetr.evaluation.recall import proposal_recall
from simdetr.exchange.weights import LoadReport, checkpoint_config, class_tensors, load_weights
from simdetr.training.datamodule import DetectionData
from simdetr.training.optimisation import Schedule, adamw, lr_factor, parameter_groups
from simdetr.training.relabel import as_image_labels
from simdetr.training.run_folder import detector_folder, leaves

LOG = logging.getLogger(__name__)
_NAMES_SHOWN = 2


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the batch was saved for replay."""


class DetectionTask(pl.LightningModule):
    """Trains a detector by Hungarian matching, all parameters together.

    Args:
        detector: Any detector of ``simdetr.detectors``.
        criterion: A matching loss with other weights, in place of the detector's own loss.
        lr: Learning rate of encoder, decoder and heads.
        backbone_lr: Learning rate of the backbone; 0 freezes it.
        new_lr: Learning rate of what ``init_weights`` do not bring, such as the heads of other classes, and of a new
            detector's class heads; ``lr`` if left out.
        weight_decay: AdamW weight decay of all groups.
        schedule: ``step``, ``cosine`` or ``constant``; see ``lr_factor``.
        drop_at: Fraction of the training after which ``step`` drops the rate.
        warmup_steps: Optimiser steps of linear warm-up.
        backbone_weights: Checkpoint (path or URL; SwAV, DINO, MoCo, MoBY, timm) the backbone starts from.
        init_weights: Run folder, detector folder or file to start from; the class head is replaced if the classes
            differ, and a head on the detector is new.
        class_names: Names of the classes that it trains on, by which ``init_weights`` sees whether they differ; linked
            to the data. None goes by their number alone.
        top_k: Detections per image kept in validation.
        seed: Seed of dropout; with it a resumed training equals an uninterrupted one.
        channels_last: Keep the backbone's weights and images channel by channel within each pixel, which convolutions
            in half precision on GPUs want.
        compile: Compile the detector with torch.compile, for images of any size; a name chooses another backend.
    """

    def __init__(
        self,
        detector: Detector,
        criterion: DetectionLoss | None = None,
        lr: float = 2e-4,
        backbone_lr: float = 2e-5,
        new_lr: float | None = None,
        weight_decay: float = 1e-4,
        schedule: Schedule = "step",
        drop_at: float = 0.8,
        warmup_steps: int = 0,
        backbone_weights: str | None = None,
        init_weights: str | None = None,
        class_names: Sequence[str] | None = None,
        top_k: int = 100,
        seed: int = 0,
        channels_last: bool = False,
        compile: bool | str = False,
    ) -> None:
        super().__init__()
        self.detector = detector
        self.criterion = criterion
        self.lr, self.backbone_lr, self.new_lr, self.weight_decay = lr, backbone_lr, new_lr, weight_decay
        self.schedule, self.drop_at, self.warmup_steps = schedule, drop_at, warmup_steps
        self.init_weights, self.top_k, self.seed = init_weights, top_k, seed
        self.compile_backend = "inductor" if compile is True else compile
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._pending: PendingLosses | None = None
        self._epoch = EpochMeans()
        self._epochs: list[dict[str, float]] = []
        self._schedule_steps: tuple[int, int] | None = None  # of the whole training, and ahead of the count
        if backbone_weights is not None and init_weights is None:
            load_into(detector.get_submodule(detector.body_name), load_backbone_weights(backbone_weights))
        self.load_report: LoadReport | None = None
        if init_weights is not None:
            self.load_report = load_weights(detector, detector_folder(init_weights), class_names)
        self._fixed = fixed_parts(detector)
        if backbone_lr == 0:
            detector.get_submodule(detector.backbone_name).requires_grad_(False)
        if channels_last:
            detector.get_submodule(detector.backbone_name).to(memory_format=torch.channels_last)

    @property
    def image_settings(self) -> dict[str, Any]:
        """How images are to be prepared: as for the weights it started from, else as the detector's backbone wants."""
        started = self.load_report.image_settings if self.load_report is not None else {}
        return {**self.detector.normalisation, **started}

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Any]:
        """Raw outputs of the detector; images [B, 3, H, W] normalised, mask [B, H, W] True = padding."""
        outputs: dict[str, Any] = self.detector(images.contiguous(memory_format=self._memory_format), mask)
        return outputs

    def on_fit_start(self) -> None:
        """Compile, and say what was loaded, once; random weights that would stay are refused."""
        check_start(self.detector, self._fixed)
        if self.compile_backend:
            self.detector.compile(dynamic=True, backend=self.compile_backend)
        if self.load_report is not None and self.global_rank == 0:
            self.load_report.log()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Dropout depends on (seed, epoch, batch, rank) alone; parts with schedules hear of the progress."""
        if self._schedule_steps is not None:
            total, ahead = self._schedule_steps
            self.detector.set_progress(min(1.0, (self.global_step + ahead) / max(1, total)))
        index = batch_idx * self.trainer.world_size + self.global_rank
        torch.manual_seed(item_seed(self.seed, self.current_epoch, index))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch, summed over decoder layers; nothing here waits for the GPU but the matching."""
        self._settle()  # a batch whose gradients this one's are added to
        losses = self.losses(batch)
        left_out = [target["dropped"] for target in batch.targets if "dropped" in target]
        if left_out:
            losses = {**losses, "dropped": torch.stack(left_out).sum().float()}
        self._pending = PendingLosses(batch, losses)
        return losses["loss"]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Stop before the weights take a loss that is not finite; else log the losses."""
        settled = self._settle()
        if settled is not None:
            count, losses = settled
            self._epoch.add(losses)
            options: dict[str, Any] = {"on_step": True, "on_epoch": False, "batch_size": count}
            self.log("train/loss", losses.pop("loss"), prog_bar=True, **options)
            self.log_dict({f"train/{name}": value for name, value in losses.items()}, **options)

    def on_train_epoch_end(self) -> None:
        """Warn of what parts of the detector find wrong; a resumed training remembers the epochs since alone."""
        means, self._epoch = self._epoch.means(), EpochMeans()
        if not means:  # no step was taken
            return
        self._epochs.append(means)
        if self.global_rank == 0:
            for alarm in self.detector.alarms(self._epochs):
                LOG.warning("epoch %d: %s", self.current_epoch, alarm)

    def _settle(self) -> tuple[int, dict[str, Tensor]] | None:
        """Number of images and losses of the batch that is under way, if there is one."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        losses, all_finite = pending.read()
        if not all_finite:
            self._stop_on_non_finite(pending.batch, losses)
        return len(pending.batch.targets), losses

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """``loss``, the total to minimise, and its terms."""
        if self.criterion is None:
            images = batch.images.contiguous(memory_format=self._memory_format)
            return self.detector.losses(images, batch.mask, batch.targets)
        losses: dict[str, Tensor] = self.criterion(self(batch.images, batch.mask), batch.targets)
        return losses

    def _stop_on_non_finite(self, batch: Batch, losses: dict[str, Tensor]) -> None:
        bad = [name for name, value in losses.items() if not torch.isfinite(value)]
        if not bad:
            raise NonFiniteLossError(
                f"A loss of another process became NaN or infinite at step {self.global_step}; its message names the "
                "images and the file for replay."
            )
        ids = self.image_ids_of(batch)
        path = Path(self.trainer.default_root_dir)
        path.mkdir(parents=True, exist_ok=True)
        path /= f"non_finite_batch_step{self.global_step}_rank{self.global_rank}.pt"
        values = {name: float(value) for name, value in losses.items()}
        state = self.detector.state_dict()
        torch.save({"image_ids": ids, "batch": tuple(batch), "losses": values, "state_dict": state}, path)
        raise NonFiniteLossError(
            f"{', '.join(bad)} became NaN or infinite at step {self.global_step} on images {ids}. "
            f"The batch and the weights are saved in {path} for replay. Lower lr (now {self.lr}), use fp32 or bf16 "
            "instead of fp16, or look at these images and boxes."
        )

    def image_ids_of(self, batch: Batch) -> list[str]:
        """Ids of a batch's images."""
        indices = [int(target["image_index"]) for target in batch.targets]
        data: Any = getattr(self.trainer, "datamodule", None)
        return [data.image_id(i) for i in indices] if data is not None else [str(i) for i in indices]

    def validation_step(self, batch: Batch | None, batch_idx: int) -> list[Findings]:  # type: ignore[override]
        """Detections of one batch in pixels of the original images; a callback scores them."""
        if batch is None:  # none of its images could be read
            return []
        sizes = torch.stack([target["orig_size"] for target in batch.targets])
        return findings(self(batch.images, batch.mask), sizes, top_k=self.top_k)

    def test_step(self, batch: Batch | None, batch_idx: int) -> list[Findings]:  # type: ignore[override]
        """As in validation."""
        return self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with the recipe's groups, and the schedule per step."""
        optimiser = self.new_optimiser()
        total, ahead = int(self.trainer.estimated_stepping_batches), 0
        data: Any = getattr(self.trainer, "datamodule", None)
        if isinstance(data, DetectionData) and (ahead := data.steps_ahead()):
            total = data.steps_per_epoch * int(self.trainer.max_epochs or 1)
        self._schedule_steps = total, ahead
        factor = lr_factor(self.schedule, total, warmup_steps=self.warmup_steps, drop_at=self.drop_at)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: factor(step + ahead))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def new_optimiser(self) -> Optimizer:
        """AdamW over the detector's parameters in the recipe's groups; of a new detector its class heads are new."""
        started = self.load_report
        new: set[str] = set()
        if self.new_lr is not None:
            new = class_tensors(self.detector) if started is None else {*started.replaced, *started.missing}
        groups = parameter_groups(self.detector, self.lr, self.backbone_lr, new=new, new_lr=self.new_lr)
        return adamw(groups, self.lr, self.weight_decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the detector: its class, arguments, categories and image sizes; plain types only."""
        data: Any = getattr(self.trainer, "datamodule", None)
        checkpoint["simdetr"] = checkpoint_config(self.detector, data)


# ----------------------------------------------------------------------------------------------------------------------
# The losses of a training step on their way to the host, which does not wait for the GPU: they are asked for once the
# backward pass is queued. By then the few numbers have long arrived, while the GPU still has work to do.


class PendingLosses:
    """One asynchronous copy of all losses of a batch, scalars by name on one device."""

    def __init__(self, batch: Batch, losses: Mapping[str, Tensor]) -> None:
        self.batch, self._names = batch, tuple(losses)
        values = torch.stack([value.detach().float() for value in losses.values()])
        broken = (~values.isfinite()).any().float()[None]
        if dist.is_available() and dist.is_initialized():
            # a process alone in stopping would leave the others waiting, or let them step on its broken gradients
            dist.all_reduce(broken, op=dist.ReduceOp.MAX)
        on_gpu = values.device.type == "cuda"
        self._host = torch.cat((values, broken)).to("cpu", non_blocking=on_gpu)
        self._arrived = torch.cuda.current_stream(values.device).record_event() if on_gpu else None

    def read(self) -> tuple[dict[str, Tensor], bool]:
        """Values by name, scalars on the CPU, and whether those of all processes are finite."""
        if self._arrived is not None:
            self._arrived.synchronize()
        *values, broken = self._host.unbind()
        return dict(zip(self._names, values, strict=True)), not bool(broken)


class EpochMeans:
    """Means of the losses of an epoch, each over the steps that have it."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """A step's, scalars on the CPU by name."""
        for name, value in losses.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + float(value), count + 1

    def means(self) -> dict[str, float]:
        """By name."""
        return {name: total / count for name, (total, count) in self._sums.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Is a detector about to learn on a backbone whose random weights it must not change? Frozen batch norm and layers are
# for weights that were learnt: random ones stay random for good. Whether weights came, by whatever way, is read off the
# network's normalisation layers, which no training leaves at their start.


class RandomStartError(ValueError):
    """A training would start from random weights that are frozen."""


def fixed_parts(detector: Detector) -> list[str]:
    """Names of the feature network's parts that a training does not change: frozen batch norms, frozen parameters."""
    body = detector.get_submodule(detector.body_name)
    norms = [name for name, module in body.named_modules() if "FrozenBatchNorm" in type(module).__name__]
    # positions are often constants by design
    frozen = [
        name
        for name, parameter in body.named_parameters()
        if not parameter.requires_grad and not name.endswith("pos_embed")
    ]
    return [*norms, *frozen]


def is_untrained(network: nn.Module) -> bool:
    """Whether every normalisation layer is as it was made; False for a network without any, which does not tell."""
    batch_norms = [module for module in network.modules() if hasattr(module, "running_mean")]
    if batch_norms:
        return all(_all_are(norm.running_mean, 0.0) and _all_are(norm.running_var, 1.0) for norm in batch_norms)
    norms = [module for module in network.modules() if isinstance(module, nn.LayerNorm | nn.GroupNorm)]
    affine = [norm for norm in norms if norm.weight is not None and norm.bias is not None]
    return bool(affine) and all(_all_are(norm.weight, 1.0) and _all_are(norm.bias, 0.0) for norm in affine)


def _all_are(values: object, wanted: float) -> bool:
    return isinstance(values, Tensor) and bool((values == wanted).all())


def check_start(detector: Detector, fixed: list[str]) -> None:
    """Refuse, by a RandomStartError, a training that would keep random weights; ``fixed`` are its ``fixed_parts``."""
    if not fixed or not is_untrained(detector.get_submodule(detector.body_name)):
        return
    shown = ", ".join(fixed[:_NAMES_SHOWN]) + (", …" if len(fixed) > _NAMES_SHOWN else "")
    options = thawing(detector)
    or_learn = f", or let all of it learn ({', '.join(options)})" if options else ""
    raise RandomStartError(
        f"detector: its backbone starts from random weights, and {len(fixed)} of its parts are frozen ({shown}) and "
        "would stay random. Give it weights (pretrained_backbone: true, --model.backbone_weights FILE, or a trained "
        f"detector to start from){or_learn}."
    )


def thawing(detector: Detector) -> list[str]:
    """The arguments that would leave nothing of its backbone fixed, as ``name: value``, if it has others."""
    before, thawed = dict(leaves(detector.init_args)), dict(leaves(detector.thawed(detector.init_args)))
    changed = {name: value for name, value in thawed.items() if before.get(name) != value}
    return [f"{name.rpartition('.')[2]}: {str(value).lower()}" for name, value in changed.items()]


# ----------------------------------------------------------------------------------------------------------------------
# Scores of a validation run. A callback, so that the task knows nothing of metrics.


class CocoValidation(Callback):
    """Logs AP (or class-agnostic recall) of the validation images after each validation epoch, and scores of points.

    Detections of all ranks are gathered; every rank logs the same.

    Args:
        class_agnostic: Log recall whatever the class, for pretraining on pseudo-classes.
    """

    def __init__(self, class_agnostic: bool = False) -> None:
        self.class_agnostic = class_agnostic
        self._rows: list[tuple[ImageLabels, ImageLabels]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse, before the first step, validation labels whose classes are none of the training's."""
        if not self.class_agnostic:
            trainer.datamodule.check_validation()  # type: ignore[attr-defined]

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last epoch."""
        self._rows = []

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:  # noqa: ANN401
        """Keep a batch's detections."""
        image_ids = _validation_labels(trainer).image_ids
        for target, found in zip(batch.targets if batch is not None else [], outputs, strict=True):
            image_id = image_ids[int(target["image_index"])]
            pairs, queries = (as_image_labels(image_id, target["orig_size"].tolist(), reading) for reading in found)
            self._rows.append((pairs, queries))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather, score and log."""
        if trainer.sanity_checking:
            return
        truth, rows = _validation_labels(trainer), self._rows
        if trainer.world_size > 1:
            parts: list[list[tuple[ImageLabels, ImageLabels]]] = [[] for _ in range(trainer.world_size)]
            dist.all_gather_object(parts, rows)
            rows = [row for part in parts for row in part]
        categories = trainer.datamodule.categories  # type: ignore[attr-defined]
        found, objects = (Labels.from_images((row[index] for row in rows), categories) for index in range(2))
        scores = proposal_recall(truth, objects) if self.class_agnostic else coco_metrics(truth, found)
        if truth.points is not None and found.points is not None:
            scores = scores | point_metrics(truth, found, objects)
        for name, value in scores.items():
            # every rank has the same value; without sync_dist Lightning warns
            pl_module.log(f"val/{name}", value, prog_bar=name in ("AP", "AR@100"), sync_dist=True)


def _validation_labels(trainer: pl.Trainer) -> Labels:
    labels: Labels = trainer.datamodule.val_labels  # type: ignore[attr-defined]
    return labels

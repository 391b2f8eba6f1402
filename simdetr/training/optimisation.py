"""AdamW groups of a detector's parameters, learning-rate schedules of the published recipes, the end at convergence."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from simdetr.detectors.detector import Detector

LOG = logging.getLogger(__name__)
Schedule = Literal["step", "cosine", "constant"]
FUSED_DEVICES = ("cuda", "cpu")
"""Devices that every supported version of torch has a fused AdamW for."""
SLOW_FACTOR = 0.1


def parameter_groups(
    detector: Detector,
    lr: float,
    backbone_lr: float,
    *,
    new: Collection[str] = (),
    new_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Trainable parameters in disjoint groups: new, backbone, its vectors, slow (offsets and references), the rest.

    The ``new`` ones are chosen by name, such as class heads that the weights to start from did not bring; they learn
    with ``new_lr`` where there is one. Empty groups are left out. Weight decay is the same for all, as in the recipe of
    Deformable DETR (Zhu et al. 2021, appendix), but for detectors whose recipe spares the backbone's biases, norms and
    tokens (ViDT), and for what a detector names (``undecayed_names``).
    """
    slow = lr * SLOW_FACTOR
    rates = {"new": new_lr, "backbone": backbone_lr, "backbone_vectors": backbone_lr, "slow": slow, "rest": lr}
    rates |= {"new_undecayed": new_lr, "undecayed": lr}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in detector.named_parameters():
        if not parameter.requires_grad:
            continue
        if any(part in name for part in detector.undecayed_names):
            members["new_undecayed" if new_lr is not None and name in new else "undecayed"].append(parameter)
        elif new_lr is not None and name in new:
            members["new"].append(parameter)
        elif name.startswith(f"{detector.backbone_name}."):
            is_vector = parameter.ndim <= 1 or name.endswith(("det_token", "det_pos_embed"))
            spared = is_vector and not detector.decays_backbone_vectors
            members["backbone_vectors" if spared else "backbone"].append(parameter)
        elif any(part in name for part in detector.slow_names):
            members["slow"].append(parameter)
        else:
            members["rest"].append(parameter)
    extra = {name: {"weight_decay": 0.0} for name in ("backbone_vectors", "new_undecayed", "undecayed")}
    return [
        {"params": members[name], "lr": rates[name], "name": name, **extra.get(name, {})}
        for name in members
        if members[name]
    ]


def adamw(groups: list[dict[str, Any]], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over ``parameter_groups``; fused, one kernel for all parameters, where their device has it."""
    # where there is none, torch says so only at the first step
    fused = all(parameter.device.type in FUSED_DEVICES for group in groups for parameter in group["params"])
    optimiser = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=fused or None)
    # leave it to the scaler, if there is one, to unscale gradients: Lightning cannot clip them else, and with bf16,
    # where nothing is scaled, refuses to all the same
    optimiser.__dict__["_step_supports_amp_scaling"] = False
    return optimiser


def lr_factor(
    schedule: Schedule, total_steps: int, *, warmup_steps: int = 0, drop_at: float = 0.8, floor: float = 1e-3
) -> Callable[[int], float]:
    """Factor on the learning rate at each optimiser step.

    Args:
        schedule: ``step`` multiplies by 0.1 at ``drop_at`` of the training; ``cosine`` falls to ``floor``;
            ``constant`` stays at 1.
        total_steps: Optimiser steps of the whole training.
        warmup_steps: Linear rise over the first steps.
        drop_at: Fraction of the training after which ``step`` drops (0.8 = epoch 40 of 50).
        floor: Last factor of ``cosine``.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if schedule == "constant":
            return 1.0
        if schedule == "step":
            return 1.0 if step < drop_at * total_steps else 0.1
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


# ----------------------------------------------------------------------------------------------------------------------
# The end of a training at convergence.


class StopOnConvergence(Callback):
    """Ends the training once the mean loss of an epoch has hardly changed several times in a row.

    Lightning's own EarlyStopping waits for a logged number to stop improving by an absolute amount; trainings log the
    loss of single steps, which says little. This compares whole epochs, by a fraction. Source: US 11,544,507 (the
    update is repeated until the total loss converges).

    Args:
        tolerance: largest change of the mean, as a fraction of the epoch's before, that counts as none.
        patience: how many such epochs in a row.

    Raises:
        ValueError: a tolerance that is not positive, a patience below 1.
    """

    def __init__(self, tolerance: float = 1e-3, patience: int = 3) -> None:
        if not tolerance > 0:
            raise ValueError(f"tolerance must be above 0, got {tolerance}; 0.001 is a thousandth of the loss")
        if patience < 1:
            raise ValueError(f"patience must be at least 1 epoch, got {patience}")
        self.tolerance, self.patience = tolerance, patience
        self._last = math.nan
        self._calm = 0
        self._sum: Tensor | float = 0.0
        self._count = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:  # noqa: ANN401
        """Add the batch's loss, without waiting for the device."""
        self._sum = self._sum + outputs["loss"].detach()
        self._count += 1

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare with the epoch before; all processes see the same mean, and decide alike."""
        here = torch.as_tensor(self._sum / max(self._count, 1), device=pl_module.device)
        mean = float(trainer.strategy.reduce(here, reduce_op="mean"))
        self._sum, self._count = 0.0, 0
        calm = abs(mean - self._last) <= self.tolerance * abs(self._last)
        self._calm = self._calm + 1 if calm else 0
        self._last = mean
        if self._calm >= self.patience:
            LOG.info("The mean loss changed by at most %g in %d epochs: stopped", self.tolerance, self.patience)
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training goes on with; a resumed epoch counts from where it was."""
        return {"last": self._last, "calm": self._calm, "sum": float(self._sum), "count": self._count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self._last, self._calm = state_dict["last"], state_dict["calm"]
        self._sum, self._count = state_dict["sum"], state_dict["count"]

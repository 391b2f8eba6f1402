"""Stop a training when its loss has converged: the mean loss of each epoch in, the end of the training out.

Lightning's own EarlyStopping waits for a logged number to stop improving by an absolute amount; trainings log the loss
of single steps, which says little. This compares whole epochs, by a fraction. Source: seed 004 (the update is repeated
until the total loss converges); specs/heads.md 1.4, step 4.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

LOG = logging.getLogger(__name__)


class StopOnConvergence(Callback):
    """Ends the training once the mean loss of an epoch has hardly changed several times in a row.

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

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
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

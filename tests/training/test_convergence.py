"""The end of a training by its losses: after how many epochs, across a resume, in two processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from simdetr.training.optimisation import StopOnConvergence


class Scripted(pl.LightningModule):
    """Its losses are the batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return batch.mean() + 0.0 * self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class Epochs(pl.LightningDataModule):
    """Two batches per epoch, whose mean is the next of the given numbers."""

    def __init__(self, means):
        super().__init__()
        self.means = means

    def train_dataloader(self):
        mean = self.means[min(self.trainer.current_epoch, len(self.means) - 1)]
        return DataLoader(torch.tensor([0.5 * mean, 1.5 * mean]))


def epochs_run(folder, means, callback, max_epochs=20, **options):
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[callback],
        enable_checkpointing=False,
    )
    trainer.fit(Scripted(), datamodule=Epochs(means), **options)
    return trainer


@pytest.mark.parametrize(
    ("means", "settings", "epochs"),
    [
        # the fifth, sixth and seventh epochs change by less than a thousandth
        ([9.0, 5.0, 4.0, 3.0, 3.001, 2.999, 3.0, 3.0], {}, 7),
        # the change is counted in a row: the sixth epoch's is not small
        ([9.0, 3.0, 3.001, 3.002, 3.02, 3.02, 3.02, 3.02], {}, 8),
        ([9.0, 5.0, 4.0, 3.0, 3.001, 2.999], {"patience": 1}, 5),
        ([9.0, 5.0, 4.0, 3.9, 3.8, 3.7], {"tolerance": 0.05}, 6),
        # a loss that rises has not converged, as it would have for one that waits for improvement
        ([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.1, 2.2], {}, 16),
    ],
)
def test_stops_when_the_mean_loss_stands_still(tmp_path, means, settings, epochs):
    trainer = epochs_run(tmp_path, means, StopOnConvergence(**settings))
    assert trainer.current_epoch == epochs


def test_a_resumed_training_stops_where_it_would_have(tmp_path):
    means = [9.0, 5.0, 3.0, 3.001, 2.999, 3.0, 3.0, 3.0]
    whole = epochs_run(tmp_path, means, StopOnConvergence())
    first = epochs_run(tmp_path, means, StopOnConvergence(), max_epochs=5)
    first.save_checkpoint(tmp_path / "half.ckpt")
    second = epochs_run(tmp_path, means, StopOnConvergence(), ckpt_path=str(tmp_path / "half.ckpt"))
    assert whole.current_epoch == second.current_epoch == 6


def test_all_processes_look_at_their_common_mean():
    """What this one sees stands still, but the mean of all does not."""
    seen = iter([5.0, 4.0, 3.0, 2.0, 2.0, 2.0, 2.0])
    strategy = SimpleNamespace(reduce=lambda here, reduce_op: torch.tensor(next(seen)))
    trainer = SimpleNamespace(strategy=strategy, should_stop=False)
    module = SimpleNamespace(device=torch.device("cpu"))
    callback = StopOnConvergence()
    stops = []
    for _ in range(7):
        callback.on_train_batch_end(trainer, module, {"loss": torch.tensor(1.0)}, None, 0)
        callback.on_train_epoch_end(trainer, module)
        stops.append(trainer.should_stop)
    assert stops == [False] * 6 + [True]


def test_bad_settings():
    with pytest.raises(ValueError, match="tolerance must be above 0, got 0"):
        StopOnConvergence(tolerance=0.0)
    with pytest.raises(ValueError, match="patience must be at least 1 epoch, got 0"):
        StopOnConvergence(patience=0)


def test_a_config_names_it(recipe, tmp_path):
    """A detector whose loss does not change: two epochs show it."""
    made = recipe(
        "--trainer.max_steps=30",
        "--model.lr=0",
        "--model.backbone_lr=0",
        "--trainer.callbacks=StopOnConvergence",
        "--trainer.callbacks.tolerance=0.9",
        "--trainer.callbacks.patience=1",
    )
    training = made.training(tmp_path)
    training.trainer.fit(training.model, datamodule=training.datamodule)
    assert training.trainer.current_epoch == 2 and training.trainer.global_step == 12

"""A training tells of itself in lines."""

from __future__ import annotations

from itertools import count, pairwise

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from simdetr.app.run_files import RunFiles
from simdetr.app.training_log import ZEROS, TrainingLog


class Line(pl.LightningModule):
    """Learns nothing much, and logs what it is told to."""

    def __init__(self, loss):
        super().__init__()
        self.layer, self.value = torch.nn.Linear(1, 1), loss

    def training_step(self, batch, index):
        loss = self.layer(batch).sum() * 0 + self.value
        self.log("train/loss", loss)
        self.log("train/giou", torch.tensor(float("nan")))
        return loss

    def validation_step(self, batch, index):
        self.log("val/AP", 0.25)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def fit(tmp_path, loss, every_s=0.0, steps=15):
    data = DataLoader(torch.ones(5, 1), batch_size=1)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        callbacks=[TrainingLog(str(tmp_path), every_s)],
    )
    trainer.fit(Line(loss), data, data)
    return RunFiles(tmp_path).told()


def test_steps_losses_rates_and_scores_are_told(tmp_path):
    rows = fit(tmp_path, 2.0)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 16)) and {row["total_steps"] for row in rows} == {15}
    assert steps[0]["loss"] == 2.0 and steps[0]["losses"] == {"giou": None} and steps[0]["lr"] == 0.5
    assert all(row["memory"] > 0 and row["seconds_per_step"] >= 0 for row in steps)
    assert [row["scores"] for row in rows if "scores" in row] == [{"AP": 0.25}] * 3
    assert not any("loss has been 0" in row.get("message", "") for row in rows)


def test_a_loss_of_nothing_is_warned_of(tmp_path):
    rows = [row for row in fit(tmp_path, 0.0) if "loss" in row]
    warned = [row["step"] for row in rows if "the loss has been 0" in row.get("message", "")]
    assert warned == list(range(ZEROS + 1, 16))


def test_lines_come_now_and_then_and_at_the_end(tmp_path):
    assert [row["step"] for row in fit(tmp_path, 1.0, every_s=1000) if "loss" in row][-1:] == [15]
    assert len([row for row in RunFiles(tmp_path).told() if "loss" in row]) <= 2


def test_a_long_training_tells_ever_more_rarely(tmp_path, monkeypatch):
    ticks = count(step=20)  # a step takes 20 s
    monkeypatch.setattr("simdetr.app.training_log.time.monotonic", lambda: float(next(ticks)))
    steps = [row["step"] for row in fit(tmp_path, 2.0, every_s=20.0, steps=100) if "loss" in row]
    gaps = [after - before for before, after in pairwise(steps)]
    assert steps[:20] == list(range(1, 21)) and steps[-1] == 100
    assert max(gaps[:20]) == 1 and min(gaps[-5:-1]) >= 3

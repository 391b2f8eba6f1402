"""A training tells of itself in lines."""

from __future__ import annotations

from itertools import count, pairwise

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from simdetr.app.run_files import RunFiles
from simdetr.app.training_log import ZEROS, TrainingLog
from simdetr.training.train import ResumePoint


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


@pytest.mark.parametrize(("batches", "kept"), [(5, 6), (1, 5)])
def test_a_training_that_is_to_pause_keeps_its_step_and_ends(tmp_path, batches, kept):
    """After the last batch of an epoch too, where there is a moment for it only at the end of the epoch."""
    files = RunFiles(tmp_path)
    point = ResumePoint(tmp_path / "resume.ckpt", 1000)

    class AskedFor(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == kept - 1:
                files.pause.touch()

    data = DataLoader(torch.ones(batches, 1), batch_size=1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_steps=15, **quiet, callbacks=[point, TrainingLog(str(tmp_path)), AskedFor()])
    with pytest.raises(SystemExit):
        trainer.fit(Line(2.0), data, data)
    assert not files.pause.is_file()
    assert torch.load(point.path, weights_only=True)["global_step"] == kept
    assert (files.told()[-1]["message"], files.told()[-1]["done"]) == (f"paused at step {kept}", kept)


def test_steps_losses_rates_and_scores_are_told(tmp_path):
    rows = fit(tmp_path, 2.0)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 16)) and {row["total"] for row in rows} == {15}
    assert all("loss" in row or "scores" in row for row in rows if "step" in row)  # the page shows those alone
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

from __future__ import annotations

import logging

import pytest
from rich.console import Console

from simdetr.training import training_bar
from simdetr.training.train import train
from simdetr.training.training_bar import TrainingProgress, scores_text, total_steps


def test_losses_come_first():
    metrics = {"v_num": 3, "val/AP": 0.12345, "train/loss": 12.3456}
    assert scores_text(metrics) == "loss 12.3 AP 0.123"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--trainer.max_steps=3", "--trainer.max_epochs=-1"), 3),
        (("--trainer.max_steps=3", "--trainer.max_epochs=50"), 3),
        (("--trainer.max_steps=-1", "--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=2"), 4),
    ],
)
def test_a_training_shows_steps_and_losses(recipe, tmp_path, monkeypatch, capsys, options, expected):
    monkeypatch.setattr(training_bar, "Console", lambda stderr: Console(stderr=True, force_terminal=True, width=80))
    made = recipe("--trainer.enable_progress_bar=true", "--data.label_fraction=0.5", *options)
    training = made.training(tmp_path)
    train(training, tmp_path)
    assert total_steps(training.trainer) == expected
    shown = capsys.readouterr().err
    last = [line for line in shown.splitlines() if "training" in line][-1]
    assert f"{expected}/{expected}" in last
    assert "loss " in last and "steps/s" in last
    assert "-2" not in shown


def test_a_training_in_a_pipe_tells_its_losses(recipe, tmp_path, monkeypatch, caplog, capsys):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(TrainingProgress.__init__, "__defaults__", (0.0,))
    made = recipe("--trainer.enable_progress_bar=true", "--trainer.max_steps=2", "--trainer.max_epochs=-1")
    train(made.training(tmp_path), tmp_path)
    lines = [record.message for record in caplog.records if record.message.startswith("training: ")]
    assert [line.partition(" steps, ")[0] for line in lines] == ["training: 1 of 2", "training: 2 of 2"]
    assert all("loss " in line and " left" in line for line in lines)
    assert "Epoch" not in capsys.readouterr().err


def test_own_bars_and_none_are_respected(recipe, tmp_path):
    from pytorch_lightning.callbacks import TQDMProgressBar

    def bars(*options):
        return [type(bar) for bar in recipe(*options).training(tmp_path).trainer.callbacks if hasattr(bar, "disable")]

    assert bars("--trainer.enable_progress_bar=false") == []
    own = '--trainer.callbacks=[{"class_path": "pytorch_lightning.callbacks.TQDMProgressBar"}]'
    assert bars("--trainer.enable_progress_bar=true", own) == [TQDMProgressBar]

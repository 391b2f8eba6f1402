from __future__ import annotations

import logging

import pytest
from rich.console import Console

from simdetr.training import progress
from simdetr.training.progress import PaceLog, scores_text, total_steps
from simdetr.training.train import train


def test_a_pipe_sees_nothing(capsys):
    with progress.image_progress("relabelling", 4) as advance:
        advance(4)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_counts_and_rate(monkeypatch, capsys):
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(stderr=True, force_terminal=True, width=100))
    with progress.image_progress("relabelling", 4) as advance:
        advance(1)
        advance(3)
    shown = capsys.readouterr().err
    assert "relabelling" in shown
    assert "4/4" in shown
    assert "images/s" in shown


@pytest.fixture
def clock(monkeypatch):
    """A clock that every look moves by ten seconds."""
    ticks = iter(range(0, 10**9, 10))
    monkeypatch.setattr("simdetr.training.progress.time.monotonic", lambda: float(next(ticks)))


def test_elsewhere_a_line_tells_count_rate_and_time_left(clock, caplog):
    caplog.set_level(logging.INFO)
    pace = PaceLog("training", "steps", 1000, begun=500, every_s=30)
    for done in (505, 510, 515, 520):  # half a step per second
        pace.tell(done, "loss 2.31")
    assert [record.message for record in caplog.records] == [
        "training: 515 of 1,000 steps, 0.5 steps/s, 0:16:10 left, loss 2.31"
    ]
    PaceLog("training", "steps", None, every_s=0).tell(5)
    assert caplog.records[-1].message == "training: 5 steps, 0.5 steps/s"


def test_images_are_told_elsewhere(clock, caplog):
    caplog.set_level(logging.INFO)
    with progress.image_progress("relabelling", 8) as advance:
        for _ in range(4):
            advance(2)
    assert [record.message for record in caplog.records] == ["relabelling: 6 of 8 images, 0.2 images/s, 0:00:10 left"]


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
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(stderr=True, force_terminal=True, width=80))
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
    monkeypatch.setattr(progress.TrainingProgress.__init__, "__defaults__", (0.0,))
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

from __future__ import annotations

import logging

import pytest
from rich.console import Console

from simdetr.training import progress
from simdetr.training.progress import PaceLog


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

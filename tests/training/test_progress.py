from __future__ import annotations

from rich.console import Console

from simdetr.training import progress


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

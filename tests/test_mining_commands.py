"""`simdetr mine`: its preview leaves proposals alone, and neither needs a config."""

from __future__ import annotations

import json

import pytest

from simdetr.commands.main import main
from simdetr.mining.store import ProposalStore
from simdetr.reports import preview_page

SMALL = "--mining.image_size 64".split()


def mine(*words):
    main(["mine", *map(str, words), *SMALL])


def refused(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        mine(*words)
    assert caught.value.code == 1
    return " ".join(capsys.readouterr().err.split())


def test_preview_prints_and_writes_and_stores_no_proposals(scenes, tmp_path, capsys):
    run = tmp_path / "run"
    truth = scenes / "instances.json"
    mine("--images", scenes, "--out", run, "--preview", 50, "--truth", truth, "--num-ranks", 2)
    said = capsys.readouterr().out
    for expected in ("12 of 12 mined", "images/s", "2 processes", "AR@1 10 25 100", str(run / "preview/index.html")):
        assert expected in said
    assert [path.name for path in run.iterdir()] == ["preview"]
    record = json.loads((run / "preview" / "preview.json").read_text(encoding="utf-8"))
    assert record["images"]["previewed"] == record["recall"]["images"] == 12
    assert record["settings"]["mining"]["image_size"] == 64
    assert "Recall" in (run / "preview" / "index.html").read_text(encoding="utf-8")


def test_preview_beside_a_mined_run_changes_nothing_of_it(scenes, tiny_config, tmp_path, capsys):
    mine("--images", scenes, "--out", tmp_path)  # without a config
    assert len(ProposalStore(tmp_path / "proposals")) == 12
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "proposals").iterdir()}
    mine("--images", scenes, "--out", tmp_path, "--config", tiny_config, "--preview", 3, "--mining.seed", 7)
    assert "3 of 12 mined" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "proposals").iterdir()} == before


def test_the_record_comes_back_from_python(scenes, tmp_path):
    record = preview_page.preview(scenes, tmp_path, count=2, options=["--mining.image_size=64"])
    assert record == json.loads((tmp_path / "preview" / "preview.json").read_text(encoding="utf-8"))
    assert record["recall"] is None and record["images"]["previewed"] == 2


def test_mistakes_are_one_line(scenes, tmp_path, capsys, monkeypatch):
    words = ["--images", scenes, "--out", tmp_path / "run"]
    assert "preview: expected at least 1 image, got 0" in refused(capsys, *words, "--preview", 0)
    assert "truth: expected --preview" in refused(capsys, *words, "--truth", scenes / "instances.json")
    assert "encoder: expected a folder" in refused(capsys, *words, "--preview", 2, "--encoder", "resnet5")
    assert "num_ranks: expected at least 1" in refused(capsys, *words, "--preview", 2, "--num-ranks", 0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "leave torchrun or srun out" in refused(capsys, *words, "--preview", 2)
    assert not (tmp_path / "run").exists()

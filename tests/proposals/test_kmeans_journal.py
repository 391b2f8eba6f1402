import json
import logging

import pytest
import torch
from safetensors import safe_open

from simdetr.mining.kmeans import Iteration, Journal

HISTORY = (Iteration(0, 12.5, 1, 0.25), Iteration(1, 1 / 3, 0, 0.2))


def test_what_was_kept_comes_back_exactly(tmp_path):
    journal = Journal(tmp_path / "new" / "journal.safetensors", "these rows")
    assert journal.restore("C=3") is None
    centroids = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    journal.keep(centroids + 1, HISTORY[:1], "C=3")
    journal.keep(centroids, HISTORY, "C=3")
    restored, history = journal.restore("C=3")
    assert torch.equal(restored, centroids) and history == HISTORY
    assert [path.name for path in journal.path.parent.iterdir()] == ["journal.safetensors"]
    with safe_open(journal.path, framework="np") as file:  # others can read it
        assert json.loads(file.metadata()["history"])[1]["inertia"] == 1 / 3


@pytest.mark.parametrize(("data", "settings"), [("other rows", "C=3"), ("these rows", "C=4")])
def test_other_data_or_settings_begin_anew(tmp_path, caplog, data, settings):
    Journal(tmp_path / "j.safetensors", "these rows").keep(torch.zeros(3, 4), HISTORY, "C=3")
    with caplog.at_level(logging.INFO):
        assert Journal(tmp_path / "j.safetensors", data).restore(settings) is None
    assert "of other regions or settings; the clustering begins anew" in caplog.text


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "pickle", "without notes"])
def test_a_damaged_file_begins_anew(tmp_path, caplog, damage):
    journal = Journal(tmp_path / "j.safetensors", "these rows")
    journal.keep(torch.zeros(30, 40), HISTORY, "C=3")
    whole = journal.path.read_bytes()
    if damage == "pickle":
        torch.save({"centroids": torch.zeros(30, 40)}, journal.path)
    elif damage == "without notes":
        journal.path.write_bytes(whole.replace(b'"history"', b'"hisTory"'))
    else:
        journal.path.write_bytes({"empty": b"", "cut": whole[:-100], "text": b"centroids" * 99}[damage])
    assert journal.restore("C=3") is None
    assert "cannot be read" in caplog.text and "begins anew" in caplog.text


def test_a_full_disk_leaves_the_last_state(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "j.safetensors")
    journal.keep(torch.ones(2, 2), HISTORY[:1], "C=2")

    def full(tensors, path, notes):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("simdetr.mining.kmeans.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        journal.keep(torch.zeros(2, 2), HISTORY, "C=2")
    assert torch.equal(journal.restore("C=2")[0], torch.ones(2, 2))
    assert len(list(tmp_path.iterdir())) == 1


def test_without_a_path_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = []
    journal = Journal(tell=told.append)
    journal.keep(torch.zeros(2, 2), HISTORY, "C=2")
    journal.report(HISTORY[0])
    assert journal.restore("C=2") is None and told == [HISTORY[0]] and not list(tmp_path.iterdir())

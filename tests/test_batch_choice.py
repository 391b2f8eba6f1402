"""``--auto-batch`` from the command line to the run folder, and again when the run is resumed."""

from __future__ import annotations

import json

import pytest
import yaml

from simdetr import pipeline
from simdetr.commands.main import main
from simdetr.recipe import Recipe, fit_to_device, is_chosen
from simdetr.training import auto_batch
from simdetr.training.run_folder import RunFolder, RunMismatchError


def settings(folder):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return config["data"]["batch_size"], config["model"]["lr"], config["model"]["backbone_lr"]


@pytest.fixture
def searches(monkeypatch):
    """How often a batch size was looked for; four images fit."""
    calls = []

    def search(training):
        calls.append(training)
        return {"batch_size": 4, "device": "cpu", "size_hw": [64, 80]}

    monkeypatch.setattr(auto_batch, "largest_batch", search)
    return calls


def test_fine_tuning_keeps_its_batch_when_resumed(tiny_config, scenes, tmp_path, searches):
    out = tmp_path / "run"
    arguments = ["finetune", f"--images={scenes}", f"--labels={scenes / 'instances.json'}", f"--out={out}"]
    arguments += [f"--config={tiny_config}", "--auto-batch"]
    main(arguments)
    # two images and 1e-3 in the recipe
    assert settings(out) == (4, 2e-3, 2e-3)
    stored = (out / "detector" / "config.json").read_text()
    main(arguments)
    assert len(searches) == 1 and (out / "detector" / "config.json").read_text() == stored
    with pytest.raises(RunMismatchError, match=r"data\.batch_size is 4 there, 2 asked"):
        pipeline.finetune(scenes, scenes / "instances.json", out, (tiny_config,))


def test_pretraining_looks_after_mining(tiny_config, scenes, tmp_path, searches):
    out = tmp_path / "run"
    for _ in range(2):
        pipeline.pretrain(scenes, out, (tiny_config,), auto_batch="sqrt")
        size, lr, backbone_lr = settings(out)
        assert (size, lr, backbone_lr) == (4, pytest.approx(1e-3 * 2**0.5), pytest.approx(1e-3 * 2**0.5))
    (training,) = searches
    assert len(training.datamodule.labels) == 12 and training.datamodule.labels.stage == 0
    assert json.loads((out / "auto_batch.json").read_text())["scaling"] == "sqrt"


def test_nothing_happens_unless_asked(tiny_config, tmp_path, searches):
    recipe, run = Recipe((str(tiny_config),)), RunFolder(tmp_path)
    assert fit_to_device(recipe, run, False) is recipe
    assert not searches and not is_chosen(run)

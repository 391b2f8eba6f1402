"""`simdetr fit` goes on where it was stopped, as every other training does."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from simdetr.commands.fit import FitCLI
from simdetr.training.detection_task import DetectionTask
from simdetr.training.run_folder import RESUME, RunMismatchError


@pytest.fixture
def fit(scenes, tiny_config):
    def run(root, *options):
        data = (f"--data.images={scenes}", f"--data.labels={scenes / 'instances.json'}", "--trainer.max_steps=4")
        every = ("--self_training.checkpoint_every_steps=2", f"--trainer.default_root_dir={root}")
        FitCLI(["fit", f"--config={tiny_config}", *data, *every, *options])
        return load_file(root / "detector" / "model.safetensors")

    return run


def test_a_killed_fit_goes_on_and_ends_as_if_it_had_not_been(fit, tmp_path, monkeypatch):
    whole = fit(tmp_path / "whole")
    steps = []
    after = DetectionTask.on_before_zero_grad

    def dying(self, optimizer):
        steps.append(self.global_step)
        if len(steps) == 4:
            raise RuntimeError("killed")
        return after(self, optimizer)

    monkeypatch.setattr(DetectionTask, "on_before_zero_grad", dying)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "killed")
    point = tmp_path / "killed" / "checkpoints" / RESUME
    assert point.is_file() and not (tmp_path / "killed" / "detector").exists()
    with pytest.raises(RunMismatchError, match=r"model\.lr is 0\.001 there, 0\.5 asked"):
        fit(tmp_path / "killed", "--model.lr=0.5")
    again = fit(tmp_path / "killed")
    assert len(steps) < 4 + 4  # it did not begin anew
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert not point.exists()  # the same command is a new training


def test_a_point_without_its_settings_is_not_gone_on_from(fit, tmp_path):
    """As older versions left it at the end of a training: of which, nobody knows."""
    whole = fit(tmp_path / "whole")
    point = tmp_path / "older" / "checkpoints" / RESUME
    point.parent.mkdir(parents=True)
    point.write_bytes(b"of another training")
    again = fit(tmp_path / "older")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_without_a_folder_of_its_own_nothing_is_kept_in_mind(fit, scenes, tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = (f"--data.images={scenes}", f"--data.labels={scenes / 'instances.json'}")
    FitCLI(["fit", f"--config={tiny_config}", *data, "--trainer.max_steps=1"])
    assert not (tmp_path / "checkpoints" / "config.yaml").exists()

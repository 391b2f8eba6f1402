"""What the doctor says about the devices."""

import pytest
import torch

from simdetr.commands import devices as acceleration
from simdetr.commands import main as cli
from simdetr.detectors import deformable_attention
from simdetr.detectors.deformable_attention import ENVIRONMENT_VARIABLE


@pytest.fixture(autouse=True)
def _only_a_cpu(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_names_what_is_used_and_why_not_the_others():
    lines = acceleration.summary().splitlines()
    assert lines[0].startswith(f"torch {torch.__version__}")
    assert lines[0].endswith(f"devices: cpu ({torch.get_num_threads()} threads)")
    assert lines[1] == "deformable attention on cpu: rows"
    assert lines[2].startswith("  triton: cannot be used: ")
    assert lines[3:] == ["  grid_sample: can be used too"]


@pytest.mark.parametrize(
    ("failure", "chosen", "triton"),
    [(None, "triton", None), ("Triton does not work here (no compiler)", "grid_sample", "no compiler")],
)
def test_a_gpu_has_its_own_lines(monkeypatch, failure, chosen, triton):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Imaginary 100")
    monkeypatch.setattr(deformable_attention.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(deformable_attention, "_triton_failure", lambda index: failure)
    lines = acceleration.summary().splitlines()
    assert lines[0].endswith("cuda:0 (Imaginary 100)")
    own = lines[lines.index(f"deformable attention on cuda:0: {chosen}") :]
    assert "  rows: cannot be used: it is written for the CPU, not for cuda" in own
    assert sum("triton: cannot be used" in line for line in own) == (triton is not None)
    if triton:
        assert any(triton in line for line in own)


def test_a_choice_from_outside_is_named(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "grid_sample")
    assert f"deformable attention on cpu: grid_sample (set by {ENVIRONMENT_VARIABLE})" in acceleration.summary()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cuda")
    assert f"deformable attention on cpu: none: {ENVIRONMENT_VARIABLE} must be one of" in acceleration.summary()


def test_doctor_prints_it_after_the_images(scenes, capsys):
    cli.main(["doctor", str(scenes)])
    printed = capsys.readouterr().out
    assert printed.index("nothing here would stop a run") < printed.index("deformable attention on cpu: rows")

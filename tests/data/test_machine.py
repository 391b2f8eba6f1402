"""What the machine decides: waiting and number of OpenMP's threads before torch is loaded, loader processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from simdetr.data import machine
from simdetr.data.machine import cores, default_workers, prepare_openmp

PROBE = """
import os, sys
class Probe:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch finds", os.environ.get("OMP_WAIT_POLICY"), file=sys.stderr)
            sys.meta_path.remove(self)
sys.meta_path.insert(0, Probe())
"""
STARTS = {
    "python -m": "import runpy; runpy.run_module('simdetr', run_name='__main__')",
    "command": "from simdetr.commands.main import main; main()",  # what the installed script does
}


@pytest.mark.parametrize(
    ("start", "own", "expected"),
    [("python -m", None, "PASSIVE"), ("command", None, "PASSIVE"), ("command", "ACTIVE", "ACTIVE")],
)
def test_threads_wait_passively_before_torch_is_imported(start, own, expected, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if own is None else {"OMP_WAIT_POLICY": own}
    words = ["doctor", str(tmp_path / "nothing")]
    code = f"{PROBE}\nsys.argv = ['simdetr', *{words!r}]\n{STARTS[start]}"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert f"torch finds {expected}\n" in result.stderr, result.stderr


def test_a_call_of_main_leaves_the_environment_alone(monkeypatch):
    from simdetr.commands.main import main

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "OMP_WAIT_POLICY" not in os.environ


@pytest.mark.parametrize(
    ("before", "busy", "expected"),
    [
        ({}, False, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({}, True, {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "3"}),
        ({"OMP_NUM_THREADS": "4"}, True, {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "4"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, False, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"OMP_WAIT_POLICY": ""}, False, {"OMP_WAIT_POLICY": ""}),
    ],
)
def test_a_thread_is_spared_on_a_busy_machine(monkeypatch, before, busy, expected):
    monkeypatch.setattr(machine, "cores", lambda: 4)
    prepare_openmp(environment := dict(before), busy)
    assert environment == expected


def test_busy_is_what_is_busy_now_and_before(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for load, percent, expected in ((3.5, 90.0, True), (3.5, 10.0, False), (0.5, 90.0, False)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        monkeypatch.setattr("psutil.cpu_percent", lambda interval, percent=percent: percent)
        assert machine.is_busy() is expected


def test_loader_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 16)
    assert default_workers("cpu", {}) == 0
    assert default_workers("cuda:1", {}) == 8
    assert default_workers("cuda", {"LOCAL_WORLD_SIZE": "4"}) == 3
    assert default_workers("cuda", {"SLURM_NTASKS_PER_NODE": "32"}) == 0
    assert cores() >= 1


def test_a_gpu_is_looked_for_where_a_driver_left_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    (tmp_path / "null").touch()
    assert not machine.may_have_gpu(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert machine.may_have_gpu(tmp_path)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert machine.may_have_gpu(tmp_path / "nothing")

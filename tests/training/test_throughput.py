from __future__ import annotations

import pytest

from simdetr.training import throughput
from simdetr.training.throughput import OF_THE_MACHINE, Throughput


def test_speed_follows_the_machine_unless_it_is_set(monkeypatch):
    monkeypatch.setattr(throughput, "default_workers", lambda device: 0 if device == "cpu" else 7)
    on_cpu = {"device": "cpu", "batch_size": 8, "num_workers": 0, "precision": "fp32"}
    assert OF_THE_MACHINE.on("cpu", 1000) == on_cpu
    assert OF_THE_MACHINE.on("cuda:1", 1000) == on_cpu | {"device": "cuda:1", "batch_size": 16, "num_workers": 7}
    assert OF_THE_MACHINE.on("cuda", 40)["num_workers"] == 2  # three batches: two to read ahead
    assert OF_THE_MACHINE.on("cuda", 0)["num_workers"] == 0
    own = Throughput(batch_size=3, num_workers=5, precision="bf16")
    assert own.on("cpu", 1) == {"device": "cpu", "batch_size": 3, "num_workers": 5, "precision": "bf16"}
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        Throughput(batch_size=0)
    with pytest.raises(ValueError, match="num_workers: expected 0 or more, got -1"):
        Throughput(num_workers=-1)

import json
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from simdetr.mining.kmeans import from_first, gather, process_group, rank, sum_over_ranks, world_size


def test_one_process_is_a_group_of_itself(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group("cpu"):
        assert not dist.is_initialized()
        assert (world_size(), rank(), gather("a"), from_first("b")) == (1, 0, ["a"], "b")
        assert sum_over_ranks(torch.ones(2)).tolist() == [1, 1]


def _talk(place, port, folder):
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(place), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with process_group("cpu"):
        heard = {"size": world_size(), "rank": rank(), "first": from_first(f"word of {place}")}
        with process_group("cpu"):  # joined already
            heard["gathered"] = gather([place])
        heard["sum"] = sum_over_ranks(torch.tensor([1.0, place])).tolist()
    heard["left"] = not dist.is_initialized()
    (folder / f"{place}.json").write_text(json.dumps(heard))


@pytest.mark.dist
def test_two_processes_hear_each_other(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_talk, args=(port, tmp_path), nprocs=2)
    alike = {"size": 2, "first": "word of 0", "gathered": [[0], [1]], "sum": [2, 1], "left": True}
    assert [json.loads((tmp_path / f"{place}.json").read_text()) for place in (0, 1)] == [
        alike | {"rank": place} for place in (0, 1)
    ]

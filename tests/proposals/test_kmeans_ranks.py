import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from simdetr.proposals.kmeans_ranks import from_first, gather, process_group, rank, sum_over_ranks, world_size


def test_one_process_is_a_group_of_itself(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group("cpu"):
        assert not dist.is_initialized()
        assert (world_size(), rank(), gather("a"), from_first("b")) == (1, 0, ["a"], "b")
        assert sum_over_ranks(torch.ones(2)).tolist() == [1, 1]


def _talk(place, port):
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(place), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with process_group("cpu"):
        assert (world_size(), rank()) == (2, place)
        with process_group("cpu"):  # joined already
            assert gather([place]) == [[0], [1]]
        assert from_first(f"word of {place}") == "word of 0"
        assert sum_over_ranks(torch.tensor([1.0, place])).tolist() == [2, 1]
    assert not dist.is_initialized()


@pytest.mark.dist
def test_two_processes_hear_each_other():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_talk, args=(port,), nprocs=2)

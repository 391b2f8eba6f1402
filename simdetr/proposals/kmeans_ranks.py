"""What the ranks of a clustering tell each other; every function also answers where there is only one process.

In: values of this process. Out: the values of all, through ``torch.distributed`` (gloo, or nccl on GPUs).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Ranks of the process group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's place in the group, 0 without one."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(value: Tensor) -> Tensor:
    """Add up a tensor in place."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def gather(value: T) -> list[T]:
    """The values of all ranks, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """The first rank's value."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


@contextmanager
def process_group(device: str | torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, for a while; nothing happens in a single process or within a group.

    Args:
        device: of the tensors that will be added up.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(torch.device(device))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()

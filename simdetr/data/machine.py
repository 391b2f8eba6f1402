"""This machine in; how many cores, threads and loader processes to use on it, out. Imports nothing heavy.

OpenMP's threads spin while they wait for each other, at the end of every operation. On a busy machine a spinning thread
holds the core that the one it waits for would need: a training beside other work comes nearly to a halt. So the
``simdetr`` command asks for passive waiting before torch, and OpenMP with it, is loaded.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

LOG = logging.getLogger(__name__)
In = TypeVar("In")
Out = TypeVar("Out")
WAITING, THREADS = "OMP_WAIT_POLICY", "OMP_NUM_THREADS"
BUSY = 0.75
"""Part of all cores that a busy machine has at work."""
GPU_FILES = ("nvidia*", "nvhost*", "nvgpu*", "kfd", "dxg")
"""What stands in /dev on Linux where there is a GPU that torch can use: NVIDIA's, its small boards', AMD's, WSL's."""
MOST_WORKERS = 8
"""Loader processes that a default takes at most: each holds batches in memory."""


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def is_busy() -> bool:
    """Whether other work keeps most of this machine's cores busy, over the last minute and now."""
    try:
        minute = os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has none
        return False
    # the load alone lags behind: it also tells of a command that has just ended
    return minute >= BUSY * (os.cpu_count() or 1) and psutil.cpu_percent(interval=0.2) >= 100 * BUSY


def default_workers(device: str = "cuda", environment: Mapping[str, str] = os.environ) -> int:
    """Processes that decode images for one that computes: on GPUs the cores that are its share, less one.

    Args:
        device: Where the computing is done. On a CPU the cores are its own: loader processes would take turns with it.
        environment: ``LOCAL_WORLD_SIZE`` (torchrun) or ``SLURM_NTASKS_PER_NODE`` say how many processes share the
            machine; a lone process has all of it.
    """
    if device.partition(":")[0] == "cpu":
        return 0
    processes = environment.get("LOCAL_WORLD_SIZE") or environment.get("SLURM_NTASKS_PER_NODE") or "1"
    share = cores() // int(processes) if processes.isdigit() and int(processes) else cores()
    return min(MOST_WORKERS, max(0, share - 1))


def prepare_openmp(environment: MutableMapping[str, str] = os.environ, busy: bool | None = None) -> None:
    """Set how OpenMP's threads wait and how many there are; what the user has set stays. Call it before torch is there.

    It is ``OMP_WAIT_POLICY=PASSIVE`` and, on a machine that is ``busy``, an ``OMP_NUM_THREADS`` that spares a core.
    """
    environment.setdefault(WAITING, "PASSIVE")
    available = cores()
    if THREADS in environment or available == 1 or not (is_busy() if busy is None else busy):
        return
    environment[THREADS] = str(available - 1)
    LOG.info("the machine is busy: computing on %d of %d cores; set %s to choose", available - 1, available, THREADS)


def may_have_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether it is worth asking torch for a GPU: True unless this is Linux and no driver of one is there."""
    return sys.platform != "linux" or any(any(devices.glob(name)) for name in GPU_FILES)


def default_device() -> str:
    """The GPU if there is one; of several processes on a machine (``LOCAL_RANK``) each takes its own."""
    if "torch" not in sys.modules and not may_have_gpu():
        return "cpu"  # what does not compute is spared half a gigabyte
    import torch  # here, because this module must be there before torch

    if not torch.cuda.is_available():
        return "cpu"
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    return "cuda" if local_rank is None else f"cuda:{int(local_rank) % torch.cuda.device_count()}"


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as torch calls it.
        title: as its maker does.
        memory_total: bytes.
        memory_used: bytes, by whatever process.
    """

    name: str
    title: str
    memory_total: int
    memory_used: int


def gpus() -> list[Gpu]:
    """The GPUs of this machine; torch is loaded to look, and holds some memory of each."""
    import torch  # as above

    found = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found.append(Gpu(f"cuda:{number}", torch.cuda.get_device_name(number), total, total - free))
    return found


def in_order(
    work: Callable[[In], Out],
    items: Iterable[In],
    threads: int,
    ahead: int = 0,
    prepare: Callable[[], object] | None = None,
) -> Generator[Out, None, None]:
    """Results in the order of the items, worked out by threads; these end with the generator.

    For work that leaves Python's lock alone most of the time: products of matrices, reading and decompressing files.

    Args:
        work: From an item to its result.
        items: Asked for as they are needed.
        threads: 0 works when a result is asked for.
        ahead: Results that are in the making or wait beside the one that is asked for; at least ``threads``.
        prepare: Called by each thread as it starts.
    """
    if not threads:
        yield from map(work, items)
        return
    begun: deque[Future[Out]] = deque()
    pool = ThreadPoolExecutor(threads, initializer=prepare)
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) > max(ahead, threads):
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)

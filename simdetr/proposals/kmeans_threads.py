"""Work and items in, results in the order of the items out, made by threads a few items ahead of who asks.

For work that leaves Python's lock alone most of the time: products of matrices, reading and decompressing files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

In = TypeVar("In")
Out = TypeVar("Out")


def in_order(work: Callable[[In], Out], items: Iterable[In], threads: int) -> Iterator[Out]:
    """Results in order; at most ``threads`` items are in the making or wait to be taken.

    Each thread's torch operations stay on its own core. Several threads that do one item each never wait for one
    another, where several threads of one small operation do at its end, which costs most on a busy machine.
    """
    intra_op = torch.get_num_threads()
    begun: deque[Future[Out]] = deque()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for item in items:
                begun.append(pool.submit(work, item))
                if len(begun) > threads:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
    finally:
        torch.set_num_threads(intra_op)  # threads that others start later are not meant

"""Two ways of doing the same, taking turns in one process: their times and the ratio of neighbours."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def compare_in_turns(
    ours: Callable[[], object], theirs: Callable[[], object], device: str, repeats: int
) -> dict[str, Any]:
    """Milliseconds of both and how many times as long theirs takes, by wall clock and by CPU time of all threads.

    The ratio is the median of the ratios of neighbours, which other work on the machine disturbs alike. The first pair
    warms up and is not counted.
    """
    times: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for _ in range(repeats + 1):
        times.append((_clocked(ours, device), _clocked(theirs, device)))
    result: dict[str, Any] = {"repeats": repeats}
    for clock, name in enumerate(("wall", "cpu")):
        pairs = [(a[clock], b[clock]) for a, b in times[1:]]
        result[name] = {
            "ours_ms": round(1000 * statistics.median(a for a, _ in pairs), 2),
            "theirs_ms": round(1000 * statistics.median(b for _, b in pairs), 2),
            "ratio": round(statistics.median(b / a for a, b in pairs), 3),
            "ratios": [round(b / a, 3) for a, b in pairs],
        }
    return result


def _clocked(work: Callable[[], object], device: str) -> tuple[float, float]:
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    _wait(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()

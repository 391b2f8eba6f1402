"""Trainings in, each done once, by whichever process is free.

A task is done when its file is there. Processes hold a task by a lock of the operating system, so that of one that
dies, however it does, the task is free again. On a machine without a GPU, small detectors train faster side by side,
one thread each, than one after another with all threads.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from filelock import FileLock, Timeout

from simdetr.data.machine import THREADS, cores, default_device
from simdetr.mining.processes import end_with_parent
from simdetr.training.run_folder import leads

LOG = logging.getLogger(__name__)
MOST_BY_DEFAULT = 4
"""Trainings that run side by side unless more are asked for: each takes a gigabyte or so."""
_POLL_S = 0.5


@dataclass(frozen=True)
class Task:
    """One training.

    Attributes:
        name: For people.
        done: The file that is there when it is done.
        needs: A file that must be there before it can begin.
    """

    name: str
    done: Path
    needs: Path | None = None

    @property
    def is_ready(self) -> bool:
        """Whether what it needs is there."""
        return self.needs is None or self.needs.is_file()


def turns(tasks: Sequence[Task], wait_s: float = 2.0) -> Iterator[Task]:
    """Tasks that are not done, one after another; while the caller does one, no other process gets it.

    Ends when all are done, also by others. The ranks of one training go through the tasks together, and only the first
    of them holds locks.
    """
    left = [task for task in tasks if not task.done.is_file()]
    if not leads():
        yield from left
        return
    while left:
        for task in filter(lambda task: task.is_ready, left):
            task.done.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(task.done.with_suffix(".lock"), thread_local=False)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            try:
                if task.done.is_file():
                    continue
                yield task
                if not task.done.is_file():
                    raise AssertionError(f"{task.name} has left no {task.done}")
            finally:
                lock.release()
            break
        else:
            time.sleep(wait_s)
        left = [task for task in tasks if not task.done.is_file()]


class Told:
    """Logs every task once, when it is done, whoever does it."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks, self.begun = tasks, time.perf_counter()
        self._said = {task.done for task in tasks if task.done.is_file()}
        self._before = len(self._said)
        LOG.info("%d of %d trainings are done", self._before, len(tasks))

    def __call__(self) -> None:
        """Look what is done."""
        for task in self.tasks:
            if task.done not in self._said and task.done.is_file():
                self._said.add(task.done)
                done, passed = len(self._said), (time.perf_counter() - self.begun) / 60
                left = passed / (done - self._before) * (len(self.tasks) - done)
                LOG.info("%d of %d done: %s; about %.0f min left", done, len(self.tasks), task.name, left)


def device_in_words() -> str:
    """What this process trains on: the GPU's name, or how many threads."""
    device = torch.device(default_device())
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type}, {torch.get_num_threads()} {'thread' if torch.get_num_threads() == 1 else 'threads'}"


def default_processes(tasks: int, devices: object) -> int:
    """Trainings to run side by side on this machine: one per core on a CPU, and one on GPUs or of several ranks."""
    if (
        tasks < 2
        or not leads()
        or "WORLD_SIZE" in os.environ
        or default_device() != "cpu"
        or devices not in (1, "auto")
    ):
        return 1
    return max(1, min(MOST_BY_DEFAULT, cores(), tasks))


def in_processes(code: str, order: dict[str, Any], count: int, logs: Path, tell: Callable[[], None]) -> None:
    """Start processes on this machine that share the tasks, and wait for them.

    Args:
        code: What each runs; it asks for its order by `told`.
        order: Plain values.
        count: Processes; each gets its share of the cores.
        logs: Folder of what they say.
        tell: Called twice a second, to say what is done.

    Raises:
        RuntimeError: One of them failed; with its last words.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        started = [
            stack.enter_context(_process(code, order, max(1, cores() // count), logs / f"process{index}.log"))
            for index in range(count)
        ]
        while any(process.poll() is None for process in started):
            time.sleep(_POLL_S)
            tell()
            if any(process.poll() for process in started):
                break
        failed = [index for index, process in enumerate(started) if process.poll()]
    tell()
    if failed:
        path = logs / f"process{failed[0]}.log"
        words = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise RuntimeError(
            f"a training failed: {words[-1] if words else 'it said nothing'} (all of it is in {path}). The same "
            "command goes on with what is finished"
        )


@contextmanager
def _process(code: str, order: dict[str, Any], threads: int, log: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with this block, and when this process dies, because its stdin closes."""
    environment = os.environ | {THREADS: str(threads)}
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=said, stderr=said, env=environment, text=True
        )
        assert process.stdin is not None
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(f"{json.dumps(order)}\n")
                process.stdin.flush()
            yield process
        finally:
            process.kill()
            process.wait()
            with suppress(BrokenPipeError):
                process.stdin.close()


def told() -> dict[str, Any]:
    """In a process of `in_processes`: its order; from now on it ends with the one that started it."""
    order: dict[str, Any] = json.loads(sys.stdin.readline())
    Thread(target=end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    return order

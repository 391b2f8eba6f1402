"""A small fine-tuning alone and beside busy processes: the command as it is, with threads that spin, with one thread.

The quickstart's detector on drawn scenes, the whole `simdetr finetune` command, start included. The busy processes do
nothing but count; there are twice as many as cores. Alone and beside them take turns, and the bar is on the medians.

python -m benchmarks.loaded_machine
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, write_result
from simdetr.commands.quickstart import FINETUNE_CONFIG, PRETRAIN_CONFIG, SCENE_SIZE_HW
from simdetr.data.machine import THREADS, WAITING, cores
from simdetr.data.scenes import render_scenes

BAR = 4.0
"""Times as long beside the busy processes as alone, at most."""
ARMS: dict[str, dict[str, str]] = {
    "as it is": {},
    "spinning": {WAITING: ""},  # set, so that it stays, and as good as not set for OpenMP
    "passive, all threads": {WAITING: "PASSIVE", THREADS: str(cores())},
    "passive, one thread": {WAITING: "PASSIVE", THREADS: "1"},
}
NUM_IMAGES = 48


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep so many processes counting while the block runs."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def fine_tuning_seconds(scenes: Path, out: Path, steps: int, extra: dict[str, str]) -> float:
    """Wall-clock time of one fine-tuning in a process of its own."""
    unset = {name: value for name, value in os.environ.items() if name not in (WAITING, THREADS)}
    command = [sys.executable, "-m", "simdetr", "finetune", "--images", str(scenes), "--labels"]
    command += [str(scenes / "instances.json"), "--out", str(out), "--config", str(PRETRAIN_CONFIG)]
    command += ["--config", str(FINETUNE_CONFIG), f"--trainer.max_steps={steps}", "--data.num_workers=0"]
    start = time.perf_counter()
    subprocess.run(command, env=unset | extra, check=True, capture_output=True)
    return time.perf_counter() - start


def measure(arms: list[str], steps: int, repeats: int, num_busy: int) -> list[dict[str, Any]]:
    """Seconds of every arm alone and beside the busy processes, and their ratio."""
    times: dict[str, tuple[list[float], list[float]]] = {arm: ([], []) for arm in arms}
    with tempfile.TemporaryDirectory() as name:
        scenes = Path(name) / "scenes"
        render_scenes(scenes, NUM_IMAGES, SCENE_SIZE_HW, seed=0)
        for repeat in range(repeats):
            for arm, (alone, beside) in times.items():
                out = Path(name) / f"{arm}-{repeat}"
                alone.append(fine_tuning_seconds(scenes, out / "alone", steps, ARMS[arm]))
                with busy_processes(num_busy):
                    beside.append(fine_tuning_seconds(scenes, out / "beside", steps, ARMS[arm]))
    return [_row(arm, alone, beside) for arm, (alone, beside) in times.items()]


def _row(arm: str, alone: list[float], beside: list[float]) -> dict[str, Any]:
    ratio = statistics.median(beside) / statistics.median(alone)
    return {
        "arm": arm,
        "alone_s": [round(seconds, 1) for seconds in alone],
        "beside_s": [round(seconds, 1) for seconds in beside],
        "ratio": round(ratio, 2),
        "met": ratio <= BAR,
    }


def main() -> None:
    """Measure and write ``results/loaded_machine.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--busy", type=int, default=2 * cores(), help="processes beside it")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--name", default="loaded_machine", help="of the result file")
    arguments = parser.parse_args()
    result: dict[str, object] = {
        "rows": measure(arguments.arms, arguments.steps, arguments.repeats, arguments.busy),
        "steps": arguments.steps,
        "busy_processes": arguments.busy,
        "bar": BAR,
        "environment": environment(("torch", "pytorch-lightning")),
    }
    print(write_result(arguments.name, result).read_text())


if __name__ == "__main__":
    main()

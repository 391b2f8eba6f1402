"""How long commands take to begin, against the state of before: wall-clock and user-CPU time of whole processes.

In turns with a checkout of the other state, which its files are compiled for by a first run that is not counted. The
CPU time hardly depends on what else the machine does. `predict` looks at one image of 480 × 640 px with a Deformable
DETR with a ResNet-50, with new weights: all of it, from the start of the process to the file.

git worktree add ../before COMMIT
python -m benchmarks.start_up --before ../before --commit COMMIT
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, write_result
from simdetr.data.scenes import render_scenes
from simdetr.detectors import DeformableDETR
from simdetr.exchange.weights import class_path_of, save_detector

HERE = Path(__file__).parents[1]
BARS_S = {"simdetr --help": 0.3, "simdetr predict (one image)": 4.0}
"""Wall-clock seconds on an idle machine, at most."""
HELPS = ("", "predict", "pretrain", "autolabel", "convert")
"""Commands whose help is asked for; the first is ``simdetr`` itself."""


def make_detector(folder: Path) -> None:
    """A detector folder with new weights."""
    detector = DeformableDETR(num_classes=8, backbone="resnet50")
    config = {
        "class_path": class_path_of(detector),
        "init_args": detector.init_args,
        "categories": [{"id": number, "name": f"kind {number}"} for number in range(8)],
        "image_settings": {"short_side": 480, "max_side": 640},
    }
    save_detector(detector, config, folder)


def run_once(tree: Path, words: list[str]) -> tuple[float, float]:
    """Wall-clock and user-CPU seconds of one command of a checkout."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "simdetr", *words]
    with subprocess.Popen(
        command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} in {tree}: {said.decode()}")
    return time.perf_counter() - start, used.ru_utime


def in_turns(before: Path, words: list[str], repeats: int) -> dict[str, Any]:
    """Medians of both states, seconds."""
    times: dict[str, list[tuple[float, float]]] = {"before": [], "now": []}
    for _ in range(repeats + 1):
        for name, tree in (("before", before), ("now", HERE)):
            times[name].append(run_once(tree, words))
    row: dict[str, Any] = {}
    for name, runs in times.items():
        walls, cpus = zip(*runs[1:], strict=True)
        row[name] = {"wall_s": round(statistics.median(walls), 3), "cpu_s": round(statistics.median(cpus), 3)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the state to compare with")
    parser.add_argument("--commit", default="", help="its name, for the record")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    made = environment(("simdetr", "torch", "torchvision", "timm", "pytorch-lightning", "jsonargparse"))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_detector(folder / "detector")
        render_scenes(folder / "scenes", 1, (480, 640), seed=0)
        (image,) = (folder / "scenes" / "images").iterdir()
        work = ["predict", "--images", str(image), "--checkpoint", str(folder / "detector")]
        commands = {f"simdetr {help_of} --help".replace("  ", " "): [*help_of.split(), "--help"] for help_of in HELPS}
        commands["simdetr predict (one image)"] = [*work, "--out", str(folder / "found.json")]
        for command, words in commands.items():
            row = {"command": command, **in_turns(args.before, words, args.repeats), "bar_s": BARS_S.get(command)}
            rows.append(row)
            print(row, flush=True)
    print(write_result("start_up", {"rows": rows, "before": args.commit, "repeats": args.repeats, "environment": made}))


if __name__ == "__main__":
    main()

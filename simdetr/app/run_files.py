"""The folder of a run: what the server asks for, what the worker tells and leaves; all of it plain JSON and Parquet.

The server knows detectors and checkpoints by their files alone, so that it need not import what trains them.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from simdetr.data.storage import atomic_path, write_json

RESUME = "resume.ckpt"
STEPS = "steps"
"""The unit of a training that has begun its steps."""
FIRST = 4
"""Images of the first part of a run, which somebody may be waiting for."""
_DETECTOR = ("config.json", "model.safetensors")


@dataclass(frozen=True)
class RunFiles:
    """Where a run keeps things."""

    path: Path

    @property
    def job(self) -> Path:
        """What is to be done."""
        return self.path / "job.json"

    @property
    def progress(self) -> Path:
        """A JSON line for everything there is to tell."""
        return self.path / "progress.jsonl"

    @property
    def outcome(self) -> Path:
        """How it ended; it is there once the run has."""
        return self.path / "outcome.json"

    @property
    def log(self) -> Path:
        """What the worker said."""
        return self.path / "worker.log"

    @property
    def images(self) -> Path:
        """The list of the images."""
        return self.path / "images.parquet"

    @property
    def labels(self) -> Path:
        """The labels that it works on."""
        return self.path / "labels.parquet"

    @property
    def parts(self) -> Path:
        """Detections, a part for some images each."""
        return self.path / "parts"

    def part(self, number: int) -> Path:
        """One of them."""
        return self.parts / f"part-{number:06d}.parquet"

    @property
    def make_way(self) -> Path:
        """It is there where a run that can wait is to let others through."""
        return self.path / "make_way"

    @property
    def pause(self) -> Path:
        """It is there where a training is to keep its step and end; gone once the step is kept."""
        return self.path / "pause"

    @property
    def training(self) -> Path:
        """The folder of its training."""
        return self.path / "training"

    @property
    def autolabel(self) -> Path:
        """The folder of few labels to many."""
        return self.path / "autolabel"

    @property
    def order(self) -> Path:
        """The order that it made."""
        return self.path / "order.csv"

    def detector(self) -> Path | None:
        """The detector that it trained, if it has."""
        for folder in (self.training / "detector", self.autolabel / "retrained" / "detector"):
            if has_detector(folder):
                return folder
        return None

    def checkpoint(self) -> Path | None:
        """The point from which a training can be resumed, if there is one."""
        found = [path for path in self.path.glob(f"**/checkpoints/{RESUME}") if path.is_file()]
        return max(found, key=lambda path: path.stat().st_mtime, default=None)

    def tell(self, **facts: Any) -> None:  # noqa: ANN401
        """Append a line of progress."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.progress.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 2), **facts}) + "\n")

    def told(self, since: int = 0) -> list[dict[str, Any]]:
        """Lines of progress from a number on; one that is being written is left for the next time."""
        if not self.progress.is_file():
            return []
        with self.progress.open(encoding="utf-8") as file:
            lines = [line for line in file if line.endswith("\n")]
        return [{"n": number, **_read_line(line)} for number, line in enumerate(lines) if number >= since]

    def end(self, **facts: Any) -> None:  # noqa: ANN401
        """Say how the run ended."""
        write_json(self.outcome, facts)

    def ended(self) -> dict[str, Any] | None:
        """How the run ended, None if it has not."""
        if not self.outcome.is_file():
            return None
        found: dict[str, Any] = json.loads(self.outcome.read_text(encoding="utf-8"))
        return found


def parts_of(total: int, size: int) -> list[range]:
    """Positions of the images of each part of a run: a few, then ``size`` at a time."""
    starts = [0, *range(FIRST, total, size)]
    return [range(start, min(stop, total)) for start, stop in zip(starts, [*starts[1:], total], strict=True)]


def _read_line(line: str) -> dict[str, Any]:
    """A line of progress; two that a kill has run together are none."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def has_detector(folder: Path) -> bool:
    """Whether a folder holds a whole detector."""
    return all((folder / name).is_file() for name in _DETECTOR)


def detector_in(path: Path) -> Path | None:
    """The detector that a path means: itself, or the last one of a run's folder; None where there is none."""
    if path.is_file() or has_detector(path):
        return path.absolute()
    stages = sorted(path.glob("stage[0-9]*"), key=lambda stage: (len(stage.name), stage.name), reverse=True)
    folders = (path / "detector", *(stage / "detector" for stage in stages))
    return next((folder.absolute() for folder in folders if has_detector(folder)), None)


def has_clusters(path: Path) -> bool:
    """Whether a folder holds the labels of a pretraining, be it no more than what was mined and clustered."""
    return any(path.glob("stage*/labels.parquet"))


def write_image_list(paths: Sequence[Path | str], target: Path) -> None:
    """Write a list of images that ``open_images`` reads; any path can stand in it."""
    with atomic_path(target) as temporary:
        pq.write_table(pa.table({"path": pa.array([str(path) for path in paths], pa.string())}), temporary)


def read_image_list(path: Path) -> list[str]:
    """The paths of such a list."""
    found: list[str] = pq.read_table(path)["path"].to_pylist()
    return found


def read_order(path: Path) -> list[dict[str, str]]:
    """The rows of an order as ``simdetr label-order`` writes it."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))

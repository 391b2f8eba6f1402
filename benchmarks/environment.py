"""What a number was measured on: hardware, versions and the command, written beside it as JSON."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
DATA = Path(os.environ.get("SIMDETR_DATA", Path(__file__).parents[2] / "shared" / "data"))


def environment(packages: tuple[str, ...]) -> dict[str, object]:
    """Processor, cores, threads, versions, date and command line of this run."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join(["python", *_script(), *map(shlex.quote, _relative(sys.argv[1:]))]),
    }


def write_result(name: str, result: dict[str, object]) -> Path:
    """Write ``results/<name>.json`` and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


def _script() -> list[str]:
    spec = sys.modules["__main__"].__spec__
    return _relative(sys.argv[:1]) if spec is None else ["-m", spec.name]


def _relative(arguments: list[str]) -> list[str]:
    root = str(Path(__file__).parents[1]) + os.sep
    return [argument.removeprefix(root) for argument in arguments]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()

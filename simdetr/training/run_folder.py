"""Where a run keeps things, and which of its steps are done.

In: a folder. Out: paths of its parts and ``steps.jsonl`` with one line per finished step. A step is done when its
output exists; outputs appear whole or not at all, so the same command again goes on where the last one stopped.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning_utilities.core.rank_zero import rank_zero_only

from simdetr.data.atomic_files import atomic_path
from simdetr.training.weights import is_saved

LOG = logging.getLogger(__name__)


class RunMismatchError(ValueError):
    """The folder holds a run made with other settings."""


@dataclass
class StepResult:
    """What a step reports when it ends: how many of what."""

    count: int = 0
    what: str = ""


@dataclass(frozen=True)
class RunFolder:
    """Layout of one run; see design.md section 4."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def proposals(self) -> Path:
        """The proposal store."""
        return self.path / "proposals"

    @property
    def steps(self) -> Path:
        """One JSON line per finished step."""
        return self.path / "steps.jsonl"

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.path / "report" / "index.html"

    def stage(self, stage: int) -> Path:
        """Folder of a stage; 0 holds the mined labels."""
        return self.path / f"stage{stage}"

    def labels(self, stage: int) -> Path:
        """Labels that a stage produced."""
        return self.stage(stage) / "labels.parquet"

    def detector(self, stage: int) -> Path:
        """Detector that a stage trained."""
        return self.stage(stage) / "detector"

    def has_detector(self, stage: int) -> bool:
        """Whether a stage's detector is complete."""
        return is_saved(self.detector(stage))

    def stages(self) -> list[int]:
        """Numbers of the stages that have begun, ascending."""
        return sorted(int(path.name.removeprefix("stage")) for path in self.path.glob("stage[0-9]*") if path.is_dir())

    def claim(self, config_yaml: str, settled: Sequence[str] | None = None) -> None:
        """Keep the configuration, or check that it is the one this run was started with.

        Args:
            config_yaml: The resolved configuration.
            settled: Sections that finished work depends on; only they must not differ. All, when left out.

        Raises:
            RunMismatchError: They differ; the message lists the settings.
        """
        if self.config.is_file():
            self._check_settled(yaml.safe_load(self.config.read_text(encoding="utf-8")), config_yaml, settled)
            if self.config.read_text(encoding="utf-8") == config_yaml:
                return
        with atomic_path(self.config) as temporary:
            temporary.write_text(config_yaml, encoding="utf-8")

    def _check_settled(self, before: object, config_yaml: str, settled: Sequence[str] | None) -> None:
        there, asked = dict(_leaves(before)), dict(_leaves(yaml.safe_load(config_yaml)))
        differing = [
            f"{name} is {there.get(name, 'not set')!r} there, {asked.get(name, 'not set')!r} asked"
            for name in sorted({*there, *asked})
            if (name in there, there.get(name)) != (name in asked, asked.get(name))
            and (settled is None or any(f"{name}.".startswith(f"{section}.") for section in settled))
        ]
        if differing:
            raise RunMismatchError(
                f"out: {self.path} holds a run with other settings ({'; '.join(differing)}). Repeat the first command "
                "to resume it, or choose another out."
            )

    @contextmanager
    def step(self, name: str, what: str) -> Iterator[StepResult]:
        """Time a step and write its line when it ends without an error."""
        result = StepResult(what=what)
        LOG.info("%s ...", name)
        start = time.perf_counter()
        yield result
        seconds = time.perf_counter() - start
        LOG.info("%s: %s %s in %.1f s", name, f"{result.count:,}", what, seconds)
        row = {"name": name, "seconds": round(seconds, 3), "count": result.count, "what": what}
        if not leads():
            return
        with self.steps.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def detector_folder(path: str | Path) -> Path:
    """The detector a path means: itself, or the last one of a run folder.

    Raises:
        FileNotFoundError: The path does not exist or holds no detector.
    """
    path = Path(path)
    if path.is_file() or is_saved(path):
        return path
    run = RunFolder(path)
    trained = [path / "detector", *(run.detector(stage) for stage in reversed(run.stages()))]
    for folder in trained:
        if is_saved(folder):
            return folder
    raise FileNotFoundError(
        f"checkpoint: expected a run folder, a detector folder or a checkpoint file, got {path}, which "
        f"{'holds none' if path.exists() else 'does not exist'}."
    )


def leads() -> bool:
    """Whether this process is the one of its run that writes files; True where there is only one."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def made_once(output: Path, make: Callable[[], object], *, poll_s: float = 1.0) -> None:
    """Let one process of the run make a file that does not exist yet; the others wait for it."""
    if output.is_file():
        return
    if leads():
        make()
        return
    while not output.is_file():
        time.sleep(poll_s)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Dotted names and values of nested settings; a list is one value."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value

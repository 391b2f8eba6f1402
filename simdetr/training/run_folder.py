"""Where a run keeps things, and which of its steps are done.

In: a folder. Out: paths of its parts and ``steps.jsonl`` with one line per finished step. A step is done when its
output exists; outputs appear whole or not at all, so the same command again goes on where the last one stopped.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from simdetr.data.atomic_files import atomic_path

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

    def last_stage(self) -> int:
        """Number of the last stage whose labels or detector exist.

        Raises:
            FileNotFoundError: The folder holds no stage.
        """
        stages = [int(path.name.removeprefix("stage")) for path in self.path.glob("stage[0-9]*") if any(path.iterdir())]
        if not stages:
            raise FileNotFoundError(f"run: {self.path} holds no stage; expected the --out of `simdetr pretrain`.")
        return max(stages)

    def claim(self, config_yaml: str) -> None:
        """Keep the configuration, or check that it is the one this run was started with.

        Raises:
            RunMismatchError: It differs; the message lists the lines.
        """
        if not self.config.is_file():
            with atomic_path(self.config) as temporary:
                temporary.write_text(config_yaml, encoding="utf-8")
            return
        before, now = self.config.read_text(encoding="utf-8").splitlines(), config_yaml.splitlines()
        if before != now:
            was = [line.strip() for line in before if line not in now]
            is_now = [line.strip() for line in now if line not in before]
            raise RunMismatchError(
                f"out: {self.path} holds a run with other settings (there: {'; '.join(was) or 'nothing more'}; asked: "
                f"{'; '.join(is_now) or 'nothing more'}). Repeat the first command to resume it, or choose another out."
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
        with self.steps.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

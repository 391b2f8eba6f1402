"""Where a run keeps things, and which of its steps are done.

In: a folder. Out: paths of its parts and ``steps.jsonl`` with one line per finished step. A step is done when its
output exists; outputs appear whole or not at all, so the same command again goes on where the last one stopped.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from lightning_utilities.core.rank_zero import rank_zero_only

from simdetr.data.class_paths import current
from simdetr.data.label_files import read_labels
from simdetr.data.labels import Labels
from simdetr.data.storage import atomic_path
from simdetr.exchange.weights import is_saved

LOG = logging.getLogger(__name__)
FREE = (
    "data.num_workers",
    "inference.batch_size",
    "inference.num_workers",
    "mining.batch_size",
    "mining.num_workers",
    "self_training.checkpoint_every_steps",
    "self_training.stages",
    "trainer.accelerator",
    "trainer.default_root_dir",
    "trainer.devices",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.logger",
    "trainer.num_nodes",
    "trainer.profiler",
    "trainer.strategy",
)
"""Settings that a started run may change: where and how the work is done, and how many stages there are.

Other devices make steps of another size, unless ``PER_STEP`` makes up for it; the data module warns of that.
"""
PER_STEP = ("data.batch_size", "trainer.accumulate_grad_batches")
"""Settings that may change as long as the images per optimiser step, of all devices, stay the same."""
LEADER_LOCK = ".leader.lock"
LEAST_WAIT_S = 5.0
"""How long the leader waits for its lock, which another process holds for a moment when it looks."""
PATIENCE_S = 60.0
"""How long the other processes look for a leader before they take it for dead."""


class RunMismatchError(ValueError):
    """The folder holds a run made with other settings."""


class RunInUseError(RuntimeError):
    """Another command works on this run."""


class LeaderLostError(RuntimeError):
    """The process of the run that writes files has died, so what the others wait for will not come."""


@dataclass
class StepResult:
    """What a step reports when it ends: how many."""

    count: int = 0


@dataclass(frozen=True)
class RunFolder:
    """Layout of one run."""

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
        """Keep the configuration, or check that it is the one this run was started with, but for what is ``FREE``.

        ``settled`` are sections that finished work depends on; only they must not differ. All, when left out. A
        RunMismatchError lists the settings that do.
        """
        if self.config.is_file():
            before = self.config.read_text(encoding="utf-8")
            self._check_settled(yaml.safe_load(current(before)), config_yaml, settled)
            if before == config_yaml:
                return
        with atomic_path(self.config) as temporary:
            temporary.write_text(config_yaml, encoding="utf-8")

    def _check_settled(self, before: object, config_yaml: str, settled: Sequence[str] | None) -> None:
        there, asked = dict(leaves(before)), dict(leaves(yaml.safe_load(config_yaml)))
        per_step = _images_per_step(asked)
        free = (*FREE, *PER_STEP) if per_step is not None and per_step == _images_per_step(there) else FREE
        differing = [
            f"{name} is {there.get(name, 'not set')!r} there, {asked.get(name, 'not set')!r} asked"
            for name in sorted({*there, *asked})
            if (name in there, there.get(name)) != (name in asked, asked.get(name))
            and (settled is None or _is_within(name, settled))
            and not _is_within(name, free)
        ]
        if differing:
            raise RunMismatchError(
                f"out: {self.path} holds a run with other settings ({'; '.join(differing)}). Repeat the first command "
                "to resume it, or choose another out."
            )

    @contextmanager
    def led(self) -> Iterator[None]:
        """Hold the leader's lock while the block runs, if this is the leader, so that the others notice its death.

        The lock is the operating system's: it ends with its process, however that dies. RunInUseError if another
        command holds it.
        """
        if not leads():
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LEADER_LOCK, thread_local=False)
        try:
            lock.acquire(timeout=LEAST_WAIT_S)
        except Timeout:
            raise RunInUseError(
                f"out: another command works on {self.path}. Wait until it ends or stop it, or choose another out."
            ) from None
        except (NotImplementedError, OSError) as error:
            LOG.warning("%s cannot be locked (%s): other processes will not notice if this one dies", self.path, error)
        try:
            yield
        finally:
            lock.release()

    def has_leader(self) -> bool:
        """Whether a process holds the leader's lock; True where locks do not work, since that cannot be known."""
        lock = FileLock(self.path / LEADER_LOCK, blocking=False)
        try:
            lock.acquire()
        except (Timeout, NotImplementedError, OSError):
            return True
        lock.release()
        return False

    def made_once(
        self, output: Path, make: Callable[[], object], *, poll_s: float = 1.0, patience_s: float = PATIENCE_S
    ) -> None:
        """Let the leader, within :meth:`led`, make a file that does not exist yet; the other processes wait for it.

        They look every ``poll_s`` seconds, and take the leader, which may begin later than they, for dead after
        ``patience_s`` without any: a LeaderLostError.
        """
        if output.is_file():
            return
        if leads():
            make()
            return
        seen = time.monotonic()
        while not output.is_file():
            if self.has_leader():
                seen = time.monotonic()
            elif time.monotonic() > seen + patience_s and not output.is_file():
                raise LeaderLostError(
                    f"{output} was to be made by the first process of this run, which has died or was never there; its "
                    "own messages tell why. Start all processes again: the run goes on with what is finished."
                )
            time.sleep(poll_s)

    def labels_once(self, stage: int, make: Callable[[], object]) -> Labels:
        """The labels of a stage, which the leader makes if they do not exist yet; see :meth:`made_once`."""
        self.made_once(self.labels(stage), make)
        return read_labels(self.labels(stage))

    @contextmanager
    def step(self, name: str, what: str) -> Iterator[StepResult]:
        """Time a step and write its line when it ends without an error."""
        result = StepResult()
        LOG.info("%s ...", name)
        start = time.perf_counter()
        yield result
        seconds = time.perf_counter() - start
        LOG.info("%s: %s %s in %.1f s", name, f"{result.count:,}", what, seconds)
        if leads():
            row = {"name": name, "seconds": round(seconds, 3), "count": result.count, "what": what}
            with self.steps.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def settled(self) -> tuple[str, ...] | None:
        """Sections of the config that a started pretraining cannot change, None for all; the store guards its own."""
        if not self.labels(0).is_file():
            return ()
        return None if self.stage(1).is_dir() else ("encoder", "mining", "clustering", "data.images")

    def check_classes(self, asked: int) -> None:
        """RunMismatchError unless the labels T0 have the number of pseudo-classes that is asked for."""
        there = read_labels(self.labels(0)).num_classes
        if there != asked:
            raise RunMismatchError(
                f"clustering.num_classes: {self.stage(0)} holds {there:,} pseudo-classes, {asked:,} asked. Give "
                f"--clustering.num_classes={there}, or delete that folder to cluster anew."
            )

    def is_newer_than_report(self) -> bool:
        """Whether a step was finished after the report was written, or there is no report."""
        return not self.report.is_file() or self.report.stat().st_mtime < self.steps.stat().st_mtime


def detector_folder(path: str | Path) -> Path:
    """The detector a path means: itself, or the last one of a run folder; FileNotFoundError if there is none."""
    path = Path(path)
    if path.is_file() or is_saved(path):
        return path
    run = RunFolder(path)
    for folder in (path / "detector", *map(run.detector, reversed(run.stages()))):
        if is_saved(folder):
            return folder
    raise FileNotFoundError(
        f"checkpoint: expected a run folder, a detector folder or a checkpoint file, got {path}, which "
        f"{'holds none' if path.exists() else 'does not exist'}."
    )


def leads() -> bool:
    """Whether this process is the one of its run that writes files; True where there is only one."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def _is_within(name: str, sections: Sequence[str]) -> bool:
    """Whether a dotted name is one of these sections or settings, or inside one."""
    return any(f"{name}.".startswith(f"{section}.") for section in sections)


def _images_per_step(settings: dict[str, Any]) -> int | None:
    """Images per optimiser step of all devices; None where the number of devices is left to the machine."""
    defaults = {"trainer.devices": "auto", "trainer.num_nodes": 1, "trainer.accumulate_grad_batches": 1}
    values = [(defaults | settings).get(name) for name in (*PER_STEP, "trainer.devices", "trainer.num_nodes")]
    counts = [len(value) if isinstance(value, list) else value for value in values]
    numbers = [count for count in counts if isinstance(count, int) and count > 0]
    return math.prod(numbers) if len(numbers) == len(counts) else None


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Dotted names and values of nested settings; a list is one value, and null is as good as not set.

    So an option that came later, null as long as it is not used, does not keep an older run from going on.
    """
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}" if name else str(key))
    elif value is not None:
        yield name, value

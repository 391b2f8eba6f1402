"""Where a run keeps things, and which of its steps are done.

In: a folder. Out: paths of its parts and ``steps.jsonl`` with one line per finished step. A step is done when its
output exists; outputs appear whole or not at all, so the same command again goes on where the last one stopped.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from simdetr.data.class_paths import current
from simdetr.data.label_files import read_labels
from simdetr.data.labels import Labels
from simdetr.data.storage import atomic_path, write_json
from simdetr.exchange.weights import is_saved

LOG = logging.getLogger(__name__)
FREE = (
    "data.num_workers",
    "inference.batch_size",
    "inference.num_workers",
    "mining.batch_size",
    "mining.max_unreadable",
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
OF_A_TRAINING = (
    "data.batch_size",
    "data.max_side",
    "data.short_sides",
    "model.backbone_lr",
    "model.lr",
    "model.new_lr",
    "trainer",
)
"""Settings of a stage's training that may change as long as it has no point to resume from: what fits the memory."""
OF_MINED_LABELS = ("encoder", "mining", "clustering", "data.images")
CHECKPOINTS, RESUME, BEST = "checkpoints", "resume.ckpt", "best.ckpt"
"""Folder below that of a training, and the files in it."""
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
    def contents(self) -> Path:
        """Hashes of what the inputs held when the work began, by the settings that name them."""
        return self.path / "inputs.json"

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

    def claim(self, config_yaml: str, settled: Sequence[str] | None = None, free: Sequence[str] = ()) -> None:
        """Keep the configuration of this run, or check that it is the one this run was started with, but for ``FREE``.

        ``settled`` are sections that finished work depends on; only they must not differ, but for what is ``free``.
        All, when left out. A RunMismatchError lists the settings that do; those that may are told.
        """
        if self.config.is_file():
            before = self.config.read_text(encoding="utf-8")
            self._check_settled(yaml.safe_load(current(before)), config_yaml, settled, free)
            if before == config_yaml:
                return
        with atomic_path(self.config) as temporary:
            temporary.write_text(config_yaml, encoding="utf-8")

    def _check_settled(
        self, before: object, config_yaml: str, settled: Sequence[str] | None, free: Sequence[str]
    ) -> None:
        there, asked = dict(leaves(before)), dict(leaves(yaml.safe_load(config_yaml)))
        per_step = _images_per_step(asked)
        unasked = (*FREE, *PER_STEP) if per_step is not None and per_step == _images_per_step(there) else FREE
        differing = [
            name
            for name in sorted({*there, *asked})
            if not _is_same(there.get(name), asked.get(name)) and not _is_within(name, unasked)
        ]
        refused = [
            name for name in differing if (settled is None or _is_within(name, settled)) and not _is_within(name, free)
        ]
        if refused:
            said = [
                f"{name} is {there.get(name, 'not set')!r} there, {asked.get(name, 'not set')!r} asked"
                for name in refused
            ]
            raise RunMismatchError(
                f"out: {self.path} holds a run with other settings ({'; '.join(said)}). Repeat the first command "
                "to resume it, or choose another out."
            )
        if differing and leads():
            said = [f"{name} {there.get(name, 'not set')!r} -> {asked.get(name, 'not set')!r}" for name in differing]
            LOG.info("%s goes on with other settings, of work that has not begun: %s", self.path, "; ".join(said))

    def claim_contents(self, contents: Mapping[str, str], *, begun: bool) -> None:
        """Keep hashes of what inputs hold, by the settings that name them, or check that it is what work began with.

        A run that was begun before there was such a record goes on without.

        Raises:
            RunMismatchError: Work has ``begun``, with other contents.
        """
        before: dict[str, str] = {}
        if begun:
            if not self.contents.is_file():
                return
            before = json.loads(self.contents.read_text(encoding="utf-8"))
            changed = [name for name in contents if before.get(name, contents[name]) != contents[name]]
            if changed:
                what = "labels" if any(name.endswith("labels") for name in changed) else "images"
                raise RunMismatchError(
                    f"out: {self.path} holds a training on other {what} ({', '.join(changed)} changed since). Choose "
                    "another out, or delete the folder to train anew."
                )
        write_json(self.contents, {**before, **contents}, indent=1)

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

    def settled(self, stages: int) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
        """What a started pretraining of so many stages cannot change of its config, as ``claim`` takes it.

        The store guards its own settings. Mined labels stay valid whatever the training that has left no point to
        resume from, such as one that did not fit the memory, and so does a trained stage before it.
        """
        if not self.labels(0).is_file():
            return (), ()
        waiting = [stage for stage in range(1, stages + 1) if not self.has_detector(stage)]
        if not waiting or is_begun(self.stage(waiting[0])):
            return None, ()
        return (OF_MINED_LABELS, ()) if waiting[0] == 1 else (None, OF_A_TRAINING)

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


def holds_detector(path: str | Path) -> bool:
    """Whether ``detector_folder`` finds one."""
    try:
        detector_folder(path)
    except FileNotFoundError:
        return False
    return True


def is_begun(training: Path) -> bool:
    """Whether the training of a folder has something to go on from: a resume point, or its detector."""
    return is_saved(training / "detector") or (training / CHECKPOINTS / RESUME).is_file()


def leads() -> bool:
    """Whether this process is the one of its run that writes files; True where there is only one."""
    # its import sets the rank from what the launcher has said, and takes seconds that no prediction needs
    from lightning_fabric.utilities.rank_zero import rank_zero_only

    return int(getattr(rank_zero_only, "rank", 0)) == 0


def _is_same(before: object, asked: object) -> bool:
    """Whether two values of a setting are equal, or name the same file or folder in two ways."""
    if before == asked or not isinstance(before, str) or not isinstance(asked, str):
        return before == asked
    try:
        return Path(before).samefile(asked)
    except (OSError, ValueError):  # one of them is no place on this machine
        return False


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

"""One mining job and a number of processes in, a complete proposal store out (``simdetr mine --num-ranks N``).

The processes share nothing but the store, see :mod:`simdetr.mining.miner`. This one shows the bar for all of
them and says at the end what became of each.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from threading import Thread
from typing import IO

import torch

from simdetr.data.images import open_images
from simdetr.data.machine import THREADS, cores
from simdetr.mining.miner import MiningBar, Rank, ShardClaims, begin, finish, mine, mine_free_shards
from simdetr.mining.store import ProposalStore, StoreError
from simdetr.recipe import PipelineSections, Recipe
from simdetr.training.inference import default_device

LOG = logging.getLogger(__name__)
_CODE = "from simdetr.mining.processes import work; work()"
_DETECTOR = "--model.detector=simdetr.detectors.DeformableDETR"  # the recipe wants one; mining does not use it


@dataclass(frozen=True)
class MiningJob:
    """What to mine and how, as plain values that another process can be told.

    Attributes:
        images: what ``open_images`` takes.
        out: folder or URL of the store.
        config: YAML files, later ones over earlier ones; without any the defaults.
        options: ``--section.name=value`` strings, over the files.
        device: Torch device; the GPU if there is one, each process its own.
    """

    images: str
    out: str
    config: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    device: str | None = None

    def sections(self) -> PipelineSections:
        """The settings, checked and built."""
        options = self.options if self.config else (_DETECTOR, *self.options)
        return Recipe(self.config, (f"--data.images={self.images}", *options)).sections()

    @property
    def own_device(self) -> str:
        """The device of this process: of several GPUs the one of its local rank."""
        anyone = self.device is None or (self.device == "cuda" and torch.cuda.is_available())
        return default_device() if anyone else str(self.device)

    def run(self, *, progress: bool) -> ProposalStore:
        """Mine in this process, together with others that mine into the same store."""
        sections = self.sections()
        source = open_images(self.images)
        return mine(source, sections.encoder, sections.mining, self.out, self.own_device, progress=progress)

    def run_in_ranks(self, num_ranks: int, *, progress: bool) -> ProposalStore:
        """Mine in several new processes on this machine.

        Raises:
            ValueError: if these are several processes already.
            StoreError: if a process died and the others could not do all of its work; the same call goes on.
        """
        if num_ranks < 1:
            raise ValueError(f"num_ranks: expected at least 1, got {num_ranks}")
        if Rank.from_environment().count > 1:
            raise ValueError("num_ranks: torchrun or srun has started the processes already; leave num_ranks out")
        sections = self.sections()
        store = begin(open_images(self.images), sections.encoder, sections.mining, self.out)
        shards = range(store.manifest.num_shards)
        if len(shards) < num_ranks:
            LOG.warning("%d shards for %d processes; lower mining.shard_size to employ all", len(shards), num_ranks)
        with MiningBar(store, shards, shown=progress) as bar, ExitStack() as stack:
            ranks = [stack.enter_context(_process(self, Rank(index, num_ranks), bar)) for index in range(num_ranks)]
            ends = [rank.end() for rank in ranks]
        died = "; ".join(f"process {index} {end}" for index, end in enumerate(ends) if end)
        done = len(store.written())
        if done < len(shards):
            raise StoreError(
                f"{done} of {len(shards)} shards are mined: {died or 'one is missing'}. Run the same command to go on"
            )
        if died:
            LOG.warning("%s; the others did its work", died)
        return finish(store, sections.mining.max_unreadable)


@dataclass(frozen=True)
class _Process:
    """One started process, the thread that hears of its images, and the file of its messages."""

    process: subprocess.Popen[str]
    listener: Thread
    messages: IO[str]

    def end(self) -> str:
        """Wait for its end; empty where it ended well, else what happened."""
        code = self.process.wait()
        self.listener.join()
        if code == 0:
            return ""
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        self.messages.seek(0)
        lines = [line for line in self.messages.read().splitlines() if line.strip()]
        return f"ended with code {code}: {lines[-1] if lines else 'it said nothing'}"


@contextmanager
def _process(job: MiningJob, rank: Rank, bar: MiningBar) -> Iterator[_Process]:
    """Start a process that ends with this block; it also ends when this process dies, because its stdin closes."""
    names = {"RANK": rank.index, "LOCAL_RANK": rank.index, "WORLD_SIZE": rank.count, "LOCAL_WORLD_SIZE": rank.count}
    environment = os.environ | {name: str(value) for name, value in names.items()}
    share, own = max(1, cores() // rank.count), environment.get(THREADS, "")
    environment[THREADS] = str(min(share, int(own))) if own.isdigit() else own or str(share)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as messages:
        process = subprocess.Popen(
            [sys.executable, "-c", _CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            env=environment,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        listener = Thread(target=_hear, args=(process.stdout, bar), daemon=True)
        listener.start()
        try:
            with suppress(BrokenPipeError):  # it has died already, which its end will tell
                process.stdin.write(json.dumps(asdict(job)) + "\n")
                process.stdin.flush()
            yield _Process(process, listener, messages)
        finally:
            process.kill()
            listener.join()
            process.wait()
            process.stdout.close()
            with suppress(BrokenPipeError):
                process.stdin.close()


def _hear(counts: IO[str], bar: MiningBar) -> None:
    for line in counts:
        bar.advance(int(line))


def work() -> None:
    """What a started process does: read its job, mine the shards that are free, tell how many images are done."""
    values = json.loads(sys.stdin.readline())
    job = MiningJob(**values | {name: tuple(values[name]) for name in ("config", "options")})
    Thread(target=_end_with_parent, daemon=True).start()
    counts, sys.stdout = sys.stdout, sys.stderr  # nothing but counts may get between the counts
    sections, source = job.sections(), open_images(job.images)
    store = begin(source, sections.encoder, sections.mining, job.out)

    def advance(count: int) -> None:
        counts.write(f"{count}\n")
        counts.flush()

    # Ctrl-C reaches the whole group; the parent says so
    with suppress(KeyboardInterrupt), ShardClaims(store, Rank.from_environment()) as claims:
        mine_free_shards(claims, source, sections.encoder, sections.mining, job.own_device, advance=advance)


def _end_with_parent() -> None:
    sys.stdin.read()  # returns when the other end is closed
    os._exit(1)  # at once, from a thread; what is not written yet is mined again

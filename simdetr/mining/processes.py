"""One mining job and a number of processes in, a complete proposal store out (``simdetr mine --num-ranks N``).

They share nothing but the store, see :mod:`simdetr.mining.miner`. This one shows the bar for all of them and says at
the end what became of each.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from threading import Thread
from typing import IO, Any, NamedTuple

from simdetr.data.images import ImageSource
from simdetr.data.machine import THREADS, cores
from simdetr.mining.batch import MiningConfig
from simdetr.mining.encoders import Encoder
from simdetr.mining.miner import MiningBar, Rank, ShardClaims, begin, finish, mine_free_shards
from simdetr.mining.store import ProposalStore, StoreError

LOG = logging.getLogger(__name__)


class Job(NamedTuple):
    """What to mine and how, built: the arguments of `simdetr.mining.miner.mine`; the device is this process's."""

    source: ImageSource
    encoder: Encoder
    config: MiningConfig
    out: str
    device: str


def mine_in_processes(
    job: Job, code: str, order: Mapping[str, Any], num_ranks: int, *, progress: bool
) -> ProposalStore:
    """Mine in several new processes on this machine; ``progress`` shows a bar for all of them.

    Each runs ``code``, which ends in a call of `work`, and is told ``order``, plain values to build the same job from.

    Raises:
        ValueError: if these are several processes already.
        StoreError: if a process died and the others could not do all of its work; the same call goes on.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks: expected at least 1, got {num_ranks}")
    if Rank.from_environment().count > 1:
        raise ValueError("num_ranks: torchrun or srun has started the processes already; leave num_ranks out")
    store = begin(job.source, job.encoder, job.config, job.out)
    shards = range(store.manifest.num_shards)
    if len(shards) < num_ranks:
        LOG.warning("%d shards for %d processes; lower mining.shard_size to employ all", len(shards), num_ranks)
    with MiningBar(store, shards, shown=progress) as bar, ExitStack() as stack:
        told = (code, json.dumps(order))
        ranks = [stack.enter_context(_process(*told, Rank(index, num_ranks), bar)) for index in range(num_ranks)]
        ends = [rank.end() for rank in ranks]
    died = "; ".join(f"process {index} {end}" for index, end in enumerate(ends) if end)
    done = len(store.written())
    if done < len(shards):
        raise StoreError(
            f"{done} of {len(shards)} shards are mined: {died or 'one is missing'}. Run the same command to go on"
        )
    if died:
        LOG.warning("%s; the others did its work", died)
    return finish(store, job.config.max_unreadable)


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
def _process(code: str, order: str, rank: Rank, bar: MiningBar) -> Iterator[_Process]:
    """Start a process that ends with this block; it also ends when this process dies, because its stdin closes."""
    names = {"RANK": rank.index, "LOCAL_RANK": rank.index, "WORLD_SIZE": rank.count, "LOCAL_WORLD_SIZE": rank.count}
    environment = os.environ | {name: str(value) for name, value in names.items()}
    share, own = max(1, cores() // rank.count), environment.get(THREADS, "")
    environment[THREADS] = str(min(share, int(own))) if own.isdigit() else own or str(share)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as messages:
        command, pipe = [sys.executable, "-c", code], subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=messages, env=environment, text=True)
        assert process.stdin is not None and process.stdout is not None
        counts = process.stdout

        def hear() -> None:
            for line in counts:
                bar.advance(int(line))

        listener = Thread(target=hear, daemon=True)
        listener.start()
        try:
            with suppress(BrokenPipeError):  # it has died already, which its end will tell
                process.stdin.write(f"{order}\n")
                process.stdin.flush()
            yield _Process(process, listener, messages)
        finally:
            process.kill()
            listener.join()
            process.wait()
            counts.close()
            with suppress(BrokenPipeError):
                process.stdin.close()


def work(build: Callable[[dict[str, Any]], Job]) -> None:
    """What a started process does: read its order, build the job, mine free shards, tell how many images are done."""
    order = json.loads(sys.stdin.readline())
    Thread(target=end_with_parent, daemon=True).start()
    counts, sys.stdout = sys.stdout, sys.stderr  # nothing but counts may get between the counts
    job = build(order)
    store = begin(job.source, job.encoder, job.config, job.out)

    def advance(count: int) -> None:
        counts.write(f"{count}\n")
        counts.flush()

    # Ctrl-C reaches the whole group; the parent says so
    with suppress(KeyboardInterrupt), ShardClaims(store, Rank.from_environment()) as claims:
        mine_free_shards(claims, job.source, job.encoder, job.config, job.device, advance=advance)


def end_with_parent() -> None:
    """In a thread of a started process: wait until the process that started it is gone, and go too."""
    sys.stdin.read()  # returns when the other end is closed
    os._exit(1)  # at once, from a thread; what is not written yet is mined again

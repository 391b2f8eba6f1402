"""A store in, the shards that this process shall mine out, so that processes share a store and never a shard.

In a folder that can be locked, a process locks a shard before it mines it. The lock is the operating system's: it ends
with its process, however that dies, so what a dead process began is free for the others. Every process begins with its
own share (rank, rank + ranks, ...) and then takes what is left. On other storages nothing can be locked: there its
share is all that a process takes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from simdetr.proposals.store import ProposalStore, StoreError

_LEFTOVERS = (".*.lock", ".*.tmp")


@dataclass(frozen=True)
class Rank:
    """Which one of how many processes this is.

    Attributes:
        index: from 0.
        count: processes in all.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"rank: expected 0 <= index < count, got {self.index} of {self.count}; check RANK and WORLD_SIZE"
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Rank:
        """As torchrun (``RANK``, ``WORLD_SIZE``) or srun (``SLURM_PROCID``, ``SLURM_NTASKS``) say; else alone."""
        for index, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if index in environment and count in environment:
                interactive = index == "SLURM_PROCID" and environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
                return cls() if interactive else cls(int(environment[index]), int(environment[count]))
        return cls()


class ShardClaims:
    """Claims of one process on the missing shards of a store; a context manager, which gives back what it holds.

    Args:
        store: may be in use by other processes.
        rank: decides with which shards this process begins; of those that are there it verifies the checksums.

    Attributes:
        store: the store.
        taken: shards that this process has claimed since it began.
    """

    def __init__(self, store: ProposalStore, rank: Rank) -> None:
        self.store = store
        self.taken: set[int] = set()
        self._locks: dict[int, FileLock] = {}
        lockable = isinstance(store.folder, Path)
        shards = range(store.manifest.num_shards)
        own = shards[rank.index :: rank.count]
        self._order = [*own, *(shard for shard in shards if shard not in own)] if lockable else list(own)
        self._remove_damaged(own if lockable else range(0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for shard in list(self._locks):
            self.release(shard)

    def free(self) -> Iterator[int]:
        """Claim missing shards one by one, when they are asked for, until none is free; never waits."""
        for shard in self._order:
            if not self.store.shard_path(shard).exists() and self._claim(shard):
                if self.store.shard_path(shard).exists():  # written by another while this one asked for the lock
                    self.release(shard)
                else:
                    self.taken.add(shard)
                    yield shard

    def release(self, shard: int) -> None:
        """Give back a claim; any thread may."""
        lock = self._locks.pop(shard, None)
        if lock is not None:
            lock.release()

    def _claim(self, shard: int) -> bool:
        if not isinstance(self.store.folder, Path):
            return True
        lock = FileLock(self.store.folder / f".shard-{shard:05d}.lock", blocking=False, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            return False
        except OSError as error:
            raise StoreError(
                f"cannot lock a shard in {self.store.folder}: {error}; make room or mine elsewhere"
            ) from error
        self._locks[shard] = lock
        return True

    def _remove_damaged(self, verified: range) -> None:
        """Make sure that a shard that is there is a sound one; of ``verified`` every byte is read."""
        for shard in sorted({*self._order} & {*self.store.written()}):
            if not self.store.is_sound(shard, whole=shard in verified) and self._claim(shard):
                if not self.store.is_sound(shard, whole=shard in verified):  # none has redone it meanwhile
                    self.store.shard_path(shard).unlink(missing_ok=True)
                self.release(shard)


def tidy(store: ProposalStore) -> None:
    """Remove lock files, and what killed processes left half-written, from a complete store."""
    if isinstance(store.folder, Path):
        for pattern in _LEFTOVERS:
            for leftover in store.folder.glob(pattern):
                with suppress(OSError):  # another process does the same
                    leftover.unlink()

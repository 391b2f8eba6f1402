"""Mining of a whole image source: images and a frozen encoder in, a resumable store of regions out.

Any number of processes may mine into one store, started together or not, and never the same shard. In a folder that can
be locked, a process locks a shard before it mines it. The lock is the operating system's: it ends with its process,
however that dies, so what a dead process began is free for the others. Every process begins with its own share (rank,
rank + ranks, ...) and then takes what is left. On other storages nothing can be locked: there its share is all that a
process takes. A run killed at any point goes on with the same call, and ends with the store that one uninterrupted
process writes.

Within a shard images of equal shape are batched and go through :mod:`simdetr.mining.batch`, while threads decode the
next ones and another writes the shard before. Memory does not grow with the number of images, and a row does not depend
on which process mines it.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any, Self

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from simdetr.data.images import ImageSource
from simdetr.data.quarantine import check_fraction, to_csv
from simdetr.data.storage import Location, write_whole
from simdetr.mining.batch import LoadedImage, MiningConfig, batches_of_one_shape, images_ahead, mine_pixels
from simdetr.mining.encoders import Encoder
from simdetr.mining.pace import RateColumn
from simdetr.mining.store import Manifest, ProposalRow, ProposalStore, StoreError

_log = logging.getLogger(__name__)
_PER_REGION_BYTES = 40  # beside its feature
_POLL_S, _POLL_REMOTE_S = 0.5, 5.0
_SAY_EVERY_S = 60.0
_LEFTOVERS = (".*.lock", ".*.tmp")
_LOOK_EVERY_S = 2.0
_SPEED_OVER_S = 120.0  # shards of other processes come in one piece
QUARANTINE = "quarantine.csv"


def mine(
    source: ImageSource,
    encoder: Encoder,
    config: MiningConfig,
    out: str | Location,
    device: str | torch.device = "cpu",
    progress: bool = False,
    rank: Rank | None = None,
) -> ProposalStore:
    """Mine every image of a source into a store; the same call again goes on where it stopped.

    Several processes that call this share the work; each returns when the store is complete.

    Args:
        source: the images.
        encoder: frozen; moved to ``device``.
        config: the settings.
        out: folder of the store, a path or URL; also holds ``quarantine.csv``.
        device: where encoding and clustering run.
        progress: show a bar with rate and time left, in the first process.
        rank: which one of several processes this is; by default as torchrun or SLURM say.

    Returns:
        The complete store.

    Raises:
        ValueError: if the source is empty.
        StoreError: if the store is of another run or cannot be written.
        TooManyUnreadableError: past ``max_unreadable``.
    """
    rank = rank or Rank.from_environment()
    store = begin(source, encoder, config, out)
    claims = ShardClaims(store, rank)
    with claims, MiningBar(store, claims.taken, shown=progress and rank.index == 0) as bar:
        said = time.monotonic()
        while missing := store.manifest.num_shards - len(store.written()):
            if mine_free_shards(claims, source, encoder, config, device, bar.advance):
                continue
            if time.monotonic() > said + _SAY_EVERY_S:
                _log.info("waiting for %d shards that other processes mine", missing)
                said = time.monotonic()
            time.sleep(_POLL_S if isinstance(store.folder, Path) else _POLL_REMOTE_S)
            bar.look()
    return finish(store, config.max_unreadable)


def begin(source: ImageSource, encoder: Encoder, config: MiningConfig, out: str | Location) -> ProposalStore:
    """Make the store, or find the one that is there; errors as of `mine`, or a StoreError if the disk is too small."""
    store = open_store(source, encoder, config.result_settings(), config.shard_size, out)
    written = sum(len(store.manifest.images_of(shard)) for shard in store.written())
    _check_space(store, config, len(source) - written)
    return store


def open_store(
    source: ImageSource, encoder: Encoder, settings: Mapping[str, Any], shard_size: int, out: str | Location
) -> ProposalStore:
    """The same by settings of any method, whatever room there is."""
    if not len(source):
        raise ValueError("source: expected at least one image, got none; check the folder or list")
    manifest = Manifest(
        config=settings,
        encoder=encoder.fingerprint,
        source=source.fingerprint(),
        num_images=len(source),
        shard_size=shard_size,
        region_dim=encoder.region_dim,
    )
    return ProposalStore.create(out, manifest)


def finish(store: ProposalStore, max_unreadable: float) -> ProposalStore:
    """List the unreadable images of a complete store and tidy its folder; TooManyUnreadableError as of `mine`."""
    unreadable = UnreadableImages(store, max_unreadable)
    reasons = unreadable.check()
    unreadable.write(reasons)
    if reasons:
        quarantine = store.folder / QUARANTINE
        _log.warning("%d of %d images are unreadable, see %s", len(reasons), store.manifest.num_images, quarantine)
    tidy(store)
    return store


def _check_space(store: ProposalStore, config: MiningConfig, num_images: int) -> None:
    """Stop before work starts if not even one shard fits; warn if the whole may not."""
    if not isinstance(store.folder, Path):
        return
    per_image = config.most_boxes * (2 * store.manifest.region_dim + _PER_REGION_BYTES)
    free = shutil.disk_usage(store.folder).free
    needed, one_shard = num_images * per_image, min(num_images, config.shard_size) * per_image
    if num_images and free < one_shard:
        raise StoreError(
            f"{store.folder} has {free / 1e6:.0f} MB free, a shard may take {one_shard / 1e6:.0f} MB; make room, "
            f"choose another folder or lower shard_size"
        )
    if free < needed:
        _log.warning("%s has %.1f GB free, the proposals may take %.1f GB", store.folder, free / 1e9, needed / 1e9)


def mine_free_shards(
    claims: ShardClaims,
    source: ImageSource,
    encoder: Encoder,
    config: MiningConfig,
    device: str | torch.device = "cpu",
    advance: Callable[[int], None] = lambda count: None,
) -> int:
    """Mine shard after shard until no missing one is free; returns how many.

    Arguments and errors are those of `mine`; ``advance`` hears of every image that is done.
    """
    if isinstance(encoder, nn.Module):
        encoder.to(device).eval()
    manifest = claims.store.manifest
    unreadable = UnreadableImages(claims.store, config.max_unreadable)
    mined = 0

    def write(shard: int, rows: list[ProposalRow], reasons: dict[str, str]) -> None:
        claims.store.write_shard(shard, rows, reasons)
        claims.release(shard)

    positions = (position for shard in claims.free() for position in manifest.images_of(shard))
    with load_ahead(source, positions, config, device) as loaded, ThreadPoolExecutor(1) as writer:
        writing = writer.submit(lambda: None)
        for shard, images in groupby(loaded, lambda image: source.position(image.image_id) // manifest.shard_size):
            rows, reasons = mine_rows(images, encoder, config, device, advance)
            writing.result()
            unreadable.check(reasons)
            writing = writer.submit(write, shard, rows, reasons)
            mined += 1
        writing.result()
    return mined


def load_ahead(
    source: ImageSource, positions: Iterable[int], config: MiningConfig, device: str | torch.device
) -> AbstractContextManager[Iterator[LoadedImage]]:
    """The images at some positions, decoded by threads a batch ahead."""
    threads = config.decoding_threads(device)
    return images_ahead(source, positions, config.image_size, threads, ahead=config.batch_size)


@torch.no_grad()
def mine_rows(
    images: Iterable[LoadedImage],
    encoder: Encoder,
    config: MiningConfig,
    device: str | torch.device,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[list[ProposalRow], dict[str, str]]:
    """Rows of one shard's images in their order, and the reasons by id of the unreadable ones."""
    rows: dict[int, ProposalRow] = {}
    unreadable: dict[str, str] = {}

    def readable() -> Iterator[tuple[tuple[int, LoadedImage], Tensor]]:
        for place, image in enumerate(images):
            advance(1)
            if image.pixels is None:
                unreadable[image.image_id] = image.reason
            else:
                yield (place, image), image.pixels

    for batch, pixels in batches_of_one_shape(readable(), config.batch_size):
        regions = mine_pixels(pixels.to(device), encoder, [image.size_hw for _, image in batch], config)
        for (place, image), found in zip(batch, regions, strict=True):
            rows[place] = ProposalRow(image.image_id, *image.size_hw, found)
    return [rows[place] for place in sorted(rows)], unreadable


@dataclass(frozen=True)
class Rank:
    """Which one, from 0, of how many processes this is."""

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

    The store may be in use by other processes. The rank decides with which shards this process begins; of those that
    are there it verifies the checksums. ``taken`` are the shards that it has claimed since it began.
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


class MiningBar:
    """Images done of all, images per second and time left, on stderr unless not ``shown``; a context manager.

    Of ``own`` shards the images are told one by one, by :meth:`advance`; the store is looked at for those of others.
    """

    def __init__(self, store: ProposalStore, own: Container[int], shown: bool) -> None:
        self._store, self._own, self._shown = store, own, shown
        self._begun_with = frozenset(store.written())
        self._there, self._told, self._others = self._images_of(self._begun_with), 0, 0
        self._lock = Lock()  # several threads may tell
        self._looked = time.monotonic()
        columns = (TextColumn("mining"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
        console, period = Console(stderr=True), _SPEED_OVER_S
        self._bar = Progress(*columns, console=console, disable=not shown, speed_estimate_period=period)
        self._task = self._bar.add_task("mining", total=store.manifest.num_images, completed=self._there)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.look(0)
        self._bar.stop()

    def advance(self, count: int) -> None:
        """So many more images of the own shards."""
        with self._lock:
            self._told += count
            self.look()

    def look(self, every_s: float = _LOOK_EVERY_S) -> None:
        """Show what is done, with the shards of others unless one looked at them a moment ago."""
        if not self._shown:
            return
        if time.monotonic() >= self._looked + every_s:
            new = set(self._store.written()) - self._begun_with
            self._others = self._images_of(frozenset(shard for shard in new if shard not in self._own))
            self._looked = time.monotonic()
        done = self._there + self._told + self._others
        self._bar.update(self._task, completed=min(done, self._store.manifest.num_images))

    def _images_of(self, shards: frozenset[int]) -> int:
        return sum(len(self._store.manifest.images_of(shard)) for shard in shards)


class UnreadableImages:
    """The unreadable images of a store, whoever found them; ``quarantine.csv``, and a stop past a fraction of all.

    Every process counts what the shards of all processes say, so that none needs to hear of the others; the list is put
    together from the shards once they are all there.
    """

    def __init__(self, store: ProposalStore, max_fraction: float) -> None:
        self._store, self._max_fraction = store, max_fraction
        self._known: dict[int, dict[str, str]] = {}  # by shard

    def check(self, found: Mapping[str, str] | None = None) -> dict[str, str]:
        """Reasons by id of those of all shards so far, in their order, and ``found``, of a shard not written yet.

        Raises:
            TooManyUnreadableError: there are too many; ``quarantine.csv`` lists them.
        """
        for shard in self._store.written():
            if shard not in self._known:
                self._known[shard] = self._store.unreadable([shard])
        reasons = {name: text for shard in sorted(self._known) for name, text in self._known[shard].items()}
        reasons |= found or {}
        path = self._store.folder / QUARANTINE
        try:
            check_fraction(reasons, self._store.manifest.num_images, self._max_fraction, path)
        except RuntimeError:
            self.write(reasons)
            raise
        return reasons

    def write(self, reasons: Mapping[str, str]) -> None:
        """Write ``quarantine.csv`` unless it says so already; all processes write the same."""
        path, content = self._store.folder / QUARANTINE, to_csv(reasons)

        def is_there() -> bool:
            return path.exists() and path.read_bytes() == content

        if not reasons or is_there():
            return
        try:
            write_whole(path, content)
        except OSError as error:
            if not is_there():  # else another process has written it, and tidied up this one's temporary file
                raise StoreError(f"cannot write {path}: {error}; make room and run the same command again") from error

"""Mining of a whole image source: images and a frozen encoder in, a resumable store of regions out.

Images of equal shape are batched within a shard and go through :mod:`simdetr.proposals.batch_mining`, while threads
decode the next ones; finished shards are written one by one. A run killed at any point goes on with the same call, and
ends with the store that an uninterrupted run writes.
"""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import nn

from simdetr.data.images import ImageSource
from simdetr.data.quarantine import Quarantine
from simdetr.proposals.batch_mining import MiningConfig, cluster_maps, encode, mine_batch, mine_maps
from simdetr.proposals.features import Encoder
from simdetr.proposals.image_loading import ImageLoading, LoadedImage
from simdetr.proposals.shards import ProposalRow
from simdetr.proposals.store import Manifest, ProposalStore, StoreError

__all__ = ["MiningConfig", "cluster_maps", "mine", "mine_batch", "mine_maps"]

_log = logging.getLogger(__name__)
_PER_REGION_BYTES = 40  # beside its feature


def mine(
    source: ImageSource,
    encoder: Encoder,
    config: MiningConfig,
    out: Path,
    device: str | torch.device = "cpu",
    num_workers: int = 2,
    progress: bool = False,
) -> ProposalStore:
    """Mine every image of a source into a store; the same call again goes on where it stopped.

    Args:
        source: the images.
        encoder: frozen; moved to ``device``.
        config: the settings.
        out: folder of the store; also holds ``quarantine.csv``.
        device: where encoding and clustering run.
        num_workers: threads that decode images; 0 decodes in between.
        progress: show a bar with rate and time left.

    Returns:
        The complete store.

    Raises:
        ValueError: if the source is empty.
        StoreError: if the store is of another run or cannot be written.
        TooManyUnreadableError: past ``max_unreadable``.
    """
    if not len(source):
        raise ValueError("source: expected at least one image, got none; check the folder or list")
    manifest = Manifest(
        config=config.result_settings(),
        encoder=encoder.fingerprint,
        source=source.fingerprint(),
        num_images=len(source),
        shard_size=config.shard_size,
        region_dim=encoder.region_dim,
    )
    store = ProposalStore.create(out, manifest)
    quarantine = Quarantine(store.folder / "quarantine.csv", len(source), config.max_unreadable)
    missing = store.missing_shards()
    remaining = sum(len(manifest.images_of(shard)) for shard in missing)
    _check_space(store, config, remaining)
    if isinstance(encoder, nn.Module):
        encoder.to(device).eval()
    with ExitStack() as stack:
        advance = _progress_bar(stack, len(source), remaining) if progress else _no_bar
        positions = (position for shard in missing for position in manifest.images_of(shard))
        loading = ImageLoading(source, positions, config.image_size, num_workers, ahead=config.batch_size)
        loaded = _counted(stack.enter_context(loading), advance)
        for shard in missing:
            images = islice(loaded, len(manifest.images_of(shard)))
            rows, unreadable = _mine_shard(images, encoder, config, device)
            for image_id, reason in unreadable.items():
                quarantine.add(image_id, reason)
            store.write_shard(shard, rows, list(unreadable))
    for leftover in store.folder.glob(".*.tmp"):  # of killed runs
        leftover.unlink(missing_ok=True)
    if len(quarantine):
        _log.warning("%d of %d images are unreadable, see %s", len(quarantine), len(source), quarantine.path)
    return store


@torch.no_grad()
def _mine_shard(
    images: Iterable[LoadedImage], encoder: Encoder, config: MiningConfig, device: str | torch.device
) -> tuple[list[ProposalRow], dict[str, str]]:
    """Rows of one shard's images in source order, and the reasons of the unreadable ones."""
    waiting: dict[torch.Size, list[tuple[int, LoadedImage]]] = defaultdict(list)
    rows: dict[int, ProposalRow] = {}
    unreadable: dict[str, str] = {}

    def finish(batch: list[tuple[int, LoadedImage]]) -> None:
        pixels = torch.stack([image.pixels for _, image in batch if image.pixels is not None]).to(device)
        regions = mine_maps(encode(pixels, encoder), [image.size_hw for _, image in batch], config)
        for (place, image), found in zip(batch, regions, strict=True):
            rows[place] = ProposalRow(image.image_id, *image.size_hw, found)

    for place, image in enumerate(images):
        if image.pixels is None:
            unreadable[image.image_id] = image.reason
            continue
        same = waiting[image.pixels.shape]
        same.append((place, image))
        if len(same) == config.batch_size:
            finish(waiting.pop(image.pixels.shape))
    for batch in waiting.values():
        finish(batch)
    return [rows[place] for place in sorted(rows)], unreadable


def _check_space(store: ProposalStore, config: MiningConfig, num_images: int) -> None:
    """Stop before work starts if not even one shard fits; warn if the whole may not."""
    per_image = config.filters.get("keep_most_diverse", 100) * (2 * store.manifest.region_dim + _PER_REGION_BYTES)
    free = shutil.disk_usage(store.folder).free
    needed, one_shard = num_images * per_image, min(num_images, config.shard_size) * per_image
    if num_images and free < one_shard:
        raise StoreError(
            f"{store.folder} has {free / 1e6:.0f} MB free, a shard may take {one_shard / 1e6:.0f} MB; make room, "
            f"choose another folder or lower shard_size"
        )
    if free < needed:
        _log.warning("%s has %.1f GB free, the proposals may take %.1f GB", store.folder, free / 1e9, needed / 1e9)


class _RateColumn(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.1f} images/s")


def _progress_bar(stack: ExitStack, total: int, remaining: int) -> Callable[[int], None]:
    """Open a bar that closes with the stack; returns what moves it."""
    columns = (TextColumn("mining"), BarColumn(), MofNCompleteColumn(), _RateColumn(), TimeRemainingColumn())
    bar = stack.enter_context(Progress(*columns))
    task = bar.add_task("mining", total=total, completed=total - remaining)
    return lambda count: bar.advance(task, count)


def _no_bar(count: int) -> None:
    """Progress that nobody asked to see."""


def _counted(images: Iterable[LoadedImage], advance: Callable[[int], None]) -> Iterator[LoadedImage]:
    """Pass images through and move the bar by one for each."""
    for image in images:
        advance(1)
        yield image

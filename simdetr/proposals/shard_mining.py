"""Claims on shards in, mined shards in the store out: the loop that one process runs.

Images of equal shape are batched within a shard and go through :mod:`simdetr.proposals.batch_mining`, while threads
decode the next ones and another writes the shard before. Memory does not grow with the number of images, and a row does
not depend on which process mines it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import groupby

import torch
from torch import nn

from simdetr.data.images import ImageSource
from simdetr.proposals.batch_mining import MiningConfig, mine_pixels
from simdetr.proposals.features import Encoder
from simdetr.proposals.image_loading import ImageLoading, LoadedImage
from simdetr.proposals.shard_claims import ShardClaims
from simdetr.proposals.shards import ProposalRow
from simdetr.proposals.unreadable import UnreadableImages


def mine_free_shards(
    claims: ShardClaims,
    source: ImageSource,
    encoder: Encoder,
    config: MiningConfig,
    device: str | torch.device = "cpu",
    advance: Callable[[int], None] = lambda count: None,
) -> int:
    """Mine shard after shard until no missing one is free.

    Args:
        claims: on the shards of the store.
        source: the images.
        encoder: frozen; moved to ``device``.
        config: the settings.
        device: where encoding and clustering run.
        advance: hears of every image that is done.

    Returns:
        Number of shards mined.

    Raises:
        StoreError: if the store cannot be written.
        TooManyUnreadableError: past ``max_unreadable``.
    """
    if isinstance(encoder, nn.Module):
        encoder.to(device).eval()
    manifest = claims.store.manifest
    unreadable = UnreadableImages(claims.store, config.max_unreadable)
    mined = 0
    with ExitStack() as stack:
        positions = (position for shard in claims.free() for position in manifest.images_of(shard))
        threads = config.decoding_threads(device)
        loading = ImageLoading(source, positions, config.image_size, threads, ahead=config.batch_size)
        loaded = stack.enter_context(loading)
        writer = stack.enter_context(ThreadPoolExecutor(1))
        writing: Future[None] | None = None
        for shard, images in groupby(loaded, lambda image: source.position(image.image_id) // manifest.shard_size):
            rows, reasons = mine_rows(_counted(images, advance), encoder, config, device)
            if writing is not None:
                writing.result()
            unreadable.check(reasons)
            writing = writer.submit(_write, claims, shard, rows, reasons)
            mined += 1
        if writing is not None:
            writing.result()
    return mined


@torch.no_grad()
def mine_rows(
    images: Iterable[LoadedImage], encoder: Encoder, config: MiningConfig, device: str | torch.device
) -> tuple[list[ProposalRow], dict[str, str]]:
    """Rows of one shard's images in their order, and the reasons by id of the unreadable ones."""
    waiting: dict[torch.Size, list[tuple[int, LoadedImage]]] = defaultdict(list)
    rows: dict[int, ProposalRow] = {}
    unreadable: dict[str, str] = {}

    def finish(batch: list[tuple[int, LoadedImage]]) -> None:
        pixels = torch.stack([image.pixels for _, image in batch if image.pixels is not None]).to(device)
        regions = mine_pixels(pixels, encoder, [image.size_hw for _, image in batch], config)
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


def _write(claims: ShardClaims, shard: int, rows: list[ProposalRow], reasons: dict[str, str]) -> None:
    claims.store.write_shard(shard, rows, reasons)
    claims.release(shard)


def _counted(images: Iterable[LoadedImage], advance: Callable[[int], None]) -> Iterator[LoadedImage]:
    """Pass images through and tell of each."""
    for image in images:
        advance(1)
        yield image

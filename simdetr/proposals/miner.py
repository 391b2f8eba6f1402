"""Mining of a whole image source: images and a frozen encoder in, a resumable store of regions out.

Any number of processes may mine into one store, started together or not: they share its shards
(:mod:`simdetr.proposals.shard_claims`), and each shard is mined by :mod:`simdetr.proposals.shard_mining`. A run killed
at any point goes on with the same call, and ends with the store that one uninterrupted process writes.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

import torch

from simdetr.data.images import ImageSource
from simdetr.data.locations import Location
from simdetr.proposals.batch_mining import MiningConfig, cluster_maps, mine_batch, mine_maps
from simdetr.proposals.features import Encoder
from simdetr.proposals.mining_progress import MiningBar
from simdetr.proposals.shard_claims import Rank, ShardClaims, tidy
from simdetr.proposals.shard_mining import mine_free_shards
from simdetr.proposals.store import Manifest, ProposalStore, StoreError
from simdetr.proposals.unreadable import QUARANTINE, UnreadableImages

__all__ = ["MiningConfig", "begin", "cluster_maps", "finish", "mine", "mine_batch", "mine_maps"]

_log = logging.getLogger(__name__)
_PER_REGION_BYTES = 40  # beside its feature
_POLL_S, _POLL_REMOTE_S = 0.5, 5.0
_SAY_EVERY_S = 60.0


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
    """Make the store, or find the one that is there.

    Raises:
        ValueError: if the source is empty.
        StoreError: if the store is of another run, cannot be written or does not fit on the disk.
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
    written = sum(len(manifest.images_of(shard)) for shard in store.written())
    _check_space(store, config, len(source) - written)
    return store


def finish(store: ProposalStore, max_unreadable: float) -> ProposalStore:
    """List the unreadable images of a complete store and tidy its folder.

    Raises:
        TooManyUnreadableError: past ``max_unreadable``.
    """
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

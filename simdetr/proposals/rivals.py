"""A rival's proposals for a whole image source: images and a frozen encoder in, a resumable store of regions out.

The same store as our own mining writes, so that recall, report and clustering read either. The rival's name lies in the
manifest's settings: stores of different methods are never mixed. Images go one by one, as these methods do.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from simdetr.data.images import ImageSource
from simdetr.proposals.baselines import baseline
from simdetr.proposals.batch_mining import MiningConfig, encode
from simdetr.proposals.features import Encoder
from simdetr.proposals.image_loading import ImageLoading
from simdetr.proposals.miner import finish
from simdetr.proposals.shards import ProposalRow
from simdetr.proposals.store import Manifest, ProposalStore

MAX_BOXES = 100  # per image; recall is reported up to here
_WORKERS = 2  # threads that decode; the methods themselves are far slower


@torch.no_grad()
def mine_rival(
    method: str,
    source: ImageSource,
    encoder: Encoder,
    config: MiningConfig,
    out: str | Path,
    *,
    max_boxes: int = MAX_BOXES,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> ProposalStore:
    """Mine every image of a source with a rival; the same call again goes on where it stopped.

    Args:
        method: name in :data:`simdetr.proposals.baselines.BASELINES`.
        source: the images.
        encoder: frozen; moved to ``device``. Methods that look at pixels only take the regions' features from it.
        config: settings of our own mining; image size, seed, shard size and the share of unreadable images count.
        out: folder of the store; also holds ``quarantine.csv``.
        max_boxes: of an image, the best.
        device: where encoding and graph methods run.
        progress: show a bar.

    Returns:
        The complete store.

    Raises:
        ValueError: for an unknown method, or an empty source.
        StoreError: if the store is of another method, images or settings, or cannot be written.
        TooManyUnreadableError: past ``max_unreadable``.
        RuntimeError: for selective_search without OpenCV's contrib modules.
    """
    find = baseline(method)
    if not len(source):
        raise ValueError("source: expected at least one image, got none; check the folder or list")
    manifest = Manifest(
        config={"method": method, "max_boxes": max_boxes, "image_size": config.image_size, "seed": config.seed},
        encoder=encoder.fingerprint,
        source=source.fingerprint(),
        num_images=len(source),
        shard_size=config.shard_size,
        region_dim=encoder.region_dim,
    )
    store = ProposalStore.create(out, manifest)
    if isinstance(encoder, nn.Module):
        encoder.to(device).eval()
    missing = store.missing_shards()
    positions = [position for shard in missing for position in manifest.images_of(shard)]
    with ImageLoading(source, positions, config.image_size, _WORKERS, ahead=config.batch_size) as loading:
        console = Console(stderr=True)
        loaded = iter(track(loading, method, len(positions), console=console, disable=not progress))
        for shard in missing:
            rows, unreadable = [], {}
            for image in islice(loaded, len(manifest.images_of(shard))):
                if image.pixels is None:
                    unreadable[image.image_id] = image.reason
                    continue
                maps = encode(image.pixels[None].to(device), encoder)
                regions = find([image.pixels], maps, [image.size_hw], max_boxes, config.seed)[0]
                rows.append(ProposalRow(image.image_id, *image.size_hw, regions))
            store.write_shard(shard, rows, unreadable)
    return finish(store, config.max_unreadable)

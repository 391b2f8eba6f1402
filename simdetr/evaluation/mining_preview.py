"""Quality before cost: some images of a source in; what a full run of the mining would give and take out.

They are mined in memory by the code of a full run, so the boxes are those that it would store.
:mod:`simdetr.evaluation.preview_page` draws what is found here.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from simdetr.data.images import ImageSource
from simdetr.data.labels import Category, Labels
from simdetr.evaluation.mining_time import MiningTime, mine_timed, warm_up
from simdetr.evaluation.proposal_recall import proposal_recall
from simdetr.evaluation.rival_recall import best_first
from simdetr.proposals.batch_mining import MiningConfig
from simdetr.proposals.features import Encoder
from simdetr.proposals.image_loading import ImageLoading
from simdetr.proposals.shard_mining import mine_rows
from simdetr.proposals.shards import REGION_COLUMNS, ProposalRow, to_bytes, to_table

MAX_BOXES = (1, 10, 25, 100)


@dataclass(frozen=True)
class Recall:
    """Recall of the previewed boxes.

    Attributes:
        scores: what `proposal_recall` gives.
        images: number of previewed images with truth.
        objects: number of objects on them.
        max_boxes: most boxes of an image that were judged.
        ranked: whether the miner tells which boxes are better.
    """

    scores: dict[str, float]
    images: int
    objects: int
    max_boxes: int
    ranked: bool


@dataclass(frozen=True)
class MiningPreview:
    """What mining some images of a source showed.

    Attributes:
        config: the settings.
        device: where it ran.
        source: all images.
        rows: of the readable previewed ones, in source order, as a full run stores them.
        unreadable: reasons by id of the others.
        copies: (id, id of the first one) of previewed images with equal files.
        time: of these images, after a warm-up.
        stored_bytes: of their rows in Parquet, without what every shard takes.
        shard_bytes: what every shard takes beside its rows.
        held_bytes: of one image's regions in memory, on average.
        peak_bytes: most memory that the process had; None where the system does not tell.
        device_peak_bytes: most memory taken on the device; None on the processor.
        truth: labels of previewed images; None without any.
        recall: None without truth.
    """

    config: MiningConfig
    device: str
    source: ImageSource
    rows: list[ProposalRow]
    unreadable: dict[str, str]
    copies: list[tuple[str, str]]
    time: MiningTime
    stored_bytes: int
    shard_bytes: int
    held_bytes: int
    peak_bytes: int | None
    device_peak_bytes: int | None
    truth: Labels | None
    recall: Recall | None

    @property
    def previewed(self) -> int:
        """Number of previewed images, unreadable ones among them."""
        return len(self.rows) + len(self.unreadable)


def preview_mining(
    source: ImageSource,
    encoder: Encoder,
    config: MiningConfig,
    count: int,
    *,
    truth: Labels | None = None,
    device: str = "cpu",
) -> MiningPreview:
    """Mine some images of a source in memory.

    Args:
        source: the images.
        encoder: frozen; moved to ``device``.
        config: the settings.
        count: images to mine, evenly spaced; all if there are fewer.
        truth: boxes for some of the images; those come first among the previewed ones.
        device: where encoding and clustering run.

    Raises:
        ValueError: for a count below 1, an empty source, truth of other images, or if no image can be read.
    """
    if count < 1:
        raise ValueError(f"preview: expected at least 1 image, got {count}")
    positions = choose_images(source, count, truth)
    if isinstance(encoder, nn.Module):
        encoder.to(device).eval()
    warm_up(source, positions, encoder, config, device)
    rows, unreadable, taken = mine_timed(source, positions, encoder, config, device)
    host_peak, device_peak = _peak_bytes(device)
    if not rows:
        raise ValueError(
            f"preview: none of the {len(positions)} previewed images can be read, such as {next(iter(unreadable))}: "
            f"{next(iter(unreadable.values()))}; see `simdetr doctor`"
        )
    stored, per_shard = _stored_bytes(rows, encoder.region_dim, config.shard_size)
    known = [row.image_id for row in rows if truth is not None and row.image_id in truth]
    judged = truth.select(known) if truth is not None and known else None
    recall = None if judged is None else _recall(source, encoder, config, rows, judged, device)
    return MiningPreview(
        config=config,
        device=device,
        source=source,
        rows=rows,
        unreadable=unreadable,
        copies=_copies(source, [row.image_id for row in rows]),
        time=taken,
        stored_bytes=stored,
        shard_bytes=per_shard,
        held_bytes=_held_bytes(rows),
        peak_bytes=host_peak,
        device_peak_bytes=device_peak,
        truth=judged,
        recall=recall,
    )


def choose_images(source: ImageSource, count: int, truth: Labels | None = None) -> list[int]:
    """Positions of evenly spaced images, ascending; images with boxes in ``truth`` first, others if those are too few.

    Raises:
        ValueError: for an empty source, or truth without a box on an image of the source.
    """
    if not len(source):
        raise ValueError("source: expected at least one image, got none; check the folder or list")
    if truth is None:
        return _evenly(list(range(len(source))), count)
    owners = np.repeat(np.arange(len(truth)), np.diff(truth.offsets))[~truth.crowd]
    labelled = [truth.image_ids[row] for row in np.unique(owners)]
    known = sorted(source.position(image_id) for image_id in labelled if image_id in source)
    if not known:
        raise ValueError(
            f"truth: none of its {len(labelled)} images with boxes is in {source.root} (there are ids like "
            f"{source.ids[0]!r}, its first is {truth.image_ids[0] if len(truth) else None!r}); file names must be "
            "relative to the folder of --images"
        )
    if len(known) >= count:
        return _evenly(known, count)
    others = sorted(set(range(len(source))).difference(known))
    return sorted([*known, *_evenly(others, count - len(known))])


def _evenly(positions: list[int], count: int) -> list[int]:
    if len(positions) <= count:
        return positions
    # the middles of as many equal parts: the first images of a set are rarely its typical ones
    return [positions[int((part + 0.5) * len(positions) / count)] for part in range(count)]


def _stored_bytes(rows: Sequence[ProposalRow], dim: int, shard_size: int) -> tuple[int, int]:
    """What the rows take in Parquet files of at most ``shard_size`` images, and what each file takes beside them."""
    nothing = {name: getattr(rows[0].regions, name)[:0] for name in REGION_COLUMNS}
    bare = replace(rows[0], regions=replace(rows[0].regions, **nothing))
    per_shard = to_bytes(to_table([bare], dim, {"shard": 0, "unreadable": {}})).size
    shards = [rows[start : start + shard_size] for start in range(0, len(rows), shard_size)]
    whole = sum(to_bytes(to_table(shard, dim, {"shard": 0, "unreadable": {}})).size for shard in shards)
    return whole - per_shard * len(shards), per_shard


def _held_bytes(rows: Sequence[ProposalRow]) -> int:
    return int(sum(getattr(row.regions, name).nbytes for row in rows for name in REGION_COLUMNS)) // len(rows)


def _peak_bytes(device: str) -> tuple[int | None, int | None]:
    """Most memory so far of the process and on the device."""
    on_device = torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else None
    if sys.platform == "win32":
        return None, on_device
    import resource  # Unix only

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, on_device


def _copies(source: ImageSource, image_ids: Sequence[str]) -> list[tuple[str, str]]:
    """Images whose files are byte for byte those of an earlier one, each with that one."""
    first: dict[str, str] = {}
    copies = []
    for image_id in image_ids:
        with source.record(image_id).open() as stream:
            digest = hashlib.file_digest(stream, "blake2b").hexdigest()
        if first.setdefault(digest, image_id) != image_id:
            copies.append((image_id, first[digest]))
    return copies


def _recall(
    source: ImageSource,
    encoder: Encoder,
    config: MiningConfig,
    rows: Sequence[ProposalRow],
    truth: Labels,
    device: str,
) -> Recall:
    """Recall on the images of the truth, with as many boxes as AR@100 wants where the settings rank them."""
    judged = [row for row in rows if row.image_id in truth]
    levels = config.level_sets
    if levels is not None and levels.max_boxes < max(MAX_BOXES):
        # ranked boxes: the first of a longer list are the shorter list
        more = replace(config, level_sets=replace(levels, max_boxes=max(MAX_BOXES)))
        positions = [source.position(row.image_id) for row in judged]
        threads = config.decoding_threads(device)
        with ImageLoading(source, positions, config.image_size, threads, ahead=config.batch_size) as loading:
            judged, _ = mine_rows(loading, encoder, more, device)
    boxes = Labels.from_images(map(best_first, judged), (Category(1, "object"),), stage=0)
    return Recall(
        scores=proposal_recall(truth, boxes, MAX_BOXES),
        images=len(truth),
        objects=int((~truth.crowd).sum()),
        max_boxes=max((len(row.regions) for row in judged), default=0),
        ranked=any(len(np.unique(row.regions.score)) > 1 for row in judged),
    )

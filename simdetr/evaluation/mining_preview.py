"""Quality before cost: some images of a source in; what a full run of the mining gives and takes out, nothing stored.

The images are decoded and mined by the code of a full run, in this process, with stopwatches around its parts. Boxes are
those that the full run stores. :mod:`simdetr.evaluation.preview_page` draws what is found here.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from simdetr.data.images import ImageSource
from simdetr.data.labels import Category, Labels
from simdetr.evaluation.proposal_recall import proposal_recall
from simdetr.evaluation.rival_recall import best_first
from simdetr.proposals.batch_mining import MiningConfig
from simdetr.proposals.features import Encoder
from simdetr.proposals.image_loading import ImageLoading, LoadedImage, load_image
from simdetr.proposals.shard_mining import mine_rows
from simdetr.proposals.shards import REGION_COLUMNS, ProposalRow, to_bytes, to_table

NUM_WORKERS = 2  # threads that decode, as in a full run
MAX_BOXES = (1, 10, 25, 100)


@dataclass(frozen=True)
class MiningTime:
    """Where the time went. All in seconds, for all images together.

    Attributes:
        images: number of images.
        total: from the first to the last.
        decoding: of the decoding threads, added up; it goes on beside the rest.
        waiting: for decoded images, when nothing else could be done.
        encoder: in the encoder.
        cpu: of the process, on all its cores.
        batches: number of calls of the encoder.
    """

    images: int
    total: float
    decoding: float
    waiting: float
    encoder: float
    cpu: float
    batches: int

    @property
    def images_per_s(self) -> float:
        """Speed of one process."""
        return self.images / self.total

    @property
    def clustering(self) -> float:
        """Of everything after the encoder, from clusters to boxes."""
        return max(0.0, self.total - self.waiting - self.encoder)

    @property
    def busy_cores(self) -> float:
        """Processor cores in use, on average."""
        return self.cpu / self.total


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
    _warm_up(source, positions, encoder, config, device)
    rows, unreadable, taken = _mine(source, positions, encoder, config, device)
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


def _warm_up(
    source: ImageSource, positions: Sequence[int], encoder: Encoder, config: MiningConfig, device: str
) -> None:
    """Load, compile and allocate what the first batch would; on a processor one image does that."""
    for position in positions:
        image = load_image(source[position], config.image_size)
        if image.pixels is not None:
            copies = 1 if device == "cpu" else min(config.batch_size, len(positions))
            mine_rows([image] * copies, encoder, config, device)
            return


def _mine(
    source: ImageSource, positions: Sequence[int], encoder: Encoder, config: MiningConfig, device: str
) -> tuple[list[ProposalRow], dict[str, str], MiningTime]:
    """Rows, reasons and times: the loop of a full run over these images."""
    timed = _TimedEncoder(encoder, device)
    with ImageLoading(source, positions, config.image_size, NUM_WORKERS, ahead=config.batch_size) as loading:
        images = _TimedImages(loading)
        start, cpu = time.perf_counter(), time.process_time()
        rows, unreadable = mine_rows(images, timed, config, device)
        _finish(device)
        total, cpu = time.perf_counter() - start, time.process_time() - cpu
    taken = MiningTime(len(rows), total, images.decoding, images.waiting, timed.seconds, cpu, timed.calls)
    return rows, unreadable, taken


class _TimedImages:
    """Passes loaded images through; notes how long their decoding and the waiting for it took."""

    def __init__(self, images: Iterator[LoadedImage]) -> None:
        self._images = images
        self.decoding = self.waiting = 0.0

    def __iter__(self) -> Iterator[LoadedImage]:
        return self

    def __next__(self) -> LoadedImage:
        start = time.perf_counter()
        image = next(self._images)
        self.waiting += time.perf_counter() - start
        self.decoding += image.seconds
        return image


class _TimedEncoder:
    """An encoder that notes how long it takes, until its device has finished."""

    def __init__(self, encoder: Encoder, device: str) -> None:
        self._encoder, self._device = encoder, device
        self.strides, self.region_dim, self.fingerprint = encoder.strides, encoder.region_dim, encoder.fingerprint
        self.seconds, self.calls = 0.0, 0

    def __call__(self, images: Tensor) -> dict[int, Tensor]:
        _finish(self._device)
        start = time.perf_counter()
        maps = self._encoder(images)
        _finish(self._device)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return maps


def _finish(device: str) -> None:
    """Wait until a device has done what it was given."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def _stored_bytes(rows: Sequence[ProposalRow], dim: int, shard_size: int) -> tuple[int, int]:
    """What the rows take in Parquet files of at most ``shard_size`` images, and what each file takes beside them."""
    nothing = {name: getattr(rows[0].regions, name)[:0] for name in REGION_COLUMNS}
    bare = replace(rows[0], regions=replace(rows[0].regions, **nothing))
    per_shard = to_bytes(to_table([bare], dim, {"shard": 0, "unreadable": {}})).size
    shards = [rows[start : start + shard_size] for start in range(0, len(rows), shard_size)]
    whole = sum(to_bytes(to_table(shard, dim, {"shard": 0, "unreadable": {}})).size for shard in shards)
    return whole - per_shard * len(shards), per_shard


def _held_bytes(rows: Sequence[ProposalRow]) -> int:
    return sum(getattr(row.regions, name).nbytes for row in rows for name in REGION_COLUMNS) // len(rows)


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
        with ImageLoading(source, positions, config.image_size, NUM_WORKERS, ahead=config.batch_size) as loading:
            judged, _ = mine_rows(loading, encoder, more, device)
    boxes = Labels.from_images(map(best_first, judged), (Category(1, "object"),), stage=0)
    return Recall(
        scores=proposal_recall(truth, boxes, MAX_BOXES),
        images=len(truth),
        objects=int((~truth.crowd).sum()),
        max_boxes=max((len(row.regions) for row in judged), default=0),
        ranked=any(len(np.unique(row.regions.score)) > 1 for row in judged),
    )

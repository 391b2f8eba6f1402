"""Quality before cost: some images of a source in; what a full run of the mining would give and take out.

They are mined in memory by the loop of a full run, :func:`simdetr.mining.miner.mine_rows`, with stopwatches around its
parts, so the boxes are those that it would store. Time, disk and memory of a full run are estimates: straight lines
through the previewed images. The record (``preview.json``) says what each assumes;
:mod:`simdetr.reports.preview_page` draws it.

Letters: N images, M boxes of all images together.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simdetr.boxes import pairwise_iou
from simdetr.data.annotations import Category
from simdetr.data.images import ImageSource
from simdetr.data.labels import Labels
from simdetr.data.storage import json_ready
from simdetr.evaluation.recall import proposal_recall
from simdetr.mining.batch import LoadedImage, MiningConfig, load_image
from simdetr.mining.encoders import Encoder
from simdetr.mining.miner import load_ahead, mine_rows
from simdetr.mining.store import REGION_COLUMNS, ProposalRow, best_first, to_bytes, to_table

T = TypeVar("T")
MAX_BOXES = (1, 10, 25, 100)
COPY_IOU = 0.9  # boxes of one image that overlap more say the same thing twice
BORDER_PX = 0.5  # a box that ends closer to the image's border touches it
SIZE_EDGES = np.linspace(0, 1, 21)
ASPECT_EDGES = 2.0 ** np.arange(-4.25, 4.5, 0.5)  # one bin is centred at 1:1
"""Bins of the histograms; what lies outside the outermost edges counts into the outermost bins."""


@dataclass(frozen=True)
class Recall:
    """Recall of the previewed boxes."""

    scores: dict[str, float]  # as `proposal_recall` gives them
    images: int  # previewed ones with truth
    objects: int  # on them
    max_boxes: int  # most boxes of an image that were judged
    ranked: bool  # whether the miner tells which boxes are better


@dataclass(frozen=True)
class MiningTime:
    """Where the time went: seconds for all images together."""

    images: int
    total: float  # from the first to the last
    decoding: float  # of the decoding threads, added up; it goes on beside the rest
    waiting: float  # for decoded images, when nothing else could be done
    encoder: float
    cpu: float  # of the process, on all its cores
    batches: int  # calls of the encoder

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
class MiningPreview:
    """What mining some images of a source showed."""

    config: MiningConfig
    device: str
    source: ImageSource  # all images
    rows: list[ProposalRow]  # of the readable previewed ones, in source order, as a full run stores them
    unreadable: dict[str, str]  # reasons by id of the others
    copies: list[tuple[str, str]]  # (id, id of the first one) of previewed images with equal files
    time: MiningTime  # of these images, after a warm-up
    stored_bytes: int  # of their rows in Parquet, without what every shard takes
    shard_bytes: int  # what every shard takes beside its rows
    held_bytes: int  # of one image's regions in memory, on average
    peak_bytes: int | None  # most memory that the process had; None where the system does not tell
    device_peak_bytes: int | None  # most memory taken on the device; None on the processor
    truth: Labels | None  # of previewed images; None without any
    recall: Recall | None  # None without truth

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

    The arguments are those of `simdetr.mining.miner.mine`, ``count``: so many images, evenly spaced (all if there are
    fewer), and ``truth``: boxes for some of the images, which come first among the previewed ones. ValueError for a
    count below 1, an empty source, truth of other images, or if no image can be read.
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
        held_bytes=sum(getattr(row.regions, name).nbytes for row in rows for name in REGION_COLUMNS) // len(rows),
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
        return evenly(range(len(source)), count)
    labelled = [truth.image_ids[row] for row in np.unique(truth.owners[~truth.crowd])]
    known = sorted(source.position(image_id) for image_id in labelled if image_id in source)
    if not known:
        raise ValueError(
            f"truth: none of its {len(labelled)} images with boxes is in {source.root} (there are ids like "
            f"{source.ids[0]!r}, its first is {truth.image_ids[0] if len(truth) else None!r}); file names must be "
            "relative to the folder of --images"
        )
    if len(known) >= count:
        return evenly(known, count)
    others = sorted(set(range(len(source))).difference(known))
    return sorted([*known, *evenly(others, count - len(known))])


def evenly(positions: Sequence[T], count: int) -> list[T]:
    """Some of them: the middles of as many equal parts, as the first images of a set are rarely its typical ones."""
    if len(positions) <= count:
        return list(positions)
    return [positions[int((part + 0.5) * len(positions) / count)] for part in range(count)]


# ----------------------------------------------------------------------------------------------------------------------
# The stopwatches.


def warm_up(source: ImageSource, positions: Sequence[int], encoder: Encoder, config: MiningConfig, device: str) -> None:
    """Load, compile and allocate what the first batch would; on a processor one image does that."""
    for position in positions:
        image = load_image(source[position], config.image_size)
        if image.pixels is not None:
            copies = 1 if device == "cpu" else min(config.batch_size, len(positions))
            mine_rows([image] * copies, encoder, config, device)
            return


def mine_timed(
    source: ImageSource, positions: Sequence[int], encoder: Encoder, config: MiningConfig, device: str
) -> tuple[list[ProposalRow], dict[str, str], MiningTime]:
    """Rows, reasons and times: the loop of a full run over these images."""
    timed = _TimedEncoder(encoder, device)
    decoding = waiting = 0.0

    def images() -> Iterator[LoadedImage]:
        nonlocal decoding, waiting
        asked = time.perf_counter()
        for image in loading:
            waiting += time.perf_counter() - asked
            decoding += image.seconds
            yield image
            asked = time.perf_counter()

    with load_ahead(source, positions, config, device) as loading:
        start, cpu = time.perf_counter(), time.process_time()
        rows, unreadable = mine_rows(images(), timed, config, device)
        _finish(device)
        total, cpu = time.perf_counter() - start, time.process_time() - cpu
    return rows, unreadable, MiningTime(len(rows), total, decoding, waiting, timed.seconds, cpu, timed.calls)


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


# ----------------------------------------------------------------------------------------------------------------------
# Bytes, copies and recall of what was mined.


def _stored_bytes(rows: Sequence[ProposalRow], dim: int, shard_size: int) -> tuple[int, int]:
    """What the rows take in Parquet files of at most ``shard_size`` images, and what each file takes beside them."""
    nothing = {name: getattr(rows[0].regions, name)[:0] for name in REGION_COLUMNS}
    bare = replace(rows[0], regions=replace(rows[0].regions, **nothing))
    per_shard = to_bytes(to_table([bare], dim, {"shard": 0, "unreadable": {}})).size
    shards = [rows[start : start + shard_size] for start in range(0, len(rows), shard_size)]
    whole = sum(to_bytes(to_table(shard, dim, {"shard": 0, "unreadable": {}})).size for shard in shards)
    return whole - per_shard * len(shards), per_shard


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
    source: ImageSource, encoder: Encoder, config: MiningConfig, rows: list[ProposalRow], truth: Labels, device: str
) -> Recall:
    """Recall on the images of the truth, with as many boxes as AR@100 wants where the settings rank them."""
    judged = [row for row in rows if row.image_id in truth]
    levels = config.level_sets
    if levels is not None and levels.max_boxes < max(MAX_BOXES):
        # ranked boxes: the first of a longer list are the shorter list
        more = replace(config, level_sets=replace(levels, max_boxes=max(MAX_BOXES)))
        positions = [source.position(row.image_id) for row in judged]
        with load_ahead(source, positions, config, device) as loading:
            judged, _ = mine_rows(loading, encoder, more, device)
    boxes = Labels.from_images(map(best_first, judged), (Category(1, "object"),), stage=0)
    return Recall(
        scores=proposal_recall(truth, boxes, MAX_BOXES),
        images=len(truth),
        objects=int((~truth.crowd).sum()),
        max_boxes=max((len(row.regions) for row in judged), default=0),
        ranked=are_ranked(judged),
    )


def are_ranked(rows: Iterable[ProposalRow]) -> bool:
    """Whether the scores of some image's boxes differ."""
    return any(len(np.unique(row.regions.score)) > 1 for row in rows)


# ----------------------------------------------------------------------------------------------------------------------
# The record: what a full run would take, and how many, how large, how long, how alike the boxes are.


class Machine(NamedTuple):
    """What the processes of a full run share: processor cores and graphics processors."""

    cores: int
    gpus: int = 0


def preview_record(preview: MiningPreview, machine: Machine, num_ranks: int = 1) -> dict[str, Any]:
    """Everything the page shows of a preview, as JSON can hold it, for a full run in so many processes of a machine."""
    rows, truth, recall, taken = preview.rows, preview.truth, preview.recall, preview.time
    parts = {
        "waiting_for_images": taken.waiting,
        "encoder": taken.encoder,
        "clustering_and_boxes": taken.clustering,
        "decoding_beside_it": taken.decoding,
    }
    boxes = BoxStatistics.of([row.regions.boxes_xyxy for row in rows], [(row.height, row.width) for row in rows])
    true = [] if truth is None else [truth.image(row) for row in range(len(truth))]
    objects = BoxStatistics.of([image.boxes_xyxy[~image.crowd] for image in true], [image.size_hw for image in true])
    record: dict[str, Any] = {
        "images": {
            "total": len(preview.source),
            "previewed": preview.previewed,
            "readable": len(rows),
            "ids": [row.image_id for row in rows],
            "unreadable": preview.unreadable,
            "duplicates": [list(pair) for pair in preview.copies],
        },
        "speed": {
            "images_per_s": taken.images_per_s,
            "seconds": taken.total,
            "ms_per_image": {name: 1000 * seconds / taken.images for name, seconds in parts.items()},
            "images_per_batch": taken.images / taken.batches,
            "busy_cores": taken.busy_cores,
            "peak_bytes": preview.peak_bytes,
            "device_peak_bytes": preview.device_peak_bytes,
            "parquet_bytes_per_image": preview.stored_bytes / len(rows),
        },
        "full_run": full_run(preview, machine, num_ranks),
        "boxes": boxes.summary(),
        "truth": None if truth is None else objects.summary(),
        "recall": recall if recall is None else vars(recall) | {"scores": json_ready(recall.scores)},
        "warnings": _warnings(preview),
        "settings": {"device": preview.device, "mining": preview.config.result_settings()},
    }
    plain: dict[str, Any] = json.loads(json.dumps(record, allow_nan=False))
    return plain


def full_run(preview: MiningPreview, machine: Machine, num_ranks: int = 1) -> dict[str, Any]:
    """Seconds, bytes on disk and bytes in memory that mining the whole source takes, and what that assumes."""
    total, shard_size = len(preview.source), preview.config.shard_size
    shards, busy = -(-total // shard_size), preview.time.busy_cores
    seconds = preview.time.total / preview.previewed * total
    on_gpu = preview.device.startswith("cuda")
    speedup = min(num_ranks, machine.gpus if on_gpu else max(1.0, machine.cores / busy))
    kept = 2 * preview.held_bytes * min(shard_size, total)
    assumed = [
        "time: all images cost what the previewed ones did, nothing else runs, and starting a process is not counted",
        "disk: the other images' regions take what those of the previewed ones take in Parquet",
        "memory: the peak of this process and two shards of regions; each process needs as much",
    ]
    if num_ranks > 1:
        limit = f"{machine.gpus} GPUs" if on_gpu else f"{machine.cores} cores, {busy:.1f} for each"
        assumed.insert(1, f"{num_ranks} processes: each as fast as this one, as far as {limit} allow; not measured")
    return {
        "images": total,
        "seconds": seconds,
        "num_ranks": num_ranks,
        "speedup": speedup,
        "seconds_of_ranks": seconds / speedup,
        "disk_bytes": round(preview.stored_bytes / preview.previewed * total) + preview.shard_bytes * shards,
        "shards": shards,
        "memory_bytes": None if preview.peak_bytes is None else preview.peak_bytes + kept,
        "device_memory_bytes": preview.device_peak_bytes,
        "assumptions": assumed,
    }


def _warnings(preview: MiningPreview) -> list[str]:
    """What should be looked at before a full run."""
    found, recall = [], preview.recall
    allowed = preview.config.max_unreadable
    if len(preview.unreadable) / preview.previewed > allowed:
        found.append(
            f"{len(preview.unreadable)} of {preview.previewed} previewed images are unreadable, more than "
            f"mining.max_unreadable allows ({allowed:.0%}): a full run would stop"
        )
    without = sum(len(row.regions) == 0 for row in preview.rows)
    if without:
        found.append(f"{without} of {len(preview.rows)} images have no box")
    if recall is not None and not recall.ranked:
        found.append("these settings do not rank the boxes: AR@1 and AR@10 count them as they stand")
    if recall is not None and recall.max_boxes < 100:
        found.append(f"no image has more than {recall.max_boxes} boxes: AR@100 is the recall of all of them")
    return found


@dataclass(frozen=True)
class BoxStatistics:
    """Boxes of a set of images, by what a person asks about them."""

    per_image: NDArray[np.int64]  # [N], number of boxes
    size: NDArray[np.float64]  # [M], square root of the share of the image's area that a box covers; 0..1
    aspect: NDArray[np.float64]  # [M], width / height
    copied: NDArray[np.bool_]  # [M], whether another box of the same image has an IoU above `COPY_IOU` with it
    at_border: NDArray[np.bool_]  # [M], whether it touches the image's border

    @classmethod
    def of(cls, boxes_xyxy: Iterable[NDArray[np.float32]], sizes_hw: Sequence[tuple[int, int]]) -> BoxStatistics:
        """Measure boxes, per image [n, 4] pixels, of N images of (height, width) pixels."""
        columns: list[tuple[NDArray[Any], ...]] = [(np.zeros(0), np.zeros(0), np.zeros(0, bool), np.zeros(0, bool))]
        for boxes, (height, width) in zip(boxes_xyxy, sizes_hw, strict=True):
            across, down = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64).T
            overlaps = pairwise_iou(torch.as_tensor(boxes), torch.as_tensor(boxes)).fill_diagonal_(0).numpy()
            gaps = np.concatenate([boxes[:, :2], np.array([width, height]) - boxes[:, 2:]], axis=1)
            size, aspect = np.sqrt(across * down / (height * width)), across / np.maximum(down, 1e-9)
            columns.append((size, aspect, np.any(overlaps > COPY_IOU, axis=1), np.any(gaps < BORDER_PX, axis=1)))
        stacked = [np.concatenate(parts) for parts in zip(*columns, strict=True)]
        return cls(np.array([len(column[0]) for column in columns[1:]], np.int64), *stacked)

    def summary(self) -> dict[str, Any]:
        """Plain numbers, as JSON can hold them.

        ``boxes``; ``per_image`` (min, median, max, and the number of ``images`` by number of boxes); ``size`` and
        ``aspect`` (median and histogram); ``copied`` and ``at_border``, shares of the boxes, 0 without any.
        """
        counts = self.per_image if len(self.per_image) else np.zeros(1, np.int64)
        return {
            "boxes": len(self.size),
            "per_image": {
                "min": int(counts.min()),
                "median": float(np.median(counts)),
                "max": int(counts.max()),
                "images": np.bincount(self.per_image).tolist(),
            },
            "size": _distribution(self.size, SIZE_EDGES),
            "aspect": _distribution(self.aspect, ASPECT_EDGES),
            "copied": float(self.copied.mean()) if len(self.size) else 0.0,
            "at_border": float(self.at_border.mean()) if len(self.size) else 0.0,
        }


def _distribution(values: NDArray[np.float64], edges: NDArray[np.float64]) -> dict[str, Any]:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return {
        "median": float(np.median(values)) if len(values) else None,
        "edges": edges.round(4).tolist(),
        "counts": counts.tolist(),
    }

"""A preview of mining in; plain numbers for ``preview.json`` out, among them what a full run would take.

Time, disk and memory of a full run are estimates: straight lines through the previewed images. The record says what
each assumes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from simdetr.evaluation.box_statistics import BoxStatistics
from simdetr.evaluation.mining_preview import MiningPreview, Recall


@dataclass(frozen=True)
class Machine:
    """What the processes of a full run share.

    Attributes:
        cores: processor cores.
        gpus: graphics processors.
    """

    cores: int
    gpus: int = 0


def preview_record(preview: MiningPreview, machine: Machine, num_ranks: int = 1) -> dict[str, Any]:
    """Everything the page shows, as JSON can hold it.

    Args:
        preview: what was measured.
        machine: where the full run will be.
        num_ranks: processes of the full run.
    """
    boxes = BoxStatistics.of(
        [row.regions.boxes_xyxy for row in preview.rows], [(row.height, row.width) for row in preview.rows]
    )
    record: dict[str, Any] = {
        "images": {
            "total": len(preview.source),
            "previewed": preview.previewed,
            "readable": len(preview.rows),
            "ids": [row.image_id for row in preview.rows],
            "unreadable": preview.unreadable,
            "duplicates": [list(pair) for pair in preview.copies],
        },
        "speed": _speed(preview),
        "full_run": full_run(preview, machine, num_ranks),
        "boxes": boxes.summary(),
        "truth": None if preview.truth is None else _truth(preview),
        "recall": None if preview.recall is None else _recall(preview.recall),
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
        "assumptions": _assumptions(machine, num_ranks, None if on_gpu else busy),
    }


def _assumptions(machine: Machine, num_ranks: int, busy_cores: float | None) -> list[str]:
    """What the estimates rest on; ``busy_cores`` of one process where it needs no GPU."""
    assumed = [
        "time: all images cost what the previewed ones did, nothing else runs, and starting a process is not counted",
        "disk: the other images' regions take what those of the previewed ones take in Parquet",
        "memory: the peak of this process and two shards of regions; each process needs as much",
    ]
    if num_ranks > 1:
        limit = f"{machine.gpus} GPUs" if busy_cores is None else f"{machine.cores} cores, {busy_cores:.1f} for each"
        assumed.insert(1, f"{num_ranks} processes: each as fast as this one, as far as {limit} allow; not measured")
    return assumed


def _speed(preview: MiningPreview) -> dict[str, Any]:
    taken = preview.time
    parts = {
        "waiting_for_images": taken.waiting,
        "encoder": taken.encoder,
        "clustering_and_boxes": taken.clustering,
        "decoding_beside_it": taken.decoding,
    }
    return {
        "images_per_s": taken.images_per_s,
        "seconds": taken.total,
        "ms_per_image": {name: 1000 * seconds / taken.images for name, seconds in parts.items()},
        "images_per_batch": taken.images / taken.batches,
        "busy_cores": taken.busy_cores,
        "peak_bytes": preview.peak_bytes,
        "device_peak_bytes": preview.device_peak_bytes,
        "parquet_bytes_per_image": preview.stored_bytes / len(preview.rows),
    }


def _recall(recall: Recall) -> dict[str, Any]:
    scores = {name: None if math.isnan(score) else score for name, score in recall.scores.items()}  # JSON has no nan
    return vars(recall) | {"scores": scores}


def _truth(preview: MiningPreview) -> dict[str, Any]:
    """Sizes and aspects of the true objects, to hold those of the boxes against."""
    truth = preview.truth
    assert truth is not None
    objects = [truth.image(row) for row in range(len(truth))]
    boxes = [image.boxes_xyxy[~image.crowd] for image in objects]
    return BoxStatistics.of(boxes, [image.size_hw for image in objects]).summary()


def _warnings(preview: MiningPreview) -> list[str]:
    """What should be looked at before a full run."""
    found = []
    unreadable, allowed = len(preview.unreadable) / preview.previewed, preview.config.max_unreadable
    if unreadable > allowed:
        found.append(
            f"{len(preview.unreadable)} of {preview.previewed} previewed images are unreadable, more than "
            f"mining.max_unreadable allows ({allowed:.0%}): a full run would stop"
        )
    without = sum(len(row.regions) == 0 for row in preview.rows)
    if without:
        found.append(f"{without} of {len(preview.rows)} images have no box")
    if preview.recall is not None and not preview.recall.ranked:
        found.append("these settings do not rank the boxes: AR@1 and AR@10 count them as they stand")
    if preview.recall is not None and preview.recall.max_boxes < 100:
        found.append(f"no image has more than {preview.recall.max_boxes} boxes: AR@100 is the recall of all of them")
    return found

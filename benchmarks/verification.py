"""Verifying candidates against the bare encoder on the same crops, and peak memory of many candidates.

Boxes of coco256/train are the candidates; the gallery is random, 30 shots of each of 80 classes. Time: images decoded,
boxes cropped, encoded, written to disk and voted on, against the encoder alone with the crops in memory, in turns in
one process. Memory: beyond the model and before the first image, images repeated under other names, in a process of its
own, with a network that only averages (what is held does not depend on how long a crop takes). Bars: 1.1 and 2 GiB.

python -m benchmarks.verification
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from torch.nn import functional

from benchmarks.environment import DATA, environment, write_result
from benchmarks.turns import compare_in_turns
from simdetr.data.images import ImageSource, open_images, read_image
from simdetr.data.label_files import read_labels
from simdetr.data.labels import Labels
from simdetr.labelling.crop_features import CropEncoder, box_faults, crop_boxes, crop_encoder, crop_features
from simdetr.labelling.verification import Gallery, verify

CLASSES, SHOTS = 80, 30
BARS = {"time": 1.1, "memory_gib": 2.0}
PACKAGES = ("torch", "timm", "numpy", "scipy", "pillow")


class CellColours(nn.Module):
    """Mean colours of 16 × 16 cells: 768 numbers of a crop for next to no time."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, S, S] to [B, 768]."""
        return functional.adaptive_avg_pool2d(images, 16).flatten(1)


def candidates(count: int) -> tuple[ImageSource, Labels]:
    """The first images of the set that have so many boxes together, or all."""
    labels = read_labels(DATA / "coco256" / "instances_train.json")
    last = int(np.searchsorted(labels.offsets, count)) if count < labels.offsets[-1] else len(labels)
    return open_images(DATA / "coco256" / "train"), labels.select(labels.image_ids[:last])


def repeated(labels: Labels, times: int, folder: Path) -> tuple[ImageSource, Labels]:
    """The set several times over, by links in folders of different names."""
    for copy in range(times):
        (folder / f"{copy:04d}").symlink_to(DATA / "coco256" / "train", target_is_directory=True)
    ids = [f"{copy:04d}/{name}" for copy in range(times) for name in labels.image_ids]
    rows = [replace(labels.image(i % len(labels)), image_id=image_id) for i, image_id in enumerate(ids)]
    return ImageSource(folder, ids), Labels.from_images(rows, labels.categories)


def random_gallery(dim: int) -> Gallery:
    """As large as a real one; what it holds does not change the time."""
    features = np.random.default_rng(0).normal(size=(CLASSES * SHOTS, dim))
    return Gallery.of(features, np.repeat(np.arange(CLASSES), SHOTS), [str(i) for i in range(CLASSES * SHOTS)])


def measure_time(word: str, count: int, turns: int, device: str) -> dict[str, Any]:
    """The whole verification against the encoder alone."""
    source, labels = candidates(count)
    encoder = crop_encoder(word, device)
    gallery, good = random_gallery(encoder.dim), box_faults(labels) == ""
    starts = labels.offsets
    crops = torch.cat(
        [
            crop_boxes(
                read_image(source.record(name)),
                torch.from_numpy(labels.boxes_xyxy[starts[i] : starts[i + 1]][good[starts[i] : starts[i + 1]]]),
                encoder.size,
            )
            for i, name in enumerate(labels.image_ids)
        ]
    )
    batch_size = 32 if device == "cpu" else 128

    def encode() -> None:
        for batch in crops.split(batch_size):
            encoder(batch.to(device)).cpu()

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            found = crop_features(source, labels, encoder, device=device, batch_size=batch_size, cache=folder)
            verify(found, labels.classes, gallery)

    found = compare_in_turns(encode, whole, device, turns)
    return {
        "encoder": word,
        "crop_px": encoder.size,
        "boxes_per_turn": len(labels.boxes_xyxy),
        "images_per_turn": len(labels),
        "candidates": turns * len(labels.boxes_xyxy),
        "ours": "encoder alone",
        "theirs": "whole verification",
        **found,
        "bar": BARS["time"],
        "met": found["wall"]["ratio"] <= BARS["time"],
    }


def measure_memory(count: int) -> dict[str, Any]:
    """Peak memory of this process, beyond what it has before the first image."""
    encoder = CropEncoder(CellColours(), "cells")
    gallery = random_gallery(encoder.dim)
    with tempfile.TemporaryDirectory() as folder:
        labels = candidates(10**9)[1]
        source, labels = repeated(labels, -(-count // len(labels.boxes_xyxy)), Path(folder))
        before = psutil.Process().memory_info().rss
        started = time.perf_counter()
        found = crop_features(source, labels, encoder, cache=Path(folder) / "cache")
        encoded = time.perf_counter()
        votes = verify(found, labels.classes, gallery)
        voted = time.perf_counter()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "candidates": len(votes),
        "images": len(labels),
        "feature_length": encoder.dim,
        "before_mib": round(before / 2**20, 1),
        "peak_mib": round(peak / 2**20, 1),
        "beyond_gib": round((peak - before) / 2**30, 3),
        "features_s": round(encoded - started, 1),
        "votes_s": round(voted - encoded, 1),
        "met": (peak - before) / 2**30 < BARS["memory_gib"],
    }


def main() -> None:
    """Measure and write ``results/verification.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="efficientnet-lite0")
    parser.add_argument("--boxes", type=int, default=929, help="per turn, at least; 929 is the whole set")
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--many", type=int, default=100_000, help="candidates of the memory test")
    parser.add_argument("--once", action="store_true", help="the memory test alone, in this process")
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(measure_memory(arguments.many)))
        return
    surroundings = environment(PACKAGES)
    command = [sys.executable, "-m", "benchmarks.verification", "--once", f"--many={arguments.many}"]
    memory = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, object] = {
        "time": measure_time(arguments.encoder, arguments.boxes, arguments.turns, arguments.device),
        "memory": {**json.loads(memory), "bar_gib": BARS["memory_gib"]},
        "environment": surroundings,
    }
    print(write_result("verification", result).read_text())


if __name__ == "__main__":
    main()

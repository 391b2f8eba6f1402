"""Recall of mined boxes, by encoder and image set -> benchmarks/results/proposal_recall.json.

Encoders that need no download, against a crude one (mean and deviation of RGB, gradient energy per cell) and against
untrained networks. Class-agnostic recall at IoU 0.5 and average recall over IoU 0.50:0.95 (pycocotools' matching) on
evenly spaced validation images, of all boxes before any filter and of the at most 25 that the filters keep. Settings
were chosen on training images; see benchmarks/LOG.md.

    python benchmarks/proposal_recall.py [--images 60] [--data ../shared/data]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.coco import read_coco
from simdetr.data.images import read_image
from simdetr.data.labels import Labels
from simdetr.evaluation.recall import proposal_recall
from simdetr.mining.batch import MiningConfig, cluster_maps, encode, shrink
from simdetr.mining.colour_texture import ColourTextureEncoder
from simdetr.mining.encoders import Encoder, TimmEncoder
from simdetr.mining.filters import apply_filters
from simdetr.mining.regions import Regions, to_regions

REPOSITORY = Path(__file__).resolve().parents[1]
SETS = ("fod", "coco256", "bccd")
ALL_BOXES = 2000  # more than any clustering gives


class CrudeEncoder(nn.Module):
    """The plain idea: RGB mean and deviation, and gradient energy, of every cell."""

    strides = (16, 32)
    region_dim = 8
    fingerprint = "crude"

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Images [B, 3, H, W] to maps of 8 channels."""
        grey = images.mean(dim=1, keepdim=True)
        across = functional.pad((grey[..., 1:] - grey[..., :-1]).abs(), (0, 1))
        down = functional.pad((grey[..., 1:, :] - grey[..., :-1, :]).abs(), (0, 0, 0, 1))
        maps = {}
        for stride in self.strides:
            mean = functional.avg_pool2d(images, stride)
            deviation = (functional.avg_pool2d(images.square(), stride) - mean.square()).clamp(min=0).sqrt()
            energy = functional.avg_pool2d(torch.cat((across, down), dim=1), stride)
            maps[stride] = torch.cat((mean, deviation, energy), dim=1)
        return maps


def subset(truth: Labels, count: int) -> Labels:
    """Evenly spaced images of a set."""
    rows = np.unique(np.linspace(0, len(truth) - 1, min(count, len(truth))).round().astype(int))
    return truth.select(truth.image_ids[row] for row in rows)


def regions_of(
    encoder: Encoder, configs: dict[str, MiningConfig], images: list[Tensor]
) -> dict[tuple[str, str], list[Regions]]:
    """Per configuration, the regions of each image before and after the filters; images are encoded once."""
    found: dict[tuple[str, str], list[Regions]] = defaultdict(list)
    for image in images:
        size = (image.shape[1], image.shape[2])
        maps = encode(shrink(image, MiningConfig.image_size)[None], encoder)
        for name, config in configs.items():
            candidates = cluster_maps(maps, config)
            found[name, "all"] += to_regions(candidates, [size])
            found[name, "kept"] += to_regions(apply_filters(candidates, config.filters), [size])
    return found


def recall_of(regions: list[Regions], limit: int, truth: Labels) -> dict[str, float]:
    """Recall of the boxes, and how many they are."""
    rows = [
        ImageLabels.build(image_id, size, found.boxes_xyxy, np.zeros(len(found)))
        for image_id, size, found in zip(truth.image_ids, truth.sizes_hw.tolist(), regions, strict=True)
    ]
    recall = proposal_recall(truth, Labels.from_images(rows, (Category(1, "object"),), stage=0), (limit,))
    return {
        "recall50": round(recall[f"recall50@{limit}"], 4),
        "AR": round(recall[f"AR@{limit}"], 4),
        "boxes_per_image": round(sum(map(len, regions)) / len(regions), 1),
    }


def encoder_speed(encoder: Encoder, repeats: int = 5) -> float:
    """Images per second of the encoder alone at 448 x 448 px, batches of 8, median."""
    images = torch.rand(8, 3, 448, 448, generator=torch.Generator().manual_seed(0))
    encoder(images)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        encoder(images)
        seconds.append(time.perf_counter() - started)
    return round(8 / float(np.median(seconds)), 2)


def main() -> None:
    """Measure every encoder on every set and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=60, help="validation images per set, evenly spaced")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("SIMDETR_DATA", REPOSITORY / "../shared/data"))
    )
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks/results/proposal_recall.json")
    arguments = parser.parse_args()
    default = MiningConfig()
    limits = {**default.filters, "merge_similar_clusters": 0.9, "drop_similar_subsets": 0.9}
    kernel = MiningConfig(affinity="clamp", centre=False, cut_steps=0, filters=limits)
    configs = {"default": default, "kernel": kernel}
    encoders: dict[str, Encoder] = {
        "colour-texture": ColourTextureEncoder(),
        "untrained resnet50": TimmEncoder("resnet50", random_weights=True),
        "untrained resnet18": TimmEncoder("resnet18", random_weights=True),
        "crude colour": CrudeEncoder(),
    }
    results = []
    for set_name in SETS:
        truth = subset(read_coco(arguments.data / set_name / "instances_val.json")[0], arguments.images)
        images = [read_image(arguments.data / set_name / "val" / image_id) for image_id in truth.image_ids]
        for encoder_name, encoder in encoders.items():
            found = regions_of(encoder, configs, images)
            for config_name in configs:
                row = {"set": set_name, "images": len(images), "encoder": encoder_name, "config": config_name}
                row["all"] = recall_of(found[config_name, "all"], ALL_BOXES, truth)
                row["kept"] = recall_of(found[config_name, "kept"], 25, truth)
                results.append(row)
                print(f"{set_name:8} {encoder_name:20} {config_name:8} all {row['all']} kept {row['kept']}", flush=True)
    report = {
        "what": "class-agnostic recall of mined boxes at 448 px, evenly spaced validation images",
        "command": f"python benchmarks/proposal_recall.py --images {arguments.images}",
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} torch threads",
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "timm": timm.__version__},
        "configs": {name: config.result_settings() for name, config in configs.items()},
        "encoder_images_per_second": {name: encoder_speed(encoder) for name, encoder in encoders.items()},
        "rows": results,
    }
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

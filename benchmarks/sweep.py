"""Settings of the mining, one at a time around the chosen ones -> benchmarks/results/sweep.json.

Chosen on the training images of coco256 (and, as a check against one-sidedness, of fod and bccd), reported once on the
validation images: class-agnostic average recall over IoU 0.50:0.95 of the 25 highest ranked boxes, colour-texture
encoder.

    python -m benchmarks.sweep [--images 60] [--data ../shared/data]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.environment import DATA, environment, write_result
from benchmarks.proposal_recall import SETS, recall_of, subset
from simdetr.data.coco import read_coco
from simdetr.data.images import read_image
from simdetr.data.labels import Labels
from simdetr.mining import ColourTextureEncoder, MiningConfig, mine_batch
from simdetr.mining.level_sets import LevelSets

LIMIT = 25
KERNEL: dict[str, Any] = {"affinity": "clamp", "centre": False, "cut_steps": 0}
CHOSEN = MiningConfig()
PLAIN = MiningConfig(
    **KERNEL,
    level_sets=None,
    filters=MiningConfig().filters | {"merge_similar_clusters": 0.9, "drop_similar_subsets": 0.9},
)


def variants() -> dict[str, MiningConfig]:
    """Every configuration by name; "chosen" is the one that the recipes use."""
    table = {"chosen": CHOSEN}
    table |= {
        "the document's filters": PLAIN,
        "the document's filters, merge 0.5": replace(PLAIN, filters=PLAIN.filters | {"merge_similar_clusters": 0.5}),
        "the document's filters, merge 0.7": replace(PLAIN, filters=PLAIN.filters | {"merge_similar_clusters": 0.7}),
        "the document's filters, subsets 0.7": replace(PLAIN, filters=PLAIN.filters | {"drop_similar_subsets": 0.7}),
        "the document's filters, exp affinity": replace(PLAIN, affinity="exp", centre=True, cut_steps=2),
    }
    clustering: list[tuple[str, Any]] = [
        ("affinity", "clamp"),
        ("centre", False),
        ("cut_steps", 0),
        ("kmeans_starts", 3),
    ]
    clustering += [("connectivity", 8), ("image_size", 320), ("image_size", 640)]
    clustering += [("clusters", {32: [2, 4, 8]}), ("clusters", {16: [8, 16]}), ("clusters", {32: [2, 4, 8], 16: [8]})]
    for name, value in clustering:
        table[f"{name} {value}"] = replace(CHOSEN, **{name: value})
    fine: list[tuple[str, Any]] = [("cell_px", 2), ("cell_px", 8), ("cell_px", 16)]
    fine += [("levels", levels) for levels in ((0.5,), (0.35, 0.7), (0.1, 0.35, 0.7, 0.9), (0.05, 0.2, 0.5, 0.8, 0.95))]
    fine += [("erosion", 1), ("erosion", 2), ("min_cells", 4), ("min_cells", 16)]
    fine += [("max_iou", value) for value in (0.5, 0.6, 0.7, 0.8)]
    fine += [("edge_power", value) for value in (0.0, 1.0, 2.0, 3.0)]
    fine += [("border_factor", value) for value in (1.0, 0.3)]
    fine += [("max_ranked", value) for value in (128, 1024)]
    fine += [("min_relative_score", value) for value in (0.05, 0.1, 0.2)]
    for name, value in fine:
        table[f"{name} {value}"] = replace(CHOSEN, level_sets=LevelSets(**{name: value}))
    return table


def measure(config: MiningConfig, truth: Labels, images: list[Tensor]) -> dict[str, float]:
    """Recall of the kept boxes of all images, and milliseconds per image, encoder included."""
    encoder = ColourTextureEncoder()
    started = time.perf_counter()
    regions = [
        found
        for start in range(0, len(images), 16)
        for found in mine_batch(images[start : start + 16], encoder, config)
    ]
    return recall_of(regions, LIMIT, truth) | {"ms": round(1000 * (time.perf_counter() - started) / len(images), 1)}


def load(data: Path, name: str, split: str, count: int) -> tuple[Labels, list[Tensor]]:
    """Evenly spaced images of a set with their boxes."""
    truth = subset(read_coco(data / name / f"instances_{split}.json")[0], count)
    return truth, [read_image(data / name / split / image_id) for image_id in truth.image_ids]


def main() -> None:
    """Measure every variant on the training images, the named ones on the validation images."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=50, help="images per set, evenly spaced; all of coco256")
    parser.add_argument("--data", type=Path, default=DATA)
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "what": f"class-agnostic AR@{LIMIT} (IoU 0.50:0.95) by setting, colour-texture encoder; chosen on train",
        "images_per_set": arguments.images,
        "chosen": CHOSEN.result_settings(),
        "environment": environment(("torch", "torchvision", "scipy")),
        "train": [],
        "val": [],
    }
    for split in ("train", "val"):
        sets = {
            name: load(arguments.data, name, split, 128 if name == "coco256" else arguments.images) for name in SETS
        }
        for name, config in variants().items():
            if split == "val" and not (name == "chosen" or "document" in name):
                continue
            row: dict[str, Any] = {"variant": name}
            row |= {key: measure(config, truth, images) for key, (truth, images) in sets.items()}
            report[split].append(row)
            print(
                split,
                name,
                {key: row[key]["AR"] for key in sets},
                np.mean([row[key]["ms"] for key in sets]).round(),
                flush=True,
            )
            write_result("sweep", report)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

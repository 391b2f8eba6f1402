"""Does the encoder matter to what is mined, and do scores say what is an object? -> results/proposal_ranking.json.

Per image set and encoder: class-agnostic AR@1, @10 and @25 (IoU 0.50:0.95) and AP at IoU 0.5 of the at most 25 mined
boxes of evenly spaced validation images, by pycocotools. Every row has the ranking of the defaults, and beside it the
plain one of the image alone (edge, area, fill, recurrence, hard suppression), from the same shapes. Untrained networks
are the control. Constants were chosen on training images (`benchmarks/LOG.md`).

    python -m benchmarks.proposal_ranking [--images 128] [--sets coco256 fod] [--encoders efficientnet-lite0]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

from benchmarks.environment import DATA, environment, write_result
from simdetr.boxes import batched_iou
from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.coco import read_coco
from simdetr.data.images import read_image
from simdetr.data.labels import Labels
from simdetr.evaluation.coco_metric import match_boxes
from simdetr.mining.batch import MiningConfig, cluster_levels, encode, shrink
from simdetr.mining.colour_texture import ColourTextureEncoder
from simdetr.mining.encoders import Encoder, TimmEncoder
from simdetr.mining.level_sets import LevelSets, Shapes, find_shapes
from simdetr.mining.ranking import rank_shapes

SETS = {"coco256": 128, "fod": 100, "aquarium": 60, "neu_det": 60}
ENCODERS: dict[str, Callable[[], Encoder]] = {
    "colour-texture": ColourTextureEncoder,
    "untrained efficientnet-lite0": lambda: TimmEncoder("efficientnet-lite0", random_weights=True),
    "efficientnet-lite0": lambda: TimmEncoder("efficientnet-lite0", pretrained=True),
    "untrained augnet-resnet50": lambda: TimmEncoder("augnet-resnet50", random_weights=True),
    "augnet-resnet50": lambda: TimmEncoder("augnet-resnet50", pretrained=True),
}


def plain_ranking(shapes: Shapes) -> tuple[Tensor, Tensor]:
    """The ranking without an encoder, for one image: kept shapes and the score of every shape."""
    height, width = shapes.grid
    touched = (shapes.boxes == shapes.boxes.new_tensor([0, 0, width, height])).sum(dim=1)
    looks = shapes.edge**1.5 * 0.5**touched * (shapes.count / (height * width)).sqrt()
    ranked = looks.argsort(descending=True, stable=True)[:512]
    scores = torch.zeros_like(looks)
    scores[ranked] = looks[ranked] * (batched_iou(shapes.boxes[ranked][None])[0] > 0.6).sum(dim=0)
    return ranked[nms(shapes.boxes[ranked], scores[ranked], 0.65)][:25], scores


def mined(encoder: Encoder, truth: Labels, folder: str) -> dict[str, Labels]:
    """The mined boxes of a set by both rankings."""
    config = MiningConfig()
    settings = config.level_sets or LevelSets()
    rows: dict[str, list[ImageLabels]] = {"plain": [], "default": []}
    for image_id in truth.image_ids:
        image = read_image(DATA / folder / "val" / image_id)
        pixels = shrink(image, config.image_size)[None]
        maps = encode(pixels, encoder)
        shapes = find_shapes(pixels.float() / 255, cluster_levels(maps, config), settings)
        step = np.array([image.shape[2] / shapes.grid[1], image.shape[1] / shapes.grid[0]] * 2)
        for name, (kept, scores) in (
            ("plain", plain_ranking(shapes)),
            ("default", rank_shapes(shapes, 1, settings, maps)),
        ):
            boxes = shapes.boxes[kept].numpy() * step
            rows[name].append(
                ImageLabels.build(image_id, image.shape[-2:], boxes, np.zeros(len(boxes)), scores=scores[kept].numpy())
            )
    return {name: _with_scores_below_one(found) for name, found in rows.items()}


def _with_scores_below_one(rows: list[ImageLabels]) -> Labels:
    top = max(float(row.scores.max(initial=0)) for row in rows)
    scaled = [
        ImageLabels.build(row.image_id, row.size_hw, row.boxes_xyxy, row.classes, scores=row.scores / top)
        for row in rows
    ]
    return Labels.from_images(scaled, (Category(1, "object"),), stage=0)


def main() -> None:
    """Measure every encoder on every set; what is done is written after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=128, help="validation images per set, at most")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    result = environment(("torch", "timm", "numpy")) | {"config": MiningConfig().result_settings()}
    rows: list[dict[str, object]] = []
    for encoder_name in arguments.encoders:
        encoder = ENCODERS[encoder_name]()
        for folder in arguments.sets:
            truth = read_coco(DATA / folder / "instances_val.json")[0]
            count = min(arguments.images, SETS[folder], len(truth))
            places = np.unique(np.linspace(0, len(truth) - 1, count).round().astype(int))
            truth = truth.select(truth.image_ids[place] for place in places)
            for ranking, labels in mined(encoder, truth, folder).items():
                found = match_boxes(truth, labels, class_agnostic=True, max_boxes=(1, 10, 25))
                row: dict[str, object] = {"set": folder, "images": count, "encoder": encoder_name, "ranking": ranking}
                row |= {f"AR@{k}": round(found.average_recall(k), 4) for k in (1, 10, 25)}
                row["AP50"] = round(found.average_precision(iou=50), 4)
                rows.append(row)
                print(row, flush=True)
            write_result("proposal_ranking", result | {"rows": rows})


if __name__ == "__main__":
    main()

"""Matching of all layers and images against the usual formulation, layer by layer and image by image.

Both find the same assignments: six layers, a batch of 8 images, 300 queries, 12 to 28 objects per image. The usual way
takes the probabilities of all classes, then the columns of the image's objects, torch.cdist, torchvision's
generalized_box_iou and scipy, 48 times. Ratio of neighbours in turns, medians, by wall clock and by CPU time.

python -m benchmarks.matcher
"""

from __future__ import annotations

import argparse

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import generalized_box_iou

from benchmarks.environment import environment, write_result
from benchmarks.turns import compare_in_turns
from simdetr.boxes import cxcywh_to_xyxy
from simdetr.detectors.matcher import HungarianMatcher, Matches, Target

LAYERS, BATCH, QUERIES = 6, 8, 300
BAR = 3.0


def predictions(num_classes: int, device: str) -> tuple[Tensor, Tensor, list[Target]]:
    """Logits [N, B, Q, K], boxes [N, B, Q, 4] and targets of a batch."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(LAYERS, BATCH, QUERIES, num_classes, generator=generator) - 4.0
    boxes = torch.rand(LAYERS, BATCH, QUERIES, 4, generator=generator) * 0.5 + 0.1
    counts = torch.randint(12, 29, (BATCH,), generator=generator).tolist()
    targets: list[Target] = [
        {
            "labels": torch.randint(num_classes, (count,), generator=generator).to(device),
            "boxes": (torch.rand(count, 4, generator=generator) * 0.4 + 0.1).to(device),
        }
        for count in counts
    ]
    return logits.to(device), boxes.to(device), targets


def together(logits: Tensor, boxes: Tensor, targets: list[Target]) -> Matches:
    """Ours: one tensor of costs, one transfer."""
    matcher = HungarianMatcher()
    return matcher.assign([matcher.costs(logits, boxes, targets)], [len(target["labels"]) for target in targets])[0]


@torch.no_grad()
def one_by_one(logits: Tensor, boxes: Tensor, targets: list[Target]) -> list[list[tuple[Tensor, Tensor]]]:
    """The usual way: per layer and image the queries and their targets."""
    layers = []
    for layer_logits, layer_boxes in zip(logits, boxes, strict=True):
        images = []
        for image, target in enumerate(targets):
            probability = layer_logits[image].sigmoid()
            negative = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
            positive = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
            of_class = positive[:, target["labels"]] - negative[:, target["labels"]]
            distance = torch.cdist(layer_boxes[image], target["boxes"], p=1)
            giou = generalized_box_iou(cxcywh_to_xyxy(layer_boxes[image]), cxcywh_to_xyxy(target["boxes"]))
            query, index = linear_sum_assignment((2 * of_class + 5 * distance - 2 * giou).cpu())
            images.append((torch.from_numpy(query), torch.from_numpy(index)))
        layers.append(images)
    return layers


def agree(num_classes: int, device: str) -> bool:
    """Whether both find the same assignments."""
    case = predictions(num_classes, device)
    found, usual = together(*case), one_by_one(*case)
    return all(
        torch.equal(found.query[layer], torch.cat([query for query, _ in images]))
        and torch.equal(found.target[layer], torch.cat([target for _, target in images]))
        for layer, images in enumerate(usual)
    )


def measure(num_classes: int, device: str, repeats: int) -> dict[str, object]:
    """Times of both and their ratio."""
    case = predictions(num_classes, device)
    times = compare_in_turns(lambda: together(*case), lambda: one_by_one(*case), device, repeats)
    return {
        "device": device,
        "num_classes": num_classes,
        "equal_assignments": agree(num_classes, device),
        **times,
        "bar": BAR,
        "met": bool(times["wall"]["ratio"] >= BAR),
    }


def main() -> None:
    """Measure and write ``results/matcher.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--classes", type=int, nargs="+", default=[91, 2048])
    parser.add_argument("--name", default="matcher", help="of the result file")
    arguments = parser.parse_args()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = [measure(classes, device, arguments.repeats) for device in devices for classes in arguments.classes]
    result: dict[str, object] = {
        "what": f"{LAYERS} layers, batch {BATCH}, {QUERIES} queries, 12 to 28 objects per image",
        "rows": rows,
        "gpu": "measured" if "cuda" in devices else "not measured",
        "environment": environment(("torch", "torchvision", "scipy")),
    }
    print(write_result(arguments.name, result).read_text())


if __name__ == "__main__":
    main()

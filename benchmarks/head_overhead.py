"""What heads cost: a landmark head on a detector's training step, localisation on that of class activation maps.

Deformable DETR R50 (6 layers, 300 queries) at 224 px, batch 2, with and without a landmark head of each prediction; and
a ResNet-50 at output stride 16, 224 px, batch 8, with all losses of localisation against class activation maps alone.
Float32, forward, losses, backward, clipping, fused AdamW, in turns in one process. Bars: 1.05 and 1.3.

python -m benchmarks.head_overhead
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import environment, write_result
from benchmarks.training_step import step_of
from benchmarks.turns import compare_in_turns
from simdetr.detectors import DeformableDETR
from simdetr.detectors.detector import Detector
from simdetr.heads import HeadedBackbone, HeadedDetector, LandmarkHead, LocalisationHead
from simdetr.training.detection_task import DetectionTask

PACKAGES = ("torch", "torchvision", "timm", "pytorch-lightning")
NUM_CLASSES, SIDE = 14, 224
BARS = {"landmarks": 1.05, "localisation": 1.3}


def make_batch(count: int, objects: int) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Images, mask and targets with points, drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    mask = torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
    targets = []
    for _ in range(count):
        boxes = torch.rand(objects, 4, generator=generator) * 0.4 + 0.2
        labels = torch.randint(NUM_CLASSES, (objects,), generator=generator)
        targets.append({"labels": labels, "boxes": boxes, "points": boxes[:, :2]})
    return images, mask, targets


def step(detector: Detector, batch: tuple[Any, ...]) -> Callable[[], Tensor]:
    """A training step of a detector on one batch."""
    task = DetectionTask(detector.train(), lr=1e-6, backbone_lr=1e-7)
    return step_of(detector, lambda: detector.losses(*batch)["loss"], task.new_optimiser())


def landmarks(repeats: int) -> dict[str, Any]:
    """With and without the head, from the same weights."""
    torch.manual_seed(0)
    plain = DeformableDETR(NUM_CLASSES)
    headed = HeadedDetector(NUM_CLASSES, LandmarkHead, DeformableDETR)
    headed.detector.load_state_dict(plain.state_dict())
    batch = make_batch(2, 8)
    return compare_in_turns(step(plain, batch), step(headed, batch), "cpu", repeats)


def localisation(repeats: int) -> dict[str, Any]:
    """All losses against class activation maps."""

    def headed(method: str) -> HeadedBackbone:
        torch.manual_seed(0)
        return HeadedBackbone(NUM_CLASSES, lambda sizes: LocalisationHead(sizes, method=method), output_stride=16)

    batch = make_batch(8, 1)
    return compare_in_turns(step(headed("cam"), batch), step(headed("in_sample"), batch), "cpu", repeats)


def main() -> None:
    """Measure and write ``results/head_overhead.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"environment": environment(PACKAGES), "gpu": "not measured"}
    for name, measure in (("landmarks", landmarks), ("localisation", localisation)):
        found = measure(arguments.repeats)
        met = found["wall"]["ratio"] <= BARS[name]
        result[name] = {"without": "ours", "with": "theirs", **found, "bar": BARS[name], "met": bool(met)}
    print(write_result("head_overhead", result).read_text())


if __name__ == "__main__":
    main()

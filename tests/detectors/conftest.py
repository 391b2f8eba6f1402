"""Detectors of other libraries, inputs of the attention, and two images that a detector can learn by heart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from simdetr.boxes import cxcywh_to_xyxy, pairwise_iou
from simdetr.detectors.predictions import postprocess


@pytest.fixture(scope="module")
def detectors(make_other):
    """One detector of each kind, in evaluation mode; tests copy those that they change."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = make_other(name, num_classes=7).eval()
        return made[name]

    return get


@pytest.fixture(scope="session")
def attention_inputs() -> Callable[..., tuple[torch.Tensor, ...]]:
    """Random values, places from -0.4 to 1.4, and weights of deformable attention on maps of the given sizes."""

    def make(
        shapes: list[tuple[int, int]],
        *,
        batch: int = 1,
        heads: int = 2,
        dim: int = 4,
        queries: int = 5,
        points: int = 2,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        cells, per_query = sum(height * width for height, width in shapes), (len(shapes), points)
        value = torch.randn(batch, cells, heads, dim, generator=generator, dtype=dtype)
        locations = torch.rand(batch, queries, heads, *per_query, 2, generator=generator, dtype=dtype) * 1.8 - 0.4
        return value, locations, torch.rand(batch, queries, heads, *per_query, generator=generator, dtype=dtype)

    return make


@pytest.fixture(scope="session")
def rectangles() -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Two images of coloured rectangles on grey, 96 px, with their boxes, masks and colours as classes."""
    places = [[(8, 12, 48, 44, 0), (52, 50, 90, 88, 1)], [(20, 40, 80, 90, 2)]]
    images, targets = torch.zeros(2, 3, 96, 96), []
    for image, boxes in enumerate(places):
        masks = torch.zeros(len(boxes), 96, 96, dtype=torch.bool)
        for index, (x0, y0, x1, y1, colour) in enumerate(boxes):
            images[image, :, y0:y1, x0:x1] = -1.0
            images[image, colour, y0:y1, x0:x1] = 2.0
            masks[index, y0:y1, x0:x1] = True
        xyxy = torch.tensor([box[:4] for box in boxes], dtype=torch.float32)
        cxcywh = torch.cat(((xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]), dim=1) / 96
        targets.append({"labels": torch.tensor([box[4] for box in boxes]), "boxes": cxcywh, "masks": masks})
    return images, targets


@pytest.fixture(scope="session")
def learn(rectangles) -> Callable[..., tuple[float, float]]:
    """Train a detector on the two images; first and last loss."""

    def train(detector: torch.nn.Module, steps: int, lr: float) -> tuple[float, float]:
        images, targets = rectangles
        mask = torch.zeros(2, 96, 96, dtype=torch.bool)
        optimiser, losses = torch.optim.AdamW(detector.train().parameters(), lr=lr, fused=True), []
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, total_iters=steps)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for _ in range(steps):
                loss = detector.losses(images, mask, targets)["loss"]
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(detector.parameters(), 0.1)
                optimiser.step()
                schedule.step()
                losses.append(loss.item())
        return losses[0], losses[-1]

    return train


@pytest.fixture(scope="session")
def assert_best_boxes_are_right(rectangles) -> Callable[..., None]:
    """The most confident boxes of a detector are those of the two images, with their classes."""

    def check(detector: torch.nn.Module, min_iou: float) -> None:
        images, targets = rectangles
        with torch.no_grad():
            detections = postprocess(detector.eval()(images), [(96, 96)] * 2)
        for found, target in zip(detections, targets, strict=True):
            count = len(target["labels"])
            ious = pairwise_iou(cxcywh_to_xyxy(target["boxes"]) * 96, found["boxes_xyxy"][:count])
            assert (ious.amax(dim=1) > min_iou).all(), ious
            assert sorted(found["labels"][:count].tolist()) == sorted(target["labels"].tolist())

    return check

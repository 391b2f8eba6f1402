"""A small network learns discs and squares: first what they are, then where their points lie, and each class its own.

With Equation 4. Discs have their point at the centre, squares at the lower right.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from simdetr.detectors.detector import Features, FeatureSizes, Level
from simdetr.heads import LandmarkHead

SIDE = 32
CENTRE, LOWER_RIGHT = 0.0, 1.0


def scenes(count, generator, rules):
    """Images [count, 1, 32, 32] with one disc (class 0) or square each, and their targets."""
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    labels = torch.randint(0, 2, (count,), generator=generator)
    radius = 4 + 4 * torch.rand(count, 1, generator=generator)
    centre = radius + 1 + torch.rand(count, 2, generator=generator) * (SIDE - 2 - 2 * radius)
    away = [(axis - centre[:, index, None, None]).abs() for index, axis in enumerate((x, y))]
    disc = away[0] ** 2 + away[1] ** 2 < radius[:, :, None] ** 2
    square = torch.maximum(*away) < radius[:, :, None]
    images = torch.where(labels[:, None, None] == 0, disc, square)[:, None].float()
    images = images + 0.1 * torch.randn(images.shape, generator=generator)
    boxes = torch.cat((centre, 2 * radius.expand(-1, 2)), dim=1) / SIDE
    points = boxes[:, :2] + boxes[:, 2:] / 2 * torch.tensor(rules)[labels, None]
    return images, {"labels": labels, "boxes": boxes, "points": points}


class Network(nn.Module):
    """Three convolutions and the head on their map."""

    def __init__(self, width=32):
        super().__init__()
        layers = []
        for channels, stride in ((1, 2), (width, 2), (width, 1)):
            layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.GroupNorm(4, width), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = LandmarkHead(FeatureSizes(2, (width,), (4,)), "grid", grid=(2, 2), beta=0.02)

    def features(self, images):
        found = self.body(images)
        return Features([Level(found, 4, found.new_zeros(found[:, 0].shape, dtype=torch.bool))], None, [])

    @torch.no_grad()
    def read(self, images):
        """Class and point of the most confident anchor node of each image."""
        features = self.features(images)
        outputs = self.head(features)
        probability = outputs.logits.softmax(dim=-1).flatten(1, 2)
        best = torch.arange(len(images)), probability[..., 2].argmin(dim=1)
        return probability[best][:, :2].argmax(dim=1), outputs.points.flatten(1, 2)[best]


def train(network, rules, steps, rate, seed, watch):
    """Train, calling ``watch(step)`` every 20 steps."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimiser = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        images, columns = scenes(32, generator, rules)
        targets = [{name: column[i : i + 1] for name, column in columns.items()} for i in range(32)]
        features = network.features(images)
        losses = network.head.losses(network.head(features), features, targets)
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
        schedule.step()
        if step % 20 == 0:
            watch(step)


def test_classes_come_before_points_and_each_class_has_its_rule():
    torch.manual_seed(1)
    network = Network()
    images, truth = scenes(256, torch.Generator().manual_seed(99), [CENTRE, LOWER_RIGHT])
    diagonal = 2**0.5
    accuracy, error = {}, {}

    def watch(step):
        classes, points = network.read(images)
        accuracy[step] = float((classes == truth["labels"]).float().mean())
        error[step] = float((points - truth["points"]).norm(dim=1).mean()) / diagonal

    train(network, [CENTRE, LOWER_RIGHT], 600, 4e-3, 2, watch)
    class_known = min(step for step, value in accuracy.items() if value >= 0.95)
    point_known = min(step for step, value in error.items() if value <= 0.02)
    assert class_known < point_known

    _, before = network.read(images)
    other = copy.deepcopy(network)
    train(other, [LOWER_RIGHT, LOWER_RIGHT], 150, 2e-3, 6, lambda step: None)
    _, after = other.read(images)
    moved = (after - before).norm(dim=1)
    _, changed = scenes(256, torch.Generator().manual_seed(99), [LOWER_RIGHT, LOWER_RIGHT])
    is_disc = truth["labels"] == 0
    expected = (changed["points"] - truth["points"])[is_disc].norm(dim=1).mean()
    assert moved[is_disc].mean() == pytest.approx(float(expected), rel=0.1)
    assert moved[~is_disc].mean() < 0.2 * expected

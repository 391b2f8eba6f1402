"""Targets of a batch as tensors, and the units of distances."""

from __future__ import annotations

import pytest
import torch

from simdetr.detectors.detector import Level
from simdetr.heads.landmark_targets import LandmarkTargets, point_units

CPU = torch.device("cpu")


def target(count):
    boxes = torch.rand(count, 4, generator=torch.Generator().manual_seed(count))
    return {"labels": torch.arange(count), "boxes": boxes, "points": boxes[:, :2]}


def test_targets_are_filled_up():
    targets = [target(2), target(0), target(3)]
    found = LandmarkTargets.of(targets, CPU)
    assert found.counts == [2, 0, 3]
    assert found.present.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    for image, wanted in enumerate(targets):
        for name in ("labels", "boxes", "points"):
            assert torch.equal(getattr(found, name)[image][found.present[image]], wanted[name])


def test_a_batch_without_landmarks():
    found = LandmarkTargets.of([target(0), target(0)], CPU)
    assert found.points.shape == (2, 0, 2) and found.present.shape == (2, 0) and found.counts == [0, 0]


def test_bad_targets():
    without = {"labels": torch.tensor([0]), "boxes": torch.rand(1, 4)}
    with pytest.raises(ValueError, match=r"image 1 of the batch has no 'points'; .*reference_points"):
        LandmarkTargets.of([target(1), without], CPU)
    with pytest.raises(ValueError, match=r"points of image 0 of the batch: expected \[2, 2\], got \[3, 2\]"):
        LandmarkTargets.of([target(2) | {"points": torch.rand(3, 2)}], CPU)


def test_units():
    mask = torch.zeros(2, 6, 10, dtype=torch.bool)
    mask[1, 4:] = True
    mask[1, :, 7:] = True
    levels = [Level(torch.zeros(2, 3, 6, 10), 8, mask), Level(torch.zeros(2, 3, 3, 5), 16, mask[:, ::2, ::2])]
    assert point_units(levels, "fraction", (4, 5)).tolist() == [[1, 1], [1, 1]]
    assert point_units(levels, "cell", (4, 5)).tolist() == [[5, 4], [5, 4]]
    assert point_units(levels, "pixel", (4, 5)).tolist() == [[80, 48], [56, 32]]

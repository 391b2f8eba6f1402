"""Landmarks of a batch as tensors of one shape, and the unit in which distances to their points are measured.

In: targets per image, or feature maps. Out: what both variants of the landmark head learn from. Letters: B images, T
landmarks of one image (padded to the most of any image), N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from simdetr.detectors.detector import Level
from simdetr.detectors.matcher import Target, pad_targets, to_device
from simdetr.heads.landmark_losses import SampleLosses, Unit


class LandmarkTargets(NamedTuple):
    """Landmarks of a batch."""

    labels: Tensor  # Class int64 [B, T]
    boxes: Tensor  # Extent, cxcywh, fractions of the valid image [B, T, 4]; without area where only the point is known
    points: Tensor  # Reference point (x, y), fractions of the valid image [B, T, 2]; NaN where unknown
    present: Tensor  # bool [B, T]; the others fill up
    counts: list[int]  # Landmarks of each image

    @classmethod
    def of(cls, targets: Sequence[Target], device: torch.device) -> LandmarkTargets:
        """Targets ``labels``, ``boxes``, ``points`` of each image on a device; ValueError without a point each."""
        counts = [len(target["labels"]) for target in targets]
        for index, (target, count) in enumerate(zip(targets, counts, strict=True)):
            if "points" not in target:
                raise ValueError(
                    f"targets: image {index} of the batch has no 'points'; say which point of each class's boxes to "
                    "learn, data.reference_points: {default: center}"
                )
            if target["points"].shape != (count, 2):
                raise ValueError(
                    f"points of image {index} of the batch: expected [{count}, 2], got {list(target['points'].shape)}"
                )
        labels, boxes = pad_targets(targets)
        points = pad_sequence([target["points"].float() for target in targets], batch_first=True)
        present = torch.arange(labels.shape[1]) < torch.tensor(counts)[:, None]
        labels, boxes, points, present = (to_device(side, device) for side in (labels, boxes, points, present))
        return cls(labels, boxes, points, present, counts)


class Samples(NamedTuple):
    """N samples that a variant trains."""

    losses: SampleLosses
    weight: Tensor  # How much each counts [N]
    is_landmark: Tensor  # bool [N]; the others are background
    class_loss_of_others: Tensor | float  # Sum over what is not among the samples


def point_units(levels: Sequence[Level], unit: Unit, grid: tuple[int, int]) -> Tensor:
    """How many units the valid image is wide and high, float32 [B, 2]; cells are those of the grid, rows and columns.

    Pixels are read off the finest feature map, so they are rounded up to its stride.
    """
    finest = levels[0]
    rows, columns = valid_cells(finest.mask)
    if unit == "pixel":
        return finest.stride * torch.stack((columns, rows), dim=1).float()
    size = torch.ones_like(rows, dtype=torch.float32)
    down, across = grid if unit == "cell" else (1, 1)
    return torch.stack((across * size, down * size), dim=1)


def valid_cells(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of a map that are not padding, int64 [B] each; mask bool [B, h, w]."""
    return (~mask[:, :, 0]).sum(dim=1), (~mask[:, 0, :]).sum(dim=1)

"""Points of a training sample: what the transforms carry along with its boxes in, its reference points out.

Rules read the boxes as the transforms leave them, flipped and cut; given points are moved as the image is. Letters: T
objects of a sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simdetr.boxes import clip
from simdetr.data import points as point_columns
from simdetr.data.points import Points
from simdetr.data.reference_points import ReferencePoints


def untransformed_points(
    rules: ReferencePoints,
    boxes_xyxy: NDArray[np.float32],
    classes: NDArray[np.int64],
    given: Points | None,
    size_hw: tuple[int, int],
) -> dict[str, Tensor]:
    """What the transforms of a training sample carry along with its boxes.

    Args:
        rules: which point of which class.
        boxes_xyxy: boxes [T, 4] of the objects of an image.
        classes: int64 [T].
        given: the labels' own points [T, 2], or None.
        size_hw: (height, width) of the image.

    Returns:
        ``points`` float32 [T, 2], the given points in pixels, NaN where unknown or outside; ``only_point`` bool [T],
        landmarks without box; ``one_sided`` bool [T], those of them that no mirror may move.
    """
    given = point_columns.unknown(len(classes)) if given is None else given
    given = np.where(rules.inside(given, np.array(size_hw))[:, None], given, np.float32(np.nan))
    only_point = point_columns.only_points(boxes_xyxy, given)
    columns = {
        "points": given,
        "only_point": only_point,
        "one_sided": only_point & rules.one_sided(classes),
    }
    return {name: torch.from_numpy(values) for name, values in columns.items()}


def transformed_points(rules: ReferencePoints, target: dict[str, Any], size_hw: tuple[int, int]) -> dict[str, Any]:
    """A transformed training target with its reference points, by the boxes as they are now.

    Args:
        rules: which point of which class.
        target: ``boxes`` xyxy in pixels, ``labels`` and what `untransformed_points` made.
        size_hw: (height, width) of the transformed image.

    Returns:
        The target with ``points`` float32 [T, 2] in pixels, NaN where there is none or it left the image; landmarks
        without box are gone where their point is, and have the box (x, y, x, y) else.

    Raises:
        ValueError: the transform took boxes away and left their points.
    """
    boxes = target["boxes"].as_subclass(Tensor).float().reshape(-1, 4)
    if not len(boxes) == len(target["labels"]) == len(target["points"]) == len(target["only_point"]):
        raise ValueError(
            f"transform: expected to keep points with their boxes, got {len(boxes)} boxes and {len(target['points'])} "
            "points; use the transforms of simdetr.data.transforms, or leave reference_points out"
        )
    if target.get("flip_refused", False):
        rules.count_refused_flip()
    only_point = target["only_point"]
    lone = target["points"].repeat(1, 2)
    boxes = torch.where(only_point[:, None], lone, boxes)
    points = rules.points_of(boxes.numpy(), target["labels"].numpy(), target["points"].numpy())
    there = rules.inside(points, np.array(size_hw))
    kept = torch.from_numpy(there) | ~only_point
    points = np.where(there[:, None], points, np.float32(np.nan))
    settled = {"boxes": clip(boxes, size_hw), "points": torch.from_numpy(points)}
    settled |= {name: target[name] for name in ("labels", "masks") if name in target}
    return target | {name: values[kept] for name, values in settled.items()}

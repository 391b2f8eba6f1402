"""From predicted landmarks to those that are kept: of several predictions of one landmark the most confident.

The best one's place is kept as it is. A mean over the group would move with every unsure neighbour, and with the score
below which predictions are left out.
Letters: N landmarks of one image, M of them kept.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

DUPLICATE_CELLS = 0.5
"""Distance, in subregions of a grid, within which two points of a class are one landmark's. A grid is taught to repeat
itself: every subregion that a landmark reaches into predicts the landmark's point (``heads.landmark_grid``)."""


def distinct_points(
    points: Tensor, classes: Tensor, size_hw: tuple[int, int], radius: float | None = None, cells: Tensor | None = None
) -> Tensor:
    """Which landmarks stay: those without a more confident one of their class around them that stays.

    Whether one stays depends on more confident ones alone, so leaving out the unsure changes nothing for the others.

    Args:
        points: [N, 2] in pixels, best first.
        classes: [N].
        size_hw: height and width of the image in pixels.
        radius: how far "around" is, as a part of the image's diagonal; 0 keeps all. None for half a subregion, and to
            keep all landmarks that come of no grid: queries are taught not to repeat each other.
        cells: width and height of a subregion in pixels [2], of landmarks that come of a grid.

    Returns:
        Indices int64 [M], ascending.

    Raises:
        ValueError: a radius below 0.
    """
    if radius is not None and not radius >= 0:
        raise ValueError(f"point_radius: expected None, 0 or a part of the image's diagonal such as 0.02, got {radius}")
    if radius == 0 or (radius is None and cells is None):
        return torch.arange(len(points), device=points.device)
    if radius is None:
        assert cells is not None
        units, reach = cells.double().cpu().numpy(), DUPLICATE_CELLS
    else:
        units, reach = np.ones(2), radius * math.hypot(*size_hw)
    # each step depends on the one before: on the host that costs least
    places, kinds = points.double().cpu().numpy() / units, classes.cpu().numpy()
    apart = np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1))
    near = (apart <= reach) & (kinds[:, None] == kinds[None])
    gone = np.zeros(len(places), bool)
    kept: list[int] = []
    for index in range(len(places)):
        if not gone[index]:
            kept.append(index)
            gone |= near[index]
    return torch.tensor(kept, dtype=torch.int64, device=points.device)

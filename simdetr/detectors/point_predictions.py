"""From predicted landmarks to those that are kept: close ones of one class become one. Source: specs/heads.md 1.4.

Letters: N landmarks of one image, M of them kept.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def merge_points(points: Tensor, classes: Tensor, scores: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Merge landmarks of one class that lie around a more confident one.

    Best first, each takes the less confident ones of its class within the radius that no better one took; their place
    is the mean of all, weighted by confidence.

    Args:
        points: [N, 2] in pixels.
        classes: [N].
        scores: [N], above 0.
        radius: in pixels; 0 merges only equal places.

    Returns:
        Indices int64 [M] of the most confident of each group, best first, and the groups' points [M, 2].
    """
    order = scores.argsort(descending=True, stable=True)
    # each step depends on the one before: on the host, which gets everything in one copy, that costs least
    columns = torch.cat((points.double(), classes[:, None], scores[:, None]), dim=1)[order].cpu().numpy()
    places, kinds, weights = columns[:, :2], columns[:, 2], columns[:, 3]
    apart = np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1))
    near = (apart <= radius) & (kinds[:, None] == kinds[None])
    group = np.full(len(places), -1)
    best: list[int] = []
    for index in range(len(places)):
        if group[index] < 0:
            group[near[index] & (group < 0)] = len(best)
            best.append(index)
    totals = [np.bincount(group, share) for share in (weights, *(weights[:, None] * places).T)]
    kept = order[torch.tensor(best, dtype=torch.int64, device=order.device)]
    return kept, torch.from_numpy(np.stack(totals[1:], axis=1) / totals[0][:, None]).to(points)

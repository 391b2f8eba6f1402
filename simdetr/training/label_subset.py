"""Which images of a labelled set a low-label training may see (semi-supervised and few-label protocols)."""

from __future__ import annotations

import numpy as np

from simdetr.data.labels import Labels


def sample_images(labels: Labels, fraction: float, seed: int) -> tuple[str, ...]:
    """Ids of a random part of the labelled images, in the order of the set; at least one.

    The draw is ``default_rng(seed).choice`` over image ids without replacement, as DETReg does for its 1/2/5/10 %
    COCO protocols (specs/detectors.md A').

    Raises:
        ValueError: ``fraction`` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: expected a number in (0, 1], got {fraction}.")
    count = max(1, round(fraction * len(labels)))
    chosen = np.random.default_rng(seed).choice(len(labels), size=count, replace=False)
    return tuple(labels.image_ids[i] for i in sorted(chosen.tolist()))

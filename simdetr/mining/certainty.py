"""Mined scores, which order the boxes of one image -> how likely each box of a set is an object."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIZE_SHARE = 0.5  # of what size and borders alone explain, which is taken off
ABSOLUTE_POWER = 0.25  # how much the comparison with other images counts beside that within the image
_OCTAVES = 16  # of a box's share of the image
_PRIOR_BOXES = 20  # of the whole set, added to every cell of the table
_LEAST = 1e-9


def certainty(
    scores: NDArray[np.float32],
    boxes_xyxy: NDArray[np.float32],
    sizes_hw: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> NDArray[np.float32]:
    """How likely each box is an object, in (0, 1]; on labelled sets close to the frequency of IoU 0.5 with an object.

    A mined score orders the boxes of one image, and no more: large boxes and those at the image's border score higher
    wherever they are, and images with strong edges higher than others. A detector that learns such scores averages over
    the set, which leaves exactly these biases, and grows sure of the ground. What tells an object is a score that is
    high among boxes of its size and its touch with the borders *in this set*, among the boxes of its image, and among
    the best boxes of all images. The log of benchmarks has the numbers.

    Args:
        scores: mined scores [M] >= 0 of any scale. Where they are all equal, as the document's filters leave them,
            nothing is known and all are 1.
        boxes_xyxy: [M, 4] in pixels.
        sizes_hw: [N, 2] in pixels.
        offsets: [N + 1]; image i owns the boxes offsets[i] to offsets[i + 1].
    """
    if len(scores) == 0 or scores.min() == scores.max():
        return np.ones(len(scores), np.float32)
    owner = np.repeat(np.arange(len(sizes_hw)), np.diff(offsets))
    surprise = np.log(scores.astype(np.float64) + _LEAST)
    surprise -= SIZE_SHARE * _expected(surprise, boxes_xyxy, sizes_hw[owner])
    best = np.full(len(sizes_hw), -np.inf)
    np.maximum.at(best, owner, surprise)
    typical = np.median(best[np.isfinite(best)])
    within_image = np.exp(surprise - best[owner])
    within_set = 1 / (1 + np.exp(typical - surprise))
    found: NDArray[np.float32] = (within_image * within_set**ABSOLUTE_POWER).astype(np.float32)
    return found


def _expected(
    values: NDArray[np.float64], boxes_xyxy: NDArray[np.float32], sizes_hw: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Mean value of the set's boxes of the same size, to an octave, that touch as many borders; for each box [M]."""
    height, width = sizes_hw.astype(np.float64).T
    left, top, right, bottom = boxes_xyxy.astype(np.float64).T
    share = (right - left) * (bottom - top) / (width * height)
    octave = np.clip(np.floor(np.log2(np.maximum(share, 2.0**-_OCTAVES))) + _OCTAVES, 0, _OCTAVES).astype(np.int64)
    touched = (left <= 1).astype(np.int64) + (top <= 1) + (right >= width - 1) + (bottom >= height - 1)
    cell = octave * 5 + touched
    cells = 5 * (_OCTAVES + 1)
    counts = np.bincount(cell, minlength=cells)
    sums = np.bincount(cell, weights=values, minlength=cells)
    table = (sums + _PRIOR_BOXES * values.mean()) / (counts + _PRIOR_BOXES)
    means: NDArray[np.float64] = table[cell]
    return means

"""Mined regions of some images in; how many, how large, how long, how alike they are out.

Letters: N images, M boxes of all images together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from simdetr.boxes import pairwise_iou

COPY_IOU = 0.9  # boxes of one image that overlap more say the same thing twice
BORDER_PX = 0.5  # a box that ends closer to the image's border touches it
SIZE_EDGES = np.linspace(0, 1, 21)
ASPECT_EDGES = 2.0 ** np.arange(-4.25, 4.5, 0.5)  # one bin is centred at 1:1
"""Bins of the histograms; what lies outside the outermost edges counts into the outermost bins."""


@dataclass(frozen=True)
class BoxStatistics:
    """Boxes of a set of images, by what a person asks about them.

    Attributes:
        per_image: int64 [N], number of boxes.
        size: float64 [M], square root of the share of the image's area that a box covers; 0..1.
        aspect: float64 [M], width / height.
        copied: bool [M], whether another box of the same image has an IoU above `COPY_IOU` with it.
        at_border: bool [M], whether it touches the image's border.
    """

    per_image: NDArray[np.int64]
    size: NDArray[np.float64]
    aspect: NDArray[np.float64]
    copied: NDArray[np.bool_]
    at_border: NDArray[np.bool_]

    @classmethod
    def of(cls, boxes_xyxy: Iterable[NDArray[np.float32]], sizes_hw: Sequence[tuple[int, int]]) -> BoxStatistics:
        """Measure boxes.

        Args:
            boxes_xyxy: per image [n, 4], pixels.
            sizes_hw: (height, width) of the N images, pixels.
        """
        columns: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]] = []
        for boxes, (height, width) in zip(boxes_xyxy, sizes_hw, strict=True):
            across, down = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64).T
            overlaps = pairwise_iou(torch.as_tensor(boxes), torch.as_tensor(boxes)).fill_diagonal_(0).numpy()
            gaps = np.concatenate([boxes[:, :2], np.array([width, height]) - boxes[:, 2:]], axis=1)
            columns.append(
                (
                    np.sqrt(across * down / (height * width)),
                    across / np.maximum(down, 1e-9),
                    np.any(overlaps > COPY_IOU, axis=1),
                    np.any(gaps < BORDER_PX, axis=1),
                )
            )
        empty = (np.zeros(0), np.zeros(0), np.zeros(0, bool), np.zeros(0, bool))
        stacked = [np.concatenate(parts) for parts in zip(empty, *columns, strict=True)]
        return cls(np.array([len(column[0]) for column in columns], np.int64), *stacked)

    def __len__(self) -> int:
        return len(self.size)

    def summary(self) -> dict[str, Any]:
        """Plain numbers, as JSON can hold them.

        Returns:
            ``boxes``; ``per_image`` (min, median, max, and the number of ``images`` by number of boxes); ``size`` and
            ``aspect`` (median and histogram); ``copied`` and ``at_border``, shares of the boxes, 0 without any.
        """
        counts = self.per_image if len(self.per_image) else np.zeros(1, np.int64)
        return {
            "boxes": len(self),
            "per_image": {
                "min": int(counts.min()),
                "median": float(np.median(counts)),
                "max": int(counts.max()),
                "images": np.bincount(self.per_image).tolist(),
            },
            "size": _distribution(self.size, SIZE_EDGES),
            "aspect": _distribution(self.aspect, ASPECT_EDGES),
            "copied": float(self.copied.mean()) if len(self) else 0.0,
            "at_border": float(self.at_border.mean()) if len(self) else 0.0,
        }


def _distribution(values: NDArray[np.float64], edges: NDArray[np.float64]) -> dict[str, Any]:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return {
        "median": float(np.median(values)) if len(values) else None,
        "edges": edges.round(4).tolist(),
        "counts": counts.tolist(),
    }

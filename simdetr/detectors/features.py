"""What a detector computes on its way to boxes, for heads to read: feature maps, and the queries of every layer.

Letters: B images, C channels, L predictions of the decoder, Q queries, D their width, K classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from simdetr.detectors.detector import Detector, DetectorOutput
from simdetr.detectors.matcher import Target


class Level(NamedTuple):
    """One feature map."""

    features: Tensor
    """[B, C, h, w]."""
    stride: int
    """Pixels of the input per cell."""
    mask: Tensor
    """bool [B, h, w], True = padding."""


class Queries(NamedTuple):
    """The decoder's queries after each of its L predictions, first to last."""

    states: list[Tensor]
    """[B, Q, D]."""
    references: list[Tensor]
    """Point (x, y) that the prediction starts from, fractions of the valid image [B, Q, 2]."""
    logits: list[Tensor]
    """Class logits [B, Q, K], each class on its own (sigmoid)."""
    boxes: list[Tensor]
    """cxcywh, fractions of the valid image [B, Q, 4]."""


class Features(NamedTuple):
    """What a head reads."""

    levels: list[Level]
    """Fine to coarse."""
    queries: Queries | None
    """None where there is no decoder."""
    taps: list[Any]
    """What a neck noted at each level, one per level; empty without a neck."""


Neck = Callable[[int, Level], tuple[Tensor, Any]]
"""Sees level i while the features are computed; gives the features [B, C, h, w] to go on with, and what to note."""


@dataclass(frozen=True)
class FeatureSizes:
    """What a head is built for.

    Attributes:
        num_classes: K.
        level_channels: C of each level, fine to coarse.
        level_strides: Input pixels per cell of each level.
        query_channels: D; None where there is no decoder.
        num_predictions: L; 0 where there is no decoder.
    """

    num_classes: int
    level_channels: tuple[int, ...]
    level_strides: tuple[int, ...]
    query_channels: int | None = None
    num_predictions: int = 0


class QueryDetector(Detector):
    """A detector whose feature maps and queries heads may read."""

    @property
    @abstractmethod
    def feature_sizes(self) -> FeatureSizes:
        """Sizes of what ``decoded`` gives."""

    @abstractmethod
    def decoded(
        self, images: Tensor, mask: Tensor | None = None, neck: Neck | None = None
    ) -> tuple[DetectorOutput, Features]:
        """Detect, and keep what it was read from.

        Args:
            images: as in ``forward``.
            mask: as in ``forward``.
            neck: sees, and may change, the projected feature maps before the transformer reads them.
        """

    @abstractmethod
    def losses_of(self, outputs: DetectorOutput, images: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """``losses`` of outputs that are there already."""


def levels_of(
    maps: Sequence[Tensor], masks: Sequence[Tensor], strides: Sequence[int], neck: Neck | None
) -> tuple[list[Level], list[Any]]:
    """Feature maps as levels, changed by the neck, and what it noted.

    Args:
        maps: [B, C, h, w] each.
        masks: bool per map, True = padding: [B, h, w], or [1, h, w] and all False if no image is padded.
        strides: one per map.
        neck: sees them one after the other.
    """
    levels, taps = [], []
    for index, (features, mask, stride) in enumerate(zip(maps, masks, strides, strict=True)):
        level = Level(features, stride, mask.expand(features.shape[0], -1, -1))
        if neck is not None:
            changed, tap = neck(index, level)
            level = level._replace(features=changed)
            taps.append(tap)
        levels.append(level)
    return levels, taps


def queries_of(
    states: Sequence[Tensor], boxes: Sequence[Tensor], logits: Sequence[Tensor], start: Tensor, refine: bool
) -> Queries:
    """Queries of a decoder.

    Args:
        states: [B, Q, D] of each prediction.
        boxes: cxcywh [B, Q, 4] of each prediction.
        logits: [B, Q, K] of each prediction.
        start: where the first prediction starts, points or boxes [B, Q, 2 or 4].
        refine: whether each prediction starts from the box of the one before, else all from ``start``.
    """
    later = [found.detach() for found in boxes[:-1]] if refine else [start] * (len(boxes) - 1)
    return Queries(list(states), [place[..., :2] for place in (start, *later)], list(logits), list(boxes))

"""The boxes of one image, their categories and where they come from; the error for labels that break a rule.

A box's lineage is the stage that first found it, and the clustering that a mined one was found in. Mining gives the
first lineage; every relabelling hands on that of the box before (`simdetr.training.fusion`).

Letters: n boxes of one image, M of all images together. Boxes are xyxy in pixels of the upright original.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_SIDE = 1_000_000
"""Of an image, in pixels; what a file says beyond it is no size."""


class LabelError(ValueError):
    """Labels that break a rule; the message names the rule, what was met and where."""


@dataclass(frozen=True)
class Category:
    """A kind of object, with the id that the user's file gave it."""

    id: int | str
    name: str


@dataclass(frozen=True)
class ImageLabels:
    """The boxes of one image; not checked before they are part of a `Labels`.

    Attributes:
        image_id: id of the image in its source.
        size_hw: height and width of the upright original in pixels.
        boxes_xyxy: float32 [n, 4] in pixels.
        classes: int64 [n], indices into the categories.
        scores: float32 [n] in [0, 1].
        crowd: bool [n], True where a box stands for a group of objects.
        areas: float32 [n], area of the object in square pixels.
        lineage: where the boxes come from, None where nobody knows.
        masks: COCO's compressed run lengths of the objects at the image's size, bytes [n], None where nobody knows.
        points: float32 [n, 2], a reference point (x, y) of each object in pixels, NaN where it has none; or None.
    """

    image_id: str
    size_hw: tuple[int, int]
    boxes_xyxy: NDArray[np.float32]
    classes: NDArray[np.int64]
    scores: NDArray[np.float32]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float32]
    lineage: Lineage | None = None
    masks: NDArray[np.object_] | None = None
    points: NDArray[np.float32] | None = None

    @classmethod
    def build(
        cls,
        image_id: str,
        size_hw: tuple[int, int],
        boxes_xyxy: ArrayLike,
        classes: ArrayLike,
        scores: ArrayLike | None = None,
        crowd: ArrayLike | None = None,
        areas: ArrayLike | None = None,
        *,
        lineage: Lineage | None = None,
        masks: NDArray[np.object_] | None = None,
        points: ArrayLike | None = None,
    ) -> ImageLabels:
        """Labels from anything array-like; scores are 1, nothing is a crowd and areas are the boxes' unless given."""
        boxes = np.asarray(boxes_xyxy, dtype=np.float32).reshape(-1, 4)
        return cls(
            image_id=image_id,
            size_hw=(int(size_hw[0]), int(size_hw[1])),
            boxes_xyxy=boxes,
            classes=np.asarray(classes, dtype=np.int64).reshape(-1),
            scores=np.ones(len(boxes), np.float32) if scores is None else np.asarray(scores, np.float32).reshape(-1),
            crowd=np.zeros(len(boxes), np.bool_) if crowd is None else np.asarray(crowd, np.bool_).reshape(-1),
            areas=(boxes[:, 2:] - boxes[:, :2]).prod(1) if areas is None else np.asarray(areas, np.float32).reshape(-1),
            lineage=lineage,
            masks=masks,
            points=None if points is None else np.asarray(points, np.float32).reshape(-1, 2),
        )

    def __len__(self) -> int:
        return len(self.boxes_xyxy)


LINEAGE_COLUMNS: dict[str, type[np.signedinteger[Any]]] = {
    "born": np.int8,
    "born_row": np.int32,
    "stride": np.int16,
    "k": np.int16,
    "cluster": np.int16,
}


@dataclass(frozen=True)
class Lineage:
    """Origin of M boxes, by column.

    Attributes:
        born: int8 [M], stage that first found the object: -1 people, 0 mining, j the detector of stage j.
        born_row: int32 [M], which of its image's boxes it was then, counted from 0 in the labels of stage ``born``; a
            mined one is that region of the image in the proposal store.
        stride: int16 [M], feature level of the clustering that found the mined region; 0 where it is not known.
        k: int16 [M], number of clusters of that clustering; 0 where it is not known.
        cluster: int16 [M], which of these clusters the region is a part of; -1 where it is not known.

    Raises:
        ValueError: columns of different length.
    """

    born: NDArray[np.int8]
    born_row: NDArray[np.int32]
    stride: NDArray[np.int16]
    k: NDArray[np.int16]
    cluster: NDArray[np.int16]

    def __post_init__(self) -> None:
        for name, dtype in LINEAGE_COLUMNS.items():
            column = np.asarray(getattr(self, name), dtype=dtype)
            if column.shape != (len(self),):
                raise ValueError(f"{name}: expected shape ({len(self)},) as born has, got {column.shape}")
            object.__setattr__(self, name, column)

    def __len__(self) -> int:
        return len(self.born)

    def __getitem__(self, rows: slice | NDArray[Any]) -> Lineage:
        """The lineage of some of the boxes."""
        return Lineage(**{name: getattr(self, name)[rows] for name in LINEAGE_COLUMNS})

    @classmethod
    def first_seen(cls, stage: int, offsets: NDArray[np.int64]) -> Lineage:
        """Of boxes of a stage that nothing earlier is known of; offsets as of `Labels`, int64 [N + 1]."""
        rows = int(offsets[-1])
        return cls(
            born=np.full(rows, stage, np.int8),
            born_row=(np.arange(rows) - np.repeat(offsets[:-1], np.diff(offsets))).astype(np.int32),
            stride=np.zeros(rows, np.int16),
            k=np.zeros(rows, np.int16),
            cluster=np.full(rows, -1, np.int16),
        )

    @classmethod
    def stack(cls, parts: Sequence[Lineage]) -> Lineage:
        """One after the other; at least one."""
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in LINEAGE_COLUMNS})

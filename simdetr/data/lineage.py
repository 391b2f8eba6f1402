"""Where boxes come from: for each box the stage that first found it, and the clustering that a mined one was found in.

Mining gives the first lineage; every relabelling hands on that of the box before
(`simdetr.training.inheritance`). Letters: N images, M boxes of all images together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        """Of boxes that nothing earlier is known of.

        Args:
            stage: whose boxes they are.
            offsets: int64 [N + 1]; image i owns the boxes offsets[i] to offsets[i + 1].
        """
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

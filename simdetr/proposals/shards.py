"""One shard of proposals between memory and Parquet: rows to a table, a table to columns.

One table row per image: id, size, and lists over its regions: boxes float32, features fp16, area, and where they came
from (level, K, cluster, score). What the rows cannot say (the shard's number, ids of unreadable images) lies in the
schema's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from simdetr.data.locations import Location
from simdetr.proposals.regions import Regions

REGION_COLUMNS = ("boxes_xyxy", "features", "area", "stride", "k", "cluster", "score")


@dataclass(frozen=True)
class ProposalRow:
    """One image of a store: its id, its upright size in pixels and its regions."""

    image_id: str
    height: int
    width: int
    regions: Regions


@dataclass(frozen=True)
class ProposalShard:
    """One shard by column; image i owns region rows ``offsets[i]:offsets[i + 1]``.

    Attributes:
        image_ids: N ids.
        sizes_hw: int64 [N, 2], pixels.
        offsets: int64 [N + 1].
        boxes_xyxy: float32 [M, 4], pixels.
        features: float16 [M, D]; D is 0 when features were not asked for.
        area: float32 [M], square pixels.
        stride, k, cluster: int16 [M].
        score: float32 [M].
    """

    image_ids: tuple[str, ...]
    sizes_hw: NDArray[np.int64]
    offsets: NDArray[np.int64]
    boxes_xyxy: NDArray[np.float32]
    features: NDArray[np.float16]
    area: NDArray[np.float32]
    stride: NDArray[np.int16]
    k: NDArray[np.int16]
    cluster: NDArray[np.int16]
    score: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.image_ids)

    def row(self, index: int) -> ProposalRow:
        """The row of image ``index``."""
        own = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        regions = Regions(
            boxes_xyxy=self.boxes_xyxy[own],
            features=self.features[own].astype(np.float32),
            area=self.area[own],
            stride=self.stride[own],
            k=self.k[own],
            cluster=self.cluster[own],
            score=self.score[own],
        )
        height, width = self.sizes_hw[index].tolist()
        return ProposalRow(self.image_ids[index], height, width, regions)


def _schema(dim: int, notes: Mapping[str, Any]) -> pa.Schema:
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("boxes_xyxy", pa.list_(pa.list_(pa.float32(), 4)), nullable=False),
            pa.field("features", pa.list_(pa.list_(pa.float16(), dim)), nullable=False),
            pa.field("area", pa.list_(pa.float32()), nullable=False),
            pa.field("stride", pa.list_(pa.int16()), nullable=False),
            pa.field("k", pa.list_(pa.int16()), nullable=False),
            pa.field("cluster", pa.list_(pa.int16()), nullable=False),
            pa.field("score", pa.list_(pa.float32()), nullable=False),
        ],
        metadata={"simdetr": json.dumps(notes)},
    )


def to_table(rows: Sequence[ProposalRow], dim: int, notes: Mapping[str, Any]) -> pa.Table:
    """The table of a shard's rows.

    Args:
        rows: in source order.
        dim: channels of a region feature.
        notes: plain values to keep with the table.

    Raises:
        ValueError: if a feature does not fit into fp16.
    """
    schema = _schema(dim, notes)
    regions = [row.regions for row in rows]
    for row in rows:
        if row.regions.features.size and np.abs(row.regions.features).max() > np.finfo(np.float16).max:
            raise ValueError(
                f"features: expected values within fp16 (65504), {row.image_id} has larger; scale the maps"
            )
    offsets = pa.array(np.cumsum([0, *map(len, regions)]), pa.int32())

    def column(name: str, dtype: type[np.generic]) -> pa.Array:
        parts = [getattr(r, name).ravel() for r in regions]
        values = pa.array(np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype))
        kind = schema.field(name).type
        if pa.types.is_fixed_size_list(kind.value_type):
            values = pa.FixedSizeListArray.from_arrays(values, kind.value_type.list_size)
        return pa.ListArray.from_arrays(offsets, values).cast(kind)

    return pa.table(
        [
            pa.array([row.image_id for row in rows], pa.string()),
            pa.array([row.height for row in rows], pa.int32()),
            pa.array([row.width for row in rows], pa.int32()),
            column("boxes_xyxy", np.float32),
            column("features", np.float16),
            column("area", np.float32),
            column("stride", np.int16),
            column("k", np.int16),
            column("cluster", np.int16),
            column("score", np.float32),
        ],
        schema=schema,
    )


def to_bytes(table: pa.Table) -> pa.Buffer:
    """The file of a shard, in memory."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="zstd", use_dictionary=["image_id"], write_page_checksum=True, store_schema=True
    )
    return sink.getvalue()


def read_table(path: Location, columns: list[str] | None = None) -> pa.Table:
    """Read a shard and verify the checksums of what is read; OSError or ValueError if it is damaged."""
    with path.open("rb") as stream:
        return pq.read_table(stream, columns=columns, page_checksum_verification=True)


def read_footer(path: Location) -> pq.FileMetaData:
    """Number of rows and notes of a shard, a few bytes of it; OSError or ValueError if it is cut short."""
    with path.open("rb") as stream:
        return pq.read_metadata(stream)


def read_notes(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The values that :func:`to_table` kept; KeyError or TypeError if the file is not of a store."""
    notes: dict[str, Any] = json.loads((metadata or {})[b"simdetr"])
    return notes


def _values(column: pa.ChunkedArray) -> NDArray[Any]:
    values = column.combine_chunks().flatten()
    while pa.types.is_fixed_size_list(values.type):
        values = values.flatten()
    array: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return array


def to_shard(table: pa.Table) -> ProposalShard:
    """Columns of a table that was read with or without its features."""
    names = [name for name in REGION_COLUMNS if name in table.column_names]
    dim = table.schema.field("features").type.value_type.list_size if "features" in names else 0
    flat = {name: _values(table[name]) for name in names}
    regions = len(flat["area"])
    counts = pc.list_value_length(table["area"]).to_numpy()
    return ProposalShard(
        image_ids=tuple(table["image_id"].to_pylist()),
        sizes_hw=np.stack([table["height"].to_numpy(), table["width"].to_numpy()], axis=1).astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes_xyxy=flat["boxes_xyxy"].reshape(regions, 4),
        features=flat.get("features", np.zeros(0, np.float16)).reshape(regions, dim),
        area=flat["area"],
        stride=flat["stride"],
        k=flat["k"],
        cluster=flat["cluster"],
        score=flat["score"],
    )

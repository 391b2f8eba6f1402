"""Mined regions on disk or on another storage: Parquet shards and a manifest in one folder; rows in, rows out.

Layout: ``manifest.json`` (what was mined, how, from which images), ``shard-00000.parquet`` and so on, one table row per
image: id, size, and lists over its regions (boxes, features in fp16, area, score, and the level, K and cluster of their
origin). Notes in the schema's metadata hold the rest: the shard's number and its unreadable images.
Files appear whole or not at all; a shard that is missing, cut short or damaged is named by
:meth:`ProposalStore.missing_shards` and mined again. Reading streams one shard at a time, so memory does not grow with
the number of images. The folder may be local or a URL that fsspec knows, such as ``s3://bucket/photos``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock
from numpy.typing import NDArray

from simdetr.data.annotations import ImageLabels
from simdetr.data.storage import Location, atomic_path, locate, write_whole
from simdetr.mining.regions import Regions

FORMAT = 3
MANIFEST = "manifest.json"
_SHARD_NAME = re.compile(r"shard-(\d{5,})\.parquet")
_DTYPES: dict[str, type[np.generic]] = {
    "boxes_xyxy": np.float32,
    "features": np.float16,
    "area": np.float32,
    "stride": np.int16,
    "k": np.int16,
    "cluster": np.int16,
    "score": np.float32,
}
REGION_COLUMNS = tuple(_DTYPES)


class StoreError(RuntimeError):
    """A store that cannot be read, written or continued; the message says what to do."""


@dataclass(frozen=True)
class Manifest:
    """What a store holds; two runs may share a store only if theirs are equal."""

    config: Mapping[str, Any]  # settings that change the result, as plain values
    encoder: str  # its fingerprint
    source: str  # fingerprint of the image ids
    num_images: int  # of the source
    shard_size: int  # images per shard
    region_dim: int  # channels of a region feature
    format: int = FORMAT

    @property
    def num_shards(self) -> int:
        """Shards of the complete store."""
        return -(-self.num_images // self.shard_size)

    def images_of(self, shard: int) -> range:
        """Positions in the source of a shard's images."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))


@dataclass(frozen=True)
class ProposalRow:
    """One image of a store: its id, its upright size in pixels and its regions."""

    image_id: str
    height: int
    width: int
    regions: Regions


@dataclass(frozen=True)
class ProposalShard:
    """One shard of N images and M regions by column; image i owns region rows ``offsets[i]:offsets[i + 1]``."""

    image_ids: tuple[str, ...]
    sizes_hw: NDArray[np.int64]  # [N, 2], pixels
    offsets: NDArray[np.int64]  # [N + 1]
    boxes_xyxy: NDArray[np.float32]  # [M, 4], pixels
    features: NDArray[np.float16]  # [M, D]; D is 0 when features were not asked for
    area: NDArray[np.float32]  # [M], square pixels
    stride: NDArray[np.int16]  # [M], and so are the others
    k: NDArray[np.int16]
    cluster: NDArray[np.int16]
    score: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.image_ids)

    def row(self, index: int) -> ProposalRow:
        """The row of image ``index``."""
        own = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        columns = {name: getattr(self, name)[own] for name in REGION_COLUMNS}
        regions = Regions(**columns | {"features": columns["features"].astype(np.float32)})
        height, width = self.sizes_hw[index].tolist()
        return ProposalRow(self.image_ids[index], height, width, regions)


class ProposalStore:
    """A folder of mined proposals.

    Args:
        folder: path or URL of a folder with a manifest, as :meth:`create` writes it.

    Raises:
        StoreError: if there is no manifest or it cannot be read.
    """

    def __init__(self, folder: str | Location) -> None:
        self.folder = locate(folder)
        path = self.folder / MANIFEST
        try:
            self.manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise StoreError(
                f"{self.folder} holds no proposals ({MANIFEST} is missing); run `simdetr mine` first"
            ) from None
        except (ValueError, TypeError) as error:
            raise StoreError(f"{path} is not a manifest of proposals ({error}); mine into a new folder") from error

    @classmethod
    def create(cls, folder: str | Location, manifest: Manifest) -> ProposalStore:
        """Begin a store, or continue one that was begun with an equal manifest, maybe by another process just now.

        Raises:
            StoreError: if the folder holds proposals of other settings, images or weights, or cannot be written.
        """
        folder = locate(folder)
        if not (folder / MANIFEST).exists():
            if any(folder.glob("shard-*.parquet")):
                raise StoreError(f"{folder} holds shards without {MANIFEST}; delete them or mine into a new folder")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with FileLock(folder / ".manifest.lock") if isinstance(folder, Path) else nullcontext():
                    if not (folder / MANIFEST).exists():
                        write_whole(folder / MANIFEST, (json.dumps(vars(manifest), indent=2) + "\n").encode())
            except OSError as error:
                raise StoreError(f"cannot write to {folder}: {error}; choose another output folder") from error
        store = cls(folder)
        differences = _differences(vars(store.manifest), json.loads(json.dumps(vars(manifest))))
        if differences:
            raise StoreError(
                f"{folder} holds proposals of another run: {'; '.join(differences)}. Mine into a new folder, or delete "
                f"this one, or go back to its settings"
            )
        return store

    def shard_path(self, shard: int) -> Location:
        """File of a shard."""
        return self.folder / f"shard-{shard:05d}.parquet"

    def write_shard(self, shard: int, rows: Sequence[ProposalRow], unreadable: Mapping[str, str] | None = None) -> None:
        """Write one shard atomically: rows of its readable images in source order, reasons by id of the others.

        Raises:
            StoreError: if the disk is full or read-only; nothing half-written is left.
        """
        table = to_table(rows, self.manifest.region_dim, {"shard": shard, "unreadable": dict(unreadable or {})})
        path = self.shard_path(shard)
        try:
            write_whole(path, to_bytes(table))
        except OSError as error:
            raise StoreError(
                f"cannot write {path}: {error}. {len(self.written())} of {self.manifest.num_shards} shards are safe; "
                f"make room or restore write access and run the same command to go on"
            ) from error

    def written(self) -> list[int]:
        """Numbers of the shards whose files are there, sound or not, ascending; one look at the folder."""
        if not isinstance(self.folder, Path):
            self.folder.fs.invalidate_cache(self.folder.path)  # other processes write there
        named = (_SHARD_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(number for name in named if name and (number := int(name[1])) < self.manifest.num_shards)

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that are absent, cut short or damaged (checksums of all pages are verified)."""
        return [shard for shard in range(self.manifest.num_shards) if not self.is_sound(shard)]

    def unreadable(self, shards: Iterable[int] | None = None) -> dict[str, str]:
        """Reasons by id of the unreadable images of some shards; of all written ones when left out."""
        found: dict[str, str] = {}
        for shard in self.written() if shards is None else shards:
            found |= read_notes(read_footer(self.shard_path(shard)))["unreadable"]
        return found

    def fingerprint(self) -> str:
        """What the store holds, in few letters: how it was mined and the sizes of its shards."""
        shards = [(shard, self.shard_path(shard).stat().st_size) for shard in self.written()]
        return hashlib.sha256(json.dumps([vars(self.manifest), shards]).encode()).hexdigest()[:16]

    def copy_to(self, folder: Path) -> None:
        """Put all shards into another folder, the manifest last; on one disk the files are shared, not copied."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in (*map(self.shard_path, self.written()), self.folder / MANIFEST):
            with atomic_path(folder / path.name) as temporary:
                _share(path, temporary)

    def __len__(self) -> int:
        """Images that have a row, in all written shards."""
        return sum(read_footer(self.shard_path(shard)).num_rows for shard in self.written())

    def iter_shards(self, columns: Sequence[str] | None = None) -> Iterator[ProposalShard]:
        """Stream the shards in order, all region columns or some; only leaving out ``features`` saves much.

        Raises:
            StoreError: at a damaged shard, or for an unknown column.
        """
        unknown = set(columns or ()) - set(REGION_COLUMNS)
        if unknown:
            raise StoreError(f"columns: expected some of {', '.join(REGION_COLUMNS)}, got {', '.join(sorted(unknown))}")
        wanted = ["image_id", "height", "width", *REGION_COLUMNS]
        if columns is not None and "features" not in columns:
            wanted.remove("features")
        for shard in self.written():
            yield to_shard(self.read_columns(shard, wanted))

    def read_columns(self, shard: int, columns: Sequence[str]) -> pa.Table:
        """Some columns of one shard and nothing else of it; StoreError if it is damaged."""
        path = self.shard_path(shard)
        try:
            return read_table(path, list(columns))
        except Exception as error:  # the reader raises all kinds of errors on damaged files
            raise StoreError(f"{path} is damaged ({error}); run the mining command again to redo it") from error

    def iter_rows(self, columns: Sequence[str] | None = None) -> Iterator[ProposalRow]:
        """Stream the images in source order, one shard in memory at a time; ``columns`` as in :meth:`iter_shards`."""
        for shard in self.iter_shards(columns):
            yield from map(shard.row, range(len(shard)))

    def is_sound(self, shard: int, *, whole: bool = True) -> bool:
        """Whether a shard is there and undamaged: by the checksums of all pages, or else only not cut short."""
        try:
            footer = read_footer(self.shard_path(shard))
            notes = read_notes(footer)
            if whole:
                read_table(self.shard_path(shard))
            expected = len(self.manifest.images_of(shard))
            return bool(notes["shard"] == shard) and footer.num_rows + len(notes["unreadable"]) == expected
        except Exception:  # as in reading
            return False


def to_table(rows: Sequence[ProposalRow], dim: int, notes: Mapping[str, Any]) -> pa.Table:
    """The table of rows in source order, features of ``dim`` channels, with notes; ValueError past fp16's range."""
    for row in rows:
        if row.regions.features.size and np.abs(row.regions.features).max() > np.finfo(np.float16).max:
            raise ValueError(
                f"features: expected values within fp16 (65504), {row.image_id} has larger; scale the maps"
            )
    columns = {
        "image_id": pa.array([row.image_id for row in rows], pa.string()),
        "height": pa.array([row.height for row in rows], pa.int32()),
        "width": pa.array([row.width for row in rows], pa.int32()),
    }
    offsets = pa.array(np.cumsum([0, *(len(row.regions) for row in rows)]), pa.int32())
    widths = {"boxes_xyxy": 4, "features": dim}
    for name, dtype in _DTYPES.items():
        parts = [getattr(row.regions, name).ravel() for row in rows]
        values = pa.array(np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype))
        if name in widths:
            values = pa.FixedSizeListArray.from_arrays(values, widths[name])
        columns[name] = pa.ListArray.from_arrays(offsets, values)
    fields = [pa.field(name, column.type, nullable=False) for name, column in columns.items()]
    return pa.table(columns, schema=pa.schema(fields, metadata={"simdetr": json.dumps(notes)}))


def to_bytes(table: pa.Table) -> pa.Buffer:
    """The file of a shard, in memory."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=["image_id"], write_page_checksum=True)
    return sink.getvalue()


def read_table(path: Location, columns: list[str] | None = None) -> pa.Table:
    """Read a shard and verify the checksums of what is read; OSError or ValueError if it is damaged."""
    with path.open("rb") as stream:
        return pq.read_table(stream, columns=columns, page_checksum_verification=True)


def read_footer(path: Location) -> pq.FileMetaData:
    """Number of rows and notes of a shard, a few bytes of it; OSError or ValueError if it is cut short."""
    with path.open("rb") as stream:
        return pq.read_metadata(stream)


def read_notes(footer: pq.FileMetaData) -> dict[str, Any]:
    """The values that :func:`to_table` kept; KeyError if the file is not of a store."""
    notes: dict[str, Any] = json.loads((footer.metadata or {})[b"simdetr"])
    return notes


def to_shard(table: pa.Table) -> ProposalShard:
    """Columns of a table that was read with or without its features."""

    def values(name: str) -> NDArray[Any]:
        flat = table[name].combine_chunks().flatten()
        shape = [len(flat)]
        if pa.types.is_fixed_size_list(flat.type):
            shape, flat = [*shape, flat.type.list_size], flat.flatten()
        return np.asarray(flat).reshape(shape)

    columns = {name: values(name) for name in REGION_COLUMNS if name in table.column_names}
    counts = pc.list_value_length(table["area"]).to_numpy()
    return ProposalShard(
        image_ids=tuple(table["image_id"].to_pylist()),
        sizes_hw=np.stack([table["height"].to_numpy(), table["width"].to_numpy()], axis=1).astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        **{"features": np.zeros((len(columns["area"]), 0), np.float16), **columns},
    )


def best_first(row: ProposalRow) -> ImageLabels:
    """Boxes in the order of their scores, which may have any range; scores of labels end at 1."""
    boxes = row.regions.boxes_xyxy[np.argsort(-row.regions.score, kind="stable")]
    return ImageLabels.build(row.image_id, (row.height, row.width), boxes, np.zeros(len(boxes)))


def _share(path: Location, to: Path) -> None:
    """Give a file a second name, which stays when the first is replaced; a copy where that is not possible."""
    if isinstance(path, Path):
        try:
            os.link(path, to)
        except OSError:  # another disk, or one without links
            shutil.copyfile(path, to)
    else:
        to.write_bytes(path.read_bytes())


def _differences(there: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two manifests, in words, one entry per value."""
    found = []
    for name in sorted({*there, *wanted}):
        old, new = there.get(name), wanted.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} is {old!r} there and {new!r} now")
    return found

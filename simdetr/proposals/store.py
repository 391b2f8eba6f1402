"""Mined regions on disk: Parquet shards and a manifest in one folder; rows in, rows out, shard by shard.

Layout: ``manifest.json`` (what was mined, how, from which images), ``shard-00000.parquet`` and so on, one row per image
with its size and regions, features in fp16. Files are written under a temporary name and renamed, so what is there is
whole; a shard that is missing, cut short or damaged is named by :meth:`ProposalStore.missing_shards` and mined again.
Reading streams one shard at a time, so memory does not grow with the number of images.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from simdetr.proposals.shards import (
    REGION_COLUMNS,
    ProposalRow,
    ProposalShard,
    read_notes,
    read_table,
    to_shard,
    to_table,
)

FORMAT = 2
MANIFEST = "manifest.json"


class StoreError(RuntimeError):
    """A store that cannot be read, written or continued; the message says what to do."""


@dataclass(frozen=True)
class Manifest:
    """What a store holds; two runs may share a store only if theirs are equal.

    Attributes:
        config: settings that change the result, as plain values.
        encoder: the encoder's fingerprint.
        source: fingerprint of the image ids.
        num_images: of the source.
        shard_size: images per shard.
        region_dim: channels of a region feature.
    """

    config: Mapping[str, Any]
    encoder: str
    source: str
    num_images: int
    shard_size: int
    region_dim: int
    format: int = field(default=FORMAT)

    @property
    def num_shards(self) -> int:
        """Shards of the complete store."""
        return -(-self.num_images // self.shard_size)

    def images_of(self, shard: int) -> range:
        """Positions in the source of a shard's images."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))


class ProposalStore:
    """A folder of mined proposals.

    Args:
        folder: with a manifest, as :meth:`create` writes it.

    Raises:
        StoreError: if there is no manifest or it cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
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
    def create(cls, folder: str | Path, manifest: Manifest) -> ProposalStore:
        """Begin a store, or continue one that was begun with an equal manifest.

        Raises:
            StoreError: if the folder holds proposals of other settings, images or weights, or cannot be written.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).exists():
            if any(folder.glob("shard-*.parquet")):
                raise StoreError(f"{folder} holds shards without {MANIFEST}; delete them or mine into a new folder")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _write_atomically(folder / MANIFEST, (json.dumps(vars(manifest), indent=2) + "\n").encode())
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

    def shard_path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / f"shard-{shard:05d}.parquet"

    def write_shard(self, shard: int, rows: Sequence[ProposalRow], quarantined: Sequence[str] = ()) -> None:
        """Write one shard atomically.

        Args:
            shard: its number.
            rows: its readable images, in source order.
            quarantined: ids of its unreadable images, which have no row.

        Raises:
            StoreError: if the disk is full or read-only; nothing half-written is left.
        """
        table = to_table(rows, self.manifest.region_dim, {"shard": shard, "quarantined": list(quarantined)})
        path = self.shard_path(shard)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True, store_schema=True)
        try:
            _write_atomically(path, sink.getvalue())
        except OSError as error:
            raise StoreError(
                f"cannot write {path}: {error}. {self.num_written} of {self.manifest.num_shards} shards are safe; make "
                f"room or restore write access and run the same command to go on"
            ) from error

    @property
    def num_written(self) -> int:
        """Shard files that are there, sound or not."""
        return sum(self.shard_path(shard).exists() for shard in range(self.manifest.num_shards))

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that are absent, cut short or damaged (checksums of all pages are verified)."""
        return [shard for shard in range(self.manifest.num_shards) if not self._is_sound(shard)]

    def quarantined(self) -> Iterator[str]:
        """Ids of the unreadable images of all written shards."""
        for shard in self._written():
            yield from read_notes(pq.read_schema(self.shard_path(shard)))["quarantined"]

    def __len__(self) -> int:
        """Images that have a row, in all written shards."""
        return sum(pq.read_metadata(self.shard_path(shard)).num_rows for shard in self._written())

    def iter_shards(self, columns: Sequence[str] | None = None) -> Iterator[ProposalShard]:
        """Stream the shards in order.

        Args:
            columns: region columns to read; None reads all. Only leaving out ``features`` saves much.

        Raises:
            StoreError: at a damaged shard, or for an unknown column.
        """
        unknown = set(columns or ()) - set(REGION_COLUMNS)
        if unknown:
            raise StoreError(f"columns: expected some of {', '.join(REGION_COLUMNS)}, got {', '.join(sorted(unknown))}")
        wanted = ["image_id", "height", "width", *REGION_COLUMNS]
        if columns is not None and "features" not in columns:
            wanted.remove("features")
        for shard in self._written():
            yield self._read(shard, wanted)

    def iter_rows(self, columns: Sequence[str] | None = None) -> Iterator[ProposalRow]:
        """Stream the images in source order, one shard in memory at a time; ``columns`` as in :meth:`iter_shards`."""
        for shard in self.iter_shards(columns):
            yield from map(shard.row, range(len(shard)))

    def _written(self) -> Iterator[int]:
        return (shard for shard in range(self.manifest.num_shards) if self.shard_path(shard).exists())

    def _is_sound(self, shard: int) -> bool:
        try:
            table = read_table(self.shard_path(shard))
            notes = read_notes(table.schema)
        except (OSError, ValueError, KeyError, TypeError):
            return False
        expected = len(self.manifest.images_of(shard))
        return bool(notes["shard"] == shard) and table.num_rows + len(notes["quarantined"]) == expected

    def _read(self, shard: int, columns: list[str]) -> ProposalShard:
        path = self.shard_path(shard)
        try:
            return to_shard(read_table(path, columns))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} is damaged ({error}); run the mining command again to redo it") from error


def _write_atomically(path: Path, content: Any) -> None:  # noqa: ANN401 (bytes or a pyarrow buffer)
    """Write, flush to disk, rename; the temporary file is removed when anything fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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

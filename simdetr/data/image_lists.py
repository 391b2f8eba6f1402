"""A folder or a list file in, a root folder and the image ids under it out (design.md §4, row "image list").

A list is a .txt (one path per line, ``#`` starts a comment line), a .csv or .parquet (column ``path``, else the first
column) or a COCO .json (the ``file_name`` of its images). An id is the posix path relative to the root; a path that
lies outside the root keeps its absolute form, a URL stays as it is.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from simdetr.data.locations import Location, files_below, is_url
from simdetr.data.tar_images import is_tar

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
LIST_SUFFIXES = (".csv", ".json", ".parquet", ".txt")
_PROBED_NAMES = 32  # file names looked up when guessing the folder that a COCO file speaks of


def find_images(folder: Location) -> list[str]:
    """Posix paths, relative to the folder and sorted, of all images below it; hidden files and folders are left out."""
    return sorted(name for name in files_below(folder) if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES)


def find_tars(folder: Location) -> list[str]:
    """The same of all tar files below it."""
    return sorted(name for name in files_below(folder) if is_tar(name))


def read_list(path: Path, root: Location | None) -> tuple[Location, list[str]]:
    """Root folder and ids, in the list's order and each once, of a list file.

    Raises:
        ValueError: the list cannot be read, names no images, or the images of a COCO file are in no folder near it.
    """
    folder: Location
    try:
        if path.suffix.lower() == ".json":
            names = coco_file_names(path)
            folder = root if root is not None else _coco_root(path, names)
        else:
            names = {".txt": _txt_names, ".csv": _csv_names, ".parquet": _parquet_names}[path.suffix.lower()](path)
            folder = root if root is not None else path.parent
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as an image list: {error}") from error
    return folder, list(dict.fromkeys(_relative(names, folder)))


def coco_file_names(path: Path) -> list[str]:
    """The ``file_name`` of every image of a COCO file, in the file's order."""
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise ValueError(
            f"{path} is no COCO file: expected an object with a list 'images', got {type(content).__name__}"
        )
    try:
        return [str(image["file_name"]) for image in images]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: every entry of 'images' needs a 'file_name'") from error


def _txt_names(path: Path) -> list[str]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _csv_names(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        rows = [row for row in csv.reader(stream) if row and any(cell.strip() for cell in row)]
    if not rows:
        return []
    header = [cell.strip().lower() for cell in rows[0]]
    column = header.index("path") if "path" in header else 0
    has_header = "path" in header or Path(header[0]).suffix not in IMAGE_SUFFIXES
    body = rows[1:] if has_header else rows
    if any(len(row) <= column for row in body):
        raise ValueError(f"{path}: every row needs a value in column {column + 1}, which holds the image paths")
    return [row[column].strip() for row in body]


def _parquet_names(path: Path) -> list[str]:
    names = pq.read_schema(path).names
    column = "path" if "path" in names else names[0]
    return [str(value) for value in pq.read_table(path, columns=[column])[column].to_pylist()]


def _relative(names: Iterable[str], root: Location) -> Iterable[str]:
    for name in names:
        if is_url(name):
            yield name
            continue
        path = Path(name)
        if isinstance(root, Path) and path.is_absolute() and path.is_relative_to(root.absolute()):
            path = path.relative_to(root.absolute())
        yield path.as_posix()


def _coco_root(path: Path, names: list[str]) -> Path:
    """The folder in which the images of a COCO file lie: its own, or one beside it named like its split."""
    splits = [part for part in path.stem.split("_") if part]
    folders = [path.parent, *(path.parent / part for part in (*splits, "images"))]
    folders += [path.parent.parent / part for part in (*splits, "images")]
    probed = names[:: max(1, len(names) // _PROBED_NAMES)][:_PROBED_NAMES]
    hits = [sum((folder / name).is_file() for name in probed) for folder in folders]
    if probed and max(hits) == 0:
        tried = ", ".join(str(folder) for folder in folders)
        raise ValueError(f"{path}: none of its images was found (first: {probed[0]!r}; looked in {tried}); pass root=")
    return folders[hits.index(max(hits))]

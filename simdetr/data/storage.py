"""A path or URL in, something with pathlib's methods out; content in, a file that is there whole or not at all out.

Local paths (also as ``file://``) become :class:`pathlib.Path`, every other URL that fsspec knows
(``s3://bucket/folder``, ``memory://x``) a :class:`upath.UPath` with the same methods.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from upath import UPath

from simdetr.data.annotations import LabelError

Location = Path | UPath


def locate(path: str | Location) -> Location:
    """The place that a path or URL speaks of."""
    if isinstance(path, Path) or not is_url(str(path)):
        return Path(str(path))
    url = UPath(path)
    return Path(url.path) if url.protocol in ("file", "local") else url


def is_url(text: str) -> bool:
    """Whether it names its storage: ``s3://bucket``, ``simplecache::s3://bucket``."""
    return "://" in text


def below(root: Location, name: str) -> Location:
    """The place of a relative name below a root; absolute paths and URLs stand for themselves."""
    return locate(name) if is_url(name) else root / name


def files_below(folder: Location) -> Iterator[str]:
    """Posix paths, relative to the folder, of all files below it; hidden files and folders are left out.

    Links to folders are followed once, so that a link to a parent folder does no harm.
    """
    if not isinstance(folder, Path):
        prefix = folder.path.rstrip("/") + "/"
        names = (name.removeprefix(prefix) for name in folder.fs.find(folder.path))
        yield from (name for name in names if not any(part.startswith(".") for part in name.split("/")))
        return
    seen: set[str] = set()
    for directory, subfolders, names_here in os.walk(folder, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = Path(directory).relative_to(folder)
        yield from ((relative / name).as_posix() for name in names_here if not name.startswith("."))


def content_hash(path: Path, apart: Collection[str] = ()) -> str:
    """A hash of a file's bytes; of a folder, of the names and bytes of all files below it.

    Of files with one of the suffixes ``apart``, such as ``.jpg``, the names alone.
    """
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(files_below(path)) if path.is_dir() else [""]:
        total.update(f"{name}\0".encode())
        if Path(name).suffix.lower() not in apart:
            with (path / name).open("rb") as stream:
                total.update(hashlib.file_digest(stream, "blake2b").digest())
    return total.hexdigest()


def write_whole(location: Location, content: Any) -> None:  # noqa: ANN401 (bytes or a pyarrow buffer)
    """Write a file that appears whole or not at all: locally through `atomic_path`, elsewhere as one object."""
    if not isinstance(location, Path):
        location.fs.pipe_file(location.path, bytes(content))
        return
    with atomic_path(location) as temporary, temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to, and rename it to ``path`` when the block ends well.

    Missing parent folders are made. The temporary name is this process's own and keeps the suffix, by which writers
    choose the format. When the block raises, the temporary file is removed and ``path`` stays as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(out: Path) -> None:
    """Fail with an OSError before the work if its result could not be written."""
    if out.is_dir():
        raise IsADirectoryError(f"out: expected a file name such as {out / 'labels.json'}, got the folder {out}.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise OSError(f"out: {out.parent} cannot be written to ({error}); choose another place.") from error


def read_lists(path: Path, kind: str, *lists: str) -> dict[str, Any]:
    """The content of a JSON file that is an object with these lists, such as a COCO file.

    Raises:
        LabelError: the file is missing, is no JSON, or is not of this kind.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise LabelError(f"{path} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise LabelError(f"{path} cannot be read as JSON: {error}") from error
    found: dict[str, Any] = content if isinstance(content, dict) else {}
    if missing := [name for name in lists if not isinstance(found.get(name), list)]:
        raise LabelError(f"{path} is no {kind}: expected the lists {', '.join(missing)}")
    return found


def write_json(path: str | Path, content: object, *, indent: int | None = None, sort_keys: bool = False) -> None:
    """Write a JSON file through `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent, sort_keys=sort_keys), encoding="utf-8")


def write_scores(scores: Mapping[str, float], out: Path) -> None:
    """Write scores as JSON."""
    write_json(out, json_ready(scores), indent=1)


def json_ready(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Scores with None in place of nan, which JSON does not know."""
    return {name: None if math.isnan(value) else value for name, value in scores.items()}

"""Files that somebody sends in, images of a project out; a file that is none, or tries to be elsewhere, is refused.

The content says what a file is, not its name; of its name no folder is believed. What is there already, by the hash of
its content, is named and not kept twice.
"""

from __future__ import annotations

import re
import shutil
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import NamedTemporaryFile
from typing import BinaryIO

from PIL import Image as Pictures
from sqlalchemy import select
from sqlmodel import Session, col

from simdetr.app.picture_files import digest_of, look_at, path_of
from simdetr.app.schemas import Duplicate, Refused
from simdetr.app.tables import Image, Project
from simdetr.data.images import IMAGE_SUFFIXES

FOLDER = "uploads"
MOST_MEMBERS = 20_000
_UNPACKED_TO_PACKED = 50
"""A zip that grows by more is taken for a bomb."""
_CHUNK = 1 << 20
_LONGEST_NAME = 120


@dataclass
class Outcome:
    """What became of files."""

    added: list[Image] = field(default_factory=list)
    duplicates: list[Duplicate] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


class RefusedFileError(ValueError):
    """A file that is not taken; the message says why."""


def safe_name(name: str) -> str:
    """The last part of a file's name, without what a file system or page may take for something else."""
    last = PurePosixPath(PureWindowsPath(name).as_posix()).name
    cleaned = re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*]', "_", last).strip(" .")
    stem, suffix = PurePosixPath(cleaned).stem, PurePosixPath(cleaned).suffix
    return f"{stem[: _LONGEST_NAME - len(suffix)]}{suffix}" if cleaned else "image"


def take_file(
    session: Session,
    project: Project,
    name: str,
    stream: BinaryIO,
    outcome: Outcome,
    *,
    max_bytes: int,
    max_pixels: int,
) -> None:
    """Take one file of an upload: an image, or a zip of images."""
    folder = Path(project.own_folder) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if name.lower().endswith(".zip"):
            for inner, opened in _members(stream, outcome, max_bytes):
                _take_one(session, project, folder, inner, opened, outcome, max_bytes, max_pixels)
        else:
            _take_one(session, project, folder, name, stream, outcome, max_bytes, max_pixels)
    except RefusedFileError as error:
        outcome.refused.append(Refused(name=name, reason=str(error)))


def _members(stream: BinaryIO, outcome: Outcome, max_bytes: int) -> Iterator[tuple[str, BinaryIO]]:
    """Images of a zip; what is named to lie elsewhere, is a link or encrypted is refused."""
    try:
        with zipfile.ZipFile(stream) as archive:
            members = [one for one in archive.infolist() if not one.is_dir()]
            packed = sum(one.compress_size for one in members)
            unpacked = sum(one.file_size for one in members)
            if len(members) > MOST_MEMBERS:
                raise RefusedFileError(f"it holds {len(members):,} files; send at most {MOST_MEMBERS:,} at once")
            if unpacked > max(_UNPACKED_TO_PACKED * packed, max_bytes):
                raise RefusedFileError("it unpacks to far more than it is, as a bomb does; send the images themselves")
            for member in members:
                if reason := _trick(member):
                    outcome.refused.append(Refused(name=member.filename, reason=reason))
                elif not PurePosixPath(member.filename).name.startswith("."):
                    with archive.open(member) as opened:
                        yield member.filename, opened  # type: ignore[misc]
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise RefusedFileError(f"it cannot be read as a zip: {error}") from error


def _trick(member: zipfile.ZipInfo) -> str:
    name = member.filename.replace("\\", "/")
    if name.startswith("/") or re.match(r"^[a-zA-Z]:", name) or ".." in name.split("/"):
        return "its path leads out of the zip"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "it is a link"
    if member.flag_bits & 1:
        return "it is encrypted"
    return ""


def _take_one(
    session: Session,
    project: Project,
    folder: Path,
    name: str,
    stream: BinaryIO,
    outcome: Outcome,
    max_bytes: int,
    max_pixels: int,
) -> None:
    with NamedTemporaryFile(dir=folder, prefix=".", delete=False) as written:
        temporary = Path(written.name)
    try:
        try:
            size = _copy(stream, temporary, max_bytes)
            suffix = _checked_suffix(temporary, name, max_pixels)
        except (RefusedFileError, zipfile.BadZipFile, RuntimeError) as error:
            outcome.refused.append(Refused(name=name, reason=str(error)))
            return
        digest = digest_of(temporary)
        twin = _twin(session, project, size, digest)
        if twin is not None:
            outcome.duplicates.append(Duplicate(name=name, image_id=twin))
            return
        target = _free(session, project, folder, PurePosixPath(safe_name(name)).with_suffix(suffix).name)
        shutil.move(temporary, target)
        target.chmod(0o644)
    finally:
        temporary.unlink(missing_ok=True)
    image = Image(project_id=project.id or 0, path=f"{FOLDER}/{target.name}", bytes=size, digest=digest, uploaded=True)
    look_at(project, image)
    session.add(image)
    session.flush()
    outcome.added.append(image)


def _copy(stream: BinaryIO, target: Path, max_bytes: int) -> int:
    size = 0
    with target.open("wb") as file:
        while chunk := stream.read(_CHUNK):
            size += len(chunk)
            if size > max_bytes:
                raise RefusedFileError(f"it is larger than {max_bytes >> 20} MB")
            file.write(chunk)
    if not size:
        raise RefusedFileError("it is empty")
    return size


def _checked_suffix(path: Path, name: str, max_pixels: int) -> str:
    """The suffix that the content deserves, once it is known to be an image of a bearable size."""
    try:
        with Pictures.open(path) as picture:
            width, height = picture.size
            kind = picture.format or ""
            if width * height > max_pixels:
                raise RefusedFileError(f"it has {width} × {height} pixels; at most {max_pixels:,} are taken")
            picture.verify()
    except RefusedFileError:
        raise
    except (Pictures.DecompressionBombError, Pictures.DecompressionBombWarning) as error:
        raise RefusedFileError(f"it has too many pixels; at most {max_pixels:,} are taken") from error
    except Exception as error:  # decoders raise all kinds of errors on damaged files
        raise RefusedFileError("it is no image that can be read") from error
    suffixes = [end for end, format_ in Pictures.registered_extensions().items() if format_ == kind]
    known = [end for end in suffixes if end in IMAGE_SUFFIXES]
    if not known:
        raise RefusedFileError(
            f"it is of the kind {kind or 'unknown'}, which is none of {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    own = PurePosixPath(name).suffix.lower()
    return own if own in known else known[0]


def _twin(session: Session, project: Project, size: int, digest: str) -> int | None:
    """The image with the same content, looked for among those of the same size."""
    same_size = session.scalars(select(Image).where(col(Image.project_id) == project.id, col(Image.bytes) == size))
    for image in same_size:
        if image.digest is None:
            path = path_of(project, image)
            image.digest = digest_of(path) if path.is_file() else None
        if image.digest == digest:
            return image.id
    return None


def _free(session: Session, project: Project, folder: Path, name: str) -> Path:
    """A place for a file under its name, or one like it that is not taken."""
    stem, suffix = PurePosixPath(name).stem, PurePosixPath(name).suffix
    number = 1
    while True:
        path = folder / (name if number == 1 else f"{stem}-{number}{suffix}")
        query = select(col(Image.id)).where(
            col(Image.project_id) == project.id, col(Image.path) == f"{FOLDER}/{path.name}"
        )
        if not path.exists() and session.scalar(query) is None:
            return path
        number += 1

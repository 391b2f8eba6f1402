"""Tar files of images in, as webdataset lays them out; the ids of the images and where their bytes lie out.

An image's id is ``<tar>/<member>``. The headers are read once; an image is then read by its offset, so any number of
threads and processes may read the same tar. Members that are no images (labels, captions) are passed over.
"""

from __future__ import annotations

import logging
import re
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from simdetr.data.locations import Location, below

TAR_SUFFIX = ".tar"
_BLOCK_BYTES = 512
_NUMBERED = re.compile(r"(.*)\{(\d+)\.\.(\d+)\}(.*)")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TarMembers:
    """Where images lie in tar files.

    Attributes:
        tars: paths of the tar files, relative to the root of the source.
        spans: int64 [N, 3]: for every image the number of its tar, and offset and size of its bytes.
    """

    tars: Sequence[str]
    spans: NDArray[np.int64]

    def take(self, positions: Sequence[int]) -> TarMembers:
        """Those of some images."""
        return TarMembers(self.tars, self.spans[np.asarray(positions, np.int64)])


def is_tar(name: str) -> bool:
    """Whether a file name is that of a tar."""
    return name.lower().endswith(TAR_SUFFIX)


def numbered(pattern: str) -> tuple[str, list[str]]:
    """A folder, and the names in it that ``{000..009}`` in a path stands for; one name where there is no such range."""
    cut = pattern.partition("{")[0].rfind("/") + 1
    folder, name = pattern[:cut], pattern[cut:]
    match = _NUMBERED.fullmatch(name)
    if match is None or int(match[2]) > int(match[3]):
        return folder, [name]
    before, first, last, after = match.groups()
    return folder, [f"{before}{number:0{len(first)}d}{after}" for number in range(int(first), int(last) + 1)]


def index_tars(root: Location, tars: Iterable[str], suffixes: frozenset[str]) -> tuple[list[str], TarMembers]:
    """Ids and places of all images in tar files, tar by tar in the order in which they lie there.

    Of a damaged tar, or one that is cut short, the images before the damage are kept and a warning tells of it.

    Args:
        root: folder that the tars are relative to.
        tars: their paths.
        suffixes: of image files, lower case.

    Raises:
        FileNotFoundError: a tar does not exist.
    """
    names = list(dict.fromkeys(tars))
    ids: list[str] = []
    spans: list[NDArray[np.int64]] = []
    with ThreadPoolExecutor() as pool:  # remote headers come with a delay
        found = pool.map(lambda name: _index(below(root, name), suffixes), names)
        for number, (name, (members, damage)) in enumerate(zip(names, found, strict=True)):
            if damage:
                _log.warning(
                    "%s: %s; its first %d images are used, restore the file for the others", name, damage, len(members)
                )
            ids += [f"{name}/{member}" for member in members]
            places = np.array(list(members.values()), np.int64).reshape(-1, 2)
            spans.append(np.insert(places, 0, number, axis=1))
    return ids, TarMembers(tuple(names), np.concatenate([np.zeros((0, 3), np.int64), *spans]))


def _index(tar: Location, suffixes: frozenset[str]) -> tuple[dict[str, tuple[int, int]], str]:
    """Offset and size of every image of a tar by its name, and what is wrong with the tar, if anything."""
    members: dict[str, tuple[int, int]] = {}
    total = tar.stat().st_size
    with tar.open("rb") as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # else it keeps every header
                    name = PurePosixPath(member.name)
                    if member.offset_data + member.size > total:
                        return members, f"is cut short within {member.name}"
                    if member.isreg() and name.suffix.lower() in suffixes and not _is_hidden(name):
                        members[name.as_posix()] = (
                            member.offset_data,
                            member.size,
                        )  # of two of a name the last, as tar
                stream.seek(archive.offset)
        except tarfile.TarError as error:
            return members, f"is damaged, compressed or no tar ({error})"
        end = stream.read(_BLOCK_BYTES)
    return members, "" if end and not any(end) else "is cut short or damaged: it has no end mark"


def _is_hidden(name: PurePosixPath) -> bool:
    return any(part.startswith(".") for part in name.parts)

"""File names as other tools wrote them in, ids of images out.

Told apart are backslashes, Unicode forms, ``./``, folders that the name leaves out, and folders before the rest that
are those the images lie in. Names under which Label Studio serves an image, and calls it in its exports to COCO, YOLO
and Pascal VOC, are the file behind them. A name that two images fit is of none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from urllib.parse import unquote

_ELSEWHERE = re.compile(r"/|[A-Za-z]:|[a-z0-9+]+://")  # a whole path of this or another machine, or a URL
_SPLITS = ("train", "val", "test")
_LOCAL_FILE = "?d="  # Label Studio's /data/local-files/?d=folder/a%20b.jpg
_UPLOAD = re.compile(r"^(?:.*/)?[0-9a-f]{8}-([^/]+)$")  # its /data/upload/1/1a2b3c4d-a.jpg


class Spellings:
    """A name as another tool wrote it -> the one id that it can mean, or None.

    Args:
        ids: of the images.
        root: the folder that they are relative to, as a posix path; empty where there is none.
        part: what of an id a name is compared with, such as `stem_of`.
    """

    def __init__(self, ids: Iterable[str], root: str = "", part: Callable[[str], str] = str) -> None:
        self._folder = _plain(root).rstrip("/").rpartition("/")[2]
        self._ids: dict[str, list[str]] = {}
        self._ends: dict[str, list[str]] = {}
        for image_id in ids:
            name = part(_plain(image_id))
            self._ids.setdefault(name, []).append(image_id)
            self._ends.setdefault(name.rpartition("/")[2], []).append(name)

    def __call__(self, written: str) -> str | None:
        """The id of the one image that a name can mean."""
        return next((found for name in _meant(written) if (found := self._found(name)) is not None), None)

    def _found(self, written: str) -> str | None:
        name = _plain(written)
        if name not in self._ids:
            same_end = self._ends.get(name.rpartition("/")[2], [])
            longer = [one for one in same_end if one.endswith(f"/{name}")]
            shorter = [one for one in same_end if name.endswith(f"/{one}") and self._lies_in(name[: -len(one) - 1])]
            fitting = longer or sorted(shorter, key=len)[-1:]
            if len(fitting) != 1:
                return None
            name = fitting[0]
        return self._ids[name][0] if len(self._ids[name]) == 1 else None

    def _lies_in(self, folders: str) -> bool:
        """Whether the folders written before an id can be where the images lie.

        They end in the images' own folder, or are of another machine and of no split by name: ``…/train/a.jpg`` is no
        image of ``val/``.
        """
        last = folders.rpartition("/")[2]
        return last == self._folder or (_ELSEWHERE.match(folders) is not None and not last.startswith(_SPLITS))


def stem_of(name: str) -> str:
    """A path without the ending of its last part."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + (last.rpartition(".")[0] or last)


def shared_stems(image_ids: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of images whose paths differ by their ending alone: their label files would be one."""
    first: dict[str, str] = {}
    return [(first[stem], name) for name in image_ids if first.setdefault(stem := stem_of(name), name) != name]


def _meant(written: str) -> Iterator[str]:
    """A name as it stands, then the file that Label Studio means by it."""
    yield written
    _, mark, path = written.partition(_LOCAL_FILE)
    if mark:
        yield unquote(path).lstrip("/")
    elif upload := _UPLOAD.match(written):
        yield upload[1]


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace("\\", "/")).removeprefix("./")

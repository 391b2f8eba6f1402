"""Images that could not be read go in, ``quarantine.csv`` and a stop past a fraction come out.

Rows are appended one write at a time, so several worker processes may share the file; a row cut short by a crash is
ignored when the file is read again.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path

from simdetr.data.storage import Location

_HEADER = ("image_id", "reason")
OF_MINING = "--mining.max_unreadable"
"""The option of mining and training."""


class TooManyUnreadableError(RuntimeError):
    """More images are unreadable than a run may put aside."""


class Quarantine:
    """The list of a run's unreadable images, on disk and shared by the processes of the run.

    Args:
        path: the CSV file with the columns ``image_id`` and ``reason``; rows of an earlier run are kept.
        total: number of images of the run.
        max_fraction: share of the images that may be unreadable before `add` stops the run; 1 stops it only where no
            image can be read.
        option: of the command line, where the user says that share.
    """

    def __init__(self, path: str | Path, total: int, max_fraction: float = 0.05, option: str = OF_MINING) -> None:
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"{option}: expected a share of the images from 0 to 1, got {max_fraction}")
        self.path = Path(path)
        self.total = total
        self.max_fraction = max_fraction
        self.option = option
        self._reasons: dict[str, str] = {}
        self._read_bytes = 0
        self._read_new_rows()

    def __len__(self) -> int:
        self._read_new_rows()
        return len(self._reasons)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.reasons

    @property
    def reasons(self) -> dict[str, str]:
        """Image id to reason, of all processes so far."""
        self._read_new_rows()
        return dict(self._reasons)

    def add(self, image_id: str, reason: str) -> None:
        """Put an image aside; doing it twice counts once.

        Raises:
            TooManyUnreadableError: more than ``max_fraction`` of the images are now put aside, or all.
        """
        if _one_line(image_id) not in self.reasons:
            self._append(image_id, reason)
            self._read_new_rows()
        check_fraction(self._reasons, self.total, self.max_fraction, self.path, self.option)

    def _append(self, image_id: str, reason: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = to_csv({image_id: reason})
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0))
        try:
            size = os.fstat(descriptor).st_size
            if size > 0:
                text = text.partition(b"\n")[2]  # the header is there
                os.lseek(descriptor, size - 1, os.SEEK_SET)
                if os.read(descriptor, 1) != b"\n":
                    text = b"\n" + text  # ends the row that a crash cut short
            os.write(descriptor, text)
        finally:
            os.close(descriptor)

    def _read_new_rows(self) -> None:
        """Read the whole lines that were added, by any process, since the last call."""
        if not self.path.is_file() or self.path.stat().st_size <= self._read_bytes:
            return
        with self.path.open("rb") as stream:
            stream.seek(self._read_bytes)
            new = stream.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        for row in csv.reader(io.StringIO(whole.decode("utf-8", errors="replace"))):
            if len(row) == len(_HEADER) and tuple(row) != _HEADER:
                self._reasons.setdefault(row[0], row[1])


def check_fraction(
    reasons: Mapping[str, str], total: int, max_fraction: float, path: Location, option: str = OF_MINING
) -> None:
    """`check_share` of a list of unreadable images: their reasons by id, the last found last; ``path`` has the list."""
    image_id, reason = [("", ""), *reasons.items()][-1]
    check_share(len(reasons), total, max_fraction, option, f" (last: {image_id}: {reason}); see {path}")


def check_share(count: int, total: int, max_fraction: float, option: str, where: str = "") -> None:
    """Stop where ``count`` of ``total`` images are unreadable and that is too much.

    Raises:
        TooManyUnreadableError: it is more than the share ``max_fraction``, or all; the message says ``where`` to look,
            and the ``option`` that allows more.
    """
    if not count or (count <= max_fraction * total and count < total):
        return
    more, advice = f", more than {max_fraction:.0%}", f", or allow more with {option}"
    if count == total:
        more = advice = ""
    raise TooManyUnreadableError(
        f"{count} of {total} images are unreadable{more}{where}; repair or remove the files{advice}"
    )


def to_csv(reasons: Mapping[str, str]) -> bytes:
    """The content of a file that lists unreadable images and their reasons."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_HEADER, *((_one_line(name), _one_line(reason)) for name, reason in reasons.items())])
    return text.getvalue().encode()


def _one_line(text: str) -> str:
    return " ".join(text.splitlines()).strip()

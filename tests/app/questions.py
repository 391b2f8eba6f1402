"""What tests ask the process beside the server, which calls functions of modules by their names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from simdetr.app.refusals import Refusal


@dataclass(frozen=True)
class Parcel:
    """Values that JSON has no kinds for."""

    content: bytes
    path: Path
    pair: tuple[int, float]


def number_of_process() -> int:
    return os.getpid()


def says_something() -> None:
    print("noise")  # noqa: T201


def sent_back(parcel: Parcel, *, twice: bool = False) -> list[Parcel]:
    assert isinstance(parcel.path, Path) and isinstance(parcel.content, bytes)
    return [parcel] * (1 + twice)


def content_of(path: Path) -> bytes:
    return path.read_bytes()


def refuses(status: int) -> None:
    raise Refusal(status, "there is no file for image 日本")


def fails() -> None:
    raise ValueError("not\nthis")


def ends(status: int) -> None:
    os._exit(status)

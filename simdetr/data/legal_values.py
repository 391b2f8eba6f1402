"""A value that may be one of a few -> an error that lists them where it is none of them."""

from __future__ import annotations

from typing import Any, get_args


def check_choice(name: str, value: str | None, kind: Any) -> None:  # noqa: ANN401
    """Raise a ValueError that lists the legal values unless ``value`` is one of the ``Literal`` ``kind``."""
    if value not in get_args(kind):
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, get_args(kind)))}, got {value!r}")

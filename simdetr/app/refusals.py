"""What the app answers where it does not do what was asked."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """An answer other than success.

    Args:
        status: HTTP status.
        detail: A sentence for the person.
        more: Further members of the answer, such as the state that a stale write did not know of.
    """

    def __init__(self, status: int, detail: str, **more: Any) -> None:  # noqa: ANN401
        super().__init__(detail)
        self.status, self.detail, self.more = status, detail, more


def missing(what: str, which: object) -> Refusal:
    """404 for something that is not there."""
    return Refusal(404, f"there is no {what} {which}")


class FieldRefusal(Exception):
    """422 with the place in the request that is wrong, as the framework's own checks give it."""

    def __init__(self, place: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.place, self.message = place, message

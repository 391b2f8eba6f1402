"""What a class that a config names says when it is built, without the config parser's own words around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb


@contextmanager
def constructors_speak() -> Iterator[None]:
    """Let an error of a class that a config names through as it was raised.

    The parser tries every type that an option may have, and wraps what the class said in what it thinks of the others.
    """
    try:
        yield
    except Exception as error:
        cause = error.__cause__
        while cause is not None and not _raised_by_constructor(cause):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from cause.__cause__


def _raised_by_constructor(error: BaseException) -> bool:
    """Whether the way from the parser to this error leads through the constructor of another package's class."""
    called = [(frame.f_globals.get("__name__", ""), frame.f_code.co_name) for frame, _ in walk_tb(error.__traceback__)]
    return any(
        function in ("__init__", "__post_init__") and not module.startswith("jsonargparse")
        for module, function in called
    )

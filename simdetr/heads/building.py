"""Parts of a headed detector as plain data, and back: ``class_path`` and ``init_args``, as configs have them.

Only classes of simdetr are built: a checkpoint must not name arbitrary code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def described(part: Any) -> dict[str, Any]:  # noqa: ANN401
    """Class and ``init_args`` of a built part, which keeps them."""
    return {"class_path": f"{type(part).__module__}.{type(part).__qualname__}", "init_args": dict(part.init_args)}


def part_class(class_path: str, base: type) -> Callable[..., Any]:
    """The class that a description names.

    Raises:
        ValueError: it is no subclass of ``base`` within simdetr.
    """
    module_name, _, class_name = class_path.rpartition(".")
    allowed = module_name.split(".")[0] == "simdetr"
    found = getattr(importlib.import_module(module_name), class_name, None) if allowed else None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"class_path: expected a {base.__name__} of simdetr, got {class_path!r}.")
    return found


def factory(part: Any, base: type) -> Callable[[Any], Any]:  # noqa: ANN401
    """A function of the one argument that a description lacks (sizes, or number of classes).

    Args:
        part: such a function already, or a description.
        base: what it has to make.
    """
    if not isinstance(part, Mapping):
        made: Callable[[Any], Any] = part
        return made
    found, arguments = part_class(part["class_path"], base), dict(part.get("init_args") or {})
    return lambda first: found(first, **arguments)

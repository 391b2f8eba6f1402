"""Names of a folder that are imported when they are first used (PEP 562), so that nobody pays for what is not used.

A folder's ``__init__`` says its names three times: imports for type checkers, ``__all__``, and the table of modules.
``tests/test_architecture.py`` holds them against each other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module


def names_on_first_use(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The functions ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: Its ``__name__``.
        homes: Its names by the module, below the package, that each of them is in. No name may be a module's of the
            package too: which of the two it means would depend on what was imported before.
    """
    home_of = {name: f"{package}.{module}" for module, names in homes.items() for name in names}

    def first_use(name: str) -> object:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(sorted(home_of))}")
        value: object = getattr(import_module(home_of[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return first_use, lambda: sorted({*vars(sys.modules[package]), *home_of})

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from simdetr.data.first_use import names_on_first_use


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A package with a module that sets a mark when it is imported."""
    (tmp_path / "drawer").mkdir()
    (tmp_path / "drawer" / "__init__.py").write_text(
        "from simdetr.data.first_use import names_on_first_use\n"
        "__getattr__, __dir__ = names_on_first_use(__name__, {'knives': ('sharp', 'blunt')})\n"
    )
    (tmp_path / "drawer" / "knives.py").write_text("sharp, blunt = object(), object()\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("drawer", "drawer.knives"):
        sys.modules.pop(name, None)


def test_a_name_is_imported_when_it_is_used_and_stays_the_same(folder):
    import drawer

    assert "drawer.knives" not in sys.modules and {"sharp", "blunt"} <= set(dir(drawer))
    from drawer import sharp

    assert sys.modules["drawer.knives"].sharp is sharp is drawer.sharp
    assert "sharp" in vars(drawer) and "blunt" not in vars(drawer)


def test_modules_can_be_imported_beside_the_names(folder):
    from drawer import knives

    assert isinstance(knives, ModuleType)


def test_an_unknown_name_is_told_with_those_that_there_are():
    first_use, _ = names_on_first_use("drawer", {"knives": ("sharp", "blunt")})
    with pytest.raises(AttributeError, match="module 'drawer' has no attribute 'fork'; it has blunt, sharp"):
        first_use("fork")

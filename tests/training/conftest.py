"""Trainings of the smallest detector on drawn scenes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from simdetr.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def recipe(tiny_config: Path, scenes: Path) -> MakeRecipe:
    """A recipe on the twelve scenes; later options win."""

    def make(*options: str, images: Path = scenes) -> Recipe:
        data = (f"--data.images={images}", f"--data.labels={images / 'instances.json'}")
        return Recipe((str(tiny_config),), (*data, *options))

    return make

"""Photographs that are drawn, each another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image as Pictures

PHOTO_WH = (640, 480)


def draw_photos(folder: Path, count: int) -> None:
    """Images of a coloured ground with two rectangles, each another."""
    folder.mkdir()
    width, height = PHOTO_WH
    for number in range(count):
        rng = np.random.default_rng(number)
        pixels = np.full((height, width, 3), rng.integers(60, 180, 3), np.uint8)
        for _ in range(2):
            x, y = rng.integers(0, width - 200), rng.integers(0, height - 160)
            pixels[y : y + 120, x : x + 160] = rng.integers(0, 255, 3)
        Pictures.fromarray(pixels).save(folder / f"{number:03d}.jpg", quality=90)

"""Small images and COCO files, made where a test asks for them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [H, W, 3] of random pixels."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def image_folder(tmp_path: Path):
    """Makes a folder of n random PNG images, 40 × 60 pixels, and gives its path."""

    def make(count: int, name: str = "images", size_hw: tuple[int, int] = (40, 60)) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(noise(*size_hw, seed=number)).save(folder / f"{number:03d}.png")
        return folder

    return make


@pytest.fixture
def coco_file(tmp_path: Path):
    """Writes a COCO file from its three lists and gives its path."""

    def make(images: list, annotations: list, categories: list, name: str = "instances.json") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        return path

    return make

"""Labels with all that goes wrong between tools, and the images they are of."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from PIL import Image

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.images import ImageSource, open_images
from simdetr.data.labels import Labels

settings.register_profile("simdetr", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("simdetr")


@pytest.fixture(scope="session")
def odd_labels() -> Labels:
    """Boxes at borders, of one pixel and of fractions; an empty image, subfolders, odd names, ids with gaps."""
    return Labels.from_images(
        [
            ImageLabels.build("a.png", (40, 60), [[0, 0, 60, 40], [59, 39, 60, 40], [0, 0, 1, 1]], [0, 2, 1]),
            ImageLabels.build("empty.png", (17, 31), [], []),
            ImageLabels.build("sub dir/a.png", (33, 7), [[1 / 3, 10.1234, 6.98765, 32.9]], [1]),
            ImageLabels.build("sub dir/Ärger 'so', \"x\" & <y>.png", (1, 1), [[0, 0, 1, 1], [0.25, 0.5, 1, 1]], [2, 2]),
        ],
        [Category(0, "cat"), Category(7, "große Eule, 'so'"), Category(9, '犬 "x" & <y>')],
    )


@pytest.fixture(scope="session")
def odd_images(odd_labels: Labels, tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    """The images of ``odd_labels`` on disk."""
    return open_images(images_of(odd_labels, tmp_path_factory.mktemp("odd") / "photos"))


def images_of(labels: Labels, folder: Path) -> Path:
    """Grey images of the sizes that labels say, under their ids."""
    for image_id, (height, width) in zip(labels.image_ids, labels.sizes_hw.tolist(), strict=True):
        path = folder / image_id
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (width, height)).save(path)
    return folder

"""Images drawn here, an encoder of cell colours, and the real images where they are at hand."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image


class CellColours:
    """The mean colour of every cell, at strides 16 and 32: enough to separate flat shapes."""

    strides = (16, 32)
    region_dim = 3
    fingerprint = "cell-colours"

    def __call__(self, images):
        return {stride: torch.nn.functional.avg_pool2d(images, stride) for stride in self.strides}


def draw_scene(seed, height=96, width=128):
    """A textured ground with a few rectangles; uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(90, 130, (height, width, 3))
    for _ in range(3):
        y, x = rng.integers(0, height - 32), rng.integers(0, width - 32)
        h, w = rng.integers(16, 48, 2)
        pixels[y : y + h, x : x + w] = rng.integers(0, 256, 3) + rng.integers(-8, 9, (1, 1, 3))
    return pixels.clip(0, 255).astype(np.uint8)


@pytest.fixture
def encoder():
    return CellColours()


@pytest.fixture
def drawn_scenes():
    """Eight images of three sizes, uint8 [3, H, W]."""
    sizes = [(96, 128), (128, 96), (100, 140)]
    return [torch.from_numpy(draw_scene(i, *sizes[i % 3])).permute(2, 0, 1).contiguous() for i in range(8)]


@pytest.fixture
def image_folder(tmp_path):
    """Fourteen images of two sizes in a folder."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(14):
        Image.fromarray(draw_scene(i, *[(96, 128), (128, 96)][i % 2])).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def photographs(shared_data):
    """A few real photographs at 448 px."""
    files = sorted((shared_data / "coco256" / "val").glob("*.jpg"))[:6]
    if not files:
        pytest.skip(f"coco256 is not in {shared_data}")
    return torch.stack(
        [torch.from_numpy(np.array(Image.open(f).convert("RGB").resize((448, 448)))).permute(2, 0, 1) for f in files]
    )


@pytest.fixture
def assert_same_store():
    """Two folders of proposals hold the same: byte-equal columns, the same unreadable images, and nothing else.

    Hidden files are what a killed process left half written; nobody reads them.
    """

    def names_in(folder):
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))

    def check(found, expected):
        assert names_in(found) == names_in(expected)
        for path in expected.glob("shard-*.parquet"):
            assert pq.read_table(found / path.name) == pq.read_table(path)
        for name in ("manifest.json", "quarantine.csv"):
            if (expected / name).exists():
                assert (found / name).read_bytes() == (expected / name).read_bytes()

    return check

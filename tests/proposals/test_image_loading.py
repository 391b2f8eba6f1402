"""Loading ahead in threads: order, sizes, unreadable files, a bounded number ahead."""

import threading

import pytest
import torch

from simdetr.data.images import open_images
from simdetr.mining import batch as image_loading
from simdetr.mining.batch import ImageLoading, shrink


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (320, 448)),
        ((640, 480), (448, 320)),
        ((448, 448), (448, 448)),
        ((1, 1), (448, 448)),
        ((1, 2000), (32, 448)),
        ((90, 100), (416, 448)),
    ],
)
def test_long_side_is_given_and_short_side_a_multiple_of_32(size, expected):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shrunk = shrink(image, 448)
    assert shrunk.shape == (3, *expected)
    assert shrunk.dtype == torch.uint8


def test_shrinking_keeps_a_flat_colour():
    image = torch.tensor([0, 127, 255], dtype=torch.uint8)[:, None, None].expand(3, 100, 77)
    assert shrink(image, 64).flatten(1).unique(dim=1).tolist() == [[0], [127], [255]]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_images_come_in_order(image_folder, workers):
    source = open_images(image_folder)
    with ImageLoading(source, [3, 1, 12, 1], 64, workers, ahead=2) as loading:
        found = list(loading)
    assert [image.image_id for image in found] == ["03.png", "01.png", "12.png", "01.png"]
    assert [image.size_hw for image in found] == [(128, 96), (128, 96), (96, 128), (128, 96)]


def test_unreadable_file_gives_its_reason(image_folder):
    (image_folder / "03.png").write_bytes(b"")
    with ImageLoading(open_images(image_folder), [3, 4], 64, 1, ahead=2) as loading:
        bad, good = loading
    assert bad.pixels is None
    assert bad.reason == "empty file"
    assert good.pixels is not None


def test_few_images_are_held_ahead(image_folder, monkeypatch):
    started = []
    lock = threading.Lock()
    load = image_loading.load_image

    def counted(record, image_size):
        with lock:
            started.append(record.id)
        return load(record, image_size)

    monkeypatch.setattr(image_loading, "load_image", counted)
    with ImageLoading(open_images(image_folder), range(14), 64, 2, ahead=3) as loading:
        next(loading)
    assert len(started) <= 4

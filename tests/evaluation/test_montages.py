import numpy as np
import pytest
from PIL import Image

from simdetr.data.images import ImageSource
from simdetr.reports.drawing import PAPER, class_montage, contact_sheet

RED, BLUE = (255, 0, 0), (0, 0, 255)


def painted(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.asarray(picture) == colour).all(axis=2)


def test_contact_sheet_puts_pictures_in_reading_order():
    pictures = [Image.new("RGB", (10, 20), colour) for colour in (RED, BLUE, (0, 255, 0))]
    sheet = contact_sheet(pictures, 2, gap_px=4)
    assert sheet.size == (24, 44)
    assert sheet.getpixel((5, 10)) == RED and sheet.getpixel((19, 10)) == BLUE
    assert sheet.getpixel((5, 34)) == (0, 255, 0) and sheet.getpixel((19, 34)) == PAPER
    assert contact_sheet(pictures, 9).width == 3 * 10 + 2 * 4
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([], 3)


@pytest.fixture
def painted_source(tmp_path, make_labels):
    """Two readable images and a broken one; boxes of class 0 lie on red, those of class 1 on blue."""
    for name in ("a.png", "b.png"):
        image = Image.new("RGB", (640, 640), (90, 90, 90))
        image.paste(RED, (100, 100, 200, 150))
        image.paste(BLUE, (300, 300, 340, 400))
        image.save(tmp_path / name)
    (tmp_path / "c.png").write_bytes(b"no picture")
    boxes = [(100, 100, 200, 150, 0), (300, 300, 340, 400, 1)]
    labels = make_labels({"a.png": boxes, "b.png": boxes, "c.png": [*boxes, (0, 0, 9, 9, 2)]}, (1, 2, 3, 4), stage=0)
    return ImageSource(tmp_path, ("a.png", "b.png", "c.png")), labels


def test_montage_shows_exactly_the_regions_of_the_class(painted_source):
    source, labels = painted_source
    sheet = class_montage(source, labels, 0, 5, 0, tile_px=60, columns=4)
    assert sheet.size == (60 + 4 + 60, 60)  # the box on the broken image is passed over
    red = painted(sheet, RED)
    assert red.sum() == 2 * 60 * 30  # twice as wide as high, like the boxes
    assert (red | painted(sheet, PAPER)).all()
    assert painted(class_montage(source, labels, 1, 1, 0, tile_px=60), BLUE).sum() == 24 * 60


def test_montage_is_chosen_by_the_seed(painted_source):
    source, labels = painted_source
    marked = Image.open(source.path_of("b.png"))
    marked.putpixel((150, 125), (0, 0, 0))
    marked.save(source.path_of("b.png"))
    sheets = [np.asarray(class_montage(source, labels, 0, 1, seed, tile_px=100)).tobytes() for seed in range(12)]
    assert len(set(sheets)) == 2
    assert sheets == [np.asarray(class_montage(source, labels, 0, 1, s, tile_px=100)).tobytes() for s in range(12)]


def test_montage_refuses_what_cannot_be_shown(painted_source):
    source, labels = painted_source
    with pytest.raises(ValueError, match=r"class_index: expected 0 .. 3, got 4"):
        class_montage(source, labels, 4, 5, 0)
    with pytest.raises(ValueError, match="class 3 has 0 boxes"):
        class_montage(source, labels, 3, 5, 0)
    with pytest.raises(ValueError, match="class 2 has 1 boxes, none on a readable image"):
        class_montage(source, labels, 2, 5, 0)

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from simdetr.data.images import ImageSource
from simdetr.evaluation.drawing import INK, class_colour, draw_boxes, draw_points, write_pictures

RED, BLUE = (255, 0, 0), (0, 0, 255)


def grey_image(height: int, width: int) -> torch.Tensor:
    return torch.full((3, height, width), 90, dtype=torch.uint8)


def painted(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.asarray(picture) == colour).all(axis=2)


def extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return xs[0], ys[0], xs[-1] + 1, ys[-1] + 1


def test_outline_lies_on_the_box_and_the_inside_stays():
    picture = draw_boxes(grey_image(400, 400), np.array([[50, 60, 150, 200]], np.float32), colours=[RED])
    assert picture.size == (400, 400)
    mask = painted(picture, RED)
    assert extent(mask) == (50, 60, 150, 200)
    assert not mask[64:196, 54:146].any()
    assert (np.asarray(picture)[~mask] == 90).all()


def test_small_images_are_enlarged_with_their_boxes():
    picture = draw_boxes(grey_image(40, 80), torch.tensor([[20.0, 10.0, 60.0, 30.0]]), colours=[RED])
    assert picture.size == (320, 160)
    assert extent(painted(picture, RED)) == (80, 40, 240, 120)


def test_large_images_are_shrunk_on_request():
    picture = draw_boxes(
        grey_image(800, 1000), torch.tensor([[0.0, 0.0, 1000.0, 800.0]]), colours=[RED], max_side_px=500
    )
    assert picture.size == (500, 400)
    assert extent(painted(picture, RED)) == (0, 0, 500, 400)


def test_small_boxes_stay_visible_over_large_ones():
    boxes = torch.tensor([[100.0, 100.0, 140.0, 140.0], [100.0, 100.0, 300.0, 300.0]])
    picture = draw_boxes(grey_image(400, 400), boxes, colours=[BLUE, RED])
    assert painted(picture, BLUE).sum() == 40 * 40 - 36 * 36  # the whole outline, two pixels wide


def test_boxes_beyond_the_image_are_cut():
    picture = draw_boxes(grey_image(400, 400), torch.tensor([[-50.0, 300.0, 100.0, 900.0]]), colours=[RED])
    assert extent(painted(picture, RED)) == (0, 300, 100, 400)


def test_no_boxes_leave_the_image():
    picture = draw_boxes(grey_image(400, 300), np.zeros((0, 4), np.float32), captions=[], colours=[])
    assert (np.asarray(picture) == 90).all()


def test_captions_stand_above_their_boxes_or_inside_at_the_upper_edge():
    boxes = torch.tensor([[50.0, 200.0, 150.0, 300.0], [250.0, 0.0, 390.0, 100.0]])
    plain = np.asarray(draw_boxes(grey_image(400, 400), boxes, colours=[RED, BLUE]))
    written = np.asarray(draw_boxes(grey_image(400, 400), boxes, ["a fine cat", "dog"], [RED, BLUE]))
    changed = (plain != written).any(axis=2)
    left, right = changed[:, :240], changed[:, 240:]
    assert extent(left)[0] >= 50 and 170 < extent(left)[1] < 200 and extent(left)[3] <= 201
    assert extent(right)[3] < 40
    assert changed.sum() > 300


def test_captions_at_the_right_edge_stay_in_the_picture():
    boxes = torch.tensor([[380.0, 200.0, 399.0, 300.0]])
    picture = draw_boxes(grey_image(400, 400), boxes, ["a long caption"], [RED])
    assert extent(painted(picture, RED))[0] < 320


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"captions": ["a", "b"]}, r"captions: expected one per box \(1\), got 2"),
        ({"colours": []}, r"colours: expected one per box \(1\), got 0"),
        ({"image": torch.zeros(3, 9, 9)}, r"image: expected uint8 \[3, H, W\], got torch.float32"),
        ({"boxes_xyxy": torch.tensor([[5.0, 0.0, 1.0, 4.0]])}, "expected finite corners"),
        ({"boxes_xyxy": torch.tensor([[0.0, 0.0, torch.nan, 4.0]])}, "expected finite corners"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    right = {"image": grey_image(9, 9), "boxes_xyxy": torch.tensor([[0.0, 0.0, 4.0, 4.0]])}
    with pytest.raises(ValueError, match=message):
        draw_boxes(**{**right, **arguments})


def test_class_colours_are_stable_and_differ():
    colours = [class_colour(index) for index in range(64)]
    assert colours == [class_colour(index) for index in range(64)]
    assert len(set(colours)) == 64
    for first, second in itertools.pairwise(colours):
        assert np.abs(np.subtract(first, second)).sum() > 150


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


def test_pictures_are_written_beside_nothing_of_the_user(painted_source, tmp_path, make_labels):
    source, _ = painted_source
    image = Image.open(tmp_path / "a.png")
    (tmp_path / "deep").mkdir()
    image.save(tmp_path / "deep/d.bmp")
    boxes = {"a.png": [(100, 100, 200, 150, 1, 0.3), (300, 300, 340, 400, 0, 0.9)], "deep/d.bmp": [], "c.png": []}
    labels = make_labels(boxes, (1, 2))
    source = ImageSource(tmp_path, tuple(boxes))
    before = (tmp_path / "a.png").read_bytes()
    assert write_pictures(source, labels, tmp_path / "out", max_boxes=1) == 2  # c.png cannot be read
    written = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert written == ["a.png", "deep/d.bmp.png"]
    drawn = Image.open(tmp_path / "out/a.png")
    assert painted(drawn, class_colour(0)).any() and not painted(drawn, class_colour(1)).any()  # the better one only
    assert (np.asarray(Image.open(tmp_path / "out/deep/d.bmp.png")) == np.asarray(image)).all()
    with pytest.raises(ValueError, match="holds the images themselves"):
        write_pictures(source, labels, tmp_path)
    assert (tmp_path / "a.png").read_bytes() == before

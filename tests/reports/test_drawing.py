"""Boxes, points, sheets and score maps on pictures."""

from __future__ import annotations

import itertools
import math

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.images import ImageSource
from simdetr.reports.drawing import (
    FOUND,
    HUMAN,
    INK,
    PAPER,
    class_colour,
    class_montage,
    contact_sheet,
    draw_boxes,
    draw_heat_map,
    draw_labels,
    draw_points,
    write_pictures,
)

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


def test_points_are_rings_around_their_pixel_on_any_size():
    for height, width, wanted in ((40, 80, (320, 160)), (400, 400, (400, 400))):
        x, y = 0.25 * width, 0.5 * height
        picture = draw_points(grey_image(height, width), np.array([[x, y]], np.float32), colours=[RED])
        assert picture.size == wanted
        left, top, right, bottom = extent(painted(picture, RED))
        assert (left + right) / 2 == 0.25 * wanted[0] + 0.5 and (top + bottom) / 2 == 0.5 * wanted[1] + 0.5
        assert right - left == bottom - top == 21  # as large on both
        assert picture.getpixel((round(0.25 * wanted[0]), round(0.5 * wanted[1]))) == INK  # the cross


def test_rings_stay_visible_on_a_ground_of_their_colour():
    ground = torch.tensor(RED, dtype=torch.uint8)[:, None, None].expand(3, 400, 400)
    picture = draw_points(ground, torch.tensor([[200.0, 100.0]]), colours=[RED])
    assert extent(painted(picture, INK)) == (189, 89, 212, 112)


def test_hollow_rings_show_what_is_under_them():
    points = np.array([[200.0, 200.0]])
    filled = draw_points(grey_image(400, 400), points, colours=[RED])
    hollow = draw_points(grey_image(400, 400), points, colours=[RED], filled=False)
    assert filled.getpixel((204, 196)) == RED and hollow.getpixel((204, 196)) == (90, 90, 90)
    assert hollow.getpixel((200, 200)) == RED
    assert painted(filled, RED).sum() > 1.5 * painted(hollow, RED).sum()


def test_points_are_drawn_on_a_copy_of_a_picture_in_the_pixels_of_its_image():
    boxes = draw_boxes(grey_image(40, 80), torch.tensor([[20.0, 10.0, 60.0, 30.0]]), colours=[BLUE])
    before = np.asarray(boxes).copy()
    picture = draw_points(boxes, np.array([[20.0, 10.0]]), colours=[RED], size_hw=(40, 80))
    left, top, right, bottom = extent(painted(picture, RED))
    assert ((left + right) / 2, (top + bottom) / 2) == (80.5, 40.5)
    assert painted(picture, BLUE).any() and (np.asarray(boxes) == before).all()


def test_unknown_points_are_passed_over_and_far_ones_cut_off():
    points = np.array([[np.nan, np.nan], [200.0, 200.0], [-900.0, 5000.0]])
    picture = draw_points(grey_image(400, 400), points, ["x", "", "z"])
    assert not painted(picture, class_colour(0)).any() and painted(picture, class_colour(1)).any()
    plain = draw_points(grey_image(400, 400), points[1:2], colours=[class_colour(1)])
    assert (np.asarray(plain)[:380] == np.asarray(picture)[:380]).all()
    assert (np.asarray(draw_points(grey_image(400, 400), np.zeros((0, 2)))) == 90).all()


def test_captions_stand_beside_their_points():
    points = np.array([[100.0, 300.0]])
    plain = np.asarray(draw_points(grey_image(400, 400), points, colours=[RED]))
    written = np.asarray(draw_points(grey_image(400, 400), points, ["light 0.7"], [RED]))
    left, top, _, bottom = extent((plain != written).any(axis=2))
    assert left >= 100 and 260 < top < bottom <= 300


def test_wrong_arguments_of_points_are_named():
    image, points = grey_image(9, 9), np.zeros((2, 2))
    with pytest.raises(ValueError, match=r"captions: expected one per point \(2\), got 1"):
        draw_points(image, points, ["a"])
    with pytest.raises(ValueError, match=r"colours: expected one per point \(2\), got 0"):
        draw_points(image, points, colours=[])
    with pytest.raises(ValueError, match=r"image: expected uint8 \[3, H, W\]"):
        draw_points(image.float(), points)


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


def test_pictures_show_points_of_predictions_and_truth(tmp_path, make_points):
    Image.new("RGB", (640, 640), (90, 90, 90)).save(tmp_path / "a.png")
    source = ImageSource(tmp_path, ("a.png",))
    boxes = [(300, 300, 400, 400), (100, 100, 100, 100)]
    found = make_points({"a.png": [(350, 350, 0, 0.9), (100, 100, 1, 0.8)]}, 2, boxes=boxes)
    write_pictures(source, found, tmp_path / "out")
    picture = Image.open(tmp_path / "out/a.png")
    with_area, without = class_colour(0), class_colour(1)
    assert extent(painted(picture, with_area)[310:, 300:])[2:] == (100, 90)  # box and point
    assert picture.getpixel((346, 346)) == with_area and picture.getpixel((96, 96)) == without
    plain = draw_points(grey_image(640, 640), found.points[1:], ["kind 1 0.80"], [without])
    assert (np.asarray(plain)[:200, :290] == np.asarray(picture)[:200, :290]).all()  # no box of one pixel

    truth = make_points({"a.png": [(500, 100, 1), (np.nan, np.nan, 0)]}, 2)
    write_pictures(source, found, tmp_path / "both", truth=truth)
    both = Image.open(tmp_path / "both/a.png")
    assert painted(both, without)[80:120, 480:520].any() and both.getpixel((496, 96)) == (90, 90, 90)
    changed = (np.asarray(both) != np.asarray(picture)).any(axis=2)
    assert extent(changed) == (489, 89, 512, 112)
    write_pictures(source, found, tmp_path / "other", truth=make_points({"b.png": [(500, 100, 1)]}, 2))
    assert (tmp_path / "other/a.png").read_bytes() == (tmp_path / "out/a.png").read_bytes()


def test_a_box_of_several_classes_is_drawn_once_with_its_best():
    image = torch.zeros(3, 100, 200, dtype=torch.uint8)
    categories = (Category(0, "cat"), Category(1, "dog"))
    boxes = [[10, 10, 60, 60], [100, 40, 150, 90], [10, 10, 60, 60]]
    several = ImageLabels.build("a", (100, 200), boxes, [0, 1, 1], [0.5, 0.4, 0.9])
    once = ImageLabels.build("a", (100, 200), boxes[1:], [1, 1], [0.4, 0.9])
    drawn = draw_labels(image, several, categories, 2)
    assert np.array_equal(np.asarray(drawn), np.asarray(draw_labels(image, once, categories, 2)))


def test_contact_sheet_puts_pictures_in_reading_order():
    pictures = [Image.new("RGB", (10, 20), colour) for colour in (RED, BLUE, (0, 255, 0))]
    sheet = contact_sheet(pictures, 2, gap_px=4)
    assert sheet.size == (24, 44)
    assert sheet.getpixel((5, 10)) == RED and sheet.getpixel((19, 10)) == BLUE
    assert sheet.getpixel((5, 34)) == (0, 255, 0) and sheet.getpixel((19, 34)) == PAPER
    assert contact_sheet(pictures, 9).width == 3 * 10 + 2 * 4
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([], 3)


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


def left_half() -> np.ndarray:
    return np.repeat([[1.0, 0.0]], 2, axis=0).repeat(50, axis=1)


def test_the_map_is_laid_over_the_image():
    picture = np.asarray(draw_heat_map(grey_image(400, 600), left_half(), opacity=0.25))
    assert picture.shape == (400, 600, 3)
    for column, value in ((10, 1.0), (590, 0.0)):
        colour = 255 * np.array(matplotlib.colormaps["jet"](value)[:3])
        assert np.abs(picture[200, column] - (0.75 * 90 + 0.25 * colour)).max() <= 0.5
    assert picture[200, 10, 0] > picture[200, 590, 0] and picture[200, 10, 2] < picture[200, 590, 2]  # red, blue


def test_without_opacity_the_image_is_left_and_with_all_of_it_the_map():
    clear = np.asarray(draw_heat_map(grey_image(400, 400), left_half(), opacity=0))
    assert (clear == 90).all()
    dense = np.asarray(draw_heat_map(torch.zeros(3, 400, 400, dtype=torch.uint8), left_half(), opacity=1))
    white = np.asarray(draw_heat_map(torch.full((3, 400, 400), 255, dtype=torch.uint8), left_half(), opacity=1))
    assert (dense == white).all()


def test_found_boxes_are_green_and_human_ones_red():
    picture = np.asarray(
        draw_heat_map(
            grey_image(40, 80),  # drawn at 160 × 320
            np.zeros((4, 4)),
            np.array([[20, 10, 60, 30]], np.float32),
            torch.tensor([[10.0, 5.0, 30.0, 20.0], [62.0, 30.0, 78.0, 38.0]]),
        )
    )
    assert picture.shape == (160, 320, 3)
    green, red = (picture == FOUND).all(2), (picture == HUMAN).all(2)
    assert np.flatnonzero(green.any(0))[[0, -1]].tolist() == [80, 239]
    assert np.flatnonzero(green.any(1))[[0, -1]].tolist() == [40, 119]
    assert np.flatnonzero(red.any(0))[[0, -1]].tolist() == [40, 311]
    assert red[:, 300:].any() and red[:, 100].any() and not red[90:110, :240].any()
    only_truth = np.asarray(draw_heat_map(grey_image(400, 400), np.zeros((4, 4)), truth=np.array([[9, 9, 99, 99]])))
    assert (only_truth == HUMAN).all(2).any() and not (only_truth == FOUND).all(2).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.zeros(3, 9, 9)}, r"image: expected uint8 \[3, H, W\], got torch.float32"),
        ({"score_map": np.zeros((1, 4, 4))}, "score_map: expected one map"),
        ({"score_map": np.full((4, 4), math.nan)}, "score_map: expected finite values"),
        ({"score_map": np.full((4, 4), 7.0)}, r"score_map: expected values in \[0, 1\]"),
        ({"boxes": np.array([[5, 0, 1, 4]])}, "boxes_xyxy: expected finite corners"),
        ({"opacity": 1.5}, "opacity: expected 0 to 1, got 1.5"),
    ],
)
def test_wrong_arguments_of_heat_maps_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        draw_heat_map(**{"image": grey_image(9, 9), "score_map": np.zeros((4, 4)), **changes})


def test_an_unknown_colour_map_is_named():
    with pytest.raises(ValueError, match="colour_map: matplotlib has no 'rainbows'"):
        draw_heat_map(grey_image(9, 9), np.zeros((4, 4)), colour_map="rainbows")

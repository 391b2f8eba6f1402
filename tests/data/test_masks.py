"""Codes of masks against pycocotools, broken ones, and how much memory they take."""

import sys

import numpy as np
import pytest
from pycocotools import mask as coco_masks

from simdetr.data import masks
from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.labels import Labels

SIZE = (40, 60)


def noise(count=5, size_hw=SIZE, seed=0):
    return np.random.default_rng(seed).random((count, *size_hw)) > 0.6


def of_pycocotools(pixels):
    return [coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"] for mask in pixels]


def blob(size_hw=(480, 640)):
    rows, columns = np.indices(size_hw)
    angle = np.arctan2(rows - 240, columns - 320)
    return np.hypot(rows - 240, columns - 320) < 120 + 30 * np.sin(5 * angle)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
def test_round_trip_is_exact_and_the_code_pycocotools():
    pixels = noise()
    codes = masks.encode(pixels)
    assert codes.dtype == object and codes.tolist() == of_pycocotools(pixels)
    decoded = masks.decode(codes, SIZE)
    planes = coco_masks.decode([{"size": list(SIZE), "counts": code} for code in codes])
    assert (decoded == planes.transpose(2, 0, 1)).all()
    assert decoded.dtype == np.uint8 and decoded.flags["C_CONTIGUOUS"] and (decoded == pixels).all()
    assert masks.encode(pixels.astype(np.uint8)).tolist() == codes.tolist()
    assert masks.decode(codes[:0], SIZE).shape == (0, *SIZE) and masks.encode(pixels[:0]).shape == (0,)


def test_a_wrong_size_is_named():
    with pytest.raises(LabelError, match=r"image of 40 × 61 = 2440 pixels.*sum to 2400"):
        masks.decode(masks.encode(noise(1)), (40, 61))
    with pytest.raises(LabelError, match="compressed run lengths"):
        masks.decode(masks.column([b"PPP"]), SIZE)


def test_masks_of_boxes_fill_them():
    boxes = np.array([[3, 4, 30, 25], [0, 0, 60, 40], [59, 39, 60, 40]], np.float32)
    pixels = masks.decode(masks.of_boxes(boxes, SIZE), SIZE)
    assert pixels.sum(axis=(1, 2)).tolist() == [27 * 21, 2400, 1]
    assert pixels[0, 4:25, 3:30].all() and pixels[2, 39, 59]
    assert masks.of_boxes(boxes[:0], SIZE).shape == (0,)


def test_polygons_are_pycocotools():
    polygons = [[5, 5, 30.5, 8, 20, 30], [40, 2, 58, 2, 58, 20, 40, 20]]
    expected = coco_masks.merge(coco_masks.frPyObjects(polygons, *SIZE))["counts"]
    assert masks.of_segmentation(polygons, SIZE) == expected
    assert masks.of_segmentation([*polygons, [1, 1, 2, 2]], SIZE) == expected  # a line has no area, and is no box
    assert masks.decode(masks.column([expected]), SIZE)[0].sum() == pytest.approx(311 + 324, rel=0.03)


@pytest.mark.parametrize("pixels", [*noise(3), np.zeros(SIZE, bool), np.ones(SIZE, bool), noise(1, (1, 1))[0], blob()])
def test_run_lengths_of_both_kinds(pixels):
    size = list(pixels.shape)
    (packed,) = of_pycocotools([pixels])
    flat = pixels.flatten(order="F").astype(int)
    changes = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *changes, len(flat)]).tolist()
    lengths = [0, *lengths] if flat[0] else lengths  # background comes first
    assert masks.unpack(packed).tolist() == lengths
    assert masks.of_segmentation({"size": size, "counts": packed.decode()}, pixels.shape) == packed
    assert masks.of_segmentation({"size": size, "counts": lengths}, pixels.shape) == packed


@pytest.mark.parametrize("nothing", [None, [], {}])
def test_no_segmentation_is_none(nothing):
    assert masks.of_segmentation(nothing, SIZE) is None


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ("none", "polygons or run lengths"),
        ([[1, 2, 3, 4, 5]], r"polygons \[x, y"),
        ([[1, 2, 3, 4, 5, float("nan")]], r"polygons \[x, y"),
        ([[1, 2, 3, 4, 5, 1e9]], "in or near the image"),
        ([["a", 2, 3, 4, 5, 6]], "no list of numbers"),
        ([None], r"polygons \[x, y"),
        ([[1, 2, 3, 4]], "at least three corners"),
        ([[[1, 2], [3, 4], [5, 6]]], r"polygons \[x, y"),
        ({"counts": [2400]}, "size"),
        ({"counts": [2400], "size": [60, 40]}, "size"),
        ({"size": [40, 60]}, "as a text or as a list"),
        ({"counts": [2399], "size": [40, 60]}, "sum to 2400 pixels, got 2399"),
        ({"counts": [2401, -1], "size": [40, 60]}, "sum to 2400"),
        ({"counts": [1200.5, 1199.5], "size": [40, 60]}, "whole numbers"),
        ({"counts": [[1], [1, 2]], "size": [40, 60]}, "no list of numbers"),
        ({"counts": "", "size": [40, 60]}, "compressed run lengths"),
        ({"counts": "ÿ~", "size": [40, 60]}, "compressed run lengths"),
        ({"counts": "PPP", "size": [40, 60]}, "compressed run lengths"),  # ends within a number
        ({"counts": "P" * 9 + "0", "size": [40, 60]}, "below"),
        ({"counts": "04", "size": [40, 60]}, "sum to 2400"),
    ],
)
def test_what_cannot_be_read_is_an_error(segmentation, message):
    with pytest.raises(LabelError, match=message):
        masks.of_segmentation(segmentation, SIZE)


def test_images_without_masks_get_their_boxes_if_others_have_some():
    with_masks = ImageLabels.build("a", SIZE, [[0, 0, 9, 9]], [0], masks=masks.encode(noise(1)))
    without = ImageLabels.build("b", SIZE, [[3, 4, 30, 25]], [0])
    empty = ImageLabels.build("c", SIZE, [], [])
    assert Labels.from_images([without, empty], [Category(1, "a")]).masks is None
    stacked = masks.decode(Labels.from_images([with_masks, without, empty], [Category(1, "a")]).masks, SIZE)
    assert (stacked[0] == noise(1)[0]).all() and stacked[1].sum() == 27 * 21 and len(stacked) == 2


def test_only_bytes_are_codes():
    with pytest.raises(LabelError, match="as bytes, got 'text' in row 1"):
        masks.column([b"0", "text"])
    with pytest.raises(LabelError, match="row 0"):
        masks.column([b""])


def test_a_code_takes_a_thousandth_of_its_pixels():
    (code,) = masks.encode(blob()[None])
    assert sys.getsizeof(code) < 1000 < 480 * 640 / 300


@pytest.mark.parametrize(
    ("segmentation", "box", "area"),
    [
        ([[2, 2, 12, 2, 12, 22, 2, 22]], (2, 2, 12, 22), 200),
        ([2, 2, 12, 2, 2, 22], (2, 2, 12, 22), 100),  # a triangle, without a list around it
        ([[2, 2, 12, 2, 12, 22, 2, 22], [20, 5, 20, 9, 30, 9, 30, 5]], (2, 2, 30, 22), 240),  # either way round
        ({"size": [10, 20], "counts": [12, 3, 7, 3, 175]}, (1, 2, 3, 5), 6),
    ],
)
def test_extent_is_the_box_and_area_of_a_segmentation(segmentation, box, area):
    assert masks.extent(segmentation, (40, 60)) == (box, area)


@pytest.mark.parametrize(
    "segmentation",
    [None, [], {}, [[1, 2, 3, 4]], [["a"]], {"size": [2, 2], "counts": [4]}, {"size": "2", "counts": [4]}, "text"],
)
def test_what_has_no_extent_is_an_error(segmentation):
    with pytest.raises(LabelError):
        masks.extent(segmentation, (40, 60))

"""What all formats have in common: numbers, boxes cut to their image, images that must not count as empty."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image

from simdetr.data.annotations import Category, LabelError
from simdetr.data.images import ImageSource
from simdetr.data.label_formats.reading import Gathering, number, shown, size_hw
from simdetr.data.label_report import LabelReport


def gathering(*categories: Category, strict: bool = False) -> Gathering:
    return Gathering(LabelReport(Path("a"), strict=strict), categories)


def test_declared_classes_keep_their_place_and_others_follow_by_name():
    shapes = gathering(Category(1, "owl"), Category(2, "cat"))
    image = shapes.begin("a.jpg", (10, 10))
    for name in ("zebra", "cat", "ant", "zebra"):
        shapes.add(image, shapes.class_of(name), (0, 0, 5, 5), name)
    labels = shapes.labels()
    assert labels.categories == tuple(Category(i, n) for i, n in enumerate(("owl", "cat", "ant", "zebra"), start=1))
    assert [labels.categories[index].name for index in labels.classes] == ["zebra", "cat", "ant", "zebra"]


def test_boxes_are_cut_and_bad_ones_dropped_with_their_place():
    shapes = gathering(Category(1, "cat"))
    image = shapes.begin("a.jpg", (10, 20))
    for where, box in {
        "inside": (1, 2, 3, 4),
        "over": (-5, 2, 30, 4),
        "rounding": (0, 0, 20.05, 10),
        "outside": (25, 2, 30, 4),
        "upside down": (5, 5, 4, 6),
        "nan": (math.nan, 0, 1, 1),
        "infinite": (0, 0, math.inf, 1),
    }.items():
        shapes.add(image, 0, box, where)
    labels = shapes.labels()
    assert labels.boxes_xyxy.tolist() == [[1, 2, 3, 4], [0, 2, 20, 4], [0, 0, 20, 10]]
    assert shapes.report.examples == {
        "box is no number, dropped": ["nan", "infinite"],
        "box without area in the image, dropped": ["outside", "upside down"],
        "box outside the image, clipped": ["over"],
    }


def test_boxes_go_to_their_images_in_any_order_and_repeated_images_are_merged():
    shapes = gathering(Category(1, "cat"))
    first, second = shapes.begin("a.jpg", (10, 10)), shapes.begin("b.jpg", (10, 10))
    shapes.add(second, 0, (0, 0, 1, 1), "")
    shapes.add(first, 0, (0, 0, 2, 2), "")
    assert shapes.begin("b.jpg", (99, 99)) == second
    shapes.add(second, 0, (0, 0, 3, 3), "")
    labels = shapes.labels()
    assert labels.of("a.jpg").boxes_xyxy[:, 2].tolist() == [2] and labels.of("b.jpg").boxes_xyxy[:, 2].tolist() == [
        1,
        3,
    ]
    assert shapes.report.counts == {"image named twice, its shapes merged": 1}


def test_an_image_that_lost_all_it_showed_is_not_empty_but_unlabelled():
    shapes = gathering(Category(1, "cat"))
    shapes.begin("empty.jpg", (10, 10))
    shapes.add(shapes.begin("outside.jpg", (10, 10)), 0, (20, 20, 30, 30), "one")
    shapes.drop(shapes.begin("line.jpg", (10, 10)), "polyline, left out", "two", fault=False)
    half = shapes.begin("half.jpg", (10, 10))
    shapes.drop(half, "polyline, left out", "three", fault=False)
    shapes.add(half, 0, (2, 2, 3, 3), "four")
    labels = shapes.labels()
    assert labels.image_ids == ("empty.jpg", "half.jpg") and labels.offsets.tolist() == [0, 0, 1]
    assert shapes.report.unlabelled == ["outside.jpg", "line.jpg"]
    assert shapes.report.notes == {"polyline, left out": 2}


def test_scores_are_cut_to_0_and_1():
    shapes = gathering(Category(1, "cat"))
    image = shapes.begin("a.jpg", (10, 10))
    for score in (0.25, 1.5, math.nan):
        shapes.add(image, 0, (0, 0, 5, 5), str(score), score)
    assert shapes.labels().scores.tolist() == [0.25, 1, 0]
    assert shapes.report.counts == {"score outside 0 to 1, clipped": 2}


def test_where_some_have_masks_boxes_stand_in_for_the_others():
    shapes = gathering(Category(1, "cat"))
    image = shapes.begin("a.jpg", (10, 10))
    shapes.add(image, 0, (0, 0, 5, 5), "one", mask=shapes.polygon_mask(image, [0, 0, 5, 0, 5, 5], "one"))
    shapes.add(image, 0, (2, 2, 4, 4), "two", mask=shapes.polygon_mask(image, [0, 0, 5], "two"))
    assert len(shapes.labels().masks) == 2
    assert shapes.report.counts == {"mask cannot be made, the box stands in": 1}
    assert shapes.report.notes == {"no mask, the box stands in": 1}
    huge = shapes.begin("b.jpg", (1_000_000, 1_000_000))
    assert shapes.polygon_mask(huge, [0, 0, 5, 0, 5, 5], "three") is None


def test_a_strict_report_raises():
    shapes = gathering(Category(1, "cat"), strict=True)
    shapes.add(shapes.begin("a.jpg", (10, 10)), 0, (-5, 0, 5, 5), "line 3")
    with pytest.raises(LabelError, match=r"line 3: box outside the image, clipped \(strict\)"):
        shapes.labels()


@pytest.mark.parametrize("value", ["x", None, [], {}, True, "1e999x", 10**400])
def test_what_is_no_number_is_nan(value):
    assert math.isnan(number(value))


def test_sizes_are_whole_and_bounded():
    assert size_hw("40", 60.0) == (40, 60)
    for height, width in ((0, 5), (-1, 5), (1.5, 5), ("x", 5), (None, 5), (math.inf, 5), (10**7, 5)):
        assert size_hw(height, width) is None


def test_quoted_values_are_short_and_on_one_line():
    assert shown("a\nb") == "'a\\nb'" and len(shown("x" * 1000)) == 60 and shown({"a": 1}) == "a dict"


def test_sizes_before_a_turn_by_exif_are_the_images_own(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (60, 40)).save(tmp_path / name, exif=turned)  # shown 40 wide and 60 high
    report = LabelReport(tmp_path / "labels.xml")
    shapes = Gathering(report)
    for name, box in {"a.jpg": (5, 5, 30, 58), "b.jpg": (0, 0, 40, 40)}.items():  # the first proves it
        image = shapes.begin(name, (40, 60))
        mask = shapes.mask_of([[0, 0, 9, 0, 9, 9]], image, name)
        shapes.add(image, shapes.class_of("cat"), box, name, mask=mask)
    labels = shapes.labels(ImageSource(tmp_path, ["a.jpg", "b.jpg"]))
    assert labels.sizes_hw.tolist() == [[60, 40], [60, 40]] and labels.boxes_xyxy[0].tolist() == [5, 5, 30, 58]
    assert labels.masks is None and not report.counts  # they were made at the other size
    assert sum(report.notes.values()) == 2


def test_labels_of_images_of_another_size_are_refused(tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg")
    shapes = Gathering(LabelReport(tmp_path / "labels.xml"))
    shapes.begin("a.jpg", (80, 120))
    with pytest.raises(LabelError, match=r"labels are of an image of another size.*120×80 px, the image has 60×40"):
        shapes.labels(ImageSource(tmp_path, ["a.jpg"]))

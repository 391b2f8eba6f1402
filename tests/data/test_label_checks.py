"""Labels under the ids of the images they are of."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.category_matching import match_categories
from simdetr.data.coco import read_coco
from simdetr.data.images import ImageSource, open_images
from simdetr.data.label_checks import say_match, with_ids_of, without_missing
from simdetr.data.label_report import LabelReport
from simdetr.data.labels import Labels


def labels_of(*image_ids: str) -> Labels:
    images = [ImageLabels.build(name, (10, 10), [[0, 0, 5, 5]], [0]) for name in image_ids]
    return Labels.from_images(images, [Category(1, "cat")])


@pytest.mark.parametrize(
    ("written", "there"),
    [
        ("images\\a.jpg", "images/a.jpg"),
        ("./a.jpg", "a.jpg"),
        (unicodedata.normalize("NFD", "café.jpg"), unicodedata.normalize("NFC", "café.jpg")),
        (unicodedata.normalize("NFC", "café.jpg"), unicodedata.normalize("NFD", "café.jpg")),
        ("photos/sub/a.jpg", "sub/a.jpg"),
        ("C:\\Users\\someone\\photos\\sub\\a.jpg", "sub/a.jpg"),
        ("/elsewhere/photos/a.jpg", "a.jpg"),
        ("a.jpg", "sub/a.jpg"),
    ],
)
def test_another_spelling_is_the_same_image(written, there):
    report = LabelReport(Path("labels.json"))
    source = ImageSource(Path("/data/photos"), [there, "other.jpg"])
    assert with_ids_of(labels_of(written, "other.jpg"), source, report).image_ids == (there, "other.jpg")
    assert report.total == 0 and sum(report.notes.values()) == 1


@pytest.mark.parametrize(
    ("written", "there"),
    [
        (["a.jpg"], ["x/a.jpg", "y/a.jpg"]),  # two images fit
        (["train/a.jpg"], ["a.jpg"]),  # of another folder than photos/
        (["sub\\a.jpg", "sub/a.jpg"], ["sub/a.jpg"]),  # would be one image twice
        (["photos/a.jpg", "./a.jpg"], ["a.jpg"]),
        (["ba.jpg"], ["sub/a.jpg"]),
    ],
)
def test_what_is_not_clear_stays_as_it_is(written, there):
    report = LabelReport(Path("labels.json"))
    source = ImageSource(Path("/data/photos"), there)
    assert with_ids_of(labels_of(*written), source, report).image_ids == tuple(written)
    assert not report.notes


@pytest.fixture
def photos(tmp_path):
    """A folder of four photographs, 60 × 40 pixels as stored, shown 40 × 60 since EXIF turns them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(4):
        Image.new("RGB", (60, 40), (number * 60, 9, 9)).save(folder / f"{number}.jpg", exif=exif)
    return folder


def labelled(coco_file, boxes, size_hw=(40, 60)):
    images = [{"id": n, "file_name": f"{n}.jpg", "height": size_hw[0], "width": size_hw[1]} for n in range(len(boxes))]
    annotations = [
        {"id": n, "image_id": n, "category_id": 1, "bbox": list(bbox)}
        for n, bbox in enumerate(boxes)
        if bbox is not None
    ]
    return coco_file(images, annotations, [{"id": 1, "name": "cat"}])


LOW, WIDE, SMALL = (5, 45, 10, 14), (44, 5, 14, 10), (5, 5, 10, 10)  # of the frame as shown, as stored, of either


@pytest.mark.parametrize(
    ("boxes", "noted", "counted"), [([LOW, SMALL, SMALL, None], 4, 0), ([SMALL, SMALL, SMALL], 0, 3)]
)
def test_boxes_tell_that_the_size_is_that_before_the_turn(photos, coco_file, boxes, noted, counted):
    labels, report = read_coco(labelled(coco_file, boxes), images=open_images(photos))
    assert labels.sizes_hw.tolist() == [[60, 40]] * len(boxes)
    x, y, width, height = boxes[0]
    assert labels.boxes_xyxy[0].tolist() == [x, y, x + width, y + height]  # not clipped
    assert (sum(report.notes.values()), report.total) == (noted, counted)
    assert counted == 0 or "fit either way" in report.lines()[0]


def test_boxes_of_images_that_are_not_turned_are_refused(photos, coco_file):
    with pytest.raises(
        LabelError, match=r"as it is stored, not as it is shown .*: 4 of 4 images, such as 0.jpg: labels say"
    ):
        read_coco(labelled(coco_file, [WIDE, SMALL, SMALL, None]), images=open_images(photos))
    _, report = read_coco(labelled(coco_file, [WIDE, LOW, SMALL, None]), images=open_images(photos))
    assert report.total == 3  # contradictory: one is turned, of two nobody knows


def test_right_sizes_are_not_touched(photos, coco_file):
    labels, report = read_coco(labelled(coco_file, [LOW, SMALL], (60, 40)), images=open_images(photos), strict=True)
    assert labels.sizes_hw.tolist() == [[60, 40]] * 2 and not report.notes


def test_sizes_that_the_file_lacks_are_the_images(photos, coco_file):
    labels, _ = read_coco(labelled(coco_file, [LOW], (0, 0)), images=open_images(photos), strict=True)
    assert labels.sizes_hw.tolist() == [[60, 40]] and labels.boxes_xyxy.tolist() == [[5, 45, 15, 59]]


def test_labels_of_resized_images_are_refused_and_few_are_counted(photos, coco_file):
    with pytest.raises(
        LabelError, match=r"labels are of an image of another size: 2 of 2 images, such as 0.jpg: labels say"
    ):
        read_coco(labelled(coco_file, [LOW, SMALL], (600, 400)), images=open_images(photos))
    Image.new("RGB", (80, 120)).save(photos / "3.jpg")
    _, report = read_coco(labelled(coco_file, [LOW, SMALL, SMALL, SMALL], (60, 40)), images=open_images(photos))
    assert dict(report.counts) == {"labels are of an image of another size": 1}


def test_few_headers_are_read_unless_one_tells_another_size(photos, coco_file, monkeypatch):
    seen = []
    monkeypatch.setattr("simdetr.data.label_checks._SAMPLED_FILES", 1)
    monkeypatch.setattr("simdetr.data.label_checks.upright_size", lambda record: seen.append(record.id) or (60, 40))
    source = open_images(photos)
    read_coco(labelled(coco_file, [SMALL] * 4, (60, 40)), images=source)
    assert len(seen) == 1
    seen.clear()
    read_coco(labelled(coco_file, [SMALL, SMALL, SMALL, LOW]), images=source)
    assert sorted(seen) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]


@pytest.mark.parametrize(("missing", "refused"), [(0, False), (1, False), (2, True), (20, True)])
def test_few_missing_images_are_left_out_and_said(missing, refused, caplog):
    names = [f"{number}.jpg" for number in range(20)]
    source = ImageSource(Path("/data"), ["other.jpg", *names[missing:]])
    if refused:
        with pytest.raises(LabelError, match=rf"(none|{missing}) of its 20 images (is|are not) in /data.*--images"):
            without_missing(labels_of(*names), source, "labels.json")
    else:
        assert without_missing(labels_of(*names), source, "labels.json").image_ids == tuple(names[missing:])
        assert ("labels.json: 1 of its 20 images" in caplog.text) == bool(missing)


def test_boxes_that_a_detector_cannot_find_are_counted(caplog):
    labels = labels_of("a.jpg", "b.jpg")
    say_match(match_categories(labels.categories, [Category(1, "Cat")]), labels, "val.json", "the detector")
    assert "'cat' as 'Cat'" in caplog.text and "missed" not in caplog.text
    say_match(
        match_categories(labels.categories, [Category(1, "dog"), Category(2, "owl")]),
        labels,
        "val.json",
        "the detector",
    )
    assert "that the detector does not have count as missed: 'cat' (2)" in caplog.text

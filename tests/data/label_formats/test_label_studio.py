"""Label Studio's exports: shapes in percents, annotators, skipped tasks, names of uploads."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image

from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.images import open_images
from simdetr.data.label_files import read_with_report
from simdetr.data.label_formats import label_studio
from simdetr.data.labels import Labels


def result(kind="rectangle", labels=("cat",), **value):
    value = {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 0} | value
    return {
        "type": f"{kind}labels",
        "original_width": 200,
        "original_height": 100,
        "value": {**value, f"{kind}labels": list(labels)},
    }


def annotation(*results, **facts):
    return {"id": 1, "was_cancelled": False, "result": list(results), **facts}


def task(*annotations, image="/data/local-files/?d=sub/a%20b.jpg", **data):
    return {
        "id": 5,
        "data": {"image": image, **data},
        "annotations": list(annotations),
        "predictions": [annotation(result())],
    }


@pytest.fixture
def read(tmp_path):
    def call(tasks, **choices):
        (tmp_path / "tasks.json").write_text(json.dumps(tasks))
        return read_with_report(tmp_path / "tasks.json", **choices)

    return call


def test_rectangles_are_percents_of_the_image(read):
    labels, report = read([task(annotation(result()))])
    assert labels.image_ids == ("sub/a b.jpg",) and labels.sizes_hw.tolist() == [[100, 200]]
    assert labels.boxes_xyxy.tolist() == [[20, 20, 80, 60]] and labels.categories == (Category(1, "cat"),)
    assert report.format == "label-studio" and not report.counts and not report.notes


def test_a_rotated_rectangle_turns_in_pixels_about_its_corner(read):
    labels, report = read([task(annotation(result(x=50, y=20, rotation=90)))])
    # 60 × 40 pixels at (100, 20), turned clockwise: 40 to the left, 60 down
    assert labels.boxes_xyxy[0].tolist() == pytest.approx([60, 20, 100, 80], abs=1e-4)
    assert report.notes == {"rotated box, the upright box around it taken": 1}


def test_polygons_and_ellipses(read):
    polygon = result("polygon", points=[[0, 0], [50, 0], [50, 50]])
    ellipse = result("ellipse", x=50, y=50, radiusX=10, radiusY=10, rotation=90)  # 20 × 10 pixels, turned
    labels, report = read([task(annotation(polygon, ellipse))], masks=True)
    assert labels.boxes_xyxy.round(3).tolist() == [[0, 0, 100, 50], [90, 30, 110, 70]]
    assert report.notes.total() == 2 and len(labels.masks) == 2


def test_what_has_no_box_is_counted_and_such_an_image_is_not_empty(read):
    brush = result("brush", format="rle", rle=[1, 2])
    choice = {"type": "choices", "value": {"choices": ["good"]}}
    tasks = [
        task(annotation(brush, result("keypoint"), result(), choice), image="a.jpg"),
        task(annotation(brush), image="b.jpg"),
    ]
    labels, report = read(tasks)
    assert labels.image_ids == ("a.jpg",) and report.unlabelled == ["b.jpg"]
    assert report.notes == {
        "brush, which is not read, left out": 2,
        "keypoint, which is not read, left out": 1,
        "choices, which is no shape, left out": 1,
    }


def test_tasks_that_nobody_finished_are_unlabelled_and_finished_ones_may_be_empty(read):
    tasks = [
        task(image="untouched.jpg"),
        task(annotation(result(), was_cancelled=True), image="skipped.jpg"),
        task(annotation(), image="empty.jpg", width=20, height=10),
        task(annotation(), image="sizeless.jpg"),
    ]
    labels, report = read(tasks)
    assert labels.image_ids == ("empty.jpg",) and len(labels.boxes_xyxy) == 0
    assert report.unlabelled == ["untouched.jpg", "skipped.jpg", "sizeless.jpg"]
    assert report.counts == {"image without size that is not found, left out": 1}


def test_an_empty_image_has_its_size_from_the_image(read, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("L", (20, 10)).save(tmp_path / "photos" / "empty.jpg")
    labels, _ = read([task(annotation(), image="empty.jpg")], images=open_images(tmp_path / "photos"))
    assert labels.sizes_hw.tolist() == [[10, 20]]


def test_of_several_annotators_the_truth_or_the_latest_counts(read):
    old = annotation(result(labels=["old"]), updated_at="2024-01-01T00:00:00Z")
    new = annotation(result(labels=["new"]), updated_at="2024-02-01T00:00:00Z")
    labels, report = read([task(new, old)])
    assert [one.name for one in labels.categories] == ["new"]
    assert report.notes == {"annotation of another annotator, left out": 1}
    labels, _ = read([task(new, old | {"ground_truth": True})])
    assert [one.name for one in labels.categories] == ["old"]


@pytest.mark.parametrize(
    ("written", "known", "image_id"),
    [
        ("/data/upload/3/1a2b3c4d-name.jpg", None, "name.jpg"),
        ("upload/3/1a2b3c4d-name.jpg", ["name.jpg"], "name.jpg"),
        ("/data/upload/3/1a2b3c4d-name.jpg", ["1a2b3c4d-name.jpg"], "1a2b3c4d-name.jpg"),
        ("/data/upload/3/1a2b3c4d-a%20b.jpg", None, "a b.jpg"),
        ("1a2b3c4d-name.jpg", None, "1a2b3c4d-name.jpg"),
        ("/data/local-files/?d=sub/name.jpg", None, "sub/name.jpg"),
        ("https://host/x/name.jpg?token=1", ["x/name.jpg"], "x/name.jpg"),
        ("s3://bucket/x/name.jpg", None, "x/name.jpg"),
    ],
)
def test_names_of_images(read, tmp_path, written, known, image_id):
    images = None
    for name in known or ():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (200, 100)).save(path)
        images = open_images(tmp_path / "photos")
    assert read([task(annotation(result()), image=written)], images=images)[0].image_ids == (image_id,)


def test_uploads_of_one_name_stay_apart(read):
    tasks = [task(annotation(result()), image=f"/data/upload/3/{prefix}-a.jpg") for prefix in ("1a2b3c4d", "5e6f7a8b")]
    assert read(tasks)[0].image_ids == ("1a2b3c4d-a.jpg", "5e6f7a8b-a.jpg")


def test_json_min(read):
    shape = {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 0, "rectanglelabels": ["cat"]}
    shape |= {"original_width": 200, "original_height": 100}
    facts = {"annotator": 1, "annotation_id": 7, "lead_time": 3.5}
    tasks = [
        {"image": "a.jpg", "id": 1, "label": [shape], "updated_at": "2024-02-01", **facts},
        {"image": "a.jpg", "id": 1, "label": [shape, shape], "updated_at": "2024-01-01", **facts},
    ]
    labels, report = read(tasks)
    assert report.format == "label-studio" and labels.boxes_xyxy.tolist() == [[20, 20, 80, 60]]
    assert report.notes == {"annotation of another annotator, left out": 1}


def test_json_min_has_tasks_that_nobody_touched(read):
    """Label Studio writes them with an annotator and an annotation, of which there is none."""
    tasks = [
        {"image": "new.jpg", "width": 9, "height": 9, "id": 1, "annotator": None, "annotation_id": None},
        {"image": "empty.jpg", "width": 9, "height": 9, "id": 2, "annotator": None, "annotation_id": 3},
    ]
    labels, report = read(tasks)
    assert labels.image_ids == ("empty.jpg",) and report.unlabelled == ["new.jpg"]


def test_labels_apart_from_their_shape_and_several_of_one(read):
    shape = {"id": "x", "type": "rectangle", "original_width": 200, "original_height": 100}
    shape["value"] = {"x": 10, "y": 20, "width": 30, "height": 40}
    apart = {"id": "x", "type": "labels", "value": {"labels": ["owl"]}}
    labels, report = read([task(annotation(shape, apart, result(labels=["a", "b"]), result(labels=[])))])
    assert [labels.categories[index].name for index in labels.classes] == ["owl", "a", "b"]
    assert report.counts == {"shape without label, dropped": 1}


@pytest.mark.parametrize(
    "value",
    [{"x": "a"}, {"x": None}, {"x": 1e308}, {"width": -5}, {"x": math.inf}, {"rotation": "x"}],
)
def test_values_that_are_no_shape_are_counted(read, value):
    labels, report = read([task(annotation(result(**value), result()))])
    assert len(labels.boxes_xyxy) == 1 and report.total == 1


def test_files_that_are_no_export(read, tmp_path):
    for content in ("{", '{"a": 1}', "[" * 100_000):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(LabelError, match=r"bad\.json (cannot be read as JSON|is no export of Label Studio)"):
            read_with_report(tmp_path / "bad.json", format="label-studio")
    labels, report = read([task(annotation(result())), 3, {"data": {}, "annotations": []}, {"data": {"image": 5}}])
    assert len(labels) == 1 and report.total == 3


def test_what_is_written_is_finished_and_knows_its_size(tmp_path):
    images = [
        ImageLabels.build("s/a b&c.jpg", (100, 200), [[20, 20, 80, 60]], [0]),
        ImageLabels.build("empty.jpg", (10, 20), [], []),
    ]
    labels = Labels.from_images(images, [Category(4, "cat")])
    label_studio.write(labels, tmp_path / "a.json", None)
    first, second = json.loads((tmp_path / "a.json").read_text())
    assert first["data"]["image"] == "/data/local-files/?d=s/a%20b%26c.jpg" and first["id"] == 1
    value = first["annotations"][0]["result"][0]["value"]
    assert value == {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 0, "rectanglelabels": ["cat"]}
    assert second["annotations"][0]["result"] == [] and second["data"]["width"] == 20

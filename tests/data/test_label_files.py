"""Formats told by content; COCO files as tools lay them out; errors that say what was found."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.label_files import FORMATS, format_for, format_named, format_of, read_labels, write_labels
from simdetr.data.label_formats import yolo
from simdetr.data.labels import Labels

COCO = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 60, "height": 40}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
    "categories": [{"id": 1, "name": "cat"}],
}
LABELS = Labels.from_images([ImageLabels.build("a.jpg", (40, 60), [[1, 2, 4, 6]], [0])], [Category(1, "cat")])


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_every_format_is_told_by_its_content_whatever_its_name(tmp_path, kind):
    place = tmp_path / "labels"
    kind.write(LABELS, place, None)
    assert format_of(place) == kind
    if not kind.is_folder:
        for name in ("labels.json", "labels.parquet", "labels.xml", "labels"):
            shutil.copy(place, tmp_path / "other" if name == "labels" else tmp_path / name)
            assert format_of(tmp_path / name) == kind


@pytest.mark.parametrize("name", ["labels.json", "train/_annotations.coco.json", "annotations/instances_default.json"])
def test_a_folder_with_one_coco_file_stands_for_it(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(COCO))
    (tmp_path / "data").mkdir()
    (tmp_path / "README.roboflow.txt").write_text("Exported\n")
    (tmp_path / "notes.json").write_text("{}")
    assert read_labels(tmp_path).image_ids == ("a.jpg",)


def test_a_folder_with_several_files_names_them(tmp_path):
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(COCO))
    with pytest.raises(
        LabelError, match=r"expected one file of the format coco .*, got 2: train/_annotations.* valid/.*name it"
    ):
        read_labels(tmp_path)


def test_a_folder_of_two_formats_names_both(tmp_path):
    yolo.write(LABELS, tmp_path / "both", None)
    (tmp_path / "both" / "labels.json").write_text(json.dumps(COCO))
    with pytest.raises(
        LabelError, match=r"looks like coco \(labels\.json\) and yolo \(data\.yaml\); say which .*--from NAME"
    ):
        read_labels(tmp_path / "both")
    assert len(read_labels(tmp_path / "both", format="coco")) == 1


def test_a_list_of_results_asks_for_its_truth(tmp_path):
    results = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(LabelError, match=r"a list of COCO results.*give the annotation file that it was made for"):
        read_labels(tmp_path / "results.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            b'{"shapes": []}',
            "is JSON, an object with the keys 'shapes', which looks like none of the formats",
        ),
        ("a.json", b"[]", "is JSON, an empty list, which"),
        ("a.json", b"{", "cannot be read as JSON"),
        ("a.txt", b"hello", r"begins with b'hello', which looks like none"),
        ("a.txt", b"", "is an empty file, which"),
    ],
)
def test_what_is_none_of_them_is_described(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LabelError, match=message):
        read_labels(tmp_path / name)


def test_folders_without_labels_are_described(tmp_path):
    with pytest.raises(LabelError, match="is an empty folder, which looks like none"):
        read_labels(tmp_path)
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(
        LabelError, match=r"is a folder of 3 × \.jpg, which looks like none of the formats simdetr, coco"
    ):
        read_labels(tmp_path)


def test_formats_by_name_and_by_ending(tmp_path):
    assert format_named("voc").name == "voc" and format_for(tmp_path / "a.XML").name == "cvat"
    with pytest.raises(
        LabelError, match="--to: expected one of simdetr, coco, yolo, voc, label-studio, cvat, csv, got 'x'"
    ):
        format_named("x", "--to")
    with pytest.raises(LabelError, match="does not say its format; say it with --to, such as yolo"):
        format_for(tmp_path / "folder")


def test_a_parquet_file_needs_no_ending(tmp_path):
    write_labels(LABELS, tmp_path / "a")
    assert np.array_equal(read_labels(tmp_path / "a").boxes_xyxy, LABELS.boxes_xyxy)

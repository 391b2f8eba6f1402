import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from simdetr.data.annotations import LINEAGE_COLUMNS, Category, ImageLabels, LabelError, Lineage
from simdetr.data.coco import read_coco, write_coco
from simdetr.data.label_files import read_labels, write_labels
from simdetr.data.labels import Labels

BOX = [0, 0, 5, 5]


def lineage_of(labels):
    return {name: getattr(labels.lineage, name).tolist() for name in LINEAGE_COLUMNS}


@pytest.fixture
def labels():
    """Four boxes of stage 2, on the first and the last of three images."""
    rows = [
        ImageLabels.build("a.png", (9, 9), [BOX] * 3, [0, 1, 0], scores=[0.9, 0.5, 0.125]),
        ImageLabels.build("empty.png", (9, 9), [], []),
        ImageLabels.build("b.png", (9, 9), [BOX], [1]),
    ]
    lineage = Lineage(
        born=[0, 2, -1, 1], born_row=[7, 1, 0, 70_000], stride=[32, 0, 0, 16], k=[8, 0, 0, 2], cluster=[0, -1, -1, 1]
    )
    return replace(Labels.from_images(rows, [Category(3, "c"), Category("d", "d")], 2), lineage=lineage)


def test_boxes_that_nothing_is_known_of(labels):
    own = Lineage.first_seen(2, labels.offsets)
    assert {name: getattr(own, name).dtype for name in LINEAGE_COLUMNS} == LINEAGE_COLUMNS
    assert own.born.tolist() == [2] * 4 and own.born_row.tolist() == [0, 1, 2, 0]
    assert own.stride.tolist() == own.k.tolist() == [0] * 4 and own.cluster.tolist() == [-1] * 4
    assert len(Lineage.first_seen(0, np.array([0, 0]))) == 0


def test_lineage_follows_its_boxes(labels):
    assert labels.image(0).lineage.born.tolist() == [0, 2, -1]
    assert labels.of("b.png").lineage.born_row.tolist() == [70_000] and len(labels.of("empty.png").lineage) == 0
    chosen = labels.select(["b.png", "empty.png", "a.png"])
    assert lineage_of(chosen) == {
        "born": [1, 0, 2, -1], "born_row": [70_000, 7, 1, 0], "stride": [16, 32, 0, 0], "k": [2, 8, 0, 0],
        "cluster": [1, 0, -1, -1],
    }  # fmt: skip
    assert lineage_of(labels.class_agnostic()) == lineage_of(labels)
    assert lineage_of(labels.with_categories(labels.categories[::-1])) == lineage_of(labels)
    stacked = Labels.from_images([labels.image(row) for row in range(3)], labels.categories, 2)
    assert lineage_of(stacked) == lineage_of(labels)


def test_images_without_lineage_among_others_count_as_first_seen(labels):
    rows = [ImageLabels.build("new.png", (9, 9), [BOX] * 2, [0, 0]), labels.image(2)]
    stacked = Labels.from_images(rows, labels.categories, stage=3)
    assert lineage_of(stacked) == {
        "born": [3, 3, 1], "born_row": [0, 1, 70_000], "stride": [0, 0, 16], "k": [0, 0, 2], "cluster": [-1, -1, 1],
    }  # fmt: skip
    assert Labels.from_images(rows[:1], labels.categories).lineage is None


@pytest.mark.parametrize("images", [["a.png", "empty.png", "b.png"], ["empty.png"], []])
@pytest.mark.parametrize("name", ["labels.parquet", "labels.json"])
def test_files_keep_it(labels, tmp_path, images, name):
    written = labels.select(images)
    (write_labels if name.endswith("parquet") else write_coco)(written, tmp_path / name)
    read = read_labels(tmp_path / name, strict=True)
    if written.lineage is not None and len(written.lineage) == 0 and name.endswith("json"):
        assert read.lineage is None  # COCO files say it box by box
    else:
        assert lineage_of(read) == lineage_of(written)
        assert all(getattr(read.lineage, column).dtype == dtype for column, dtype in LINEAGE_COLUMNS.items())
    assert read.image_ids == tuple(images) and read.stage == 2


def test_files_of_labels_without_it_are_as_they_were(labels, tmp_path):
    write_labels(replace(labels, lineage=None), tmp_path / "old.parquet")
    assert pq.read_schema(tmp_path / "old.parquet").names == [
        "image_id", "height", "width", "boxes_xyxy", "classes", "scores", "areas", "crowd",
    ]  # fmt: skip
    assert read_labels(tmp_path / "old.parquet").lineage is None
    write_coco(replace(labels, lineage=None), tmp_path / "old.json")
    keys = {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "score"}
    assert all(row.keys() == keys for row in json.loads((tmp_path / "old.json").read_text())["annotations"])
    assert read_labels(tmp_path / "old.json").lineage is None


def test_coco_annotations_say_it_in_fields_of_their_own(labels, tmp_path):
    write_coco(labels, tmp_path / "labels.json")
    first = json.loads((tmp_path / "labels.json").read_text())["annotations"][0]
    assert first == {
        "id": 1, "image_id": 1, "category_id": 3, "bbox": BOX, "area": 25, "iscrowd": 0, "score": 0.9,
        "stage": 2, "born": 0, "born_row": 7, "stride": 32, "k": 8, "cluster": 0,
    }  # fmt: skip


@pytest.mark.parametrize("value", ["x", None, 1.5, 40_000, -40_000])
def test_coco_lineage_that_cannot_be_is_left_out(labels, tmp_path, value):
    path = tmp_path / "labels.json"
    write_coco(labels, path)
    content = json.loads(path.read_text())
    content["annotations"][0]["stride"] = value
    del content["annotations"][2]["born"]  # half of a lineage is none
    path.write_text(json.dumps(content))
    read, problems = read_coco(path)
    assert dict(problems.counts) == {"lineage is no small whole number, left out": 1}
    assert lineage_of(read) == {
        "born": [2, 2, 2, 1], "born_row": [0, 1, 2, 70_000], "stride": [0, 0, 0, 16], "k": [0, 0, 0, 2],
        "cluster": [-1, -1, -1, 1],
    }  # fmt: skip
    with pytest.raises(LabelError, match=r"annotation 1 with .* 8, 0\]: lineage is no small whole number"):
        read_coco(path, strict=True)


def test_columns_of_other_lengths_are_refused(labels):
    with pytest.raises(ValueError, match=r"cluster: expected shape \(4,\) as born has, got \(3,\)"):
        replace(labels.lineage, cluster=[0, 0, 0])
    with pytest.raises(LabelError, match="lineage: expected that of 4 boxes, got 2; select both alike"):
        replace(labels, lineage=labels.lineage[:2])

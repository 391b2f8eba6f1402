"""What a conversion refuses, says and leaves as it was."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from simdetr.data import masks as mask_codes
from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.images import ImageSource, open_images
from simdetr.data.label_files import format_named, read_with_report, write_labels
from simdetr.data.label_formats.conversion import check_result, convert, fitting
from simdetr.data.labels import Labels

CATEGORIES = [Category(0, "cat"), Category(5, "owl"), Category(6, "unused")]


@pytest.fixture
def rich(tmp_path):
    """A Parquet file of all that other formats cannot hold."""
    masks = mask_codes.of_boxes(np.array([[1, 1, 5, 5], [2, 2, 8, 8], [0, 0, 4, 4]], np.float32), (20, 30))
    images = [
        ImageLabels.build(
            "a.jpg",
            (20, 30),
            [[1, 1, 5, 5], [2, 2, 8, 8]],
            [0, 1],
            scores=[0.5, 1],
            crowd=[False, True],
            areas=[3, 36],
            masks=masks[:2],
            points=[[3, 3], [np.nan, np.nan]],
        ),
        ImageLabels.build(
            "crowd.jpg", (20, 30), [[0, 0, 4, 4]], [1], crowd=[True], masks=masks[2:], points=[[np.nan, np.nan]]
        ),
        ImageLabels.build("empty.jpg", (20, 30), [], []),
    ]
    write_labels(Labels.from_images(images, CATEGORIES, stage=2), tmp_path / "rich.parquet")
    return tmp_path / "rich.parquet"


def test_all_that_is_lost_is_counted(rich, tmp_path):
    done = convert(rich, tmp_path / "voc", target_format="voc")
    assert {kind: count for kind, count in done.changes.items() if count} == {
        "crowd, which voc does not know: left out": 2,
        "image with none but such boxes: left out, it would say that it is empty": 1,
        "reference point, which voc does not know": 1,
        "mask, which voc is not written with: its box kept": 1,
        "score, which voc does not hold": 1,
        "area other than the box's": 1,
        "category id, which voc does not hold": 3,
        "class without boxes, which voc does not hold": 2,
    }
    lines = done.lines()
    assert lines[0].endswith(
        "(simdetr): 3 images, 1 boxes with masks, 2 crowds, 3 classes, 1 images without objects, 0 unlabelled"
    )
    assert lines[1].endswith(
        "(voc): 2 images, 1 boxes, 0 crowds, 3 classes, 1 images without objects; read back and equal"
    )
    assert "  changed or lost: 2 × crowd, which voc does not know: left out" in lines


def test_simdetr_and_coco_hold_everything(rich, tmp_path):
    done = convert(rich, tmp_path / "a.json")
    assert not +done.changes
    back = read_with_report(tmp_path / "a.json", masks=True)[0]
    assert back.stage == 2 and back.crowd.tolist() == [False, True, True] and back.categories == tuple(CATEGORIES)
    assert back.masks.tolist() == done.source.masks.tolist() and np.nanmax(back.points) == 3


def test_scores_stay_in_csv(rich, tmp_path):
    convert(rich, tmp_path / "a.csv")
    assert read_with_report(tmp_path / "a.csv")[0].scores.tolist() == [0.5]


def test_what_a_coco_file_has_beside_boxes_is_counted(tmp_path):
    content = {
        "info": {"year": 2024},
        "licenses": [{"id": 1}],
        "images": [{"id": 7, "file_name": "a.jpg", "width": 30, "height": 20, "flickr_url": "x"}],
        "annotations": [
            {
                "id": 3,
                "image_id": 7,
                "category_id": 1,
                "bbox": [1, 1, 4, 4],
                "segmentation": [[1, 1, 5, 1, 5, 5]],
                "attributes": {"a": 1},
            }
        ],
        "categories": [{"id": 1, "name": "cat", "supercategory": "animal"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    done = convert(tmp_path / "a.json", tmp_path / "b.json")
    said = {kind: count for kind, count in done.changes.items() if count}
    assert said.keys() >= {
        "'info' of the COCO file",
        "'licenses' of the COCO file",
        "field 'flickr_url' of images",
        "field 'attributes' of annotations",
        "field 'supercategory' of categories",
        "polygons, written as run lengths",
    }
    done = convert(tmp_path / "a.json", tmp_path / "b.csv")
    assert done.changes["segmentation, which is not written to csv (boxes only)"] == 1
    done = convert(tmp_path / "a.json", tmp_path / "y", target_format="yolo")
    assert done.changes["segmentation, which is not written to yolo (--masks writes it in place of the box)"] == 1


def test_boxes_of_predictions_are_cut_to_the_image():
    boxes = [[-5, 2, 8, 9], [40, 2, 50, 9], [1, 1, 5, 5]]
    labels = Labels.from_images([ImageLabels.build("a.jpg", (20, 30), boxes, [0, 0, 0])], CATEGORIES[:1])
    fit, changes = fitting(labels, format_named("coco"))
    assert fit.boxes_xyxy.tolist() == [[0, 2, 8, 9], [1, 1, 5, 5]]
    assert changes["box outside its image, cut to it"] == 2 and changes["box without width or height: left out"] == 1
    assert fitting(labels, format_named("simdetr"))[0].boxes_xyxy.tolist() == boxes


def test_nothing_is_overwritten_unasked(rich, tmp_path):
    out = tmp_path / "out"
    (out / "images").mkdir(parents=True)
    (out / "images" / "mine.jpg").write_bytes(b"mine")
    (out / "labels").mkdir()
    (out / "labels" / "old.txt").write_text("old")
    with pytest.raises(LabelError, match="exists; choose another place, or replace it with --overwrite"):
        convert(rich, out, target_format="yolo")
    convert(rich, out, target_format="yolo", overwrite=True)
    assert {path.name for path in out.rglob("*")} == {"images", "mine.jpg", "labels", "a.txt", "empty.txt", "data.yaml"}
    (tmp_path / "a.json").write_text("mine")
    with pytest.raises(LabelError, match="exists"):
        convert(rich, tmp_path / "a.json")
    convert(rich, tmp_path / "a.json", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "out", "rich.parquet"]  # and nothing hidden


@pytest.mark.parametrize(
    ("out", "choices", "message"),
    [
        ("rich.parquet", {"overwrite": True}, "is the file that is read"),
        ("a.csv", {"masks": True}, "masks: csv is written with boxes alone"),
        ("a.csv", {"link_images": True}, "only yolo needs its images beside the labels, not csv"),
        ("y", {"target_format": "yolo", "link_images": True}, r"expected the images too \(--images DIR\)"),
        ("y", {}, "does not say its format; say it with --to"),
        ("y.json", {"target_format": "nonsense"}, "--to: expected one of simdetr, coco, yolo"),
        ("y.json", {"source_format": "nonsense"}, "--from: expected one of simdetr, coco, yolo"),
        ("y.xml", {"target_format": "VOC"}, "voc is a folder, and y.xml is the name of a file; leave its ending out"),
        (".", {"target_format": "coco"}, "coco is one file, and .* is a folder"),
        ("rich.parquet", {"target_format": "simdetr", "overwrite": True}, "is the file that is read"),
    ],
)
def test_wishes_that_cannot_be_granted_are_refused_before_the_work(rich, tmp_path, out, choices, message):
    with pytest.raises(LabelError, match=message):
        convert(rich, tmp_path / out, **choices)
    assert [path.name for path in tmp_path.iterdir()] == ["rich.parquet"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (("s/a.jpg", "s/a.png"), "1 share their yolo file with another, such as 's/a.jpg' and 's/a.png'"),
        (("../a.jpg",), "expected a path relative to the folder of images"),
        (("/home/a.jpg",), "expected a path relative"),
        (("s3://bucket/a.jpg",), "expected a path relative"),
        (("..\\a.jpg",), "expected a path relative"),
    ],
)
def test_ids_that_are_no_names_of_files_beside_the_labels(tmp_path, ids, message):
    labels = Labels.from_images([ImageLabels.build(name, (20, 30), [], []) for name in ids], CATEGORIES)
    write_labels(labels, tmp_path / "a.parquet")
    with pytest.raises(LabelError, match=message):
        convert(tmp_path / "a.parquet", tmp_path / "y", target_format="yolo")
    assert not (tmp_path / "y").exists()


def test_classes_without_name(tmp_path):
    labels = Labels.from_images([ImageLabels.build("a.jpg", (20, 30), [[1, 1, 2, 2]], [0])], [Category(1, "")])
    write_labels(labels, tmp_path / "a.parquet")
    for name in ("voc", "csv", "cvat", "label-studio"):
        with pytest.raises(LabelError, match=f"categories: {name} knows classes by name, and one has none"):
            convert(tmp_path / "a.parquet", tmp_path / "out", target_format=name)


def test_a_result_that_reads_back_otherwise_is_not_kept(rich, tmp_path, monkeypatch):
    kind = format_named("csv")
    moved = replace(
        kind,
        write=lambda labels, out, images: kind.write(replace(labels, boxes_xyxy=labels.boxes_xyxy + 1), out, images),
    )
    monkeypatch.setattr("simdetr.data.label_formats.conversion.format_for", lambda out: moved)
    with pytest.raises(LabelError, match=r"reads back otherwise: the box of 1 boxes differs.*nothing was kept"):
        convert(rich, tmp_path / "a.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["rich.parquet"]


def test_every_difference_is_found():
    image = ImageLabels.build("a.jpg", (20, 30), [[1, 1, 5, 5]], [0])
    labels = Labels.from_images([image], CATEGORIES)
    check_result(labels, labels)
    others = {
        "images are not in both": replace(labels, image_ids=("b.jpg",)),
        "other sizes": replace(labels, sizes_hw=labels.sizes_hw + 1),
        "has 1 and 0 boxes": labels.rows(np.zeros(0, int)),
        "the box of 1": replace(labels, boxes_xyxy=labels.boxes_xyxy + 0.002),
        "the class of 1": replace(labels, classes=[1]),
        "the crowd of 1": replace(labels, crowd=[True]),
        "the score of 1": replace(labels, scores=[0.5]),
    }
    for message, other in others.items():
        with pytest.raises(LabelError, match=message):
            check_result(labels, other)


def test_images_on_other_storages_are_not_linked(rich, tmp_path):
    elsewhere = ImageSource("memory://photos", ["a.jpg"])
    with pytest.raises(LabelError, match="expected images that are files on this machine"):
        convert(rich, tmp_path / "y", target_format="yolo", images=elsewhere, link_images=True)


def test_links(rich, tmp_path, image_folder):
    photos = image_folder(1)
    (photos / "000.png").rename(photos / "a.jpg")
    done = convert(rich, tmp_path / "y", target_format="yolo", images=open_images(photos), link_images=True)
    assert done.advice == [f"1 links to images in {tmp_path / 'y' / 'images'}"]
    done = convert(rich, tmp_path / "z", target_format="yolo")
    assert "or link them (--link_images)" in done.advice[0]

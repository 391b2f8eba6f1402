"""YOLO as ultralytics, Roboflow, FiftyOne and CVAT lay it out."""

from __future__ import annotations

import pytest
import yaml
from PIL import Image

from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.images import open_images
from simdetr.data.label_files import read_with_report
from simdetr.data.label_formats import yolo
from simdetr.data.label_formats.known_images import KnownImages
from simdetr.data.labels import Labels

BOX = "0 0.5 0.5 0.5 0.5\n"  # of an image of 100 × 50 pixels: 25, 12.5, 75, 37.5


@pytest.fixture
def lay_out(tmp_path):
    """Makes files by their paths: images of 100 × 50 pixels from None, texts from texts."""

    def make(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                Image.new("L", (100, 50)).save(path)
            else:
                path.write_text(content, encoding="utf-8")
        return tmp_path

    return make


def read(path, **choices):
    return read_with_report(path, format="yolo", **choices)


ULTRALYTICS = {
    "data.yaml": "path: /somewhere/else\ntrain: images/train\nval: images/val\nnames: {0: cat, 1: owl}\n",
    "images/train/a.jpg": None,
    "images/train/empty.jpg": None,
    "images/train/unseen.jpg": None,
    "images/val/sub/b.jpg": None,
    "labels/train/a.txt": BOX + "1 0.1 0.2 0.9 0.2 0.9 0.8\n",
    "labels/train/empty.txt": "",
    "labels/val/sub/b.txt": BOX,
}
ROBOFLOW = {
    "data.yaml": "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cat', 'owl']\n",
    "README.roboflow.txt": "Exported\n",
    "train/images/a.jpg": None,
    "train/images/empty.jpg": None,
    "train/labels/a.txt": BOX,
    "train/labels/empty.txt": "",
    "valid/images/b.jpg": None,
    "valid/labels/b.txt": BOX,
}
CVAT = {
    "obj.data": "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\n",
    "obj.names": "cat\nowl\n",
    "train.txt": "data/obj_train_data/a.jpg\n",
    "obj_train_data/a.jpg": None,
    "obj_train_data/a.txt": BOX,
}


def test_all_splits_of_a_yaml_are_read_together(lay_out):
    root = lay_out(ULTRALYTICS)
    for path in (root, root / "data.yaml"):
        labels, report = read(path)
        assert labels.image_ids == ("train/a.jpg", "train/empty.jpg", "val/sub/b.jpg")
        assert report.unlabelled == ["train/unseen.jpg"] and not report.counts
        assert labels.categories == (Category(1, "cat"), Category(2, "owl"))
        assert labels.of("train/a.jpg").boxes_xyxy.tolist() == [[25, 12.5, 75, 37.5], [10, 10, 90, 40]]
        assert labels.of("train/a.jpg").classes.tolist() == [0, 1] and len(labels.of("train/empty.jpg")) == 0
        assert report.notes["polygon, the box around it taken"] == 1


@pytest.mark.parametrize("split", ["images/val", "labels/val"])
def test_the_folder_of_a_split_is_that_split_alone(lay_out, split):
    assert read(lay_out(ULTRALYTICS) / split)[0].image_ids == ("sub/b.jpg",)


def test_roboflows_folders(lay_out):
    root = lay_out(ROBOFLOW)
    assert read(root)[0].image_ids == ("train/images/a.jpg", "train/images/empty.jpg", "valid/images/b.jpg")
    assert read(root / "valid")[0].image_ids == ("b.jpg",)
    images = open_images(root / "train" / "images")
    labels, _ = read(root, images=images)
    assert set(labels.image_ids) >= {"a.jpg", "empty.jpg"} and labels.of("a.jpg").boxes_xyxy[0, 0] == 25


@pytest.mark.parametrize("above", ["labels/set", "images/set"])
def test_folders_above_the_set_may_be_named_anything(lay_out, above):
    paired = {"images/a.jpg": None, "labels/a.txt": BOX, "data.yaml": "names: [cat]\ntrain: images\n"}
    flat = {"train/b.jpg": None, "train/b.txt": BOX, "data.yaml": "names: [cat]\ntrain: train\n"}
    root = lay_out({f"{above}/one/{name}": text for name, text in paired.items()})
    lay_out({f"{above}/two/{name}": text for name, text in flat.items()})
    for path in ("one", "one/data.yaml", "one/images", "one/labels"):
        assert read(root / above / path)[0].image_ids == ("a.jpg",)
    for path in ("two", "two/data.yaml", "two/train"):
        labels, report = read(root / above / path)
        assert len(labels.boxes_xyxy) == 1 and not report.unlabelled


def test_text_files_beside_images_and_names_of_darknet(lay_out):
    labels, report = read(lay_out(CVAT))
    assert labels.image_ids == ("obj_train_data/a.jpg",) and [one.name for one in labels.categories] == ["cat", "owl"]
    assert not report.counts and not report.unlabelled


def test_labels_alone_with_images_elsewhere(lay_out):
    root = lay_out(
        {
            "photos/s/a.jpg": None,
            "photos/b.jpg": None,
            "set/labels/s/a.txt": BOX,
            "set/labels/gone.txt": BOX,
            "set/classes.txt": "cat\n",
        }
    )
    labels, report = read(root / "set", images=open_images(root / "photos"))
    assert labels.image_ids == ("s/a.jpg",) and report.unlabelled == ["gone", "b.jpg"]
    assert report.counts == {"label file without image, its boxes dropped": 1}
    with pytest.raises(LabelError, match=r"no image of the label files in .*set/labels was found, .*--images"):
        read(root / "set")


def test_without_names_it_says_what_to_do(lay_out):
    root = lay_out({"images/a.jpg": None, "labels/a.txt": BOX})
    with pytest.raises(
        LabelError, match=r"class names: .* no yaml with names; put a classes\.txt with one name per line"
    ):
        read(root)


def test_an_image_of_another_split_is_not_taken_for_one_of_its_name(lay_out):
    root = lay_out({"photos/train/a.jpg": None, "labels/val/a.txt": BOX, "classes.txt": "cat\n"})
    with pytest.raises(LabelError, match="no image of the label files"):
        read(root / "labels", images=open_images(root / "photos" / "train"))


def test_images_that_share_a_label_file_are_left_out(lay_out):
    root = lay_out({"images/a.jpg": None, "images/a.png": None, "labels/a.txt": BOX, "classes.txt": "cat\n"})
    labels, report = read(root)
    assert labels.image_ids == ("a.jpg",) and report.unlabelled == ["a.png"]


def test_scores_key_points_and_lines_that_cannot_be_read(lay_out):
    lines = [
        "0 0.5 0.5 0.5 0.5 0.25",
        "1.0 0.5 0.5 0.5 0.5",
        "0 0.1 0.2 0.9 0.2 0.9 0.8 0.5",  # a polygon with a score
        "7 0.5 0.5 0.5 0.5",
        "-1 0.5 0.5 0.5 0.5",
        "0 0.5 0.5",
        "cat 0.5 0.5 0.5 0.5",
        "0 320 240 100 50",
        "0 nan 0.5 0.5 0.5",
        "0 0.5 0.5 0 0.5",
        f"0 {'9' * 400} 0.5 0.5 0.5",
    ]
    root = lay_out({"images/a.jpg": None, "labels/a.txt": "\n".join(lines), "classes.txt": "cat\nowl\n"})
    labels, report = read(root)
    assert labels.scores.tolist() == [0.25, 1, 0.5] and labels.classes.tolist() == [0, 1, 0]
    assert report.counts == {
        "class number without name, dropped": 2,
        "line with neither a box nor a polygon, dropped": 1,
        "line that is not of numbers, dropped": 1,
        "coordinates that are no shares of the image, dropped": 2,
        "box is no number, dropped": 1,
        "box without area in the image, dropped": 1,
    }
    assert report.examples["class number without name, dropped"][0] == "a.txt: line 4 with '7'"


def test_key_points_of_a_pose_set_are_no_polygons(lay_out):
    line = "0 0.5 0.5 0.5 0.5 " + " ".join(["0.1 0.2 2"] * 3)
    root = lay_out(
        {"images/a.jpg": None, "labels/a.txt": line, "data.yaml": "names: [cat]\ntrain: images\nkpt_shape: [3, 3]\n"}
    )
    labels, report = read(root)
    assert labels.boxes_xyxy.tolist() == [[25, 12.5, 75, 37.5]] and report.notes["key points, the box taken"] == 1


def test_an_image_whose_lines_all_fail_is_unlabelled(lay_out):
    root = lay_out({"images/a.jpg": None, "labels/a.txt": "9 0.5 0.5 0.5 0.5", "classes.txt": "cat\n"})
    labels, report = read(root)
    assert len(labels) == 0 and report.unlabelled == ["a.jpg"]


def test_the_upright_size_counts(lay_out):
    root = lay_out({"labels/a.txt": BOX, "classes.txt": "cat\n"})
    turned = Image.Exif()
    turned[0x0112] = 8
    (root / "images").mkdir()
    Image.new("RGB", (100, 50)).save(root / "images" / "a.jpg", exif=turned)
    assert read(root)[0].boxes_xyxy.tolist() == [[12.5, 25, 37.5, 75]]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("{a: b}", "expected class numbers from 0, got 'a'"),
        ("{-1: b}", "expected class numbers from 0, got -1"),
        ("[[a]]", "expected a name for class 0, got a list"),
        ("3", "expected 'names', a list or a mapping"),
        ("[a", "expected 'names', a list or a mapping"),
    ],
)
def test_names_that_are_none(lay_out, names, message):
    root = lay_out({"data.yaml": f"names: {names}\n"})
    with pytest.raises(LabelError, match=message):
        read(root / "data.yaml")


def test_what_is_written(tmp_path):
    labels = Labels.from_images(
        [
            ImageLabels.build("s/a b.jpg", (50, 100), [[25, 12.5, 75, 37.5]], [1]),
            ImageLabels.build("empty.jpg", (50, 100), [], []),
        ],
        [Category(3, "cat"), Category(9, "große Eule")],
    )
    yolo.write(labels, tmp_path / "y", None)
    assert (tmp_path / "y/labels/s/a b.txt").read_text() == "1 0.500000000 0.500000000 0.500000000 0.500000000\n"
    assert (tmp_path / "y/labels/empty.txt").read_text() == ""
    facts = yaml.safe_load((tmp_path / "y/data.yaml").read_text(encoding="utf-8"))
    assert facts["names"] == {0: "cat", 1: "große Eule"} and facts["train"] == "images"
    back, _ = read(tmp_path / "y", images=KnownImages.of_labels(labels))
    assert back.boxes_xyxy.tolist() == labels.boxes_xyxy.tolist()


def test_links_lead_to_the_images(lay_out):
    root = lay_out({"photos/s/a.jpg": None})
    labels = Labels.from_images(
        [ImageLabels.build("s/a.jpg", (50, 100), [[25, 12.5, 75, 37.5]], [0])], [Category(1, "cat")]
    )
    yolo.write(labels, root / "y", None)
    source = open_images(root / "photos")
    assert yolo.link_images(labels, root / "y", source) == 1 == yolo.link_images(labels, root / "y", source)
    assert (root / "y/images/s/a.jpg").samefile(root / "photos/s/a.jpg")
    assert read(root / "y")[0].boxes_xyxy.tolist() == labels.boxes_xyxy.tolist()


def test_links_never_take_the_place_of_files(lay_out):
    root = lay_out({"photos/a.jpg": None, "z/images/a.jpg": "another"})
    labels = Labels.from_images([ImageLabels.build("a.jpg", (50, 100), [], [])], [Category(1, "cat")])
    (root / "y").mkdir()
    (root / "y" / "images").symlink_to(root / "photos")
    source = open_images(root / "photos")
    assert yolo.link_images(labels, root / "y", source) == 1 and not (root / "photos" / "a.jpg").is_symlink()
    assert yolo.link_images(labels, root / "z", source) == 0
    assert (root / "z/images/a.jpg").read_text() == "another" and (root / "photos" / "a.jpg").stat().st_size


def test_an_empty_file_of_label_studio_may_be_a_task_that_nobody_touched(lay_out):
    notes = '{"info": {"contributor": "Label Studio"}}'
    files = {"classes.txt": "cat\n", "images/a.jpg": None, "images/b.jpg": None, "notes.json": notes}
    root = lay_out(files | {"labels/a.txt": BOX, "labels/b.txt": "\n"})
    labels, report = read(root)
    assert labels.image_ids == ("a.jpg",) and report.unlabelled == ["b.jpg"] and not report.counts
    (root / "notes.json").write_text("{}")
    assert read(root)[0].image_ids == ("a.jpg", "b.jpg")

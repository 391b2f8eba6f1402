"""Pascal VOC: three ways to count corners, and files as tools write them."""

from __future__ import annotations

import pytest
from PIL import Image

from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.images import open_images
from simdetr.data.label_files import read_with_report
from simdetr.data.label_formats import pascal_voc
from simdetr.data.labels import Labels

SIZE = "<size><width>100</width><height>50</height><depth>3</depth></size>"


def thing(*corners, name="cat", more=""):
    sides = "".join(f"<{s}>{v}</{s}>" for s, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{sides}</bndbox></object>"


@pytest.fixture
def voc(tmp_path):
    """Writes XML files by their names, from what stands in them."""

    def make(files, folder="Annotations"):
        for name, content in files.items():
            path = tmp_path / folder / f"{name}.xml"
            path.parent.mkdir(parents=True, exist_ok=True)
            filename = f"<filename>{name.rpartition('/')[2]}.jpg</filename>"
            path.write_text(f"<annotation>{filename}{content}</annotation>", encoding="utf-8")
        return tmp_path

    return make


def read(path, **choices):
    return read_with_report(path, format="voc", **choices)


@pytest.mark.parametrize(
    ("corners", "box", "said"),
    [
        ((11, 21, 30, 40), [10, 20, 30, 40], "taken as VOC's"),  # nothing shows it
        ((1, 1, 100, 50), [0, 0, 100, 50], "taken as VOC's"),
        ((0, 21, 30, 40), [0, 21, 30, 40], "counted from 0"),
        ((11.5, 21, 30, 40), [11.5, 21, 30, 40], "counted from 0"),
        (("11.0", "21.0", "30.0", "40.0"), [11, 21, 30, 40], "counted from 0"),
        ((11, 21, 101, 40), [10, 20, 100, 39], "all one more"),
    ],
)
def test_corners_as_the_files_show_them(voc, corners, box, said):
    labels, report = read(voc({"a": SIZE + thing(*corners)}))
    assert labels.boxes_xyxy.tolist() == [box]
    assert [said in kind for kind in report.notes] == [True] and not report.counts


def test_one_file_speaks_for_its_folder_and_the_user_for_all(voc):
    root = voc({"a": SIZE + thing(0, 0, 10, 10), "b": SIZE + thing(11, 21, 30, 40)})
    assert read(root)[0].of("b.jpg").boxes_xyxy.tolist() == [[11, 21, 30, 40]]
    assert read(root, corners="voc")[0].of("b.jpg").boxes_xyxy.tolist() == [[10, 20, 30, 40]]
    assert read(root, corners="shifted")[0].of("b.jpg").boxes_xyxy.tolist() == [[10, 20, 29, 39]]


def test_a_few_fractions_are_in_vocs_own_files_too(voc):
    root = voc({"a": SIZE + thing(11.5, 21, 30, 40), "b": SIZE + thing(11, 21, 30, 40) + thing(1, 1, 9, 9)})
    assert read(root)[0].of("a.jpg").boxes_xyxy.tolist() == [[10.5, 20, 30, 40]]


def test_what_is_written_is_marked_and_read_as_it_is(tmp_path):
    boxes = [[11, 21, 30, 40], [0, 0, 100, 50]]
    labels = Labels.from_images([ImageLabels.build("s/a.jpg", (50, 100), boxes, [0, 0])], [Category(1, "cat")])
    pascal_voc.write(labels, tmp_path / "v", None)
    text = (tmp_path / "v/Annotations/s/a.xml").read_text()
    assert "<xmin>11</xmin>" in text and "<folder>s</folder>" in text
    back, report = read(tmp_path / "v")
    assert back.image_ids == ("s/a.jpg",) and back.boxes_xyxy.tolist() == boxes and not report.notes


def test_folders_files_and_the_images_they_are_of(voc):
    root = voc({"a": SIZE + thing(1, 1, 9, 9), "sub/b": SIZE, "sub/c": SIZE + thing(1, 1, 9, 9, name="owl")})
    (root / "ImageSets").mkdir()
    labels, _ = read(root)
    assert labels.image_ids == ("a.jpg", "sub/b.jpg", "sub/c.jpg") and labels.offsets.tolist() == [0, 1, 1, 2]
    assert [one.name for one in labels.categories] == ["cat", "owl"]
    assert read(root / "Annotations" / "a.xml")[0].image_ids == ("a.jpg",)


def test_a_size_that_is_missing_comes_from_the_image(voc):
    zero = SIZE.replace("100", "0")
    root = voc({"a": thing(1, 1, 9, 9), "b": zero + thing(1, 1, 9, 9), "gone": thing(1, 1, 9, 9)})
    (root / "JPEGImages").mkdir()
    for name in "ab":
        Image.new("L", (100, 50)).save(root / "JPEGImages" / f"{name}.jpg")
    for images in (None, open_images(root / "JPEGImages")):
        labels, report = read(root, images=images)
        assert labels.image_ids == ("a.jpg", "b.jpg") and labels.sizes_hw.tolist() == [[50, 100]] * 2
        assert report.unlabelled == ["gone.jpg"]
        assert report.counts == {"image without size that is not found, its boxes dropped": 1}


def test_images_without_xml_are_unlabelled(voc):
    root = voc({"a": SIZE + thing(1, 1, 9, 9)})
    (root / "JPEGImages").mkdir()
    for name in ("a", "unseen"):
        Image.new("L", (100, 50)).save(root / "JPEGImages" / f"{name}.jpg")
    for images in (None, open_images(root / "JPEGImages")):
        labels, report = read(root, images=images)
        assert labels.image_ids == ("a.jpg",) and report.unlabelled == ["unseen.jpg"]


def test_objects_that_cannot_be_used_are_counted(voc):
    root = voc(
        {
            "a": SIZE
            + thing(1, 1, 9, 9)
            + thing("x", 1, 9, 9)
            + thing(1, 1, 9, 9, name=" ")
            + "<object><name>c</name></object>",
            "b": SIZE + thing(200, 1, 300, 9),
        }
    )
    (root / "Annotations" / "broken.xml").write_text("<annotation>")
    labels, report = read(root)
    assert labels.image_ids == ("a.jpg",) and len(labels.boxes_xyxy) == 1
    assert report.unlabelled == ["broken", "b.jpg"]
    assert report.counts["object without name, dropped"] == 1 and report.counts["box is no number, dropped"] == 2
    assert report.counts["file that cannot be read, its image left out"] == 1


def test_parts_of_an_object_are_no_objects(voc):
    head = "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    labels, _ = read(voc({"a": SIZE + thing(1, 1, 9, 9).replace("</object>", f"{head}</object>")}))
    assert labels.boxes_xyxy.tolist() == [[0, 0, 9, 9]] and [one.name for one in labels.categories] == ["cat"]


def test_polygons_make_masks(voc):
    polygon = "<polygon><x1>1</x1><y1>1</y1><x2>9</x2><y2>1</y2><x3>9</x3><y3>9</y3></polygon>"
    labels, _ = read(voc({"a": SIZE + thing(1, 1, 9, 9, more=polygon)}), masks=True)
    assert len(labels.masks) == 1


def test_a_folder_without_xml_is_refused(tmp_path):
    with pytest.raises(LabelError, match="expected XML files of Pascal VOC"):
        read(tmp_path)


def test_label_studios_corners_count_from_0(voc):
    owner = "<owner><name>Label Studio</name></owner>"
    labels, report = read(voc({"a": owner + SIZE + thing(11, 21, 30, 40)}))
    assert labels.boxes_xyxy.tolist() == [[11, 21, 30, 40]] and not report.notes

"""Tables of boxes, with the columns of several tools."""

from __future__ import annotations

import pytest
from PIL import Image

from simdetr.data.annotations import Category, LabelError
from simdetr.data.label_files import read_with_report

OURS = "path,class,x0,y0,x1,y1,width,height\ns/a.jpg,cat,1,2,3.5,4,100,50\nempty.jpg,,,,,,100,50\n"


@pytest.fixture
def read(tmp_path):
    Image.new("L", (100, 50)).save(tmp_path / "a.jpg")

    def call(content, **choices):
        (tmp_path / "boxes.csv").write_text(content, encoding="utf-8")
        return read_with_report(tmp_path / "boxes.csv", **choices)

    return call


def test_boxes_and_an_image_without_any(read):
    labels, report = read(OURS)
    assert report.format == "csv" and labels.image_ids == ("s/a.jpg", "empty.jpg")
    assert labels.boxes_xyxy.tolist() == [[1, 2, 3.5, 4]] and labels.sizes_hw.tolist() == [[50, 100]] * 2
    assert labels.categories == (Category(1, "cat"),) and not report.counts


@pytest.mark.parametrize(
    "content",
    [
        "filename,width,height,class,xmin,ymin,xmax,ymax\na.jpg,100,50,cat,1,2,3,4\n",
        "\ufeffimage;label;x_min;y_min;x_max;y_max\na.jpg;cat;1;2;3;4\n",
        "Image Path\tName\tx1\ty1\tx2\ty2\na.jpg\tcat\t1\t2\t3\t4\n",
        "a.jpg,1,2,3,4,cat\n",
        "a.jpg,cat,1,2,3,4\n",
        'y1,x1,"class",path,x0,y0\r\n4,3,"cat",a.jpg,1,2\r\n\r\n',
    ],
)
def test_columns_of_other_tools(read, content):
    labels, report = read(content)
    assert report.format == "csv" and labels.image_ids == ("a.jpg",) and labels.sizes_hw.tolist() == [[50, 100]]
    assert labels.boxes_xyxy.tolist() == [[1, 2, 3, 4]] and labels.categories[0].name == "cat"


def test_without_header_an_image_without_boxes_has_empty_cells(read, tmp_path):
    Image.new("L", (100, 50)).save(tmp_path / "b.jpg")
    labels, _ = read("a.jpg,1,2,3,4,cat\nb.jpg,,,,,\n")
    assert labels.image_ids == ("a.jpg", "b.jpg") and labels.offsets.tolist() == [0, 1, 1]


def test_scores(read):
    assert read("path,class,x0,y0,x1,y1,score\na.jpg,cat,1,2,3,4,0.25\na.jpg,cat,1,2,3,4,\n")[0].scores.tolist() == [
        0.25,
        1,
    ]


def test_rows_that_cannot_be_used(read):
    labels, report = read(
        "path,class,x0,y0,x1,y1\na.jpg,cat,1,2,3,4\na.jpg,,1,2,3,4\na.jpg,cat,,,,\na.jpg,cat,1,x,3,4\ngone.jpg,cat,1,2,3,4\n"
    )
    assert len(labels.boxes_xyxy) == 1 and report.unlabelled == ["gone.jpg"]
    assert report.counts == {
        "box without class, dropped": 1,
        "class without box, dropped": 1,
        "box is no number, dropped": 1,
        "image without size that is not found, its boxes dropped": 1,
    }
    assert report.examples["box is no number, dropped"] == ["line 5"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "expected a first line with the columns path, class, x0, y0, x1, y1 .*, got 'a', 'b'"),
        ("", "an empty file"),
        ("path,class,x0,y0,x1,y1\n,cat,1,2,3,4\n", "row 2 names no image"),
        ("path,class,x0,y0,x1,y1\na.jpg,cat,0.1,0.2,0.3,0.4\n", "shares of the image; expected pixels"),
        ('path,class,x0,y0,x1,y1\n"a.jpg' + "x" * 200_000, "cannot be read as CSV"),
    ],
)
def test_tables_that_are_none(read, content, message):
    with pytest.raises(LabelError, match=message):
        read(content, format="csv")

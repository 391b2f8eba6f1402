"""CVAT's XML of images and of videos, shape by shape."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from simdetr.data import masks as mask_codes
from simdetr.data.annotations import Category, LabelError
from simdetr.data.images import open_images
from simdetr.data.label_files import read_with_report

META = (
    "<meta><task><size>4</size><original_size><width>100</width><height>50</height></original_size>"
    "<labels><label><name>owl</name></label><label><name>cat</name></label></labels></task></meta>"
)
BOX = '<box label="cat" xtl="10.5" ytl="5" xbr="20" ybr="15"/>'


@pytest.fixture
def read(tmp_path):
    def call(content, **choices):
        (tmp_path / "annotations.xml").write_text(f"<annotations><version>1.1</version>{META}{content}</annotations>")
        return read_with_report(tmp_path / "annotations.xml", **choices)

    return call


def image(*shapes, name="a.jpg"):
    return f'<image id="0" name="{name}" width="100" height="50">{"".join(shapes)}</image>'


def test_boxes_and_images_without_any(read):
    labels, report = read(image(BOX, name="s/a.jpg") + image(name="empty.jpg"))
    assert labels.image_ids == ("s/a.jpg", "empty.jpg") and labels.boxes_xyxy.tolist() == [[10.5, 5, 20, 15]]
    assert labels.categories == (Category(1, "owl"), Category(2, "cat")) and labels.classes.tolist() == [1]
    assert report.format == "cvat" and not report.counts and not report.unlabelled


def test_rotated_boxes_polygons_and_ellipses(read):
    rotated = '<box label="cat" xtl="40" ytl="20" xbr="60" ybr="30" rotation="90"/>'
    polygon = '<polygon label="cat" points="1,2;11,2;11,12.5"/>'
    ellipse = '<ellipse label="cat" cx="50" cy="25" rx="10" ry="5"/>'
    labels, report = read(image(rotated, polygon, ellipse), masks=True)
    assert labels.boxes_xyxy.round(3).tolist() == [[45, 15, 55, 35], [1, 2, 11, 12.5], [40, 20, 60, 30]]
    assert report.notes == {
        "rotated box, the upright box around it taken": 1,
        "polygon, the box around it taken": 1,
        "ellipse, the box around it taken": 1,
    }
    assert len(labels.masks) == 3


def test_masks_run_row_by_row_in_their_rectangle(read):
    mask = '<mask label="cat" rle="1, 2, 1, 2" left="30" top="10" width="3" height="2"/>'  # .##/.##
    labels, _ = read(image(mask), masks=True)
    assert labels.boxes_xyxy.tolist() == [[31, 10, 33, 12]]
    pixels = mask_codes.decode(labels.masks, (50, 100))[0]
    assert np.argwhere(pixels).tolist() == [[10, 31], [10, 32], [11, 31], [11, 32]]


@pytest.mark.parametrize("facts", ['rle="1, 2"', 'rle=""', 'rle="6"', 'rle="-1, 7"', 'rle="0, 999999999999"', ""])
def test_masks_that_are_none_are_dropped(read, facts):
    labels, report = read(image(BOX, f'<mask label="cat" left="0" top="0" width="3" height="2" {facts}/>'))
    assert len(labels.boxes_xyxy) == 1 and report.counts == {"box is no number, dropped": 1}


def test_what_has_no_box_is_counted_and_such_an_image_is_not_empty(read):
    line = '<polyline label="cat" points="1,2;3,4"/>'
    labels, report = read(
        image(line, '<points label="cat" points="1,2"/>', '<tag label="cat"/>', BOX) + image(line, name="b.jpg")
    )
    assert labels.image_ids == ("a.jpg",) and report.unlabelled == ["b.jpg"]
    assert report.notes == {
        "polyline, which is no box, left out": 2,
        "points, which is no box, left out": 1,
        "class of a whole image, left out": 1,
    }


def shown(frame, outside=0):
    return f'<box frame="{frame}" outside="{outside}" keyframe="1" xtl="1" ytl="2" xbr="{10 + frame}" ybr="9"/>'


def test_tracks_of_a_video(read, tmp_path):
    tracks = f'<track id="0" label="cat">{shown(0)}{shown(1)}{shown(2, 1)}</track>'
    labels, report = read(tracks)
    assert labels.image_ids == tuple(f"frame_{number:06d}.png" for number in range(4))
    assert labels.offsets.tolist() == [0, 1, 2, 2, 2] and labels.boxes_xyxy[:, 2].tolist() == [10, 11]
    assert report.notes == {"frames are named .png, since no images are known": 1}
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("L", (100, 50)).save(tmp_path / "photos" / f"frame_{number:06d}.jpg")
    labels, report = read(tracks, images=open_images(tmp_path / "photos"))
    assert labels.image_ids == tuple(f"frame_{number:06d}.jpg" for number in range(3))
    assert report.unlabelled == ["frame_000003"]


def test_a_video_needs_a_size_and_frames_numbers(read, tmp_path):
    labels, report = read('<track id="0" label="cat"><box frame="x"/><box frame="1e99"/><box/></track>')
    assert len(labels) == 4 and report.counts == {"shape without frame number, dropped": 3}
    (tmp_path / "b.xml").write_text(f'<annotations><track id="0" label="cat">{shown(0)}</track></annotations>')
    with pytest.raises(LabelError, match="expected the size of the video's frames"):
        read_with_report(tmp_path / "b.xml")


def test_images_and_shapes_that_cannot_be_used(read):
    labels, report = read(
        image(BOX, BOX.replace('label="cat"', ""), BOX.replace("10.5", "x"))
        + "<image/>"
        + f'<image name="b.jpg" width="0" height="x">{BOX}</image>'
    )
    assert labels.image_ids == ("a.jpg",) and len(labels.boxes_xyxy) == 1 and report.unlabelled == ["b.jpg"]
    assert report.total == 4

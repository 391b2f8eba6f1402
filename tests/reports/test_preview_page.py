"""The page of a preview: closed elements, nothing from outside, the numbers of its record, boxes in their colours."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from simdetr.data.coco import read_coco
from simdetr.data.images import open_images
from simdetr.data.storage import locate
from simdetr.mining.batch import MiningConfig
from simdetr.mining.colour_texture import ColourTextureEncoder
from simdetr.mining.preview import Machine, preview_mining, preview_record
from simdetr.mining.regions import Regions
from simdetr.reports import preview_page
from simdetr.reports.preview_page import BEST, OTHER, TRUE, preview_table, render_preview, write_preview

CONFIG = MiningConfig(image_size=64)


@pytest.fixture(scope="module")
def preview(scenes):
    source, truth = open_images(scenes), read_coco(scenes / "instances.json")[0]
    return preview_mining(source, ColourTextureEncoder(), CONFIG, 6, truth=truth.select(truth.image_ids[:4]))


def test_page_shows_the_record_and_needs_nothing_else(preview, page_of):
    record = preview_record(preview, Machine(2), 3)
    page = page_of(render_preview(preview, record), " ")
    assert all(source.startswith(("data:", "#")) for source in page.sources + page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    assert "script" not in page.tags and page.tags.count("svg") == 3 and page.tags.count("img") == 6
    for expected in (
        "6 of 12 images of",
        f"{record['speed']['images_per_s']:.1f} images/s",
        "time with 3 processes",
        f"{record['boxes']['per_image']['min']} – {record['boxes']['per_image']['max']}",
        f"{100 * preview.recall.scores['AR@25']:.1f}",
        f"{record['recall']['objects']} true objects on 4 previewed images",
        "best box",
        "mined boxes true objects",
        *record["full_run"]["assumptions"],
        *record["warnings"],
    ):
        assert expected in page.text, expected
    assert "Not shown" not in page.text and "Unreadable" not in page.text


def test_page_without_truth_with_odd_images(preview, page_of):
    odd = replace(
        preview,
        truth=None,
        recall=None,
        unreadable={"<a>.jpg": "empty & file"},
        copies=[(preview.rows[1].image_id, preview.rows[0].image_id)],
    )
    page = page_of(render_preview(odd, preview_record(odd, Machine(1))), " ")
    for expected in (
        "Not shown: there is no ground truth",
        "<a>.jpg empty & file",
        f"same file as {preview.rows[0].image_id}",
        "a full run would stop",
    ):
        assert expected in page.text, expected
    assert "true objects" not in page.text and "processes" not in page.text.replace("one process", "")


def colours_in(picture):
    pixels = np.asarray(picture).reshape(-1, 3)
    return {colour for colour in (BEST, OTHER, TRUE) if (pixels == colour).all(axis=1).any()}


def with_boxes(preview, boxes, scores):
    number = len(boxes)
    zeros = np.zeros(number, np.int16)
    regions = Regions(
        np.array(boxes, np.float32).reshape(-1, 4), np.zeros((number, 1), np.float32), np.ones(number, np.float32),
        zeros, zeros, zeros, np.array(scores, np.float32),
    )  # fmt: skip
    return replace(preview, rows=[replace(preview.rows[0], regions=regions)])


def test_pictures_mark_the_best_box_the_others_and_the_truth(preview):
    two = [(2, 2, 20, 20), (30, 30, 60, 60)]
    ((_, caption, picture),) = preview_page._pictures(with_boxes(preview, two, [0.1, 0.7]))
    assert colours_in(picture) == {BEST, OTHER, TRUE}
    scale = picture.width / 80
    assert picture.getpixel((round(30 * scale), round(45 * scale))) == BEST  # the one with the higher score
    assert re.fullmatch(r"2 boxes, \d of \d objects found", caption)

    alone = replace(with_boxes(preview, two[:1], [0.3]), truth=None)
    ((_, caption, picture),) = preview_page._pictures(alone)
    assert caption == "1 box" and colours_in(picture) == {OTHER}  # one score ranks nothing

    nothing = replace(with_boxes(preview, [], []), truth=None)
    ((_, caption, picture),) = preview_page._pictures(nothing)
    assert caption == "0 boxes" and colours_in(picture) == set()


def test_found_objects_are_counted(preview):
    image_id = preview.rows[0].image_id
    true = preview.truth.of(image_id).boxes_xyxy
    everything = with_boxes(preview, true, np.arange(len(true)))
    assert preview_page._pictures(everything)[0][1].endswith(f"{len(true)} of {len(true)} objects found")
    corner = with_boxes(preview, [(0, 0, 1, 1)], [1])
    assert preview_page._pictures(corner)[0][1].endswith(f"0 of {len(true)} objects found")


def test_long_previews_show_a_choice_of_pictures(preview, monkeypatch):
    monkeypatch.setattr(preview_page, "MAX_PICTURES", 4)
    shown = [image_id for image_id, _, _ in preview_page._pictures(preview)]
    ids = [row.image_id for row in preview.rows]
    assert shown == [ids[0], ids[2], ids[3], ids[5]]


def test_files_are_written_on_any_storage(preview, tmp_path):
    record = preview_record(preview, Machine(1))
    for folder in (tmp_path / "new" / "preview", locate("memory://runs/preview")):
        page = write_preview(preview, record, folder)
        assert page == folder / "index.html" and page.read_text(encoding="utf-8").startswith("<!doctype html>")
        assert json.loads((folder / "preview.json").read_text(encoding="utf-8")) == record
    assert sorted(path.name for path in (tmp_path / "new" / "preview").iterdir()) == ["index.html", "preview.json"]


def test_table_fits_a_terminal(preview):
    record = preview_record(preview, Machine(2), 2)
    lines = preview_table(record).splitlines()
    assert max(len(line) for line in lines if not line.startswith("!")) < 80
    names = [line[:18].strip() for line in lines if not line.startswith("!")]
    assert {"images", "speed", "full run", "2 processes", "boxes per image", "recall in %"} <= set(names)
    assert sum(line.startswith("!") for line in lines) == len(record["warnings"])
    alone = preview_table(preview_record(replace(preview, truth=None, recall=None), Machine(2)))
    assert "recall" not in alone and "processes" not in alone

"""The report's page: every part, closed elements, nothing from outside."""

import base64
import io
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from simdetr.mining.kmeans import clustering_record, fit_kmeans
from simdetr.reports.charts import Curve
from simdetr.reports.page import (
    NOT_GIVEN,
    ReportData,
    Sample,
    StepRow,
    data_uri,
    format_duration,
    render_report,
    write_report,
)


@pytest.fixture
def full_report():
    picture = Image.new("RGB", (64, 48), (200, 30, 30))
    return ReportData(
        title="run <one>",
        created="2024-05-01 12:00",
        command="simdetr pretrain --images 'a & b'",
        steps=[StepRow("Mine proposals", "1,234 proposals", 75.0, "8 images"), StepRow("Cluster", "16 classes", 2.0)],
        samples=[Sample("a/<b>.jpg", [("mined: 3 boxes", picture), ("stage 1: 2 boxes", picture)])],
        births=[("mined", (10, 20, 255)), ("stage <1>", (0, 200, 30))],
        origins=[
            {"stage": "mined", "boxes": 1234, "mined_left": 1234, "mined": 1234, "shares": {"stride 32, K 2": 1.0}},
            {
                "stage": "stage 1",
                "boxes": 50,
                "mined_left": 617,
                "mined": 1234,
                "shares": {"stride 32, K 2": 0.25, "stage <1>": 0.75},
            },
        ],
        montages=[("class 0: 12 boxes", picture)],
        clustering=clustering_record(fit_kmeans(torch.eye(40), 3, spherical=False), {"num_classes": 3}),
        recall=[
            {"stage": "mined", "images": 1200, "boxes_per_image": 7.25, "AR@100": 0.4012, "AR@100l": float("nan")},
            {"stage": "stage 1", "images": 1200, "boxes_per_image": 50.0, "AR@100": 0.5, "AR@100l": 0.25},
        ],
        curves=[Curve("stage <1>", {"train/loss": ([0, 1], [2.0, 1.0])})],
        comparison=[
            {"initialisation": "scratch", "label_budget": "1 %", "seed": 0, "AP": 0.1},
            {"initialisation": "pretrained", "label_budget": "1 %", "seed": 0, "AP": 0.25},
        ],
        config="encoder: <script>alert(1)</script>\n",
    )


def test_page_shows_every_part(full_report, page_of):
    page = page_of(render_report(full_report))
    text = page.text
    for expected in (
        "run <one>",
        "1 min 17 s in all",
        "simdetr pretrain --images 'a & b'",
        "1,234 proposals",
        "1 min 15 s · 8 images",
        "a/<b>.jpg",
        "mined: 3 boxes",
        "A colour says where a box was found first: mined stage <1>.",
        "stageboxesmined boxes leftstride 32, K 2stage <1>",
        "mined1,2341,234 (100.0 %)100.0–",
        "stage 150617 (50.0 %)25.075.0",
        "class 0: 12 boxes",
        "effective classes",
        "inertia per region",
        "1,200",
        "40.1",
        "stage <1>",
        "+15.0",
        "<script>alert(1)</script>",
    ):
        assert expected in text
    assert "Not shown" not in text
    assert "recall at IoU 0.5" not in text  # no row has it
    assert page.tags.count("img") == 3 and page.tags.count("svg") == 2


def test_page_needs_nothing_else(full_report, page_of):
    html = render_report(full_report)
    page = page_of(html)
    assert len(page.sources) == 3
    for source in page.sources:
        head, _, payload = source.partition(",")
        assert head == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(payload, validate=True))) as picture:
            assert (picture.format, picture.size) == ("JPEG", (64, 48))
    assert page.links and {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "background: rgb(10, 20, 255)" in html
    assert not re.search(r"url\((?!#)|@import|\son\w+=", html)


def test_empty_parts_say_why(page_of):
    page = page_of(render_report(ReportData("t", "now", missing={"recall": "the labels are on Mars."})))
    text = page.text
    reasons = {**NOT_GIVEN, "recall": "the labels are on Mars."}
    assert len(reasons) == 9
    assert "a colour is a class" in text
    for reason in reasons.values():
        assert f"Not shown: {reason}" in text


def test_report_is_written_whole_or_not_at_all(tmp_path, full_report):
    folder = tmp_path / "runs" / "report"
    path = write_report(full_report, folder)
    assert path == folder / "index.html"
    before = path.read_text(encoding="utf-8")
    assert before == render_report(full_report)
    broken = ReportData("t", "now", curves=[Curve("x", {})])
    with pytest.raises(ValueError, match="curve 'x'"):
        write_report(broken, folder)
    assert path.read_text(encoding="utf-8") == before
    assert list(folder.iterdir()) == [path]


def test_rivals_are_a_part_where_there_are_any(full_report, page_of):
    picture = Image.new("RGB", (64, 48))
    columns = {"AR@25": 0.4012, "AR@30": 0.45, "AR@25s": float("nan"), "AR@25l": 0.5}
    rows = [
        {"stage": "ours", "images": 60, "boxes_per_image": 24.5} | columns,
        {"stage": "LOST", "images": 60, "boxes_per_image": 1.0} | columns | {"AR@25": 0.125},
    ]
    shown = [Sample("<c>.jpg", [("ours: 24 boxes", picture), ("LOST: 1 box", picture)])]
    page = page_of(render_report(replace(full_report, rivals=rows, rival_samples=shown)))
    text = page.text
    for expected in ("Other methods", "ours6024.540.145.0–50.0", "LOST601.012.5", "<c>.jpg", "LOST: 1 box", "AR@30"):
        assert expected in text
    assert "rivals" in page.ids and "#rivals" in page.links
    assert page.tags.count("img") == 3 + 2
    without_truth = [{key: row[key] for key in ("stage", "images", "boxes_per_image")} for row in rows]
    text = page_of(render_report(ReportData("t", "now", rivals=without_truth))).text
    assert "Other methods" in text and "LOST601.0" in text and "AR@" not in text
    page = page_of(render_report(full_report))
    assert "Other methods" not in page.text and "#rivals" not in page.links


def test_runs_without_an_ap_have_neither_bar_nor_gain():
    rows = [
        {"initialisation": "scratch", "label_budget": "1 %", "AP": None},
        {"initialisation": "pretrained", "label_budget": "1 %", "AP": 0.2},
    ]
    html = render_report(ReportData("t", "now", comparison=rows))
    assert html.count('class="bar"') == 1
    assert "nan" not in html


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7620, "2 h 07 min"),
    ],
)
def test_durations_read_well(seconds, text):
    assert format_duration(seconds) == text


def test_pictures_with_transparency_become_jpeg():
    head, _, payload = data_uri(Image.new("RGBA", (5, 4))).partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(payload))).mode == "RGB"

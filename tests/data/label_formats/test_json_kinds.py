"""JSON files told by what they hold."""

from __future__ import annotations

import json

import pytest

from simdetr.data.label_formats.json_kinds import described, json_kind

TASK = {"id": 1, "data": {"image": "a.jpg"}, "annotations": []}


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        ({"categories": [], "annotations": [], "images": []}, "coco", None),
        ([TASK], "label-studio", None),
        ([{"image": "a.jpg", "id": 1, "annotator": 1, "annotation_id": 2, "lead_time": 3.5}], "label-studio", None),
        ([{"image_id": 1, "category_id": 2, "bbox": [0, 0, 1, 1], "score": 1}], "results", None),
        ({"version": 1, "shapes": []}, "other", "is JSON, an object with the keys 'version', 'shapes'"),
        ([{"a": 1}], "other", "is JSON, a list of objects with the keys 'a'"),
        ([], "other", "is JSON, an empty list"),
        (3, "other", "is JSON, 3"),
    ],
)
def test_kinds(tmp_path, content, kind, said):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    assert json_kind(path) == kind
    assert said is None or described(path) == said


def test_a_first_task_longer_than_the_head(tmp_path, monkeypatch):
    monkeypatch.setattr("simdetr.data.label_formats.json_kinds._HEAD_BYTES", 20)
    (tmp_path / "a.json").write_text(json.dumps([TASK]))
    assert json_kind(tmp_path / "a.json") == "label-studio"


@pytest.mark.parametrize("content", [b"", b"[", b"[" * 100_000, b'{"images": [', b"\xff\xfe", b"null"])
def test_broken_files_do_no_harm(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert json_kind(tmp_path / "a.json") == "other"
    assert described(tmp_path / "a.json")

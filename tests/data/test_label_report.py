"""Counting what reading a label file met."""

from __future__ import annotations

from pathlib import Path

import pytest

from simdetr.data.annotations import LabelError
from simdetr.data.label_report import LabelReport


def test_problems_are_counted_with_their_first_examples():
    report = LabelReport(Path("a.json"))
    for number in range(7):
        report.add("box clipped", f"annotation {number}")
    report.add("another", "image 3")
    assert report.total == 8
    assert report.lines() == [
        "1 × another: image 3",
        "7 × box clipped: annotation 0, annotation 1, annotation 2, annotation 3, annotation 4",
    ]


def test_a_strict_report_raises_problems_and_not_notes():
    report = LabelReport(Path("a.json"), strict=True)
    report.note("rotated box, the upright box around it taken", "shape 1")
    with pytest.raises(LabelError, match=r"a\.json: annotation 17: box clipped"):
        report.add("box clipped", "annotation 17")
    assert report.total == 0 and report.note_lines() == ["1 × rotated box, the upright box around it taken: shape 1"]


def test_unlabelled_images_are_named():
    report = LabelReport(Path("a.json"), unlabelled=[f"{number}.jpg" for number in range(6)])
    assert report.note_lines() == ["6 × image without labels, left out: 0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg"]

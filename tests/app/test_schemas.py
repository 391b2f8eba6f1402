"""What requests may hold."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from simdetr.app.schemas import BoxesAsked, ClassNew, SentBoxIn


def test_slips_of_the_pen_are_errors():
    with pytest.raises(ValidationError, match="extra_forbidden"):
        ClassNew(name="a", color="#ffffff")


@pytest.mark.parametrize("xyxy", [[0, 0, 1], [0, 0, 1, float("inf")], [0, 0, 1, float("nan")], ["a", 0, 1, 1], None])
def test_boxes_are_four_finite_numbers(xyxy):
    with pytest.raises(ValidationError):
        SentBoxIn(class_id=1, xyxy=xyxy)


def test_names_are_trimmed_and_colours_are_colours():
    assert ClassNew(name="  a b ").name == "a b"
    for colour in ("red", "#12345", "#12345g", "url(x)"):
        with pytest.raises(ValidationError):
            ClassNew(name="a", colour=colour)


def test_a_save_without_its_version_is_none():
    with pytest.raises(ValidationError, match="version"):
        BoxesAsked(boxes=[])

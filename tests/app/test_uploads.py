"""Names of files that are sent in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simdetr.app.uploads import safe_name


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("고양이 1.png", "고양이 1.png"),
        ("../../etc/passwd", "passwd"),
        ("C:\\photos\\a.jpg", "a.jpg"),
        ("a:b?.png", "a_b_.png"),
        ("..", "image"),
        ("", "image"),
        (".hidden.png", "hidden.png"),
    ],
)
def test_of_a_name_no_folder_is_believed(name, safe):
    assert safe_name(name) == safe


@given(st.text(max_size=300))
def test_any_text_becomes_a_name_in_one_folder(text):
    name = safe_name(text)
    assert name and len(name) <= 300 and not set(name) & set('/\\:\0\n"') and name not in (".", "..")

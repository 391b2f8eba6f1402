"""XML of unknown origin."""

from __future__ import annotations

import pytest

from simdetr.data.annotations import LabelError
from simdetr.data.label_formats.xml_tree import number_at, read_xml, root_tag, text_at

BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>'


def test_texts_and_numbers(tmp_path):
    (tmp_path / "a.xml").write_text("<a><b> x </b><c><d>1.5</d></c></a>")
    root = read_xml(tmp_path / "a.xml")
    assert text_at(root, "b") == "x" and number_at(root, "c/d") == 1.5
    assert text_at(root, "none") == "" and number_at(root, "none") != number_at(root, "none")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB.encode(), "has a document type or entities"),
        (BOMB.encode("utf-16"), "expected XML in UTF-8"),
        (b"<a><b></a>", "cannot be read as XML"),
        (b"", "cannot be read as XML"),
        (b"<?xml version='1.0' encoding='nonsense'?><a/>", "cannot be read as XML"),
        (b"<a>&unknown;</a>", "cannot be read as XML"),
    ],
)
def test_hostile_files_are_refused(tmp_path, content, message):
    (tmp_path / "a.xml").write_bytes(content)
    with pytest.raises(LabelError, match=message):
        read_xml(tmp_path / "a.xml")
    with pytest.raises(LabelError, match="cannot be read"):
        read_xml(tmp_path / "missing.xml")


def test_deep_nesting_does_no_harm(tmp_path):
    (tmp_path / "a.xml").write_text("<a>" * 100_000 + "</a>" * 100_000)
    assert read_xml(tmp_path / "a.xml").tag == "a"


@pytest.mark.parametrize(
    ("content", "tag"),
    [
        ("<annotation/>", "annotation"),
        ('\ufeff<?xml version="1.0"?>\n<!-- <x> -->\n<annotations><image/>', "annotations"),
        ("text", None),
        ("", None),
        ("<", None),
    ],
)
def test_the_root_is_told_from_the_first_bytes(tmp_path, content, tag):
    (tmp_path / "a.xml").write_text(content, encoding="utf-8")
    assert root_tag(tmp_path / "a.xml") == tag

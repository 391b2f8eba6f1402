"""Labels under the ids of the images they are of."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.images import ImageSource
from simdetr.data.label_checks import with_ids_of
from simdetr.data.label_report import LabelReport
from simdetr.data.labels import Labels


def labels_of(*image_ids: str) -> Labels:
    images = [ImageLabels.build(name, (10, 10), [[0, 0, 5, 5]], [0]) for name in image_ids]
    return Labels.from_images(images, [Category(1, "cat")])


@pytest.mark.parametrize(
    ("written", "there"),
    [
        ("images\\a.jpg", "images/a.jpg"),
        ("./a.jpg", "a.jpg"),
        (unicodedata.normalize("NFD", "café.jpg"), unicodedata.normalize("NFC", "café.jpg")),
        (unicodedata.normalize("NFC", "café.jpg"), unicodedata.normalize("NFD", "café.jpg")),
        ("photos/sub/a.jpg", "sub/a.jpg"),
        ("C:\\Users\\someone\\photos\\sub\\a.jpg", "sub/a.jpg"),
        ("/elsewhere/photos/a.jpg", "a.jpg"),
        ("a.jpg", "sub/a.jpg"),
    ],
)
def test_another_spelling_is_the_same_image(written, there):
    report = LabelReport(Path("labels.json"))
    source = ImageSource(Path("/data/photos"), [there, "other.jpg"])
    assert with_ids_of(labels_of(written, "other.jpg"), source, report).image_ids == (there, "other.jpg")
    assert report.total == 0 and sum(report.notes.values()) == 1


@pytest.mark.parametrize(
    ("written", "there"),
    [
        (["a.jpg"], ["x/a.jpg", "y/a.jpg"]),  # two images fit
        (["train/a.jpg"], ["a.jpg"]),  # of another folder than photos/
        (["sub\\a.jpg", "sub/a.jpg"], ["sub/a.jpg"]),  # would be one image twice
        (["photos/a.jpg", "./a.jpg"], ["a.jpg"]),
        (["ba.jpg"], ["sub/a.jpg"]),
    ],
)
def test_what_is_not_clear_stays_as_it_is(written, there):
    report = LabelReport(Path("labels.json"))
    source = ImageSource(Path("/data/photos"), there)
    assert with_ids_of(labels_of(*written), source, report).image_ids == tuple(written)
    assert not report.notes

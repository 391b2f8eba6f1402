"""Files cut short, with wrong types, huge numbers and bytes at random: a `LabelError`, or labels and a count."""

from __future__ import annotations

import copy
import json
import random
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.label_files import FORMATS, LabelFormat, format_named, read_with_report
from simdetr.data.label_formats.conversion import fitting
from simdetr.data.label_formats.known_images import KnownImages
from simdetr.data.labels import Labels

BOXES = [[1, 2, 11, 22], [0, 0, 30, 20.5]]
IMAGE = ImageLabels.build("s/a.jpg", (40, 60), BOXES, [0, 1])
LABELS = Labels.from_images(
    [IMAGE, ImageLabels.build("b.jpg", (4, 6), [], [])], [Category(1, "cat"), Category(2, "owl")]
)
JUNK = [
    "",
    "x",
    "-1",
    "0",
    "1e999",
    "nan",
    "-inf",
    "9" * 400,
    "\0",
    "é" * 3000,
    "1;2",
    ",,,",
    "true",
    "{}",
    "../../etc",
]
VALUES = [
    None,
    True,
    -1,
    0,
    1e308,
    10**400,
    float("nan"),
    "x" * 5000,
    "\0",
    [],
    {},
    [[]],
    [None],
    {"a": []},
    "nan",
    "../..",
]
TEXTS = ["coco", "label-studio", "yolo", "voc", "cvat", "csv"]


def place_of(kind: LabelFormat, folder: Path) -> Path:
    place = folder / "labels"
    kind.write(fitting(LABELS, kind)[0], place, None)
    return place


def files_of(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())


def read_all_ways(place: Path, name: str) -> None:
    for images in (None, KnownImages.of_labels(LABELS)):
        for masks in (False, True):
            try:
                read_with_report(place, images=images, format=name, masks=masks)
            except LabelError as error:
                assert len(str(error)) < 1000, "quoted values are cut"


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
@given(data=st.data())
def test_bytes_cut_off_or_changed(kind, data):
    with TemporaryDirectory() as folder:
        place = place_of(kind, Path(folder))
        path = data.draw(st.sampled_from(files_of(place)))
        content = bytearray(path.read_bytes())
        if data.draw(st.booleans()):
            content = content[: data.draw(st.integers(0, len(content)))]
        for _ in range(data.draw(st.integers(0, 4))):
            if content:
                content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        read_all_ways(place, kind.name)
        try:
            read_with_report(place)
        except LabelError:
            pass


@pytest.mark.parametrize("name", TEXTS)
@given(seed=st.integers(0, 10**6))
def test_numbers_and_words_changed(name, seed):
    rng = random.Random(seed)
    with TemporaryDirectory() as folder:
        place = place_of(format_named(name), Path(folder))
        path = rng.choice(files_of(place))
        words = list(re.finditer(r"[\w.]+", text := path.read_text(encoding="utf-8")))
        for word in sorted(rng.sample(words, min(len(words), rng.randint(1, 3))), key=lambda w: -w.start()):
            text = text[: word.start()] + rng.choice(JUNK) + text[word.end() :]
        path.write_text(text, encoding="utf-8")
        read_all_ways(place, name)


@pytest.mark.parametrize("name", ["coco", "label-studio"])
@given(seed=st.integers(0, 10**6))
def test_values_of_other_types(name, seed):
    rng = random.Random(seed)
    with TemporaryDirectory() as folder:
        place = place_of(format_named(name), Path(folder))
        content = json.loads(place.read_text())
        for _ in range(rng.randint(1, 2)):
            node = content
            while True:
                key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
                if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.2:
                    node[key] = copy.deepcopy(rng.choice(VALUES))
                    break
                node = node[key]
            if not content:
                break
        place.write_text(json.dumps(content))
        read_all_ways(place, name)

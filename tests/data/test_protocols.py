"""Drawn subsets: by hand on files of a few boxes, and by their promises on random ones."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter

import pytest

from simdetr import split
from simdetr.data.annotations import LabelError
from simdetr.data.label_files import read_labels
from simdetr.data.protocols import (
    FRACTIONS,
    RECORD,
    SHOTS,
    base_and_novel,
    content_hash,
    first_images,
    hash_order,
    k_shot,
    label_fraction,
)

NAMES = [f"{number:02d}.jpg" for number in range(40)]


def content(boxes, classes=("cat", "owl"), crowd=()):
    """A COCO file; ``boxes`` maps a file name to the classes of its boxes, box n of all lies at (n, 0)."""
    images = [{"id": 100 + row, "file_name": name, "height": 10, "width": 999} for row, name in enumerate(boxes)]
    annotations = [
        {"image_id": 100 + row, "category_id": 5 + classes.index(name), "iscrowd": 0}
        for row, own in enumerate(boxes.values())
        for name in own
    ]
    for number, entry in enumerate(annotations):
        entry |= {"id": number, "bbox": [number, 0, 1, 1], "iscrowd": int(number in crowd)}
    categories = [{"id": 5 + row, "name": name} for row, name in enumerate(classes)]
    return {"images": images, "annotations": annotations, "categories": categories, "licenses": ["mine"]}


def random_content(seed=0):
    draw = random.Random(seed)
    return content(
        {name: draw.choices(("cat", "owl", "yak"), (5, 2, 1), k=draw.randrange(7)) for name in NAMES},
        ("cat", "owl", "yak"),
    )


def shuffled(source, seed=1):
    draw = random.Random(seed)
    return source | {key: draw.sample(source[key], len(source[key])) for key in ("images", "annotations", "categories")}


def ids(drawn, key="annotations"):
    return {entry["id"] for entry in drawn[key]}


def counts(drawn):
    names = {category["id"]: category["name"] for category in drawn["categories"]}
    return Counter(names[entry["category_id"]] for entry in drawn["annotations"])


def test_the_order_is_that_of_sha256():
    """Fixed for ever: whoever changes it changes everybody's numbers."""
    expected = sorted(NAMES, key=lambda name: hashlib.sha256(b"3\0" + name.encode()).hexdigest())
    assert hash_order(NAMES, 3) == expected == hash_order(reversed(NAMES), 3)
    assert hash_order("abcd", 5) == list("dacb")
    assert first_images(NAMES, 0.1, 0) == ["02.jpg", "06.jpg", "27.jpg", "18.jpg"]
    assert hash_order(NAMES, 0) != hash_order(NAMES, 1)


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 4), (0.01, 1), (0.001, 1), (1.0, 40), (0.5, 20)])
def test_fractions_take_the_first_and_at_least_one(fraction, count):
    assert first_images(NAMES, fraction, 0) == hash_order(NAMES, 0)[:count]


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5])
def test_fractions_outside_are_errors(fraction):
    with pytest.raises(ValueError, match=r"fraction: expected a number in \(0, 1\]"):
        first_images(NAMES, fraction, 0)
    with pytest.raises(ValueError, match="at least one image"):
        label_fraction(content({}), 0.5, 0)


def test_fractions_keep_all_boxes_of_their_images_and_nest():
    source, smaller = random_content(), set()
    for fraction in FRACTIONS:
        drawn = label_fraction(source, fraction, seed=4)
        kept = ids(drawn, "images")
        assert smaller <= kept and len(kept) == max(1, round(40 * fraction))
        assert ids(drawn) == {entry["id"] for entry in source["annotations"] if entry["image_id"] in kept}
        assert [image["file_name"] for image in drawn["images"]] == sorted(i["file_name"] for i in drawn["images"])
        smaller = kept
    assert smaller == ids(source, "images")


def test_shots_add_whole_images_and_pass_over_those_with_too_many():
    """In the order d, a, c, b: d has three cats, too many for two; a gives one, c two are too many, b the second."""
    source = content({"a": ["cat", "owl"], "b": ["cat"], "c": ["cat", "cat"], "d": ["cat", "cat", "cat"]})
    drawn = k_shot(source, 2, seed=5)  # by way of one shot: the cat of a
    assert [image["file_name"] for image in drawn["images"]] == ["a", "b"]
    assert counts(drawn) == {"cat": 2, "owl": 1}
    assert drawn["info"][RECORD]["short_classes"] == {"owl": 1}


def test_shots_drop_boxes_of_classes_that_an_image_was_not_drawn_for():
    """One cat and one owl: d gives the cat; a is first among those with one owl, and its cat is not labelled."""
    source = content({"a": ["cat", "owl"], "d": ["cat", "owl", "owl"], "c": ["owl"]})
    drawn = k_shot(source, 1, seed=5)
    assert [(entry["image_id"], entry["category_id"]) for entry in drawn["annotations"]] == [(100, 6), (101, 5)]


def test_shots_take_a_part_of_an_image_where_whole_ones_do_not_add_up():
    drawn = k_shot(content({"a": ["cat"] * 4, "b": ["cat"] * 7}), 5, seed=5)  # one shot from a, which then fits whole
    assert counts(drawn) == {"cat": 5}
    assert Counter(entry["image_id"] for entry in drawn["annotations"]) == {100: 4, 101: 1}


def test_crowds_are_no_shots():
    drawn = k_shot(content({"a": ["cat", "cat"]}, crowd=(0,)), 1, seed=0)
    assert ids(drawn) == {1}


@pytest.mark.parametrize("seed", range(5))
def test_shots_nest_and_are_exact_where_there_are_enough(seed):
    source, smaller = random_content(seed), set()
    available = counts(source)
    for shots in SHOTS:
        drawn = k_shot(source, shots, seed)
        assert counts(drawn) == {name: min(shots, count) for name, count in available.items()}
        assert smaller <= ids(drawn)
        assert ids(drawn, "images") == {entry["image_id"] for entry in drawn["annotations"]}
        assert drawn["info"][RECORD]["short_classes"] == {n: c for n, c in available.items() if c < shots}
        smaller = ids(drawn)


def test_shots_must_be_whole():
    for wrong in (0, 2.5, -1):
        with pytest.raises(ValueError, match="whole numbers of boxes per class"):
            k_shot(random_content(), wrong, 0)


def test_classes_are_parted_with_their_boxes():
    source = content({"a": ["cat", "owl"], "b": ["owl"], "c": [], "d": ["cat"]})
    parts = base_and_novel(source, ["owl"])
    assert [c["name"] for c in parts["base"]["categories"]] == ["cat"]
    assert [i["file_name"] for i in parts["base"]["images"]] == ["a", "d"]
    assert [i["file_name"] for i in parts["novel"]["images"]] == ["a", "b"]
    assert ids(parts["base"]) == {0, 3} and ids(parts["novel"]) == {1, 2}
    drawn = base_and_novel(source, 1, seed=0)
    assert [c["name"] for c in drawn["novel"]["categories"]] == hash_order(["cat", "owl"], 0)[:1]


@pytest.mark.parametrize("wrong", [(), 0, 2, -1, ["cat", "owl"]])
def test_both_sides_need_classes(wrong):
    with pytest.raises(ValueError, match="expected 1 to 1 of the 2 classes"):
        base_and_novel(content({"a": ["cat", "owl"]}), wrong)


def test_unknown_classes_are_named():
    with pytest.raises(ValueError, match="novel: yak are not among the classes cat, owl"):
        base_and_novel(content({"a": ["cat", "owl"]}), ["yak"])


def test_the_hash_sees_content_alone():
    source = random_content()
    renumbered = json.loads(json.dumps(source))
    for entry in (*renumbered["images"], *renumbered["annotations"]):
        entry["id"] += 1000
    for entry in renumbered["annotations"]:
        entry["image_id"] += 1000
    assert content_hash(source) == content_hash(shuffled(source)) == content_hash(renumbered)
    renumbered["annotations"][0]["bbox"][0] += 1
    assert content_hash(source) != content_hash(renumbered)


@pytest.mark.parametrize(
    ("protocol", "options", "files"),
    [
        ("fractions", {"amounts": [0.1, 1]}, ["fraction-0.1-seed0", "fraction-1"]),
        ("shots", {}, ["shots-1-seed0", "shots-5-seed0", "shots-10-seed0", "shots-30-seed0"]),
        ("shots", {"amounts": [3]}, ["shots-3-seed0"]),
        ("rf20-vl-fsod", {}, ["rf20-vl-fsod-seed0"]),
        ("classes", {"novel": ["owl"]}, ["base", "novel"]),
        ("classes", {"novel": 1}, ["base-seed0", "novel-seed0"]),
    ],
)  # fmt: skip
def test_files_are_equal_in_any_order_of_the_source(protocol, options, files, tmp_path):
    source = random_content()
    written = []
    for name, given in {"one": source, "other": shuffled(source)}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(given))
        written.append(split(tmp_path / f"{name}.json", tmp_path / name, protocol, seeds=[0], **options))
    assert [path.stem for path in written[0]] == files
    for one, other in zip(*written, strict=True):
        assert one.read_bytes() == other.read_bytes()
        made = json.loads(one.read_text())
        record = made["info"][RECORD]
        assert record["source_sha256"] == content_hash(source)
        assert (record["source_images"], record["protocol"]) == (40, protocol)
        assert made["licenses"] == ["mine"]
        assert len(read_labels(one, strict=True)) == len(made["images"])


def test_ten_shots_are_those_of_rf20_vl(tmp_path):
    (tmp_path / "all.json").write_text(json.dumps(random_content()))
    named = split(tmp_path / "all.json", tmp_path, "rf20-vl-fsod", seeds=[2])[0]
    plain = split(tmp_path / "all.json", tmp_path, "shots", amounts=[10], seeds=[2])[0]
    named, plain = (json.loads(path.read_text()) for path in (named, plain))
    assert named["annotations"] == plain["annotations"]
    assert named["info"][RECORD]["score"] == "COCO AP on the whole test set"


def test_options_of_other_protocols_are_refused(tmp_path):
    (tmp_path / "all.json").write_text(json.dumps(random_content()))
    with pytest.raises(ValueError, match="rf20-vl-fsod takes no amounts"):
        split(tmp_path / "all.json", tmp_path, "rf20-vl-fsod", amounts=[5])
    with pytest.raises(ValueError, match="shots takes no novel"):
        split(tmp_path / "all.json", tmp_path, "shots", novel=["owl"])
    with pytest.raises(LabelError, match="no COCO annotation file"):
        (tmp_path / "none.json").write_text("{}")
        split(tmp_path / "none.json", tmp_path, "shots")

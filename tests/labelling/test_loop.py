"""Orders for a person, and two rounds with a simulated one."""

from __future__ import annotations

import csv
import json
import logging
from dataclasses import replace

import numpy as np
import pytest

from simdetr.data.annotations import Category
from simdetr.data.coco import write_coco
from simdetr.data.images import open_images
from simdetr.data.label_files import read_labels
from simdetr.labelling import loop
from simdetr.labelling.annotator import SimulatedAnnotator
from simdetr.labelling.consensus import Consensus
from simdetr.labelling.image_selection import STRATEGIES, Pool
from simdetr.labelling.loop import (
    LoopSettings,
    _decision,
    by_hand,
    contradicted,
    inspect,
    label_order,
    simulate_labelling,
)
from simdetr.training.run_folder import RunMismatchError
from tests.labelling.test_candidates import labels_of, row_of_boxes

A, B, C = row_of_boxes(3)


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_an_order_has_a_reason_for_every_image(pretrained, scenes, tmp_path):
    order = label_order(scenes, tmp_path / "order.csv", init=pretrained, encoder="colour-texture", device="cpu")
    rows = rows_of(tmp_path / "order.csv")
    assert [row["image"] for row in rows] == list(order.image_ids) and len(rows) == 12
    assert [int(row["place"]) for row in rows] == list(range(1, 13)) and all(row["reason"] for row in rows)
    assert order.strategy == "interleave"


def test_what_people_labelled_is_not_ordered_again(pretrained, scenes, tmp_path):
    truth = read_labels(scenes / "instances.json")
    write_coco(truth.select(truth.image_ids[:4]), tmp_path / "people.json")
    order = label_order(
        scenes, tmp_path / "order.csv", init=pretrained, people=tmp_path / "people.json", encoder="colour-texture"
    )
    assert order.strategy == "mixed" and set(order.image_ids) == set(truth.image_ids[4:])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategy": "best"}, "strategy: expected one of .*'mixed'.*, got 'best'"),
        ({"encoder": "no_such_model"}, "no_such_model"),
        ({"out": "."}, "out: expected a file name"),
        ({"init": "nowhere"}, "checkpoint: expected a run folder, .* nowhere, which does not exist"),
    ],
)
def test_what_is_wrong_is_said_before_the_work(pretrained, scenes, tmp_path, monkeypatch, options, said):
    monkeypatch.setattr(loop, "predict", None)
    out = tmp_path / options.pop("out", "order.csv")
    with pytest.raises((ValueError, OSError), match=said):
        label_order(scenes, out, **{"init": pretrained, **options})


def test_one_image_and_one_that_cannot_be_read(pretrained, own_scenes, tmp_path):
    source = open_images(own_scenes)
    first, second = source.ids[:2]
    source.path_of(second).write_bytes(b"no image")
    for strategy in STRATEGIES:
        order = label_order(source.subset([first, second]), tmp_path / "order.csv", init=pretrained,
                            encoder="colour-texture", strategy=strategy, device="cpu")  # fmt: skip
        assert order.image_ids == (first,) and order.excluded == (second,)
    assert [row["image"] for row in rows_of(tmp_path / "order.csv")] == [first]


def test_a_detector_that_contradicts_a_person_has_the_image_shown_again(pretrained, scenes, tmp_path, monkeypatch):
    """Of two labelled images: in one the detector is sure of another class, in the other it is not sure."""
    truth = read_labels(scenes / "instances.json")
    source, own = open_images(scenes), truth.select(truth.image_ids[:2])
    write_coco(own, tmp_path / "people.json")
    scores = np.where(own.owners == 0, 0.51, 0.5).astype(np.float32)
    found = replace(own, classes=(own.classes + 1) % own.num_classes, scores=scores)
    known = read_labels(tmp_path / "people.json")
    assert contradicted(known, found) == {own.image_ids[0]}
    assert contradicted(known, replace(found, classes=own.classes)) == frozenset()
    assert contradicted(known, found.select([])) == frozenset()
    others = tuple(Category(i, f"pseudo {i}") for i in range(own.num_classes))
    assert contradicted(known, replace(found, categories=others)) == frozenset()
    monkeypatch.setattr(loop, "predict", lambda *_, **__: found)
    order = label_order(source.subset(own.image_ids), tmp_path / "order.csv", init=pretrained, strategy="random",
                        people=tmp_path / "people.json", encoder="colour-texture", device="cpu")  # fmt: skip
    assert order.image_ids == (own.image_ids[0],) and order.flags == (frozenset({"conflict"}),)


def pool_of_scores(scores):
    """An image per score, with one proposal on its object A of class 0; a second object B has none."""
    return Pool(labels_of({name: [(A, 0, score)] for name, score in scores.items()}))


TRUTH = labels_of({name: [(A, 0, 1.0), (B, 1, 1.0)] for name in "abcde"})


def test_a_round_by_hand():
    pool = pool_of_scores({"a": 0.9, "b": 0.2, "c": 0.8, "d": 0.7, "e": 0.1})
    settings = LoopSettings(strategy="random", images_per_round=2, audited_per_round=0)
    person = SimulatedAnnotator(draw_seconds=(4.0, 4.0))
    first, row = inspect(pool, None, TRUTH, None, 0, settings, person)
    # nothing is shown in the first round: two objects drawn on each of two images
    assert (row["images"], row["boxes"], row["drawn"], row["accepted"], row["seconds"]) == (2, 4, 4, 0, 16.0)
    later = Pool(pool.labels, labelled=frozenset(first.image_ids))
    sure = pool.labels.rows(np.flatnonzero(pool.labels.scores > 0.5))
    both, row = inspect(later, sure, TRUTH, first, 1, settings, person)
    shown = sum(score > 0.5 for name, score in zip("abcde", (0.9, 0.2, 0.8, 0.7, 0.1), strict=True)
                if name in both.image_ids and name not in first.image_ids)  # fmt: skip
    assert (row["images"], row["boxes"], row["accepted"], row["drawn"]) == (4, 8, shown, 4 - shown)
    assert row["seconds"] == pytest.approx(1.6 * shown + 4.0 * (4 - shown))
    assert both.image_ids[:2] == first.image_ids


def test_only_what_other_views_show_is_shown_of_new_images(scenes, monkeypatch):
    """Of three images the first is labelled; of the others' objects the first is not sure, the last not seen again."""
    source, truth = open_images(scenes), read_labels(scenes / "instances.json")
    own = truth.select(truth.image_ids[:3])
    scores = np.full(len(own.scores), 0.9, np.float32)
    new = np.flatnonzero(own.owners > 0)
    scores[new[0]] = 0.25
    pool = Pool(replace(own, scores=scores), labelled=frozenset(own.image_ids[:1]))

    def scripted(loaded, images, labels, **_):
        seen = np.ones(len(labels.scores), np.int64)
        seen[-1] = 0
        return Consensus(labels.boxes_xyxy + np.float32(2), seen, np.ones(len(seen), np.float32))

    monkeypatch.setattr(loop, "load_detector", lambda path: None)
    monkeypatch.setattr(loop, "consensus", scripted)
    shown = loop.proposals(source, pool, scenes, 0.25, device="cpu")
    assert shown.image_ids == own.image_ids and not len(shown.of(own.image_ids[0]))
    np.testing.assert_array_equal(shown.boxes_xyxy, own.boxes_xyxy[new[1:-1]] + np.float32(2))


def test_errors_left_are_estimated_from_audited_images():
    names = [f"{i:03d}" for i in range(60)]
    truth = labels_of({name: [(A, 0, 1.0), (B, 1, 1.0)] for name in names})
    pool = Pool(labels_of({name: [(A, 0, 0.9), (C, 0, 0.6)] for name in names}), labelled=frozenset(names[:1]))
    before = truth.select(names[:1])
    settings = LoopSettings(strategy="random", images_per_round=5, audited_per_round=14)
    _, row = inspect(pool, pool.labels, truth, before, 1, settings, SimulatedAnnotator())
    # on each of the 40 that are left one proposal is wrong and one object is missed: no doubt is left, and none needed
    assert row["really_left"] == 80
    assert row["errors_left"]["total"] == pytest.approx(80)
    assert row["errors_left"]["low"] <= 80 <= row["errors_left"]["high"]
    # what is wrong is so by the person's own measure: a box that covers .6 of its object, with one who accepts from .7
    loose = (A[0], A[1], A[0] + 0.6 * (A[2] - A[0]), A[3])
    pool = Pool(labels_of({name: [(loose, 0, 0.9)] for name in names}), labelled=frozenset(names[:1]))
    _, row = inspect(pool, pool.labels, truth, before, 1, settings, SimulatedAnnotator(accept_iou=0.7))
    assert row["really_left"] == 80 and row["errors_left"]["total"] == pytest.approx(80)
    _, row = inspect(pool, pool.labels, truth, before, 1, settings, SimulatedAnnotator(misses=1.0))
    assert row["really_left"] == 40


def test_the_loop_stops_when_little_is_left():
    """By the upper end of the interval, in two rounds in a row; a round without an estimate does not count."""
    counts = {"images": 9, "seconds": 1.0, "accepted": 5, "corrected": 0, "rejected": 0, "drawn": 0}
    left = {"wrong": 1.0, "missed": 1.0, "total": 2.0, "low": 0.0, "confidence": 0.95, "basis": "", "images": 50}
    low, high = ({**counts, "errors_left": {**left, "high": high, "detections": 100}} for high in (4.0, 6.0))
    settings = LoopSettings(stop_share=0.05, audited_per_round=20)
    for rows, stops in (([low, low], True), ([low, high], False), ([high, low], False), ([counts, low], False)):
        assert _decision(rows, settings).stop == stops
    assert not _decision([low, low], LoopSettings()).stop


def test_labelling_by_hand_takes_a_drawing_per_object():
    assert by_hand(TRUTH, SimulatedAnnotator(draw_seconds=(4.0, 4.0))) == pytest.approx(40.0)


def test_one_image_is_labelled_in_one_round(pretrained, scenes, tiny_config, tmp_path, caplog):
    truth, source = scenes / "instances.json", open_images(scenes)
    with caplog.at_level(logging.INFO):
        (row,) = simulate_labelling(source.subset(source.ids[:1]), truth, scenes, truth, tmp_path / "loop",
                                    [tiny_config], init=pretrained, encoder="colour-texture", device="cpu",
                                    settings=LoopSettings(rounds=3, audited_per_round=2))  # fmt: skip
    assert row["images"] == 1 and row["boxes"] == len(read_labels(truth).of(source.ids[0])) == row["drawn"]
    assert "every image is labelled after 1 rounds" in caplog.text


def test_two_rounds_and_a_resume(pretrained, scenes, tiny_config, tmp_path):
    truth = scenes / "instances.json"
    settings = LoopSettings(rounds=2, images_per_round=3, audited_per_round=2, show_above=0.02)

    def run(**changes):
        return simulate_labelling(scenes, truth, scenes, truth, tmp_path / "loop", [tiny_config], init=pretrained,
                                  encoder="colour-texture", device="cpu", settings=settings, **changes)  # fmt: skip

    rows = run()
    assert [row["images"] for row in rows] == [5, 10] and [row["strategy"] for row in rows] == ["interleave", "mixed"]
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"] and not np.isnan(rows[1]["AP"])
    labels = [read_labels(tmp_path / "loop" / f"round{i}" / "labels.parquet") for i in range(2)]
    known = read_labels(truth)
    for image_id in labels[1].image_ids:  # a person without errors leaves the truth
        np.testing.assert_allclose(labels[1].of(image_id).boxes_xyxy, known.of(image_id).boxes_xyxy, atol=1e-4)
    (tmp_path / "loop" / "rounds.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "loop").rglob("*.safetensors")}
    assert run() == rows and json.loads((tmp_path / "loop" / "rounds.json").read_text()) == rows
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "loop").rglob("*.safetensors")}
    with pytest.raises(RunMismatchError, match=r"misses is 0\.0 there, 0\.5 asked"):
        run(annotator=SimulatedAnnotator(misses=0.5))

"""Sourcing by hand: who becomes a candidate, by which threshold, and how good the candidates are."""

from __future__ import annotations

import numpy as np
import pytest

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.labels import Labels
from simdetr.labelling.candidates import (
    REASONS,
    Candidates,
    precise_score,
    quality,
    read_candidates,
    source,
    thresholds,
    without_base,
    worth_a_look,
    write_candidates,
)

CLASSES = (Category(1, "bolt"), Category(5, "nut"))
SIZE = (100, 100)


def labels_of(images, scored=True, classes=CLASSES):
    """From {image id: [(box, class index, score)]}."""
    made = [
        ImageLabels.build(name, SIZE, [row[0] for row in rows], [row[1] for row in rows],
                          [row[2] for row in rows] if scored else None)
        for name, rows in images.items()
    ]  # fmt: skip
    return Labels.from_images(made, classes)


def row_of_boxes(count, side=8):
    return [[10.0 * i, 0.0, 10.0 * i + side, side] for i in range(count)]


def test_images_with_shots_give_no_candidates_of_their_class():
    (a, b, c) = row_of_boxes(3)
    detections = labels_of({"shot.jpg": [(a, 0, 0.9), (b, 0, 0.8), (c, 1, 0.7)], "new.jpg": [(a, 0, 0.6)]})
    shots = labels_of({"shot.jpg": [(a, 0, 1.0)]})
    found = source(detections, shots)
    # the shot itself, another object of its class, one of another class, and one elsewhere
    assert found.reason.tolist() == ["person", "holds_shots", "", ""]


def test_what_people_labelled_is_theirs():
    a, b = row_of_boxes(2)
    detections = labels_of(
        {"done.jpg": [(a, 0, 0.9), (b, 1, 0.9)], "empty.jpg": [(a, 0, 0.9)], "new.jpg": [(b, 1, 0.9)]}
    )
    people = labels_of({"done.jpg": [(b, 0, 1.0)], "empty.jpg": []})
    found = source(detections, labels_of({"elsewhere.jpg": [(a, 0, 1.0)]}), people)
    assert found.reason.tolist() == ["person", "person", "person", ""]


def test_the_published_threshold_is_not_part_of_itself():
    boxes = row_of_boxes(3)
    detections = labels_of({"a": [(boxes[0], 0, 0.8), (boxes[1], 0, 1.0), (boxes[2], 1, 0.79)]})
    above = thresholds(detections, "absolute", min_score=np.float32(0.8))
    assert (detections.scores > above[detections.classes]).tolist() == [False, True, False]


def test_the_best_of_every_class():
    boxes = row_of_boxes(5)
    scores = [0.9, 0.5, 0.1, 0.2, 0.05]
    detections = labels_of({"a": [(box, int(i > 2), scores[i]) for i, box in enumerate(boxes)]})
    above = thresholds(detections, "per_class_top", most_per_class=2)
    assert (detections.scores > above[detections.classes]).tolist() == [True, True, False, True, True]


def test_the_smallest_score_with_enough_precision():
    """By hand: from the best down 1, 1, 2/3, 3/4, 3/5 are right."""
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5], np.float32)
    right = np.array([True, True, False, True, False])
    for wanted, kept in ((0.75, 4), (0.8, 2), (0.6, 5), (1.0, 2)):
        above = precise_score(scores, right, wanted)
        assert (scores > above).sum() == kept, wanted
    assert precise_score(scores, ~right, 1.0) == np.inf  # the best one is wrong
    assert precise_score(scores[:0], right[:0], 0.5) == np.inf


def test_equal_scores_stand_and_fall_together():
    scores, right = np.array([0.9, 0.5, 0.5, 0.5], np.float32), np.array([True, True, False, False])
    assert (scores > precise_score(scores, right, 0.6)).sum() == 1  # 2/3 would need one of three equal scores alone
    assert (scores > precise_score(scores, right, 0.5)).sum() == 4


def test_agreement_is_measured_as_precision_is():
    boxes, scores = row_of_boxes(4), [0.9, 0.7, 0.5, 0.3]
    detections = labels_of({"a": [(box, i % 2, scores[i]) for i, box in enumerate(boxes)]})
    agreeing = np.array([True, False, True, False])
    above = thresholds(detections, "agreement", agreeing=agreeing, agreement=0.6)
    assert (detections.scores > above[detections.classes]).tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("agreement", "agreeing: expected the votes"),
        ("precision", "left_out: expected"),
        ("best", "expected one of 'agree"),
    ],
)
def test_a_rule_says_what_it_lacks(rule, said):
    with pytest.raises(ValueError, match=said):
        thresholds(labels_of({"a": []}), rule)


def test_what_is_worth_a_look_depends_on_no_threshold():
    """Two per image of the four best, and the best of each class whatever its score."""
    boxes = row_of_boxes(4)
    detections = labels_of(
        {"a": [(boxes[0], 0, 0.9), (boxes[1], 0, 0.8), (boxes[2], 0, 0.7), (boxes[3], 1, 0.01)], "b": []}
    )
    chosen = worth_a_look(Candidates.of(detections), per_image=1.0, most_per_class=1)
    assert chosen.tolist() == [True, True, False, True]
    rejected = Candidates.of(detections).reject(np.array([True, False, False, False]), "person")
    assert worth_a_look(rejected, per_image=1.0, most_per_class=1).tolist() == [False, True, True, True]


def test_the_first_reason_stands():
    found = Candidates.of(labels_of({"a": [(box, 0, 0.5) for box in row_of_boxes(3)]}))
    found = found.reject(np.array([True, False, False]), "low_score")
    found = found.reasons(np.array(["negative", "tie"], object), np.array([0, 1]))
    assert found.reason.tolist() == ["low_score", "tie", ""]
    assert found.counts() == {"kept": 1, "low_score": 1, "tie": 1}
    assert found.kept.tolist() == [2]


def test_every_reason_has_its_words_and_others_are_refused():
    found = Candidates.of(labels_of({"a": [(row_of_boxes(1)[0], 0, 0.5)]}))
    for reason in REASONS:
        assert found.reject(np.array([True]), reason).reason.tolist() == [reason]
    with pytest.raises(ValueError, match="reason: expected some of"):
        found.reject(np.array([True]), "ugly")
    with pytest.raises(ValueError, match="vote: expected a value for each of 1"):
        found.with_evidence(vote=np.zeros(2))


def test_candidates_survive_the_disk(tmp_path):
    found = Candidates.of(labels_of({"a": [(box, 1, 0.25) for box in row_of_boxes(3)], "b": []}))
    found = found.reject(np.array([True, False, False]), "tie")
    evidence = {
        "vote": np.array([1, -2, 0]),
        "margin": np.array([0.5, np.nan, np.inf], np.float32),
        "corrected_xyxy": np.arange(12, dtype=np.float32).reshape(3, 4),
    }
    write_candidates(found.with_evidence(**evidence), tmp_path / "verify.parquet")
    again = read_candidates(tmp_path / "verify.parquet")
    assert again.reason.tolist() == found.reason.tolist() and again.labels.image_ids == ("a", "b")
    for name, values in evidence.items():
        np.testing.assert_array_equal(again.evidence[name], values)
        assert again.evidence[name].dtype == values.dtype
    empty = Candidates.of(labels_of({"a": []})).with_evidence(corrected_xyxy=np.zeros((0, 4), np.float32))
    write_candidates(empty, tmp_path / "none.parquet")
    assert read_candidates(tmp_path / "none.parquet").evidence["corrected_xyxy"].shape == (0, 4)


def test_quality_by_hand():
    """Ten candidates, six right; four of those stay and one of the wrong: precision .6 to .8, as in a table by hand."""
    boxes = row_of_boxes(10)
    truth = labels_of({"a": [(box, 0, 1.0) for box in boxes[:6]]})
    detections = labels_of({"a": [(box, 0, 0.9 - 0.01 * i) for i, box in enumerate(boxes)]})
    found = Candidates.of(detections)
    before = quality(found, detections.boxes_xyxy, truth)
    assert (before["precision"], before["recall"], before["mean_iou"]) == (0.6, 1.0, 1.0)
    kept = np.isin(np.arange(10), [0, 1, 2, 3, 6])
    after = quality(found.reject(~kept, "other_class"), detections.boxes_xyxy, truth)
    assert (after["precision"], after["recall"], after["candidates"]) == (0.8, pytest.approx(4 / 6), 5)


def test_an_object_counts_once_and_for_its_class():
    box = [0.0, 0.0, 10.0, 10.0]
    near = [0.0, 0.0, 10.0, 8.0]  # IoU .8
    truth = labels_of({"a": [(box, 0, 1.0)], "unseen": [(box, 0, 1.0)]})
    detections = labels_of({"a": [(near, 0, 0.9), (box, 0, 0.8), (box, 1, 0.99)], "no truth": [(box, 0, 0.5)]})
    scores = quality(Candidates.of(detections), detections.boxes_xyxy, truth)
    assert scores == {"precision": pytest.approx(1 / 3), "recall": 1.0, "mean_iou": pytest.approx(0.8),
                      "candidates": 3, "objects": 1}  # fmt: skip


def test_objects_known_before_are_no_candidates():
    """Classes 0 and 1: 0 was known. A labelled object of it, one that is found surer as it, and one that is not."""
    a, b, d = row_of_boxes(3)
    low = [b[0], b[1], b[2], b[3] * 0.9]
    detections = labels_of(
        {"x": [(a, 1, 0.9), (b, 0, 0.8), (low, 1, 0.7), (d, 1, 0.6)], "y": [(a, 0, 0.5), (a, 1, 0.6)]}
    )
    base = labels_of({"x": [(a, 0, 1.0)]})
    found = without_base(Candidates.of(detections), np.array([True, False]), base)
    # in y the new class is the surer one
    assert found.reason.tolist() == ["base_class", "base_class", "base_class", "", "base_class", ""]
    assert without_base(Candidates.of(detections), np.array([False, False]), None).kept.tolist() == list(range(6))

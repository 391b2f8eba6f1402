"""What people give in: shots and their contradictions, background, classes that were known before."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from simdetr.boxes import pairwise_iou
from simdetr.data.annotations import Category, LabelError
from simdetr.data.coco import write_coco
from simdetr.labelling.shots import (
    LabellingInputs,
    background_boxes,
    check_shots,
    contradictions,
    few_of,
    joined_categories,
    merged,
)
from tests.labelling.test_candidates import CLASSES, labels_of, row_of_boxes

A, B, C = row_of_boxes(3)


def test_shots_are_looked_at_before_the_work(caplog):
    box, other = row_of_boxes(2)
    with pytest.raises(LabelError, match="expected at least one box of a class"):
        check_shots(labels_of({"a": []}))
    shots = labels_of({"a": [(box, 0, 1.0), (box, 0, 1.0), (other, 0, 1.0)]})
    with caplog.at_level(logging.WARNING):
        assert check_shots(shots) == CLASSES[:1]
    assert "1 classes have none and are left out: nut" in caplog.text
    assert contradictions(shots) == []
    double = labels_of({"a": [(box, 0, 1.0), (box, 1, 1.0)]})
    assert contradictions(double) == ["a has the same box as bolt and as nut"]
    with caplog.at_level(logging.WARNING):
        check_shots(double)
    assert "shots: a has the same box as bolt and as nut" in caplog.text
    denied = labels_of({"a": [(other, 0, 1.0)]})
    assert contradictions(shots, denied) == ["a has a box of bolt that is among the negative ones too"]


def test_two_classes_on_one_object_contradict_each_other(caplog):
    """Boxes of IoU .6, .5, and .4 with the first; of one class, or in two images, they say the same or nothing."""
    over, half, less = ([A[0], A[1], A[2], part * A[3]] for part in (0.6, 0.5, 0.4))
    with caplog.at_level(logging.WARNING):
        check_shots(labels_of({"a": [(A, 0, 1.0), (over, 1, 1.0)]}))
    assert "shots: a has boxes that overlap by 0.60 as bolt and as nut" in caplog.text
    for rows in ([(A, 0, 1.0), (half, 1, 1.0)], [(A, 0, 1.0), (less, 1, 1.0)], [(A, 1, 1.0), (over, 1, 1.0)]):
        assert contradictions(labels_of({"a": rows})) == []
    assert contradictions(labels_of({"a": [(A, 0, 1.0)], "b": [(over, 1, 1.0)]})) == []
    # a negative box beside a shot shows a part of the object, which is no object
    assert contradictions(labels_of({"a": [(A, 0, 1.0)]}), labels_of({"a": [(over, 0, 1.0)]})) == []


def test_background_touches_nothing_that_may_be_an_object():
    a, b, c = row_of_boxes(3)
    shots = labels_of({"x": [(a, 0, 1.0), ([0.0, 50.0, 30.0, 70.0], 1, 1.0)], "y": [(b, 0, 1.0)]})
    detections = labels_of({"x": [([40.0, 40.0, 90.0, 90.0], 0, 0.5), (c, 0, 0.05)]})
    found = background_boxes(shots, detections, per_image=5, seed=1)
    assert found.image_ids == ("x", "y") and np.diff(found.offsets).tolist() == [5, 5]
    sides = found.of("x").boxes_xyxy[:, 2:] - found.of("x").boxes_xyxy[:, :2]
    assert {tuple(side) for side in np.round(sides).tolist()} <= {(8.0, 8.0), (30.0, 20.0)}
    known = np.concatenate([shots.of("x").boxes_xyxy, detections.of("x").boxes_xyxy[:1]])
    overlaps = pairwise_iou(torch.from_numpy(found.of("x").boxes_xyxy), torch.from_numpy(known))
    assert overlaps.max() < 0.1
    again = background_boxes(shots.select(["y", "x"]), detections, per_image=5, seed=1)
    np.testing.assert_array_equal(again.of("x").boxes_xyxy, found.of("x").boxes_xyxy)  # whatever the order
    assert background_boxes(labels_of({"empty": [], "y": [(b, 0, 1.0)]}), detections, per_image=2).image_ids == ("y",)
    full = labels_of({"x": [([0.0, 0.0, 100.0, 100.0], 0, 1.0)]})
    assert len(background_boxes(full, detections, per_image=5).boxes_xyxy) == 0


def test_two_files_may_number_their_classes_apart():
    other = (Category(5, "bolt"), Category(1, "nut"), Category(7, "unused"))
    found = labels_of({"a": [(A, 0, 1.0), (B, 1, 1.0)]}, classes=other).with_categories(CLASSES)
    assert found.classes.tolist() == [0, 1] and found.categories == CLASSES
    with pytest.raises(LabelError, match="boxes of nut have no class among bolt"):
        found.with_categories(CLASSES[:1])


def test_new_classes_get_free_ids():
    before = (Category(1, "bolt"), Category(2, "nut"))
    joined = joined_categories(before, (Category(1, "washer"), Category(2, "nut"), Category(9, "gear")))
    assert joined == (*before, Category(3, "washer"), Category(9, "gear"))


def test_few_of_many_hold_every_class():
    images = {f"{i}": [(A, 0, 1.0)] + ([(B, 1, 1.0)] if i % 3 == 0 else []) for i in range(12)}
    few = few_of(labels_of(images), 2)
    assert np.bincount(few.classes).min() >= 2 and len(few) < 8
    assert few.image_ids == few_of(labels_of(dict(reversed(images.items()))), 2).image_ids


def test_an_image_of_both_has_the_boxes_of_both():
    both = merged(labels_of({"a": [(A, 0, 1.0)], "b": []}), labels_of({"a": [(B, 1, 1.0)], "c": [(C, 1, 1.0)]}))
    assert both.image_ids == ("a", "b", "c")
    assert both.of("a").boxes_xyxy.tolist() == [A, B] and both.of("a").classes.tolist() == [0, 1]


def test_classes_known_before_come_first_and_are_told_from_new_ones(scenes, tmp_path):
    from simdetr.data.label_files import read_labels

    truth = read_labels(scenes / "instances.json")
    new = int(truth.classes[0])
    novel = truth.select(truth.image_ids[:4])
    novel = novel.rows(np.flatnonzero(novel.classes == new))
    write_coco(novel, tmp_path / "shots.json")
    write_coco(truth.rows(np.flatnonzero(truth.classes != new)), tmp_path / "base.json")
    inputs = LabellingInputs.read(scenes, tmp_path / "shots.json", base=tmp_path / "base.json")
    assert inputs.base is not None and inputs.base.categories == inputs.shots.categories
    assert inputs.is_base.tolist() == [row in truth.classes and row != new for row in range(truth.num_classes)]
    learnt = inputs.labelled()
    assert set(learnt.classes) == set(truth.classes) and len(learnt) <= len(truth)
    alone = LabellingInputs.read(scenes, tmp_path / "shots.json")
    assert not alone.is_base.any() and alone.labelled() is alone.shots

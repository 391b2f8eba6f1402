"""What becomes a label, what a region to ignore, and what people made stays."""

from __future__ import annotations

import numpy as np
import pytest

from simdetr.labelling.assembly import assemble, collapsed_classes, without_duplicates
from simdetr.labelling.candidates import Candidates
from tests.labelling.test_candidates import labels_of, row_of_boxes

A, B, C, D = row_of_boxes(4)


def candidates_of(images, rejected=()):
    """From {image id: [(box, class, score)]}; rows in ``rejected`` do not look like their class."""
    found = Candidates.of(labels_of(images))
    return found.reject(np.isin(np.arange(len(found.reason)), rejected), "other_class")


def test_kept_become_labels_and_the_uncertain_regions_to_ignore():
    found = candidates_of({"a": [(A, 0, 0.9), (B, 1, 0.5), (C, 0, 0.05)], "b": [(A, 0, 0.4)]}, rejected=(1, 2, 3))
    shots = labels_of({"shot": [(D, 1, 1.0)]})
    made = assemble(found, found.labels.boxes_xyxy, shots, ignore_above=0.1)
    # image b has nothing that is known; the background of a holds what was found with .05
    assert made.image_ids == ("shot", "a")
    of_a = made.of("a")
    assert of_a.boxes_xyxy.tolist() == [A, B] and of_a.crowd.tolist() == [False, True]
    assert of_a.classes.tolist() == [0, 1] and of_a.scores.tolist() == [1.0, 1.0]


def test_a_rejected_box_on_a_label_is_no_region_to_ignore():
    near = [A[0], A[1], A[2], A[3] * 0.6]  # IoU .6 with A
    far = [A[0], A[1], A[2], A[3] * 0.4]
    found = candidates_of({"a": [(A, 0, 0.9), (near, 1, 0.5), (far, 1, 0.5)]}, rejected=(1, 2))
    made = assemble(found, found.labels.boxes_xyxy, labels_of({"shot": [(D, 1, 1.0)]})).of("a")
    assert made.crowd.tolist() == [False, True] and made.boxes_xyxy[1].tolist() == pytest.approx(far)


def test_labels_take_the_corrected_boxes_and_weights():
    found = candidates_of({"a": [(A, 0, 0.9), (B, 1, 0.5)]}, rejected=(1,))
    corrected = np.array([B, A], np.float32)
    weights = np.array([0.25, 1.0], np.float32)
    made = assemble(found, corrected, labels_of({"shot": [(D, 1, 1.0)]}), weights=weights).of("a")
    # the label lies where the rejected one was found, which is therefore no region of its own
    assert made.boxes_xyxy.tolist() == [B] and made.scores.tolist() == [0.25]


def test_what_people_labelled_stays_as_it_is():
    found = candidates_of({"shot": [(A, 0, 0.9), (C, 1, 0.5)], "done": [(A, 0, 0.9)]}, rejected=(1,))
    shots = labels_of({"shot": [(D, 1, 1.0)], "done": [(B, 1, 1.0)]})
    people = labels_of({"done": [(B, 1, 1.0), (C, 0, 1.0)], "empty": []})
    made = assemble(found, found.labels.boxes_xyxy, shots, people)
    assert made.image_ids == ("shot", "done", "empty")
    assert made.of("done").boxes_xyxy.tolist() == [B, C] and len(made.of("empty")) == 0
    # an image of shots is labelled in part: candidates and regions to ignore come beside the shot
    assert made.of("shot").boxes_xyxy.tolist() == [D, A, C] and made.of("shot").crowd.tolist() == [False, False, True]


def test_of_two_on_one_object_the_surer_stays():
    low = [A[0], A[1], A[2], A[3] * 0.55]
    found = candidates_of({"a": [(A, 0, 0.5), (low, 1, 0.9), (B, 0, 0.3)], "b": [(A, 0, 0.1)]})
    after = without_duplicates(found, found.labels.boxes_xyxy)
    assert after.reason.tolist() == ["duplicate", "", "", ""]
    apart = found.labels.boxes_xyxy.copy()
    apart[1] = C  # corrected to another object
    assert without_duplicates(found, apart).reason.tolist() == ["", "", "", ""]
    # one that is rejected suppresses nothing
    one = candidates_of({"a": [(A, 0, 0.5), (A, 1, 0.9)]}, rejected=(1,))
    assert without_duplicates(one, one.labels.boxes_xyxy).reason.tolist() == ["", "other_class"]


def test_a_class_that_takes_all_is_told():
    images = {f"{i}": [(A, 0, 0.9)] for i in range(21)} | {"x": [(A, 1, 0.9)], "y": [(A, 1, 0.9)]}
    found = candidates_of(images)
    assert collapsed_classes(found, max_ratio=1.5) == {"bolt": 21}  # the median of 21 and 2 is 11.5
    assert collapsed_classes(found, max_ratio=2.0) == {}
    assert collapsed_classes(candidates_of({"a": []}), max_ratio=2.0) == {}

"""Certainty of mined boxes: hand-computed cases, a set drawn with the biases that it is there to take off."""

from __future__ import annotations

import numpy as np
import pytest

from simdetr.mining.certainty import ABSOLUTE_POWER, SIZE_SHARE, certainty


def boxes_of(sides, image_side=256, places=None):
    places = np.full((len(sides), 2), 20.0) if places is None else places
    return np.concatenate([places, places + np.asarray(sides)[:, None]], axis=1).astype(np.float32)


def test_two_images_by_hand():
    # one cell of the table: the expectation is one number and drops out within an image
    scores = np.array([4.0, 1.0, 2.0], np.float32)
    found = certainty(scores, boxes_of([40, 41, 42]), np.array([[256, 256]] * 2), np.array([0, 2, 3]))
    logs = np.log(scores)
    mean = logs.mean()  # the prior of 20 boxes is the same mean
    surprise = logs - SIZE_SHARE * mean
    typical = np.median([surprise[0], surprise[2]])
    expected = np.exp(surprise - surprise[[0, 0, 2]]) * (1 / (1 + np.exp(typical - surprise))) ** ABSOLUTE_POWER
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_equal_scores_say_nothing():
    found = certainty(np.ones(4, np.float32), boxes_of([10, 20, 30, 40]), np.array([[256, 256]]), np.array([0, 4]))
    np.testing.assert_array_equal(found, 1)
    nothing = certainty(np.zeros(0, np.float32), np.zeros((0, 4), np.float32), np.array([[8, 8]]), np.array([0, 0]))
    assert nothing.size == 0


def test_scale_of_scores_does_not_matter_and_images_without_boxes_are_allowed():
    rng = np.random.default_rng(0)
    scores = rng.gamma(2.0, size=60).astype(np.float32)
    boxes = boxes_of(rng.uniform(5, 200, 60))
    sizes, offsets = np.array([[256, 256]] * 4), np.array([0, 20, 20, 45, 60])
    found = certainty(scores, boxes, sizes, offsets)
    np.testing.assert_allclose(certainty(1000 * scores, boxes, sizes, offsets), found, rtol=1e-2)
    assert ((found > 0) & (found <= 1)).all()


@pytest.mark.parametrize("bias", ["size", "border"])
def test_objects_come_before_what_scores_high_everywhere(bias):
    """Every image has one small object, and ground whose score is higher for its size or its place alone."""
    rng = np.random.default_rng(1)
    images, ground = 200, 10
    boxes, scores, is_object = [], [], []
    for _ in range(images):
        corner = rng.uniform(30, 180, (1 + ground, 2))
        sides = rng.uniform(20, 40, 1 + ground)
        score = rng.lognormal(0.0, 0.3, 1 + ground)
        score[0] *= 4  # an object stands out among boxes like it
        many = slice(1, 6)
        if bias == "size":
            sides[many], corner[many] = rng.uniform(150, 220, 5), 10
        else:
            corner[many] = 0
        score[many] *= 5
        boxes.append(boxes_of(sides, places=corner))
        scores.append(score)
        is_object.append(np.arange(1 + ground) == 0)
    boxes, scores, is_object = (np.concatenate(parts) for parts in (boxes, scores, is_object))
    offsets = np.arange(images + 1) * (1 + ground)
    found = certainty(scores.astype(np.float32), boxes, np.array([[256, 256]] * images), offsets)
    before = is_object[np.argsort(-scores)][:images].mean()
    after = is_object[np.argsort(-found)][:images].mean()
    assert before < 0.15 and after > before + 0.3, (before, after)

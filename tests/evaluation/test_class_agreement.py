"""Pseudo-class accuracy on boxes whose answer is known."""

from __future__ import annotations

import pytest

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.labels import Labels
from simdetr.evaluation.class_agreement import class_agreement

A, B, C = [0, 0, 10, 10], [20, 20, 40, 40], [60, 60, 80, 80]


def labels(rows, num_classes=3):
    images = [ImageLabels.build(name, (100, 100), boxes, classes) for name, (boxes, classes) in rows.items()]
    return Labels.from_images(images, [Category(i, str(i)) for i in range(num_classes)])


def test_the_detection_that_overlaps_a_label_most_is_asked():
    trained = labels({"a": ([A, B, C], [0, 1, 2]), "b": ([A], [2]), "c": ([], [])})
    nearly = [21, 21, 40, 40]
    found = labels({"a": ([A, nearly, [20, 20, 40, 30]], [0, 2, 1]), "b": ([[5, 5, 15, 15]], [2])})
    result = class_agreement(trained, found)
    assert (result.images, result.boxes, result.found, result.agreeing) == (3, 4, 2, 1)
    assert result.accuracy == 0.5 and result.proposals_per_image == pytest.approx(4 / 3)
    assert result.summary() == (
        "1.3 proposals per image in training, pseudo-class accuracy 50.0 % of the 2 found again"
    )


@pytest.mark.parametrize("found", [labels({"a": ([A], [0])}, 1), labels({"b": ([A], [0])}, 1)])
def test_one_class_or_nothing_found_has_no_accuracy(found):
    result = class_agreement(labels({"a": ([A], [0])}, 1), found)
    assert result.accuracy is None and result.summary() == "1.0 proposals per image in training"

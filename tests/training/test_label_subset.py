from __future__ import annotations

import pytest

from simdetr.data.labels import Category, ImageLabels, Labels
from simdetr.training.label_subset import sample_images

LABELS = Labels.from_images(
    [ImageLabels.build(f"{i}.jpg", (10, 10), [], []) for i in range(40)], (Category(1, "thing"),)
)


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 4), (0.01, 1), (0.001, 1), (1.0, 40), (0.5, 20)])
def test_takes_the_fraction_and_at_least_one(fraction, count):
    ids = sample_images(LABELS, fraction, seed=0)
    assert len(set(ids)) == len(ids) == count
    assert list(ids) == [image_id for image_id in LABELS.image_ids if image_id in ids]  # in the order of the set


def test_seeds_draw_differently_and_repeat():
    assert sample_images(LABELS, 0.1, seed=0) == sample_images(LABELS, 0.1, seed=0)
    assert sample_images(LABELS, 0.1, seed=0) != sample_images(LABELS, 0.1, seed=1)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5])
def test_fractions_outside_are_errors(fraction):
    with pytest.raises(ValueError, match=r"fraction: expected a number in \(0, 1\]"):
        sample_images(LABELS, fraction, seed=0)

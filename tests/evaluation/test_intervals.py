"""AP on drawn images against pycocotools on copies of them, intervals against scipy's."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from simdetr.data.labels import Labels
from simdetr.evaluation.coco_metric import coco_metrics
from simdetr.evaluation.intervals import (
    drawn_images,
    image_interval,
    joint_interval,
    resampled_scores,
    seed_interval,
)

NAMES = ["AP", "AP50", "AP75"]


@pytest.fixture
def scored(make_labels):
    """Truth with crowds, and predictions around it and elsewhere, on 12 images, some of them empty."""
    rng = np.random.default_rng(4)
    truth, found, crowd = {}, {}, []
    for image in range(12):
        corners = rng.uniform(0, 400, (int(rng.integers(0, 7)), 2))
        boxes = np.concatenate([corners, corners + rng.uniform(30, 200, corners.shape)], axis=1)
        classes = rng.integers(0, 3, len(boxes))
        truth[f"{image:02d}"] = [(*box, int(kind)) for box, kind in zip(boxes.tolist(), classes, strict=True)]
        crowd += (rng.random(len(boxes)) < 0.1).tolist()
        moved = np.clip(boxes + rng.normal(0, 12, boxes.shape), 0, 640)
        moved[:, 2:] = np.maximum(moved[:, :2] + 1, moved[:, 2:])
        scores = rng.random(len(boxes))
        found[f"{image:02d}"] = [
            (*box, int(kind), float(score)) for box, kind, score in zip(moved.tolist(), classes, scores, strict=True)
        ]
        found[f"{image:02d}"] += [(10 * n, 5, 10 * n + 80, 90, n % 3, float(rng.random())) for n in range(5)]
    return make_labels(truth, (1, 2, 3), crowd), make_labels(found, (1, 2, 3))


def copied(labels: Labels, counts: np.ndarray) -> Labels:
    """Every image as often as it was drawn, under names of its own."""
    chosen = [index for index, count in enumerate(counts) for _ in range(count)]
    rows = [replace(labels.image(index), image_id=f"{place}") for place, index in enumerate(chosen)]
    return Labels.from_images(rows, labels.categories)


def test_every_image_once_gives_the_numbers_that_papers_print(scored):
    truth, found = scored
    once = resampled_scores(truth, found, np.ones((1, len(truth)), np.int64))
    assert {name: once[name][0] for name in NAMES} == pytest.approx({n: coco_metrics(truth, found)[n] for n in NAMES})


def test_a_drawn_image_counts_as_often_as_copies_of_it(scored):
    truth, found = scored
    counts = drawn_images(len(truth), 8, seed=1)
    drawn = resampled_scores(truth, found, counts)
    for place, row in enumerate(counts):
        expected = coco_metrics(copied(truth, row), copied(found, row))
        assert {name: drawn[name][place] for name in NAMES} == pytest.approx({n: expected[n] for n in NAMES})


def test_draws_without_objects_and_classes_without_detections(make_labels):
    truth = make_labels({"a": [(0, 0, 50, 50, 0), (60, 60, 90, 90, 1)], "b": []}, (1, 2))
    found = make_labels({"a": [(0, 0, 50, 50, 0, 0.9)], "b": []}, (1, 2))
    drawn = resampled_scores(truth, found, np.array([[2, 0], [0, 2]]))
    assert drawn["AP"][0] == 0.5 and math.isnan(drawn["AP"][1])


def test_the_interval_over_images_is_that_of_scipy(scored):
    truth, found = scored
    ours = image_interval(resampled_scores(truth, found, drawn_images(len(truth), 4000))["AP"])

    def ap(indices, axis):
        rows = np.atleast_2d(indices)
        counts = np.stack([np.bincount(row, minlength=len(truth)) for row in rows.astype(np.int64)])
        return resampled_scores(truth, found, counts)["AP"]

    theirs = stats.bootstrap(
        (np.arange(len(truth)),), ap, n_resamples=4000, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    assert ours.covers == "images"
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_the_interval_over_seeds_is_students():
    ours, theirs = [21.0, 25.5, 22.0], [18.0, 21.0, 21.5]
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    found = seed_interval(np.subtract(ours, theirs))
    assert (found.low, found.high, found.covers) == (*map(pytest.approx, expected), "seeds")
    assert seed_interval([1.0]) is None and image_interval([math.nan]) is None


def test_the_joint_interval_is_students_without_other_images_and_normal_without_other_seeds():
    values, alone = [1.0, 2.0, 4.0], seed_interval([1.0, 2.0, 4.0])
    joint = joint_interval(values, [2.0, 2.0, 2.0], num_images=50)
    assert (joint.low, joint.high) == pytest.approx((alone.low, alone.high))
    rng = np.random.default_rng(0)
    draws = rng.normal(3, 0.5, 100_000)
    equal_seeds = joint_interval([3.0, 3.0], draws, num_images=10**6)
    assert (equal_seeds.low, equal_seeds.high) == pytest.approx((3 - 1.96 * 0.5, 3 + 1.96 * 0.5), abs=0.02)
    both = joint_interval(values, draws, num_images=190)
    assert both.low < equal_seeds.low and both.covers == "seeds and images"
    assert joint_interval([1.0], draws, 190) is None


@pytest.mark.parametrize("of_seeds", [0.3, 3.0], ids=["images vary more", "seeds vary more"])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_joint_interval_holds_the_truth_at_least_as_often_as_it_says(seeds, of_seeds):
    """Differences that vary with seeds and images: of a hundred intervals 95 or more hold the true mean."""
    rng, held = np.random.default_rng(3), 0
    for _ in range(2000):
        images = rng.normal(0, 0.6)  # of the mean difference, with this set of images
        values = 2.0 + images + rng.normal(0, of_seeds, seeds)
        interval = joint_interval(values, values.mean() + rng.normal(0, 0.6, 300), 200)
        held += interval.low <= 2.0 <= interval.high
    assert held / 2000 > 0.94


def test_the_joint_interval_is_never_narrower_than_that_over_seeds():
    values = [6.0, 17.0]
    joint = joint_interval(values, np.random.default_rng(0).normal(11, 0.5, 100), 50)
    assert joint.low < seed_interval(values).low < 0

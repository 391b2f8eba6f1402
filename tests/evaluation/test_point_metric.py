"""Landmarks: pairs, errors and point-AP by hand, by loops over plain numbers, and by COCO's likeness of keypoints."""

from __future__ import annotations

import contextlib
import io
import itertools
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from simdetr.evaluation.point_metric import (
    TOLERANCES,
    nearest_pairs,
    pair_points,
    per_class_point_metrics,
    point_metrics,
    point_precisions,
)

DIAGONAL = 640 * math.sqrt(2)
NUMBERS = [
    *("class_accuracy", "point_error_px", "point_error_px_median", "point_error_percent"),
    *("point_error_percent_median", "PCK@1", "PCK@2", "PCK@5", "point_recall"),
    *("point_AP@1", "point_AP@2", "point_AP@5", "point_AP", "points"),
]


def naive_pairs(first, second):
    """Take the nearest two of all that are left, again and again."""
    left, right, pairs = list(range(len(first))), list(range(len(second))), []
    while left and right:
        i, j = min(itertools.product(left, right), key=lambda ij: math.dist(first[ij[0]], second[ij[1]]))
        left.remove(i)
        right.remove(j)
        pairs.append((i, j))
    return pairs


def test_nearest_pairs_equal_the_naive_ones():
    rng = np.random.default_rng(0)
    for _ in range(100):
        first, second = rng.random((rng.integers(0, 7), 2)), rng.random((rng.integers(0, 7), 2))
        rows, columns = nearest_pairs(first, second)
        assert list(zip(rows, columns, strict=True)) == naive_pairs(first.tolist(), second.tolist())


def test_an_exact_hit_is_paired_whatever_the_others_lose():
    rows, columns = nearest_pairs(np.array([[0.0, 0], [10, 0]]), np.array([[9.0, 0], [40, 0]]))
    assert (rows.tolist(), columns.tolist()) == ([1, 0], [0, 1])


def test_numbers_of_one_image_by_hand(make_points):
    truth = make_points({"a": [(100, 100, 0), (300, 300, 1), (500, 100, 1)]}, 2, size_hw=(600, 800))
    found = make_points(
        {"a": [(103, 104, 0, 0.9), (300, 315, 0, 0.8), (505, 112, 1, 0.6), (500, 100, 1, 0.3)]}, 2, size_hw=(600, 800)
    )
    numbers = point_metrics(truth, found)
    assert list(numbers) == NUMBERS
    expected = {
        "class_accuracy": 2 / 3,
        "point_error_px": (5 + 15 + 13) / 3,
        "point_error_px_median": 13,
        "point_error_percent": (0.5 + 1.5 + 1.3) / 3,
        "point_error_percent_median": 1.3,
        "PCK@1": 1 / 3,
        "PCK@2": 1,
        "PCK@5": 1,
        "point_recall": 1,
        # class 0: found first, at every distance; class 1: half of the recalls, by the point with 0.3 or that with 0.6
        "point_AP@1": (1 + 51 / 101 / 2) / 2,
        "point_AP@2": (1 + 51 / 101) / 2,
        "point_AP@5": (1 + 51 / 101) / 2,
        "point_AP": (3 + 2.5 * 51 / 101) / 6,
        "points": 3,
    }
    assert numbers == pytest.approx(expected)
    every = point_metrics(truth, found, min_score=0.0)
    assert every["point_error_px"] == pytest.approx((5 + 15 + 0) / 3)
    assert every["point_AP"] == pytest.approx(numbers["point_AP"])


def test_numbers_per_class(make_points):
    truth = make_points({"a": [(100, 100, 0), (300, 300, 1)], "b": [(50, 50, 1)]}, 3)
    found = make_points({"a": [(100, 103, 0, 0.9), (300, 300, 0, 0.9)]}, 3)
    table = per_class_point_metrics(truth, found, tolerances=[0.01])
    assert list(table) == [1, 2, 3]
    assert table[1]["class_accuracy"] == 1 and table[1]["point_error_px"] == pytest.approx(3)
    assert table[1]["point_AP"] == pytest.approx(1) and table[1]["points"] == 1
    assert (table[2]["class_accuracy"], table[2]["point_recall"], table[2]["PCK@1"]) == (0, 0.5, 0.5)
    assert (table[2]["point_AP"], table[2]["points"]) == (0, 2)
    assert all(math.isnan(value) for name, value in table[3].items() if name != "points") and table[3]["points"] == 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_loops_over_plain_numbers(seed, random_points):
    truth, found = random_points(seed)
    errors, right, total = [], [], 0
    for index, image_id in enumerate(truth.image_ids):
        own, other = truth.image(index), found.of(image_id)
        total += len(own)
        rows = [row for row in range(len(other)) if other.scores[row] >= 0.4]
        for i, j in naive_pairs(own.points.tolist(), other.points[rows].tolist()):
            errors.append(math.dist(own.points[i].tolist(), other.points[rows[j]].tolist()))
            right.append(own.classes[i] == other.classes[rows[j]])
    numbers = point_metrics(truth, found, min_score=0.4)
    assert 0 < np.mean(right) < 1
    assert numbers["class_accuracy"] == np.mean(right)
    assert numbers["point_error_px"] == pytest.approx(np.mean(errors))
    assert numbers["point_error_px_median"] == pytest.approx(np.median(errors))
    assert numbers["point_error_percent"] == pytest.approx(100 * np.mean(errors) / DIAGONAL)
    assert numbers["PCK@2"] == pytest.approx(sum(error <= 0.02 * DIAGONAL for error in errors) / total)
    assert numbers["point_recall"] == pytest.approx(len(errors) / total)
    by_class = per_class_point_metrics(truth, found, min_score=0.4)
    assert sum(row["points"] for row in by_class.values()) == total
    assert np.mean([row["point_AP"] for row in by_class.values()]) == pytest.approx(numbers["point_AP"])


def test_perfect_points(random_points):
    truth, _ = random_points(0)
    numbers = point_metrics(truth, truth)
    ones = ("class_accuracy", "PCK@1", "PCK@2", "PCK@5", "point_recall", "point_AP@1", "point_AP")
    assert [numbers[name] for name in ones] == pytest.approx([1] * len(ones))
    assert numbers["point_error_px"] == numbers["point_error_percent_median"] == 0


def test_nothing_to_find_and_nothing_found(make_points):
    truth, nothing = make_points({"a": [(100, 100, 0)], "b": []}), make_points({"b": []})
    missed = point_metrics(truth, nothing)
    for name in ("class_accuracy", "point_error_px", "point_error_px_median", "point_error_percent"):
        assert math.isnan(missed[name])
    assert {missed[name] for name in ("PCK@1", "PCK@5", "point_recall", "point_AP", "point_AP@2")} == {0.0}
    empty = point_metrics(nothing, make_points({"b": [(1, 1, 0)]}))
    assert all(math.isnan(value) for name, value in empty.items() if name != "points") and empty["points"] == 0


def test_unknown_points_and_crowds_are_left_out(make_points):
    nan = math.nan
    rows = {"a": [(100, 100, 0), (nan, nan, 0), (300, 300, 0)]}
    boxes = [(90, 90, 110, 110), (0, 0, 9, 9), (290, 290, 310, 310)]
    truth = make_points(rows, boxes=boxes, crowd=[False, False, True])
    found = make_points({"a": [(nan, nan, 0, 0.9), (100, 104, 0, 0.9), (300, 300, 0, 0.9)]})
    numbers = point_metrics(truth, found)
    assert (numbers["points"], numbers["point_recall"]) == (1, 1)
    assert numbers["point_error_px"] == pytest.approx(4)
    assert numbers["point_AP@1"] == pytest.approx(1)


def test_categories_are_matched_by_id(make_points):
    truth = make_points({"a": [(100, 100, 1)]}, 2)
    found = make_points({"a": [(100, 100, 0, 0.9)]}, 3)
    found = found.with_categories(found.categories[::-1])  # its class 0 is the category 1 still
    assert point_metrics(truth, found)["class_accuracy"] == 0
    found = make_points({"a": [(100, 100, 2, 0.9), (90, 100, 1, 0.9)]}, 3)  # 3 is unknown to the truth
    pairs = pair_points(truth, found)
    assert (pairs.same_class.tolist(), pairs.errors_px.tolist()) == ([False], [0.0])


def test_wrong_arguments_are_named(make_points, make_labels):
    points, boxes = make_points({"a": [(100, 100, 0)]}), make_labels({"a": [(0, 0, 9, 9, 0)]})
    for metric in (point_metrics, lambda truth, found: point_precisions(truth, found, TOLERANCES)):
        with pytest.raises(ValueError, match="truth: expected labels with points, got 1 boxes without them"):
            metric(boxes, points)
        with pytest.raises(ValueError, match="predictions: expected labels with points"):
            metric(points, boxes)
    with pytest.raises(ValueError, match=r"min_score: expected 0 to 1, got 1.5"):
        point_metrics(points, points, min_score=1.5)
    with pytest.raises(ValueError, match="tolerances: expected shares"):
        point_metrics(points, points, tolerances=[-0.1])
    for tolerances in ((), (0.1, 0.0)):
        with pytest.raises(ValueError, match="tolerances: expected shares of the diagonal above 0"):
            point_precisions(points, points, tolerances)
    with pytest.raises(ValueError, match="are not among the 1 images of the truth"):
        pair_points(points, make_points({"c": [(1, 1, 0)]}))
    with pytest.raises(ValueError, match="1 of 1 images are not among the 1 images of the truth"):
        point_precisions(points, make_points({"c": []}), TOLERANCES)


# ----------------------------------------------------------------------------------------------------------------------
# Point-AP alone.


def naive_precision(truth, found, tolerance: float, label: int) -> float:
    """Average precision of one class with loops over plain numbers; all points known, no crowds."""
    ranked = []
    for index, image_id in enumerate(truth.image_ids):
        own, other = truth.image(index), found.of(image_id)
        free = [tuple(p) for p, c in zip(own.points.tolist(), own.classes, strict=True) if c == label]
        rows = [r for r in range(len(other)) if other.classes[r] == label]
        for row in sorted(rows, key=lambda r: -other.scores[r]):
            x, y = other.points[row].tolist()
            near = [(math.hypot(x - a, y - b), (a, b)) for a, b in free]
            hit = bool(near) and min(near)[0] <= tolerance * DIAGONAL
            if hit:
                free.remove(min(near)[1])
            ranked.append((float(other.scores[row]), hit))
    ranked.sort(key=lambda pair: -pair[0])
    total = int((truth.classes == label).sum())
    curve, hits = [], 0
    for count, (_, hit) in enumerate(ranked, start=1):
        hits += hit
        curve.append((hits / total, hits / count))
    levels = np.linspace(0, 1, 101)
    return float(np.mean([max((p for r, p in curve if r >= level), default=0.0) for level in levels]))


def keypoint_precisions(truth, found) -> np.ndarray:
    """The same by COCO's own likeness of keypoints: it falls below exp(-tolerance² / 2) at that distance."""
    keys = ("id", "image_id", "category_id", "keypoints", "num_keypoints", "bbox", "area", "iscrowd", "score")
    cocos = []
    for labels in (truth, found):
        images = [truth.row_of(image_id) for image_id in labels.image_ids for _ in labels.of(image_id).scores]
        columns = (images, labels.classes.tolist(), labels.points.tolist(), labels.scores.tolist())
        rows = [
            (0, image, label + 1, [*point, 2], 1, [0, 0, 640, 640], DIAGONAL**2, 0, score)
            for image, label, point, score in zip(*columns, strict=True)
        ]
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i} for i in range(len(truth))],
            "categories": [{"id": i + 1} for i in range(truth.num_classes)],
            "annotations": [dict(zip(keys, (i, *row[1:]), strict=True)) for i, row in enumerate(rows, start=1)],
        }
        coco.createIndex()
        cocos.append(coco)
    evaluation = COCOeval(*cocos, "keypoints")
    evaluation.params.kpt_oks_sigmas = np.array([0.5])
    evaluation.params.iouThrs = np.exp(-(np.array(TOLERANCES) ** 2) / 2)
    evaluation.params.maxDets = [100]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"][:, :, :, 0, 0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_loops_and_cocos_keypoints(seed, random_points):
    truth, found = random_points(seed)
    precisions = point_precisions(truth, found, TOLERANCES)
    assert precisions.shape == (3, 101, 3)
    for row, tolerance in enumerate(TOLERANCES):
        for label in range(3):
            naive = naive_precision(truth, found, tolerance, label)
            assert precisions[row, :, label].mean() == pytest.approx(naive, abs=1e-12)
    assert 0 < precisions.mean() < 0.9  # the data can tell right from wrong
    with contextlib.redirect_stdout(io.StringIO()):
        expected = keypoint_precisions(truth, found)
    assert np.abs(precisions - expected).max() < 1e-12


def test_one_wrong_point_between_two_right_ones(make_points):
    truth = make_points({"a": [(100, 100, 0), (300, 300, 0)]})
    found = make_points({"a": [(101, 100, 0, 0.9), (500, 100, 0, 0.8), (300, 302, 0, 0.7)]})
    precisions = point_precisions(truth, found, [0.02])
    assert precisions.mean() == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_distances_at_the_tolerance_count(make_points):
    truth = make_points({"a": [(100, 100, 0)]}, size_hw=(300, 400))
    found = make_points({"a": [(106, 108, 0, 0.9)]}, size_hw=(300, 400))  # 10 of a diagonal of 500
    assert point_precisions(truth, found, [0.02]).mean() == pytest.approx(1)
    assert point_precisions(truth, found, [0.0199]).mean() == 0


def test_a_point_is_found_once_and_by_the_better_score(make_points):
    truth = make_points({"a": [(100, 100, 0)]})
    found = make_points({"a": [(100, 100, 0, 0.5), (103, 100, 0, 0.9), (100, 101, 0, 0.4)]})
    assert point_precisions(truth, found, [0.01]).mean() == pytest.approx(1)  # the others come behind the last recall
    found = make_points({"a": [(100, 100, 0, 0.5), (160, 100, 0, 0.9)]})
    assert point_precisions(truth, found, [0.01]).mean() == pytest.approx(0.5)


def test_other_classes_and_images_do_not_count(make_points):
    truth = make_points({"a": [(100, 100, 0)], "b": [(100, 100, 1)]}, classes=3)
    found = make_points({"b": [(100, 100, 0, 0.9)], "a": [(100, 100, 1, 0.9)]}, classes=3)
    precisions = point_precisions(truth, found, TOLERANCES)
    assert not precisions[:, :, :2].any()
    assert (precisions[:, :, 2] == -1).all()


def test_objects_without_a_point_neither_count_nor_punish(make_points):
    nan = math.nan
    truth = make_points({"a": [(100, 100, 0), (nan, nan, 0)]}, boxes=[(90, 90, 110, 110), (300, 300, 400, 400)])
    inside = make_points({"a": [(100, 100, 0, 0.5), (350, 350, 0, 0.9)]})
    assert point_precisions(truth, inside, [0.01]).mean() == pytest.approx(1)
    outside = make_points({"a": [(100, 100, 0, 0.5), (450, 450, 0, 0.9)]})
    assert point_precisions(truth, outside, [0.01]).mean() == pytest.approx(0.5)
    nothing = make_points({"a": [(100, 100, 0, 0.5), (nan, nan, 0, 0.9)]})
    assert point_precisions(truth, nothing, [0.01]).mean() == pytest.approx(1)
    assert point_precisions(truth, truth, [0.01]).mean() == pytest.approx(1)


def test_crowds_neither_count_nor_punish(make_points):
    boxes = [(90, 90, 110, 110), (300, 300, 400, 400)]
    rows = {"a": [(100, 100, 0), (350, 350, 0)]}
    found = make_points({"a": [(100, 100, 0, 0.5), (310, 310, 0, 0.9), (390, 310, 0, 0.8)]})
    crowded, single = make_points(rows, boxes=boxes, crowd=[False, True]), make_points(rows, boxes=boxes)
    assert point_precisions(crowded, found, [0.01]).mean() == pytest.approx(1)
    assert point_precisions(single, found, [0.01]).mean() < 0.5


def test_no_predictions_no_truth(make_points):
    truth = make_points({"a": [(100, 100, 0)], "b": []})
    assert not point_precisions(truth, make_points({}), TOLERANCES).any()
    assert (point_precisions(make_points({"a": []}), make_points({"a": [(1, 1, 0, 0.5)]}), TOLERANCES) == -1).all()

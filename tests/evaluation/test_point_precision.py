import contextlib
import io
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from simdetr.evaluation.point_metric import point_precisions

TOLERANCES = (0.01, 0.02, 0.05)
DIAGONAL = 640 * math.sqrt(2)


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
        rows = [
            (0, truth.row_of(image_id), c + 1, [*p, 2], 1, [0, 0, 640, 640], DIAGONAL**2, 0, float(s))
            for image_id in labels.image_ids
            for c, p, s in zip(
                labels.of(image_id).classes.tolist(),
                labels.of(image_id).points.tolist(),
                labels.of(image_id).scores,
                strict=True,
            )
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


def test_wrong_arguments_are_named(make_points, make_labels):
    points, boxes = make_points({"a": [(100, 100, 0)]}), make_labels({"a": [(0, 0, 9, 9, 0)]})
    with pytest.raises(ValueError, match="truth: expected labels with points"):
        point_precisions(boxes, points, TOLERANCES)
    with pytest.raises(ValueError, match="predictions: expected labels with points"):
        point_precisions(points, boxes, TOLERANCES)
    for tolerances in ((), (0.1, 0.0)):
        with pytest.raises(ValueError, match="tolerances: expected shares of the diagonal above 0"):
            point_precisions(points, points, tolerances)
    with pytest.raises(ValueError, match="1 of 1 images are not among the 1 images of the truth"):
        point_precisions(points, make_points({"c": []}), TOLERANCES)

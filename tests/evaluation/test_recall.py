import math

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from simdetr.evaluation.recall import proposal_recall

THRESHOLDS = np.linspace(0.5, 0.95, 10)
SIZE_LIMITS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}


def greedy_hits(truth, proposals, wanted, limit: int, threshold: float) -> int:
    """Wanted truth boxes taken by the best-scored proposals, each taking the free one that it covers best."""
    order = np.argsort(-proposals.scores, kind="stable")[:limit]
    overlaps = box_iou(torch.tensor(proposals.boxes_xyxy[order]).double(), torch.tensor(truth.boxes_xyxy).double())
    free = set(np.flatnonzero(wanted).tolist())
    hits = 0
    for row in overlaps.tolist():
        covered = [index for index in free if row[index] >= threshold]
        if covered:
            free.remove(max(covered, key=lambda index: row[index]))
            hits += 1
    return hits


def brute_force(truth, proposals, max_boxes):
    result = {}
    for suffix, (low, high) in SIZE_LIMITS.items():
        for limit in max_boxes:
            recalls = []
            for threshold in THRESHOLDS:
                hits = objects = 0
                for image_id in truth.image_ids:
                    image = truth.of(image_id)
                    wanted = ~image.crowd & (image.areas >= low) & (image.areas <= high)
                    objects += int(wanted.sum())
                    hits += greedy_hits(image, proposals.of(image_id), wanted, limit, threshold)
                recalls.append(hits / objects)
            result[f"AR@{limit}{suffix}"] = float(np.mean(recalls))
            result[f"recall50@{limit}{suffix}"] = recalls[0]
    return result


def test_equals_brute_force_on_random_boxes(make_labels):
    rng = np.random.default_rng(3)
    objects, found, crowd = {}, {}, []
    for index in range(8):
        rows, guesses = [], []
        for _ in range(rng.integers(1, 9)):
            corner, sides = rng.uniform(0, 300, 2), np.exp(rng.uniform(np.log(10), np.log(300), 2))
            box = np.concatenate([corner, corner + sides])
            rows.append((*box, int(rng.integers(3))))
            crowd.append(bool(rng.random() < 0.1))
            for _ in range(rng.integers(0, 5)):
                moved = box + np.tile(sides, 2) * rng.normal(0, 0.08, 4)
                if (moved[2:] > moved[:2]).all():
                    guesses.append((*moved, int(rng.integers(3)), float(rng.random())))
        objects[f"{index}.jpg"], found[f"{index}.jpg"] = rows, guesses
    truth = make_labels(objects, (1, 2, 3), crowd)
    proposals = make_labels(found, (1, 2, 3))
    max_boxes = (1, 3, 10)
    recall = proposal_recall(truth, proposals, max_boxes)
    assert any(crowd) and 0.1 < recall["AR@3"] < recall["AR@10"] < 0.9
    assert recall == pytest.approx(brute_force(truth, proposals, max_boxes))


def test_hand_computed_recall_by_rank_overlap_and_size(make_labels):
    truth = make_labels({"a": [(0, 0, 200, 200, 0), (300, 300, 320, 320, 1)], "b": [(0, 0, 50, 50, 0)]}, (1, 2))
    proposals = make_labels(
        {
            # a wrong class does not matter; the small object is only hit by the last box, whose IoU is 0.81
            "a": [(0, 0, 200, 200, 1), (400, 400, 500, 500, 0), (300, 300, 318, 318, 0)],
            "b": [],
        },
        (8, 9),
    )
    recall = proposal_recall(truth, proposals, (1, 3))
    assert recall["recall50@1"] == pytest.approx(1 / 3)
    assert recall["recall50@3"] == pytest.approx(2 / 3)
    assert recall["AR@3"] == pytest.approx((1 + 0.7) / 3)  # 0.81 passes 7 of the 10 thresholds
    assert recall["AR@3s"] == pytest.approx(0.7)
    assert recall["recall50@3m"] == 0.0
    assert recall["AR@1l"] == pytest.approx(1.0)


def test_a_proposal_takes_one_object_only(make_labels):
    truth = make_labels({"a": [(0, 0, 100, 100, 0), (0, 0, 100, 90, 0)]})
    assert proposal_recall(truth, make_labels({"a": [(0, 0, 100, 100, 0)]}))["recall50@100"] == pytest.approx(0.5)


def test_without_proposals_it_is_zero_and_without_objects_nan(make_labels):
    nothing = make_labels({"a": []})
    zero = proposal_recall(make_labels({"a": [(0, 0, 10, 10, 0)]}), nothing)
    assert (zero["AR@100"], zero["recall50@100s"]) == (0.0, 0.0)
    assert math.isnan(zero["AR@100l"])
    assert all(math.isnan(value) for value in proposal_recall(nothing, nothing).values())


def test_proposals_of_unknown_images_are_refused(make_labels):
    with pytest.raises(ValueError, match="1 of 1 images are not among the 1 images of the truth"):
        proposal_recall(make_labels({"a": []}), make_labels({"z": []}))

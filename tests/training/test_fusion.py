"""Fusion of detections and mined boxes: hand-computed cases."""

import numpy as np
import pytest

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.labels import Labels
from simdetr.mining.pseudo_labels import certainty
from simdetr.training import fusion
from simdetr.training.fusion import Fusion, fuse

CATEGORIES = (Category(1, "a"), Category(2, "b"))


def labels_of(boxes, classes, scores, image_id="i", stage=0):
    image = ImageLabels.build(image_id, (100, 100), np.array(boxes, np.float32).reshape(-1, 4), classes, scores)
    return Labels.from_images([image], CATEGORIES, stage)


@pytest.fixture
def as_joined(monkeypatch):
    """Scores as they are joined, before they become a certainty."""
    monkeypatch.setattr(fusion, "certainty", lambda scores, *where: scores)


@pytest.mark.usefixtures("as_joined")
def test_a_detection_takes_part_of_the_mined_box_and_both_scores():
    found = labels_of([[10, 10, 30, 30]], [1], [0.64], stage=1)
    mined = labels_of([[12, 10, 32, 30]], [0], [0.25])
    fused = fuse(found, mined, Fusion(mined_box=0.5, mined_score=0.5, max_iou=0.55), max_boxes=10)
    np.testing.assert_allclose(fused.boxes_xyxy, [[11, 10, 31, 30]])  # the mined box itself is suppressed
    np.testing.assert_allclose(fused.scores, [0.4], rtol=1e-6)
    assert fused.classes.tolist() == [1] and fused.stage == 1 and fused.categories == CATEGORIES


@pytest.mark.usefixtures("as_joined")
def test_what_only_one_of_them_says_stays_with_less_trust():
    found = labels_of([[10, 10, 30, 30]], [1], [0.81], stage=1)
    mined = labels_of([[60, 60, 90, 90]], [0], [0.64])
    fused = fuse(found, mined, Fusion(mined_score=0.5, unmatched=0.04), max_boxes=10)
    np.testing.assert_allclose(fused.boxes_xyxy, [[10, 10, 30, 30], [60, 60, 90, 90]])
    np.testing.assert_allclose(fused.scores, [0.18, 0.16], rtol=1e-6)
    assert fused.classes.tolist() == [1, 0]


def test_of_several_mined_boxes_the_near_and_certain_one_is_taken():
    found = labels_of([[0, 0, 20, 20]], [0], [1.0], stage=1)
    mined = labels_of([[0, 0, 22, 20], [0, 0, 20, 24]], [0, 0], [0.1, 0.9])
    fused = fuse(found, mined, Fusion(mined_box=1.0), max_boxes=1)
    np.testing.assert_allclose(fused.boxes_xyxy, [[0, 0, 20, 24]])


def test_empty_sides_and_limits():
    none, nothing_mined = labels_of([], [], [], stage=1), labels_of([], [], [])
    mined = labels_of([[0, 0, 10, 10], [50, 50, 60, 60]], [0, 1], [0.9, 0.5])
    settings = Fusion()
    assert len(fuse(none, nothing_mined, settings, max_boxes=5).scores) == 0
    alone = fuse(none, mined, settings, max_boxes=1)
    np.testing.assert_allclose(alone.boxes_xyxy, [[0, 0, 10, 10]])
    elsewhere = labels_of([[0, 0, 10, 10]], [0], [0.7], image_id="other", stage=1)
    np.testing.assert_allclose(fuse(elsewhere, mined, settings, max_boxes=5).boxes_xyxy, [[0, 0, 10, 10]])


@pytest.mark.usefixtures("as_joined")
@pytest.mark.parametrize("image_id", ["i", "not mined"])
def test_a_detection_is_as_sure_where_nothing_was_mined_as_beside_another_object(image_id):
    found = labels_of([[10, 10, 30, 30]], [1], [0.3], stage=1)
    beside = fuse(found, labels_of([[60, 60, 90, 90]], [0], [0.64]), Fusion(), max_boxes=2)
    here = labels_of([[10, 10, 30, 30]], [1], [0.3], image_id, stage=1)
    alone = fuse(here, labels_of([], [], []), Fusion(), max_boxes=2)
    assert alone.scores[0] == beside.scores[beside.classes == 1][0] < 0.3


@pytest.mark.usefixtures("as_joined")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_later_stages_change_what_is_known_less(stage):
    """From T0 on, scores are a weighted geometric mean; a detector of stage j counts a j-th of the first."""
    found = labels_of([[10, 10, 30, 30]], [1], [0.64], stage=stage)
    before = labels_of([[10, 10, 30, 30]], [0], [0.25], stage=stage - 1)
    fused = fuse(found, before, Fusion(mined_score=0.7), max_boxes=1)
    np.testing.assert_allclose(fused.scores, [0.64 ** (0.3 / stage) * 0.25 ** (1 - 0.3 / stage)], rtol=1e-6)
    assert fused.stage == stage


def test_later_stages_take_what_size_explains_off_the_detections_alone():
    rng = np.random.default_rng(0)
    images = [
        ImageLabels.build(f"{n}", (100, 100), [[5, 5, 60, 60], [70, 70, 80, 80]], [0, 0], [0.8, rng.uniform(0.1, 0.3)])
        for n in range(40)
    ]
    found, before = (Labels.from_images(images, CATEGORIES, stage) for stage in (2, 1))
    fused = fuse(found, before, Fusion(mined_score=0.6), max_boxes=2)
    sure = certainty(found.scores, found.boxes_xyxy, found.sizes_hw, found.offsets)
    expected = np.maximum(sure, 0.05) ** 0.2 * before.scores**0.8
    np.testing.assert_allclose(np.sort(fused.scores), np.sort(expected), rtol=1e-5)


def test_fused_scores_lose_what_size_explains(monkeypatch):
    """In every image the largest box is found and scores high: being large is no news."""
    rng = np.random.default_rng(0)
    images = []
    for number in range(40):
        corners = rng.uniform(5, 40, (4, 2))
        sides = np.array([50.0, 12, 12, 12])[:, None]
        scores = np.array([0.8, 0.5, 0.2, 0.2]) * rng.uniform(0.9, 1, 4)
        boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
        images.append(ImageLabels.build(f"{number}", (100, 100), boxes, [0] * 4, scores))
    found = Labels.from_images(images, CATEGORIES, 1)
    fused = fuse(found, found, Fusion(), max_boxes=4)
    with monkeypatch.context() as patch:
        patch.setattr(fusion, "certainty", lambda scores, *where: scores)
        joined = fuse(found, found, Fusion(), max_boxes=4)
    expected = certainty(joined.scores, joined.boxes_xyxy, joined.sizes_hw, joined.offsets)
    np.testing.assert_array_equal(fused.scores, expected)
    is_large = fused.boxes_xyxy[:, 2] - fused.boxes_xyxy[:, 0] > 30
    before = joined.scores[is_large].mean() / np.delete(joined.scores, np.flatnonzero(is_large)).mean()
    after = fused.scores[is_large].mean() / np.delete(fused.scores, np.flatnonzero(is_large)).mean()
    assert after < before - 0.3


@pytest.mark.parametrize("name", ["iou", "mined_box", "mined_score", "unmatched", "max_iou"])
def test_settings_are_checked(name):
    with pytest.raises(ValueError, match=f"fusion.{name}: expected 0 to 1, got 2"):
        Fusion(**{name: 2})


def test_detections_without_a_stage_are_refused():
    none = labels_of([], [], [])
    with pytest.raises(ValueError, match=r"^found: expected detections of stage 1 or later, got stage 0"):
        fuse(none, none, Fusion(), max_boxes=1)

"""Fusion of detections and mined boxes: hand-computed cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from simdetr.data.annotations import LINEAGE_COLUMNS, Category, ImageLabels, Lineage
from simdetr.data.labels import Labels
from simdetr.mining.certainty import certainty
from simdetr.training import fusion
from simdetr.training.fusion import Fusion, fuse, inherit

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


# ----------------------------------------------------------------------------------------------------------------------
# Lineage.


def stage_labels(stage, boxes):
    """Labels of images of 100 px from {id: boxes}."""
    rows = [ImageLabels.build(name, (100, 100), own, np.zeros(len(own))) for name, own in boxes.items()]
    return Labels.from_images(rows, [Category(1, "object")], stage)


def mined(boxes):
    """Labels T0 whose n-th box was found at stride 16 in cluster n of K = 8."""
    labels = stage_labels(0, boxes)
    rows = len(labels.classes)
    found = {"stride": np.full(rows, 16), "k": np.full(rows, 8), "cluster": np.arange(rows)}
    return replace(labels, lineage=replace(Lineage.first_seen(0, labels.offsets), **found))


def lineages(labels):
    """(born, born_row, stride, k, cluster) of every box."""
    return list(zip(*(getattr(labels.lineage, name).tolist() for name in LINEAGE_COLUMNS), strict=True))


@pytest.mark.parametrize(
    ("box", "inherits"),
    [
        ([0, 0, 10, 10], True),
        ([0, 0, 10, 20], True),  # IoU 100 / 200, exactly a half
        ([0, 0, 10, 5], True),
        ([0, 0, 10, 21], False),
        ([0, 0, 10, 4], False),
        ([20, 20, 30, 30], False),
        ([0, 0, 0, 0], False),  # no area
    ],
)
def test_half_of_the_union_is_enough(box, inherits):
    labels = inherit(stage_labels(1, {"a": [box]}), mined({"a": [[50, 50, 60, 60], [0, 0, 10, 10]]}))
    assert lineages(labels) == [(0, 1, 16, 8, 1) if inherits else (1, 0, 0, 0, -1)]


def test_of_two_candidates_the_one_that_overlaps_more():
    near, nearer = [0, 0, 10, 14], [0, 0, 10, 12]  # IoU with the box: 10 / 14 and 10 / 12
    for candidates in ([near, nearer], [nearer, near]):
        labels = inherit(stage_labels(1, {"a": [[0, 0, 10, 10]]}), mined({"a": candidates}))
        assert lineages(labels) == [(0, candidates.index(nearer), 16, 8, candidates.index(nearer))]
    equal = inherit(stage_labels(1, {"a": [[0, 0, 10, 10]]}), mined({"a": [near, near]}))
    assert lineages(equal) == [(0, 0, 16, 8, 0)]  # the first: the better one, in stages that are sorted by score


def test_two_boxes_may_go_on_from_one():
    labels = inherit(stage_labels(1, {"a": [[0, 0, 10, 9], [0, 1, 10, 10]]}), mined({"a": [[0, 0, 10, 10]]}))
    assert lineages(labels) == [(0, 0, 16, 8, 0)] * 2


def test_images_do_not_mix_and_may_lack_boxes_or_be_new():
    box = [0, 0, 10, 10]
    before = mined({"none after": [box], "b": [[50, 50, 60, 60], box], "none before": [], "gone": [box]})
    after = stage_labels(1, {"new": [box], "b": [box, [70, 70, 80, 80]], "none before": [box], "none after": []})
    labels = inherit(after, before)
    assert lineages(labels) == [(1, 0, 0, 0, -1), (0, 1, 16, 8, 2), (1, 1, 0, 0, -1), (1, 0, 0, 0, -1)]
    assert (labels.boxes_xyxy == after.boxes_xyxy).all() and labels.image_ids == after.image_ids
    assert lineages(inherit(stage_labels(1, {}), before)) == []
    assert lineages(inherit(after, mined({}))) == [(1, row, 0, 0, -1) for row in (0, 0, 1, 0)]


def test_three_stages():
    """A mined box that shrinks by a half each time, one found by stage 1, one lost by stage 1 and found again."""
    before = mined({"a": [[0, 0, 40, 40], [60, 60, 70, 70]]})
    first = inherit(stage_labels(1, {"a": [[0, 50, 10, 60], [0, 0, 40, 20]]}), before)
    second = inherit(stage_labels(2, {"a": [[0, 0, 20, 20], [60, 60, 70, 70], [0, 50, 10, 61]]}), first)
    third = inherit(stage_labels(3, {"a": [[60, 60, 70, 71], [0, 50, 10, 60], [0, 0, 10, 20], [90, 0, 99, 9]]}), second)
    assert lineages(first) == [(1, 0, 0, 0, -1), (0, 0, 16, 8, 0)]
    assert lineages(second) == [(0, 0, 16, 8, 0), (2, 1, 0, 0, -1), (1, 0, 0, 0, -1)]
    assert lineages(third) == [(2, 1, 0, 0, -1), (1, 0, 0, 0, -1), (0, 0, 16, 8, 0), (3, 3, 0, 0, -1)]


def test_labels_of_older_versions_count_as_first_seen():
    before = stage_labels(1, {"a": [[50, 50, 60, 60], [0, 0, 10, 10]]})
    labels = inherit(stage_labels(2, {"a": [[0, 0, 10, 10], [80, 80, 90, 90]]}), before)
    assert lineages(labels) == [(1, 1, 0, 0, -1), (2, 1, 0, 0, -1)]


def test_random_boxes_agree_with_a_plain_loop():
    generator = np.random.default_rng(0)

    def draw(low, high):
        corners = generator.integers(0, 20, (generator.integers(low, high), 2))
        return np.concatenate([corners, corners + generator.integers(5, 40, corners.shape)], axis=1).tolist()

    before = mined({str(i): draw(0, 12) for i in range(30)})
    labels = inherit(stage_labels(1, {str(i): draw(0, 20) for i in reversed(range(30))}), before)
    found = iter(lineages(labels))
    inherited = 0
    for image_id in labels.image_ids:
        old = before.of(image_id)
        for row, (x0, y0, x1, y1) in enumerate(labels.of(image_id).boxes_xyxy.tolist()):
            best, parent = 0.0, None
            for number, (a0, b0, a1, b1) in enumerate(old.boxes_xyxy.tolist()):
                shared = max(0, min(x1, a1) - max(x0, a0)) * max(0, min(y1, b1) - max(y0, b0))
                iou = shared / ((x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - shared)
                if iou > best:
                    best, parent = iou, number
            if best >= 0.5:
                inherited += 1
                assert next(found) == (0, parent, 16, 8, old.lineage.cluster[parent])
            else:
                assert next(found) == (1, row, 0, 0, -1)
    assert 20 < inherited < len(labels.classes) - 20 and next(found, None) is None

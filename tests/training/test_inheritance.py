from dataclasses import replace

import numpy as np
import pytest

from simdetr.data.annotations import LINEAGE_COLUMNS, Category, ImageLabels, Lineage
from simdetr.data.labels import Labels
from simdetr.training.fusion import inherit


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

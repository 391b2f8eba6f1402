"""Boxes whose size, aspect, copies and border contacts are known by hand."""

import json

import numpy as np
import pytest

from simdetr.mining.preview import ASPECT_EDGES, SIZE_EDGES, BoxStatistics


def boxes(*rows):
    return np.array(rows, np.float32).reshape(-1, 4)


@pytest.fixture
def statistics():
    return BoxStatistics.of(
        [
            boxes((10, 10, 60, 30), (10, 10, 60, 31), (20, 40, 40, 90)),  # the first two: IoU 20 / 21
            boxes(),
            boxes((0, 5, 10, 15), (100, 50, 200, 100), (1, 1, 199, 99)),
        ],
        [(100, 100), (50, 50), (100, 200)],
    )


def test_values_are_those_of_the_boxes(statistics):
    assert statistics.per_image.tolist() == [3, 0, 3]
    assert statistics.size == pytest.approx(np.sqrt([0.1, 0.105, 0.1, 0.005, 0.25, 198 * 98 / 20000]))
    assert statistics.aspect == pytest.approx([2.5, 50 / 21, 0.4, 1, 2, 198 / 98])
    assert statistics.copied.tolist() == [True, True, False, False, False, False]
    assert statistics.at_border.tolist() == [False, False, False, True, True, False]


def test_summary_counts_every_box_once(statistics):
    summary = statistics.summary()
    assert summary["boxes"] == 6
    assert summary["per_image"] == {"min": 0, "median": 3.0, "max": 3, "images": [1, 0, 0, 2]}
    assert (summary["copied"], summary["at_border"]) == pytest.approx((2 / 6, 2 / 6))
    for name in ("size", "aspect"):
        values = getattr(statistics, name)
        assert sum(summary[name]["counts"]) == 6
        assert summary[name]["median"] == pytest.approx(np.median(values))
        counts, edges = summary[name]["counts"], summary[name]["edges"]
        assert counts[np.searchsorted(edges, values[-1], side="right") - 1] >= 1
    assert json.loads(json.dumps(summary)) == summary


def test_bins_hold_every_box_there_can_be():
    assert (SIZE_EDGES[0], SIZE_EDGES[-1]) == (0, 1)
    square = np.searchsorted(ASPECT_EDGES, 1)
    assert np.sqrt(ASPECT_EDGES[square - 1] * ASPECT_EDGES[square]) == pytest.approx(1)
    line = BoxStatistics.of([boxes((0, 0, 1000, 1), (0, 0, 1, 1000))], [(1000, 1000)])
    counts = line.summary()["aspect"]["counts"]
    assert (counts[0], counts[-1], sum(counts)) == (1, 1, 2)


def test_no_boxes_and_no_images():
    for empty in (BoxStatistics.of([], []), BoxStatistics.of([boxes()], [(5, 5)])):
        summary = empty.summary()
        assert (summary["boxes"], summary["copied"], summary["at_border"]) == (0, 0, 0)
        assert summary["size"]["median"] is None and sum(summary["size"]["counts"]) == 0

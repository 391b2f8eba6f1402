"""The column of points: its rules, COCO's keypoints, and stacking."""

import numpy as np
import pytest

from simdetr.data import points
from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.labels import Labels

NAN = float("nan")


def test_a_column_is_checked_and_typed():
    made = points.column([[1, 2], [NAN, NAN]], 2)
    assert made.dtype == np.float32 and made[0].tolist() == [1, 2] and points.known(made).tolist() == [True, False]
    assert points.column([], 0).shape == (0, 2) and np.isnan(points.unknown(3)).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, 2]], r"points: expected \(x, y\) of 2 boxes, got shape \(1, 2\)"),
        ([[1, 2, 3], [1, 2, 3]], r"of 2 boxes, got shape \(2, 3\)"),
        ([], r"of 2 boxes, got shape \(0,\)"),
        ([[1, 2], [NAN, 3]], r"NaN for both, got \[nan, 3.0\] in row 1"),
        ([[1, float("inf")], [0, 0]], r"finite \(x, y\).*got \[1.0, inf\] in row 0"),
    ],
)
def test_broken_points_are_refused(values, message):
    with pytest.raises(LabelError, match=message):
        points.column(values, 2)


def test_only_points_have_no_box_with_area():
    boxes = np.array([[5, 5, 5, 5], [5, 5, 5, 9], [5, 5, 9, 9], [5, 5, 5, 5]], np.float32)
    known = points.column([[5, 5], [5, 5], [5, 5], [NAN, NAN]], 4)
    assert points.only_points(boxes, known).tolist() == [True, True, False, False]


def test_images_without_points_have_unknown_ones_if_others_have_some():
    with_points = ImageLabels.build("a", (40, 60), [[0, 0, 9, 9]], [0], points=[[3, 4]])
    without = ImageLabels.build("b", (40, 60), [[0, 0, 9, 9]] * 2, [0, 0])
    assert Labels.from_images([without], [Category(1, "a")]).points is None
    stacked = Labels.from_images([without, with_points], [Category(1, "a")]).points
    np.testing.assert_array_equal(stacked, [[NAN, NAN], [NAN, NAN], [3, 4]])


@pytest.mark.parametrize(
    ("keypoints", "expected"),
    [([3, 4.5, 2], (3, 4.5)), ([3, 4, 1], (3, 4)), ([3, 4, 0], None), ([], None), (None, None)],
)
def test_the_one_keypoint_is_the_point_where_it_is_labelled(keypoints, expected):
    assert points.of_keypoints(keypoints) == expected


@pytest.mark.parametrize("keypoints", [[1, 2], [1, 2, 3, 4], ["a", 2, 2], [NAN, 2, 2], 5, [1, 2, None], {"x": 1}])
def test_other_keypoints_are_an_error(keypoints):
    with pytest.raises(LabelError, match=r"one keypoint \[x, y, visibility\] of finite numbers, got"):
        points.of_keypoints(keypoints)


def test_files_of_people_are_told_apart():
    one, several = {"keypoints": [1, 2, 2]}, {"keypoints": [0] * 51}
    assert points.one_each([one, {}, 5, {"keypoints": None}]) and not points.one_each([one, several])

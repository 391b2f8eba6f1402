"""Several predictions of one landmark: by hand, against a plain loop, and what must not move or merge."""

from __future__ import annotations

import pytest
import torch

from simdetr.detectors.predictions import distinct_points

SIZE = (720, 1280)
DIAGONAL = (720**2 + 1280**2) ** 0.5


def of_class_0(*places):
    return torch.tensor(places), torch.zeros(len(places), dtype=torch.int64)


def test_the_less_confident_of_a_class_goes():
    points = torch.tensor([[10.0, 12.0], [14.0, 13.0], [50.0, 50.0], [10.0, 10.0]])  # best first
    classes = torch.tensor([2, 1, 1, 1])
    assert distinct_points(points, classes, SIZE, 5.01 / DIAGONAL).tolist() == [0, 1, 2]  # 3 is 5 px away from 1
    assert distinct_points(points, classes, SIZE, 4.99 / DIAGONAL).tolist() == [0, 1, 2, 3]


def test_two_lights_35_px_apart_are_two():
    points, classes = of_class_0([600.0, 300.0], [635.0, 300.0])
    assert distinct_points(points, classes, SIZE).tolist() == [0, 1]
    assert distinct_points(points, classes, SIZE, cells=torch.tensor([1280 / 24, 720 / 12])).tolist() == [0, 1]
    assert distinct_points(points, classes, SIZE, 0.03).tolist() == [0]  # only if asked for


def test_a_grid_repeats_itself_within_half_a_subregion():
    cells = torch.tensor([40.0, 20.0])
    points, classes = of_class_0([100.0, 100.0], [119.0, 100.0], [121.0, 100.0], [100.0, 109.0], [100.0, 111.0])
    assert distinct_points(points, classes, SIZE, cells=cells).tolist() == [0, 2, 4]
    assert distinct_points(points, classes, SIZE, 0.0, cells).tolist() == [0, 1, 2, 3, 4]
    assert distinct_points(points, torch.arange(5), SIZE, cells=cells).tolist() == [0, 1, 2, 3, 4]


def test_a_chain_is_not_one_landmark():
    """Each is near the next, but only what is near one that stays goes."""
    points, classes = of_class_0([0.0, 0.0], [8.0, 0.0], [4.0, 0.0])
    assert distinct_points(points, classes, SIZE, 5 / DIAGONAL).tolist() == [0, 1]


def test_the_unsure_change_nothing_for_the_others():
    generator = torch.Generator().manual_seed(0)
    points = 100 * torch.rand(60, 2, generator=generator)
    classes = torch.randint(0, 2, (60,), generator=generator)
    every = distinct_points(points, classes, SIZE, 15 / DIAGONAL).tolist()
    for count in range(0, 60, 7):
        found = distinct_points(points[:count], classes[:count], SIZE, 15 / DIAGONAL).tolist()
        assert found == [index for index in every if index < count]


def test_without_landmarks_and_with_a_wrong_radius():
    nothing = distinct_points(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), SIZE, 0.03)
    assert nothing.shape == (0,) and nothing.dtype == torch.int64
    with pytest.raises(ValueError, match=r"point_radius: expected None, 0 or .* got -1"):
        distinct_points(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), SIZE, -1)


@pytest.mark.parametrize("seed", range(5))
def test_by_a_plain_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    points = 100 * torch.rand(60, 2, generator=generator)
    classes = torch.randint(0, 3, (60,), generator=generator)
    left, expected = list(range(60)), []
    while left:
        best = left[0]
        expected.append(best)
        left = [i for i in left if classes[i] != classes[best] or (points[i] - points[best]).norm() > 20]
    assert 3 < len(expected) < 60
    assert distinct_points(points, classes, SIZE, 20 / DIAGONAL).tolist() == expected

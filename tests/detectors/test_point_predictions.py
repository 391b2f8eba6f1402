"""Merging of landmarks: by hand, against a plain loop, and where numbers are large."""

from __future__ import annotations

import pytest
import torch

from simdetr.detectors.point_predictions import merge_points


def test_close_landmarks_of_one_class_become_one():
    points = torch.tensor([[10.0, 10.0], [14.0, 13.0], [10.0, 12.0], [50.0, 50.0]])
    classes = torch.tensor([1, 1, 2, 1])
    scores = torch.tensor([0.5, 0.75, 0.9, 0.6])
    kept, merged = merge_points(points, classes, scores, radius=5.0)
    assert kept.tolist() == [2, 1, 3]  # best first; 0 is 5 px away from 1
    torch.testing.assert_close(merged, torch.tensor([[10.0, 12.0], [12.4, 11.8], [50.0, 50.0]]))
    kept, merged = merge_points(points, classes, scores, radius=4.9)
    assert kept.tolist() == [2, 1, 3, 0]
    assert torch.equal(merged, points[kept])


def test_a_chain_is_not_one_landmark():
    """Each is near the next, but only what is near the best joins it."""
    points = torch.tensor([[0.0, 0.0], [4.0, 0.0], [8.0, 0.0]])
    kept, merged = merge_points(points, torch.zeros(3, dtype=torch.int64), torch.tensor([0.9, 0.5, 0.6]), 5.0)
    assert kept.tolist() == [0, 2]
    torch.testing.assert_close(merged, torch.tensor([[4 * 0.5 / 1.4, 0.0], [8.0, 0.0]]))


def test_of_equals_the_first_stays():
    points = torch.tensor([[1.0, 1.0], [3.0, 1.0]])
    kept, merged = merge_points(points, torch.zeros(2, dtype=torch.int64), torch.tensor([0.7, 0.7]), 5.0)
    assert kept.tolist() == [0] and merged.tolist() == [[2.0, 1.0]]


def test_without_landmarks():
    kept, merged = merge_points(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), torch.zeros(0), 5.0)
    assert kept.shape == (0,) and kept.dtype == torch.int64 and merged.shape == (0, 2)


def test_radius_0_merges_equal_places_alone_even_far_from_the_origin():
    points = torch.full((40, 2), 8000.0)
    points[:20, 0] += torch.arange(20) * 0.25
    kept, merged = merge_points(points, torch.zeros(40, dtype=torch.int64), torch.ones(40), 0.0)
    assert sorted(merged[:, 0].tolist()) == [8000 + 0.25 * step for step in range(20)] and len(kept) == 20


@pytest.mark.parametrize("seed", range(5))
def test_by_a_plain_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    points = 100 * torch.rand(60, 2, generator=generator)
    classes = torch.randint(0, 3, (60,), generator=generator)
    scores = 0.1 + 0.9 * torch.rand(60, generator=generator)
    left, expected = sorted(range(60), key=lambda i: -scores[i]), []
    while left:
        best = left[0]
        group = [i for i in left if classes[i] == classes[best] and (points[i] - points[best]).norm() <= 20]
        left = [i for i in left if i not in group]
        expected.append((best, (points[group] * scores[group, None]).sum(0) / scores[group].sum()))
    kept, merged = merge_points(points, classes, scores, 20.0)
    assert 3 < len(kept) < 60
    assert kept.tolist() == [best for best, _ in expected]
    torch.testing.assert_close(merged, torch.stack([place for _, place in expected]))

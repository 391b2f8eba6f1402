"""Batched k-means against scikit-learn's inertia, and on points that coincide."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from simdetr.mining.spectral_clustering import batched_kmeans, number_by_first_member, take_lowest


def inertia(points, labels):
    points, labels = points.numpy(), labels.numpy()
    return sum(((points[labels == k] - points[labels == k].mean(0)) ** 2).sum() for k in np.unique(labels))


def best_labels(points, num_clusters, starts=4, seed=0):
    """Of the starts the one with the lowest inertia, numbered canonically."""
    labels = batched_kmeans(points, num_clusters, starts=starts, seed=seed)
    costs = [[inertia(p, start) for start in label.T] for p, label in zip(points, labels, strict=True)]
    return number_by_first_member(take_lowest(labels, torch.tensor(costs)))


@pytest.mark.parametrize("num_clusters", [2, 4, 8])
def test_inertia_of_scikit_learn(num_clusters):
    points = torch.randn(5, 150, 6, generator=torch.Generator().manual_seed(num_clusters))
    labels = best_labels(points, num_clusters, starts=10)
    ours = [inertia(p, label) for p, label in zip(points, labels, strict=True)]
    theirs = [KMeans(num_clusters, n_init=10, random_state=0).fit(p.numpy()).inertia_ for p in points]
    assert np.mean(ours) <= 1.01 * np.mean(theirs)


def test_separated_groups_are_found():
    centres = torch.eye(8) * 10
    truth = torch.arange(8).repeat_interleave(20)[None]
    points = centres[truth] + 0.1 * torch.randn(1, 160, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(best_labels(points, 8), truth)


def test_coinciding_points_share_a_cluster():
    points = torch.eye(3)[torch.arange(30) % 3][None]
    points = points + 1e-7 * torch.randn(1, 30, 3, generator=torch.Generator().manual_seed(0))
    for num_clusters in (3, 5, 40):
        assert torch.equal(best_labels(points, num_clusters)[0], torch.arange(30) % 3)


def test_one_point_and_equal_points():
    assert torch.equal(best_labels(torch.randn(2, 1, 4), 8), torch.zeros(2, 1, dtype=torch.int64))
    assert torch.equal(best_labels(torch.zeros(2, 9, 4), 8), torch.zeros(2, 9, dtype=torch.int64))


def test_a_set_does_not_feel_its_batch():
    points = torch.randn(6, 100, 5, generator=torch.Generator().manual_seed(3))
    together = best_labels(points, 7)
    alone = torch.cat([best_labels(p[None], 7) for p in points])
    assert torch.equal(together, alone)
    assert torch.equal(best_labels(points.flip(0), 7).flip(0), together)


def test_seed_decides():
    points = torch.randn(1, 300, 3, generator=torch.Generator().manual_seed(3))
    assert torch.equal(best_labels(points, 12, seed=5), best_labels(points, 12, seed=5))
    assert not torch.equal(best_labels(points, 12, starts=1, seed=5), best_labels(points, 12, starts=1, seed=6))


def test_lowest_cost_is_taken_and_rounding_decides_nothing():
    labels = torch.arange(3).expand(3, 2, 3)
    costs = torch.tensor([[2.0, 1.0, 3.0], [1.00001, 1.0, 1.0], [5.0, 5.0, 4.0]])
    assert take_lowest(labels, costs).tolist() == [[1, 1], [0, 0], [2, 2]]


def test_numbers_follow_the_first_member():
    labels = torch.tensor([[3, 3, 0, 2, 0], [1, 1, 1, 1, 1]])
    assert number_by_first_member(labels).tolist() == [[0, 0, 1, 2, 1], [0, 0, 0, 0, 0]]

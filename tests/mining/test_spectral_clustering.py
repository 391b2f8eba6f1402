"""Spectral clustering against scikit-learn: same partition of planted graphs, no worse normalised cut on features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.metrics import adjusted_rand_score

from simdetr.mining.encoders import TimmEncoder
from simdetr.mining.spectral_clustering import (
    batched_kmeans,
    cell_affinity,
    cluster_graphs,
    leading_eigenvectors,
    lower_cut,
    normalised_cut,
    number_by_first_member,
    spectral_clustering,
    spectral_embedding,
    symmetric_eigh,
    take_lowest,
)


def planted(groups, size, seed, inside=0.8, outside=0.05):
    """Weights of a graph with ``groups`` dense groups in random node order, and the groups."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.repeat(np.arange(groups), size))
    weights = np.where(truth[:, None] == truth[None], inside, outside) * rng.uniform(0.5, 1.5, (len(truth),) * 2)
    return torch.from_numpy((weights + weights.T) / 2).float(), truth


def sklearn_labels(weights, k):
    model = SpectralClustering(k, affinity="precomputed", random_state=0)
    return torch.from_numpy(model.fit_predict(weights.double().numpy())).long()


@pytest.mark.parametrize("centre", [True, False])
def test_affinity_is_that_of_double_precision_and_no_setting_is_touched(centre, monkeypatch):
    def refuse(precision):
        raise AssertionError(f"the precision of every product of the process was set to {precision}")

    monkeypatch.setattr(torch, "set_float32_matmul_precision", refuse)
    before = torch.get_float32_matmul_precision()
    features = torch.randn(2, 300, 9, 8, generator=torch.Generator().manual_seed(0)) + 1
    cells = features.double().flatten(2)
    cells = torch.nn.functional.normalize(cells - cells.mean(dim=2, keepdim=True) * centre, dim=1)
    cosine = (cells.mT @ cells).clamp(min=0)
    torch.testing.assert_close(cell_affinity(features, "clamp", centre=centre).double(), cosine, atol=1e-5, rtol=0)
    spectral_clustering(features, [3])
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(("groups", "size"), [(2, 20), (4, 25), (8, 40), (3, 120)])
def test_planted_partition_equals_scikit_learn(groups, size):
    graphs = [planted(groups, size, seed) for seed in range(3)]
    labels = cluster_graphs(torch.stack([weights for weights, _ in graphs]), [groups])[groups]
    for (weights, truth), found in zip(graphs, labels, strict=True):
        assert adjusted_rand_score(sklearn_labels(weights, groups), found) == 1
        assert adjusted_rand_score(truth, found) == 1


def test_one_decomposition_serves_every_k(monkeypatch):
    weights, truth = planted(4, 20, seed=1)
    together = cluster_graphs(weights[None], [2, 4])
    assert torch.equal(together[4], cluster_graphs(weights[None], [4])[4])
    assert adjusted_rand_score(truth, together[4][0]) == 1
    assert together[2].max() == 1


def shapes_of_features(count, side, seed=0):
    """Smooth random feature maps with a few groups, [B, 24, side, side]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 24, 4, 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    return fine + 0.6 * torch.randn(fine.shape, generator=generator)


def assert_cut_no_worse(maps, ks, **affinity):
    """The mean cut over images and numbers of clusters is at most 0.5 % above scikit-learn's."""
    weights = cell_affinity(maps, **affinity)
    labels = cluster_graphs(weights, ks)
    ours = sum(normalised_cut(weights, labels[k]).mean() for k in ks)
    theirs = sum(normalised_cut(weights, torch.stack([sklearn_labels(w, k) for w in weights])).mean() for k in ks)
    assert ours <= 1.005 * theirs
    assert all(label.amax(dim=1).min() == k - 1 for k, label in labels.items())  # no cheaper by leaving clusters out


@pytest.mark.parametrize(("side", "ks"), [(14, [2, 4, 8]), (20, [8])])
@pytest.mark.parametrize("affinity", ["exp", "clamp"])
def test_normalised_cut_of_scikit_learn_on_drawn_features(side, ks, affinity):
    assert_cut_no_worse(shapes_of_features(6, side), ks, kind=affinity)


@pytest.mark.parametrize("affinity", ["exp", "clamp"])
def test_normalised_cut_of_scikit_learn_on_photographs(photographs, affinity):
    maps = TimmEncoder("resnet18", random_weights=True)(photographs / 255)
    assert_cut_no_worse(maps[32], [2, 4, 8], kind=affinity)


def test_lower_cut_takes_back_a_wrong_cell_and_never_loses_a_cluster():
    weights, truth = planted(3, 20, seed=2)
    labels = torch.from_numpy(truth)[None].clone()
    labels[0, :3] = (labels[0, :3] + 1) % 3
    assert torch.equal(lower_cut(weights[None], labels, 5)[0], torch.from_numpy(truth))
    assert torch.equal(lower_cut(weights[None], labels, 0), labels)
    alone = torch.tensor([[0, 1, 2, 2]])
    assert lower_cut(torch.ones(1, 4, 4), alone, 5).unique().tolist() == [0, 1, 2]


def test_normalised_cut_by_hand():
    # 0-1 with weight 3, 2-3 with weight 3, one bridge 1-2 of weight 1; self-loops must not count
    weights = torch.tensor([[[9.0, 3, 0, 0], [3, 9, 1, 0], [0, 1, 9, 3], [0, 0, 3, 9]]])
    torch.testing.assert_close(normalised_cut(weights, torch.tensor([[0, 0, 1, 1]])), torch.tensor([2 / 7]))
    torch.testing.assert_close(normalised_cut(weights, torch.tensor([[0, 0, 0, 0]])), torch.tensor([0.0]))


def test_labels_have_the_shape_of_the_map():
    labels = spectral_clustering(torch.randn(2, 5, 4, 6), [2, 3])
    assert {k: tuple(label.shape) for k, label in labels.items()} == {2: (2, 4, 6), 3: (2, 4, 6)}


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
@pytest.mark.parametrize(("height", "width"), [(14, 14), (28, 28), (1, 1), (1, 60), (1, 400)])
@pytest.mark.parametrize("affinity", ["exp", "clamp"])
@pytest.mark.parametrize("centre", [True, False])
def test_constant_features_are_one_cluster(value, height, width, affinity, centre):
    features = torch.full((2, 8, height, width), value)
    for label in spectral_clustering(features, [2, 8, 16], affinity=affinity, centre=centre).values():
        assert label.unique().tolist() == [0]


@pytest.mark.parametrize("side", [10, 24])
@pytest.mark.parametrize("affinity", ["exp", "clamp"])
def test_fewer_distinct_cells_than_clusters(side, affinity):
    rng = np.random.default_rng(0)
    kind = torch.from_numpy(rng.integers(0, 3, (1, side, side)))
    features = torch.eye(3)[kind].permute(0, 3, 1, 2)
    for k, label in spectral_clustering(features, [3, 8, 16], affinity=affinity).items():
        assert adjusted_rand_score(kind.flatten(), label.flatten()) == 1, k


def test_isolated_nodes_share_a_cluster():
    features = torch.zeros(1, 4, 6, 6)
    features[:, 0, :3] = 1  # half of the cells point one way, half have no direction
    label = spectral_clustering(features, [2], affinity="clamp", centre=False)[2][0]
    assert label[:3].unique().tolist() == [0]
    assert label[3:].unique().tolist() == [1]


@pytest.mark.parametrize("side", [12, 20])
def test_a_map_does_not_feel_its_batch(side):
    maps = shapes_of_features(5, side)
    together = spectral_clustering(maps, [4, 8])
    for k in (4, 8):
        alone = torch.cat([spectral_clustering(m[None], [4, 8])[k] for m in maps])
        assert torch.equal(together[k], alone)


def test_repeated_calls_are_equal_and_leave_the_global_generator_alone():
    maps = shapes_of_features(2, 20)
    state = torch.random.get_rng_state()
    first, second = spectral_clustering(maps, [8]), spectral_clustering(maps, [8])
    assert torch.equal(first[8], second[8])
    assert torch.equal(state, torch.random.get_rng_state())


def test_embedding_has_no_columns_without_positive_eigenvalue():
    embedding = spectral_embedding(torch.ones(1, 5, 5), 4)
    assert embedding[0, :, 1:].abs().max() == 0
    torch.testing.assert_close(embedding[0, :, 0].abs(), torch.full((5,), 5**-0.5))


def test_wrong_arguments_are_named():
    cells = torch.ones(1, 2, 1, 3)
    with pytest.raises(ValueError, match="affinity must be 'clamp' or 'exp', got 'dot'"):
        cell_affinity(cells, "dot")
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        cell_affinity(cells, "exp", 0)
    with pytest.raises(ValueError, match="at least 1, got \\[2, 0\\]"):
        cluster_graphs(torch.ones(1, 3, 3), [2, 0])


# ----------------------------------------------------------------------------------------------------------------------
# Leading eigenvectors against LAPACK in double precision, and on graphs where solvers fail.


def with_spectrum(values, nodes, seed=0):
    """A symmetric matrix with these leading eigenvalues and a low bulk."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(nodes, nodes)))[0]
    spectrum = rng.uniform(-0.2, 0.2, nodes)
    spectrum[: len(values)] = values
    return torch.from_numpy((basis * spectrum) @ basis.T).float()


def subspace_cosine(found, matrix, count):
    """Cosine of the largest angle between the found and the true leading subspace."""
    true = np.linalg.eigh(matrix.double().numpy())[1][:, -count:]
    return np.linalg.svd(found.double().numpy().T @ true, compute_uv=False).min()


@pytest.mark.parametrize("nodes", [40, 200, 500])
def test_equals_lapack(nodes):
    wanted = [1.0, 0.9, 0.85, 0.6, 0.5, 0.45]
    matrices = torch.stack([with_spectrum(wanted, nodes, seed) for seed in range(3)])
    values, vectors = leading_eigenvectors(matrices, 6)
    torch.testing.assert_close(values, torch.tensor([wanted] * 3), atol=1e-4, rtol=0)
    for matrix, found in zip(matrices, vectors, strict=True):
        torch.testing.assert_close(found.T @ found, torch.eye(6), atol=1e-4, rtol=0)
        assert subspace_cosine(found, matrix, 6) > 0.9999


@pytest.mark.parametrize("copies", [3, 4, 9])
def test_finds_every_copy_of_a_repeated_eigenvalue(copies):
    matrix = with_spectrum([1.0] * copies + [0.5] * (10 - copies), 400)[None]
    values, vectors = leading_eigenvectors(matrix, 10)
    torch.testing.assert_close(values[0], torch.tensor([1.0] * copies + [0.5] * (10 - copies)), atol=1e-4, rtol=0)
    assert subspace_cosine(vectors[0, :, :copies], matrix[0], copies) > 0.9999


def test_a_spectrum_without_gaps_is_still_solved():
    matrix = with_spectrum([0.5 - 1e-3 * i for i in range(300)], 400)[None]
    values, vectors = leading_eigenvectors(matrix, 6)
    torch.testing.assert_close(values[0], torch.tensor([0.5 - 1e-3 * i for i in range(6)]), atol=1e-5, rtol=0)
    residual = matrix[0] @ vectors[0] - vectors[0] * values[0]
    assert residual.norm(dim=0).max() < 1e-3


def test_flat_and_empty_graphs_are_finite():
    flat = (torch.ones(400, 400) - torch.eye(400)) / 399
    values, vectors = leading_eigenvectors(torch.stack([flat, torch.zeros(400, 400)]), 6)
    assert torch.isfinite(vectors).all()
    torch.testing.assert_close(values[0, 0], torch.tensor(1.0))
    assert (values[0, 1:] <= 1e-4).all()
    assert values[1].abs().max() < 1e-6


def test_a_matrix_does_not_feel_its_batch():
    hard = with_spectrum([0.5 - 2e-3 * i for i in range(200)], 400, seed=1)
    easy = with_spectrum([1.0, 0.9, 0.8, 0.7], 400, seed=2)
    alone = leading_eigenvectors(easy[None], 4)
    together = leading_eigenvectors(torch.stack([hard, easy, hard]), 4)
    torch.testing.assert_close(together[0][1], alone[0][0], atol=1e-6, rtol=0)
    torch.testing.assert_close(together[1][1], alone[1][0], atol=1e-5, rtol=0)


def test_no_more_vectors_than_nodes():
    values, vectors = leading_eigenvectors(torch.zeros(2, 3, 3), 8)
    assert values.shape == (2, 3)
    assert vectors.shape == (2, 3, 3)


def test_survives_lapack_failing(monkeypatch):
    matrices = torch.stack([with_spectrum([1.0, 1.0, 0.5], 30, seed) for seed in range(2)])
    expected = symmetric_eigh(matrices)[0]

    def fail(_):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    values, vectors = symmetric_eigh(matrices)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, matrices, atol=1e-5, rtol=0)


def test_survives_lapack_returning_nan(monkeypatch):
    matrices = with_spectrum([1.0, 0.5], 20)[None]
    broken = torch.full((1, 20), torch.nan), torch.full((1, 20, 20), torch.nan)
    monkeypatch.setattr(torch.linalg, "eigh", lambda _: broken)
    values, _ = symmetric_eigh(matrices)
    torch.testing.assert_close(values[0, -2:], torch.tensor([0.5, 1.0]), atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Batched k-means against scikit-learn's inertia, and on points that coincide.


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

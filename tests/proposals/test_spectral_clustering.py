"""Spectral clustering against scikit-learn: same partition of planted graphs, no worse normalised cut on features."""

import numpy as np
import pytest
import torch
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score

from simdetr.mining.encoders import TimmEncoder
from simdetr.mining.spectral_clustering import (
    cell_affinity,
    cluster_graphs,
    lower_cut,
    normalised_cut,
    spectral_clustering,
    spectral_embedding,
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

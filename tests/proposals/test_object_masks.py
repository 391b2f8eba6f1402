"""LOST, TokenCut and MaskCut on maps whose objects are known, and their eigenvectors against scipy's."""

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy import ndimage

from simdetr.mining.rivals import WEAK, lost, mask_cut, second_eigenvector, token_cut

METHODS = {"lost": lost, "token_cut": token_cut, "mask_cut": mask_cut}


def planted(height, width, *blocks, noise=0.0, seed=0):
    """A map [1 + number of blocks, H, W]: a ground and blocks (y0, x0, y1, x1), each with a channel of its own."""
    generator = torch.Generator().manual_seed(seed)
    features = noise * torch.randn(1 + len(blocks), height, width, generator=generator)
    kind = torch.zeros(height, width, dtype=torch.long)
    for number, (y0, x0, y1, x1) in enumerate(blocks, start=1):
        kind[y0:y1, x0:x1] = number
    return features + torch.nn.functional.one_hot(kind, 1 + len(blocks)).permute(2, 0, 1)


def mask_of(height, width, block):
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[block[0] : block[2], block[1] : block[3]] = True
    return mask


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(
    ("block", "noise"),
    [((2, 3, 5, 7), 0), ((2, 3, 5, 7), 0.05), ((0, 0, 3, 4), 0), ((0, 0, 3, 4), 0.05), ((5, 1, 6, 2), 0)],
)
def test_the_one_planted_block_is_the_first_object(method, block, noise):
    found = method(planted(8, 10, block, noise=noise))
    assert torch.equal(found[0], mask_of(8, 10, block))


def test_two_apart_blocks_of_one_kind_are_cut_at_their_gap():
    # both are the prominent side; only the part around the most prominent cell is the object
    features = planted(9, 9, (1, 1, 4, 4))
    features[:, 6:8, 5:8] = features[:, 2, 2][:, None, None]
    blocks = [mask_of(9, 9, (1, 1, 4, 4)), mask_of(9, 9, (6, 5, 8, 8))]
    for method in (lost, token_cut):
        assert any(torch.equal(method(features)[0], block) for block in blocks)
    found = mask_cut(features)
    assert len(found) == 2
    assert {tuple(mask.nonzero()[0].tolist()) for mask in found} == {(1, 1), (6, 5)}
    assert torch.equal(found[0] | found[1], blocks[0] | blocks[1])


def test_mask_cut_finds_every_object_once_and_stops():
    blocks = [(1, 1, 4, 5), (6, 6, 10, 9), (9, 1, 11, 4)]
    found = mask_cut(planted(12, 12, *blocks), masks=6)
    assert len(found) == 3  # nothing is left to cut, though three more were allowed
    assert found.sum(dim=0).max() == 1
    for block in blocks:
        assert any(torch.equal(mask, mask_of(12, 12, block)) for mask in found)
    assert torch.equal(mask_cut(planted(12, 12, *blocks), masks=2), found[:2])


def test_without_centring_the_plain_cosine_counts():
    # two kinds of cells, 60 degrees apart: alike by plain cosine (0.5), opposite once the mean is subtracted
    ground, other = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 3**0.5 / 2])
    features = ground[:, None, None].repeat(1, 8, 10)
    features[:, 2:5, 3:7] = other[:, None, None]
    block = mask_of(8, 10, (2, 3, 5, 7))
    for method in (token_cut, mask_cut):
        assert torch.equal(method(features, 0.4)[0], block)
        assert torch.equal(method(features, 0.6, centre=False)[0], block)
        assert len(method(features, 0.4, centre=False)) == 0


def test_mask_cut_does_not_take_a_side_with_corners():
    # a frame of fewer cells than what it encloses is the prominent side, but has all four corners
    features = planted(12, 12, (1, 1, 11, 11))
    frame = ~mask_of(12, 12, (1, 1, 11, 11))
    assert frame.sum() < (~frame).sum()
    assert torch.equal(token_cut(features)[0], frame)
    assert torch.equal(mask_cut(features)[0], ~frame)


def test_lost_grows_only_by_similar_cells_of_few_neighbours():
    # by hand: centred features of a row of cells; the seed is the cell with the fewest non-negative products
    cells = torch.tensor([[-3.0, 1.0], [1.0, -2.0], [1.0, 1.0], [1.0, 0.0]])
    assert cells.sum(dim=0).tolist() == [0, 0]
    features = cells.T.reshape(2, 1, 4)
    products = cells @ cells.T
    assert (products >= 0).sum(dim=1).tolist() == [1, 2, 2, 3]  # so the seed is cell 0, which is like no other
    assert lost(features).flatten().tolist() == [True, False, False, False]


def test_lost_is_limited_by_its_expansion():
    # a chain: the seed alone is unlike the last cell, with its neighbour it is alike
    angles = torch.deg2rad(torch.tensor([0.0, 60.0, 110.0, 225.0, 260.0, 300.0]))
    cells = torch.stack([angles.cos(), angles.sin()], dim=1)
    features = cells.T.reshape(2, 1, 6)
    centred = cells - cells.mean(dim=0)
    products = centred @ centred.T
    order = (products >= 0).sum(dim=1).argsort(stable=True)
    for expansion in range(1, 7):
        grown = [int(i) for i in order[:expansion] if products[order[0], i] >= 0]
        like = (products[:, grown].sum(dim=1) >= 0).tolist()
        seed = int(order[0])
        start, end = seed, seed + 1
        while start > 0 and like[start - 1]:
            start -= 1
        while end < 6 and like[end]:
            end += 1
        assert lost(features, expansion).flatten().nonzero().flatten().tolist() == list(range(start, end))


@pytest.mark.parametrize("nodes", [5, 60, 300])
@pytest.mark.parametrize("kind", ["random", "blocks"])
def test_second_eigenvector_is_scipys(nodes, kind):
    rng = np.random.default_rng(nodes)
    if kind == "random":
        weights = (rng.random((nodes, nodes)) < 0.3).astype(float)
    else:
        member = np.arange(nodes) < nodes // 3
        weights = (member[:, None] == member).astype(float)
    weights = np.maximum(np.maximum(weights, weights.T), np.eye(nodes)).clip(min=WEAK)
    degree = np.diag(weights.sum(axis=1))
    values, vectors = scipy.linalg.eigh(degree - weights, degree, subset_by_index=[0, 1])
    value, vector = second_eigenvector(torch.from_numpy(weights))
    assert 1 - value == pytest.approx(values[1], abs=1e-6)
    found, expected = vector.numpy() / np.linalg.norm(vector), vectors[:, 1] / np.linalg.norm(vectors[:, 1])
    assert abs(found @ expected) == pytest.approx(1, abs=1e-6)


def test_token_cut_is_its_definition_on_random_features():
    """The graph, cut and side of the paper, written out with scipy."""
    features = torch.randn(6, 7, 9, generator=torch.Generator().manual_seed(4))
    cells = features.flatten(1).T.numpy()
    cells = cells - cells.mean(axis=0)
    cells /= np.linalg.norm(cells, axis=1, keepdims=True)
    weights = np.where(cells @ cells.T >= 0.2, 1, 1e-5)
    degree = np.diag(weights.sum(axis=1))
    vector = scipy.linalg.eigh(degree - weights, degree)[1][:, 1]
    peak = np.abs(vector).argmax()
    side = (vector > vector.mean()) == (vector[peak] > vector.mean())
    parts, _ = ndimage.label(side.reshape(7, 9))
    expected = parts == parts.flat[peak]
    np.testing.assert_array_equal(token_cut(features)[0].numpy(), expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 28), (6, 6)])
def test_flat_maps_have_a_defined_result(shape):
    flat = torch.full((3, *shape), 0.7)
    assert lost(flat).all()  # everything is like everything
    assert token_cut(flat).shape == mask_cut(flat).shape == (0, *shape)


def test_precision_of_the_features_does_not_matter():
    features = planted(8, 10, (2, 3, 5, 7), noise=0.05)
    for method in METHODS.values():
        assert torch.equal(method(features), method(features.bfloat16()))

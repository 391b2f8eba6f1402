"""Heads: softmax as logits, initialisation, group norm over tokens."""

import pytest
import torch

from simdetr.detectors.vidt import (
    NeckFreeHead,
    Perceptron,
    map_projection,
    project_tokens,
    softmax_log_odds,
    vector_head,
)


def test_log_odds_are_softmax_probabilities():
    logits = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)) * 4
    odds = softmax_log_odds(logits)
    assert odds.shape == (3, 5, 7)
    torch.testing.assert_close(odds.sigmoid(), logits.softmax(-1)[..., :-1])


def test_log_odds_stay_finite():
    sure = torch.tensor([[200.0, 0.0, 0.0], [0.0, 0.0, 200.0]], requires_grad=True)
    odds = softmax_log_odds(sure)
    odds.sum().backward()
    assert torch.isfinite(odds).all() and torch.isfinite(sure.grad).all()
    assert odds[0, 0] > 10 and (odds[1] < -10).all()


def test_perceptron_by_hand():
    head = Perceptron(4, 3)
    states = torch.randn(2, 5, 4)
    expected = states
    for index, layer in enumerate(head.layers):
        expected = expected @ layer.weight.T + layer.bias
        expected = expected.clamp(min=0) if index < 2 else expected
    torch.testing.assert_close(head(states), expected)
    assert set(head.state_dict()) == {f"layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")}


@pytest.mark.parametrize("bias", [-2.0, 0.0])
def test_vector_head_starts_at_its_bias(bias):
    head = vector_head(8, 6, bias)
    assert head(torch.randn(2, 8)).tolist() == [[0.0, 0.0, bias, bias, bias, bias]] * 2
    assert sum(p.numel() for p in vector_head(256, 256, bias).parameters()) == 197_376


@torch.no_grad()
def test_group_norm_mixes_the_tokens_of_an_image_in_any_order():
    torch.manual_seed(0)
    projection = map_projection(6, 64)
    tokens = torch.randn(2, 5, 6)
    found = project_tokens(projection, tokens)
    assert found.shape == (2, 5, 64)
    groups = found.view(2, 5, 32, 2)  # 32 groups of 2 channels, normed over tokens and channels
    torch.testing.assert_close(groups.mean((1, 3)), torch.zeros(2, 32), rtol=0, atol=1e-5)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(project_tokens(projection, tokens[:, order]), found[:, order])
    tokens[0, 4] += 1.0
    changed = project_tokens(projection, tokens)
    assert not torch.allclose(changed[0, 0], found[0, 0]) and torch.equal(changed[1], found[1])


def test_neck_free_head():
    head = NeckFreeHead(12, 32, 7)
    classes, boxes = head(torch.randn(2, 5, 12))
    assert classes.shape == (2, 5, 8) and boxes.shape == (2, 5, 4)
    assert ((boxes > 0) & (boxes < 1)).all()

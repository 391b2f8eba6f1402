"""Non-local attention block: heads, section 2.6 no. 5, and a plain implementation of its formula."""

from __future__ import annotations

import pytest
import torch

from simdetr.heads.attention import NonLocalAttention, averaged


def block(channels=6, seed=0, **widths):
    """A block whose embeddings are all random and all matter."""
    torch.manual_seed(seed)
    made = NonLocalAttention(channels, **widths).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return made


def features_of(batch=2, channels=6, height=3, width=4, seed=1):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed)).double()


def nothing_padded(features):
    return torch.zeros(len(features), *features.shape[2:], dtype=torch.bool)


def y_of(made, features, padding):
    """y [B, N, G]: its average over one position at a time."""
    weights, _ = made(features, padding)
    positions = weights.shape[1]
    return made.attended(weights, features, torch.eye(positions).double().expand(len(features), -1, -1))


def plainly(made, features, padding):
    """The block position by position: w, y and a as the formulas have them."""
    embedded = [part(features).flatten(2).transpose(1, 2) for part in (made.theta, made.phi, made.g)]
    rows = []
    for theta, phi, g, padded in zip(*embedded, padding.flatten(1), strict=True):
        valid = (~padded).nonzero().flatten()
        similar = torch.stack([torch.stack([theta_i @ phi[j] for j in valid]) for theta_i in theta])
        rows.append(similar.softmax(dim=1) @ g[valid])
    y = torch.stack(rows)
    return y, y.mean(dim=2).view(padding.shape).masked_fill(padding, 0.0)


@pytest.mark.parametrize("widths", [{}, {"embed_channels": 3, "value_channels": 5}])
@pytest.mark.parametrize("pads", [False, True])
def test_it_is_the_plain_formula(widths, pads):
    made, features = block(**widths), features_of()
    padding = nothing_padded(features)
    padding[1, 2:], padding[1, :, 3:] = pads, pads
    y, raw = plainly(made, features, padding)
    torch.testing.assert_close(made(features, padding).raw, raw)
    torch.testing.assert_close(y_of(made, features, padding), y)
    masks = torch.rand(2, 3, 12, generator=torch.Generator().manual_seed(4)).double()
    averages = masks / masks.sum(dim=2, keepdim=True)
    found = made.attended(made(features, padding).weights, features, averages)
    torch.testing.assert_close(found, averages @ y)


def test_widths_are_an_eighth_and_all_channels_unless_given():
    made = NonLocalAttention(32)
    assert made.theta.weight.shape == made.phi.weight.shape == (4, 32, 1, 1)
    assert made.g.weight.shape == (32, 32, 1, 1)
    given = NonLocalAttention(32, embed_channels=5, value_channels=7)
    assert (given.theta.out_channels, given.phi.out_channels, given.g.out_channels) == (5, 5, 7)
    assert NonLocalAttention(3).theta.out_channels == 1


def test_permuted_positions_permute_y():
    made, features = block(), features_of()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    shuffled = features.flatten(2)[:, :, order].view_as(features)
    padding = nothing_padded(features)
    torch.testing.assert_close(y_of(made, shuffled, padding), y_of(made, features, padding)[:, order])


def test_one_feature_everywhere_gives_one_y():
    made = block()
    features = features_of(height=1, width=1).expand(-1, -1, 3, 4)
    y = y_of(made, features, nothing_padded(features))
    torch.testing.assert_close(y, y[:, :1].expand_as(y))


def test_without_similarity_y_is_the_mean_of_g():
    made, features = block(), features_of()
    with torch.no_grad():
        made.theta.weight.zero_()
        made.phi.weight.zero_()
    y = y_of(made, features, nothing_padded(features))
    mean_g = made.g(features).mean(dim=(2, 3))
    torch.testing.assert_close(y, mean_g[:, None].expand_as(y))


def test_padding_neither_weighs_nor_changes_others():
    made, features = block(), features_of()
    padding = nothing_padded(features)
    padding[:, :, 3] = True
    wild = features.masked_fill(padding[:, None], 1e4)
    first, second = made(features, padding), made(wild, padding)
    torch.testing.assert_close(second.raw, first.raw, rtol=0, atol=0)
    assert not second.raw[padding].any()
    assert not second.weights[:, :, padding[0].flatten()].any()
    torch.testing.assert_close(second.weights.sum(dim=2), torch.ones(2, 12).double())
    cut = made(features[..., :3], padding[..., :3]).raw
    torch.testing.assert_close(first.raw[..., :3], cut)


def test_at_the_start_it_smooths_the_channel_mean():
    torch.manual_seed(0)
    made, features = NonLocalAttention(16), features_of(channels=16).float().relu()
    weights, raw = made(features, nothing_padded(features))
    torch.testing.assert_close(raw.flatten(1), (weights @ features.mean(dim=1).flatten(1)[..., None]).squeeze(2))
    torch.testing.assert_close(made.theta.weight, made.phi.weight)
    own = weights.diagonal(dim1=1, dim2=2).mean()
    assert own > 1.5 / 12, "positions look at what is like them, themselves above all"


def test_gradients():
    made = block(channels=3, embed_channels=2, value_channels=2)
    features = features_of(1, 3, 2, 3).requires_grad_()
    padding = nothing_padded(features)
    padding[0, :, 2] = True
    averages = torch.tensor([[[0.5, 0.25, 0.0, 0.25, 0.0, 0.0]]]).double()

    def outputs(values, *_):
        weights, raw = made(values, padding)
        return raw, made.attended(weights, values, averages)

    assert torch.autograd.gradcheck(outputs, (features, *made.parameters()))


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(0)
    made, features = NonLocalAttention(8), features_of(channels=8).bfloat16()
    padding = nothing_padded(features)
    exact = made(features.float(), padding)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = made(features, padding)
        means = made.attended(found.weights, features, torch.full((2, 1, 12), 1 / 12))
    assert found.raw.dtype == means.dtype == torch.float32
    torch.testing.assert_close(found.raw, exact.raw)


def test_averaged():
    features = torch.arange(8.0).view(1, 2, 2, 2)
    averages = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.5]]])
    assert averaged(features, averages).tolist() == [[[0.0, 4.0], [2.0, 6.0]]]


@pytest.mark.parametrize("name", ["channels", "embed_channels", "value_channels"])
def test_widths_below_one_are_refused(name):
    with pytest.raises(ValueError, match=rf"^{name} must be at least 1, got 0$"):
        NonLocalAttention(**{"channels": 8, name: 0})

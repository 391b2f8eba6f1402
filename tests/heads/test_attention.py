"""What is noted at a level: attention, masks and unit vectors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from simdetr.detectors.detector import Level
from simdetr.heads.attention import (
    BACKGROUND,
    DROPPED,
    FOREGROUND,
    AttentionTap,
    NonLocalAttention,
    averaged,
    check_level,
    check_thresholds,
    checked_taps,
    foreground_masks,
    have_all_parts,
    importance_map,
    normalised_attention,
)


def make_level(padded=False):
    features = torch.randn(2, 8, 4, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[1, :, 3:] = padded
    return Level(features, 8, mask)


def make_tap(**options):
    torch.manual_seed(0)
    tap = AttentionTap(8, **options)
    torch.nn.init.normal_(tap.block.g.weight)
    return tap


@pytest.mark.parametrize("soft", [False, True])
def test_notes_follow_from_the_raw_attention(soft):
    level = make_level(padded=True)
    noted = make_tap(soft_masks=soft, foreground_threshold=0.7, background_threshold=0.3)(level, embed=False)
    assert noted.embeddings is None and torch.equal(noted.padding, level.mask)
    torch.testing.assert_close(noted.attention, normalised_attention(noted.raw, level.mask))
    torch.testing.assert_close(noted.masks, foreground_masks(noted.attention, level.mask, 0.7, 0.3, soft=soft))
    hard = foreground_masks(noted.attention, level.mask, 0.7, 0.3)
    assert noted.usable.tolist() == [bool(image.flatten(1).any(dim=1).all()) for image in hard]


@pytest.mark.parametrize("embed_from", ["attended", "input"])
def test_embeddings_are_projected_means_under_the_masks(embed_from):
    level, tap = make_level(padded=True), make_tap(embed_from=embed_from, value_channels=6, embedding_size=5)
    noted = tap(level, embed=True)
    weights, _ = tap.block(level.features, level.mask)
    y = weights @ tap.block.g(level.features).flatten(2).transpose(1, 2)
    read = y if embed_from == "attended" else level.features.flatten(2).transpose(1, 2)
    for part in range(3):
        mask = noted.masks[:, part].flatten(1)[..., None]
        means = (mask * read).sum(dim=1) / mask.sum(dim=1)
        torch.testing.assert_close(noted.embeddings[:, part], F.normalize(tap.projector(means), dim=1))


@pytest.mark.parametrize(("embed_from", "learns"), [("attended", True), ("input", False)])
def test_hard_masks_let_embeddings_teach_the_block_only_by_what_it_attended(embed_from, learns):
    tap = make_tap(embed_from=embed_from)
    noted = tap(make_level(), embed=True)
    gradients = torch.autograd.grad(noted.embeddings.sum(), list(tap.block.parameters()), allow_unused=True)
    assert all((gradient is not None and bool(gradient.any())) == learns for gradient in gradients)


def test_soft_masks_teach_the_block_even_from_the_input():
    tap = make_tap(embed_from="input", soft_masks=True)
    noted = tap(make_level(), embed=True)
    gradients = torch.autograd.grad(noted.embeddings.sum(), [tap.block.theta.weight, tap.block.phi.weight])
    assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("soft", [False, True])
def test_a_constant_map_is_not_usable_and_harms_nothing(soft):
    tap = make_tap(soft_masks=soft)
    features = torch.full((1, 8, 3, 3), 0.3, requires_grad=True)
    noted = tap(Level(features, 8, torch.zeros(1, 3, 3, dtype=torch.bool)), embed=True)
    assert noted.usable.tolist() == [False] and not noted.attention.any()
    noted.embeddings.sum().backward()
    assert torch.isfinite(features.grad).all() and all(torch.isfinite(p.grad).all() for p in tap.parameters())


def test_without_projector_there_are_no_embeddings():
    tap = make_tap(embedding_size=None)
    assert tap(make_level(), embed=True).embeddings is None and tap.projector is None


def test_taps():
    assert checked_taps(None, 3) == (0, 1, 2) and checked_taps([1], 3) == (1,)
    for wrong in ([], [0, 0], [1, 0], [-1], [3]):
        with pytest.raises(ValueError, match=r"taps: expected ascending levels among 0 to 2, got"):
            checked_taps(wrong, 3)


def test_levels_of_another_kind():
    check_level(1, make_level(), 8)
    with pytest.raises(ValueError, match=r"features of level 1: expected \[B, 9, h, w\], got \[2, 8, 4, 5\]"):
        check_level(1, make_level(), 9)
    with pytest.raises(ValueError, match=r"features of level 1: expected a map of at least 2 x 2, got 4 x 1;"):
        check_level(1, make_level()._replace(features=torch.zeros(2, 8, 4, 1)), 8)


# ----------------------------------------------------------------------------------------------------------------------
# Non-local attention block: identity attention, and a plain implementation of its formula.


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


# ----------------------------------------------------------------------------------------------------------------------
# Masks of attention: worked by hand, and bounds that always hold.


A = torch.tensor([[[0.0, 0.1, 0.3], [0.2, 0.9, 0.6], [0.1, 0.5, 1.0]]])


def random_attention(seed=0, batch=4, size=(5, 6)):
    return torch.rand(batch, *size, generator=torch.Generator().manual_seed(seed))


def unpadded(maps):
    return torch.zeros_like(maps, dtype=torch.bool)


def test_masks_of_a_known_map():
    masks = foreground_masks(A, unpadded(A), 0.8, 0.2)[0]
    assert masks[FOREGROUND].tolist() == [[0, 0, 1], [0, 1, 1], [0, 1, 1]]
    assert masks[DROPPED].tolist() == [[0, 0, 1], [0, 0, 1], [0, 1, 0]]
    assert masks[BACKGROUND].tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 0]]
    peak = (A[0] >= 0.8).float()
    assert peak.sum() == 2
    torch.testing.assert_close(masks[DROPPED] + peak, masks[FOREGROUND])


def test_identities_of_random_maps():
    maps = random_attention()
    masks = foreground_masks(maps, unpadded(maps), 0.7, 0.3)
    dropped, foreground, background = masks.unbind(dim=1)
    assert (dropped <= foreground).all() and not (dropped * background).any()
    assert torch.equal(foreground + background, torch.ones_like(maps))
    higher = foreground_masks(maps, unpadded(maps), 0.8, 0.3)[:, DROPPED]
    assert (higher >= dropped).all() and higher.sum() > dropped.sum()
    beyond = foreground_masks(maps, unpadded(maps), float(maps.max()) + 0.1, 0.3)
    assert torch.equal(beyond[:, DROPPED], beyond[:, FOREGROUND])


def test_soft_masks_round_to_the_hard_ones_and_pass_gradients():
    maps = random_attention().requires_grad_()
    hard = foreground_masks(maps, unpadded(maps), 0.8, 0.2)
    soft = foreground_masks(maps, unpadded(maps), 0.8, 0.2, soft=True)
    assert not hard.requires_grad and soft.requires_grad
    assert torch.equal(soft[:, 1:].round(), hard[:, 1:])
    torch.testing.assert_close(soft[:, FOREGROUND] + soft[:, BACKGROUND], torch.ones_like(maps))
    at_threshold = foreground_masks(torch.full((1, 2, 2), 0.25), unpadded(A[:, :2, :2]), 0.8, 0.2, soft=True)
    assert float(at_threshold[0, FOREGROUND, 0, 0]) == pytest.approx(0.7310586)  # σ((0.25 − 0.2) / 0.05)
    assert float(at_threshold[0, DROPPED, 0, 0]) == pytest.approx(0.7310586 / (1 + 2.718281828**-11))
    assert torch.autograd.grad(soft[:, DROPPED].sum(), maps)[0].abs().max() > 0


def test_normalised_to_the_range_of_valid_positions():
    raw = torch.tensor([[[2.0, 4.0, 99.0], [3.0, 6.0, -99.0]]])
    padding = torch.tensor([[[False, False, True], [False, False, True]]])
    assert normalised_attention(raw, padding).tolist() == [[[0.0, 0.5, 0.0], [0.25, 1.0, 0.0]]]


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_constant_attention_is_zero_also_but_for_rounding(value):
    raw = torch.full((1, 3, 3), value).requires_grad_()
    shaken = raw * (1 + 1e-7 * random_attention(batch=1, size=(3, 3)))
    for constant in (raw, shaken):
        found = normalised_attention(constant, unpadded(constant))
        assert not found.any()
        found.sum().backward()
    assert not raw.grad.any()


def test_nearly_constant_attention_is_not_constant():
    raw = 1 + 1e-3 * random_attention(batch=1)
    assert float(normalised_attention(raw, unpadded(raw)).max()) == 1.0


def test_scale_and_shift_change_nothing():
    raw = random_attention(batch=2).double()
    padding = unpadded(raw)
    first, second = (normalised_attention(values, padding) for values in (raw, 3.5 * raw - 7))
    torch.testing.assert_close(first, second)
    assert torch.equal(foreground_masks(first, padding, 0.8, 0.2), foreground_masks(second, padding, 0.8, 0.2))


def test_importance_is_a_sigmoid():
    raw = torch.tensor([[[0.0, 1.0, 5.0]]])
    padding = torch.tensor([[[False, False, True]]])
    torch.testing.assert_close(importance_map(raw, padding), torch.tensor([[[0.5, 0.731059, 0.0]]]))


@pytest.mark.parametrize("soft", [False, True])
def test_padding_is_in_no_mask(soft):
    maps = random_attention()
    padding = unpadded(maps)
    padding[:, :, 4:] = True
    masks = foreground_masks(maps, padding, 0.8, 0.2, soft=soft)
    assert not masks[..., 4:].any() and masks[..., :4].any()


def test_maps_with_an_empty_mask_are_told():
    full = torch.ones(1, 3, 3)
    maps = torch.cat([A, 0 * full, 0.5 * full, torch.where(A > 0.2, 1.0, 0.0)])
    masks = foreground_masks(maps, unpadded(maps), 0.8, 0.2)
    # nothing but background; no background; no foreground below the peak
    assert have_all_parts(masks).tolist() == [True, False, False, False]


@pytest.mark.parametrize(("foreground", "background"), [(0.2, 0.2), (0.2, 0.8)])
def test_thresholds_in_the_wrong_order(foreground, background):
    with pytest.raises(ValueError, match=rf"foreground_threshold: expected more than .*\({background}\), got 0\.2"):
        check_thresholds(foreground, background)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_thresholds_outside_their_range(value):
    with pytest.raises(ValueError, match=r"foreground_threshold: expected a share .* within \(0, 1\), got"):
        check_thresholds(value, 0.2)
    with pytest.raises(ValueError, match=r"background_threshold: expected a share .* within \(0, 1\), got"):
        check_thresholds(0.8, value)
    check_thresholds(0.8, 0.2)

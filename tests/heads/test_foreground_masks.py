"""Masks of attention: heads, section 2.6 nos. 1, 2 and 6."""

from __future__ import annotations

import pytest
import torch

from simdetr.heads.attention import (
    BACKGROUND,
    DROPPED,
    FOREGROUND,
    check_thresholds,
    foreground_masks,
    have_all_parts,
    importance_map,
    normalised_attention,
)

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

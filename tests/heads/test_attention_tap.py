"""What is noted at a level: attention, masks and unit vectors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from simdetr.detectors.detector import Level
from simdetr.heads.attention import AttentionTap, check_level, checked_taps, foreground_masks, normalised_attention


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

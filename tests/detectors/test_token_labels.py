"""Targets of token labels pixel by pixel, their losses by the scalar formulas (T22)."""

import math

import pytest
import torch

from simdetr.detectors import mask_vectors
from simdetr.detectors.vidt_losses import token_losses, token_targets


def rectangles(*boxes, size_hw=(24, 32)):
    masks = torch.zeros(len(boxes), *size_hw, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def test_shares_by_hand():
    target = {"masks": rectangles((0, 0, 8, 8), (4, 0, 16, 8)), "labels": torch.tensor([2, 0])}
    (shares,) = token_targets([target], 3, (24, 32), [(3, 4)])
    assert shares.shape == (1, 3, 4, 3) and shares.dtype == torch.float32
    expected = torch.zeros(3, 4, 3)
    expected[0, 0, 2] = 1.0  # the earlier object is in front
    expected[0, 1, 0] = 1.0
    assert torch.equal(shares[0], expected)
    (shares,) = token_targets([{**target, "labels": torch.tensor([1, 1])}], 3, (24, 32), [(3, 4)])
    assert shares[0, 0, :2, 1].tolist() == [1, 1] and shares.sum() == 2  # of one class, counted once
    (swapped,) = token_targets(
        [{"masks": target["masks"].flip(0), "labels": torch.tensor([0, 2])}], 3, (24, 32), [(3, 4)]
    )
    assert swapped[0, 0, 0].tolist() == [0.5, 0, 0.5]


def test_rows_sum_to_the_foreground_and_channel_0_can_hold_it():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(4, 37, 50, generator=generator) > 0.7
    labels = torch.tensor([3, 1, 1, 0])
    maps_hw = [(7, 8), (4, 4), (1, 1)]
    levels = token_targets([{"masks": masks, "labels": labels}], 4, (50, 60), maps_hw)
    canvas = torch.zeros(50, 60)
    canvas[:37, :50] = masks.any(dim=0)
    for level, size in zip(levels, maps_hw, strict=True):
        foreground = torch.nn.functional.adaptive_avg_pool2d(canvas[None, None], size)[0, 0]
        torch.testing.assert_close(level[0].sum(dim=2), foreground, atol=1e-6, rtol=0)
    originals = token_targets([{"masks": masks, "labels": labels + 1}], 5, (50, 60), maps_hw, foreground_channel=True)
    for level, original in zip(levels, originals, strict=True):
        torch.testing.assert_close(original[..., 1:], level)
        torch.testing.assert_close(original[..., 0], level.sum(dim=3))


def test_cells_are_means_over_their_pixels():
    masks = torch.rand(3, 30, 41, generator=torch.Generator().manual_seed(1)) > 0.5
    labels = torch.tensor([1, 0, 1])
    owner = torch.full((32, 48), -1)  # every pixel's class, padded at the bottom and right
    for mask, label in zip(masks.flip(0), labels.flip(0), strict=True):
        owner[:30, :41][mask] = label
    (level,) = token_targets([{"masks": masks.to(torch.uint8), "labels": labels}], 2, (32, 48), [(5, 6)])
    for row in range(5):
        rows = slice(row * 32 // 5, math.ceil((row + 1) * 32 / 5))
        for column in range(6):
            cell = owner[rows, column * 48 // 6 : (column + 1) * 48 // 6]
            expected = torch.stack([(cell == label).float().mean() for label in range(2)])
            torch.testing.assert_close(level[0, row, column], expected, atol=1e-6, rtol=0)


def test_portions_make_no_difference(monkeypatch):
    masks = torch.rand(5, 24, 32, generator=torch.Generator().manual_seed(2)) > 0.6
    targets = [{"masks": masks, "labels": torch.arange(5) % 3}, {"masks": masks[:0], "labels": torch.arange(0)}]
    whole = token_targets(targets, 3, (24, 40), [(3, 5), (2, 2)])
    assert not whole[0][1].any() and not whole[1][1].any()  # the image without objects
    monkeypatch.setattr(mask_vectors, "_PIXELS_AT_ONCE", 2 * 24 * 40)
    for one, two in zip(whole, token_targets(targets, 3, (24, 40), [(3, 5), (2, 2)]), strict=True):
        torch.testing.assert_close(one, two)


def test_a_canvas_that_is_too_small_is_named():
    with pytest.raises(ValueError, match=r"canvas_hw: expected at least the masks' \(24, 32\), got \(24, 30\)"):
        token_targets([{"masks": rectangles((0, 0, 1, 1)), "labels": torch.tensor([0])}], 1, (24, 30), [(3, 4)])


def test_losses_by_the_scalar_formulas():
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randn(2, h, w, 3, generator=generator, dtype=torch.float64) for h, w in ((3, 4), (2, 2))]
    targets = [torch.rand(level.shape, generator=generator, dtype=torch.float64) for level in tokens]
    focal = dice = 0.0
    for level, shares in zip(tokens, targets, strict=True):
        for logits, wanted in zip(level.flatten(1).tolist(), shares.flatten(1).tolist(), strict=True):
            common = total = summed = 0.0
            for x, t in zip(logits, wanted, strict=True):
                p = 1 / (1 + math.exp(-x))
                cross = -t * math.log(p) - (1 - t) * math.log(1 - p)
                right = p * t + (1 - p) * (1 - t)
                summed += (0.3 * t + 0.7 * (1 - t)) * (1 - right) ** 1.5 * cross
                common, total = common + p * t, total + p + t
            focal += summed / (len(logits) / 3)  # a mean over cells, a sum over classes
            dice += 1 - (2 * common + 1) / (total + 1)
    found = token_losses(tokens, targets, alpha=0.3, gamma=1.5)
    torch.testing.assert_close(torch.stack(found), torch.tensor([focal, dice], dtype=torch.float64), rtol=1e-6, atol=0)


def test_losses_pass_gradcheck_and_vanish_where_all_is_right():
    shares = torch.rand(1, 2, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    logits = torch.randn(1, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_losses([x], [shares]), (logits,))
    sure = torch.tensor([[[[40.0, -40.0]]]])
    focal, dice = token_losses([sure], [torch.tensor([[[[1.0, 0.0]]]])])
    assert float(focal) < 1e-9 and float(dice) < 1e-6

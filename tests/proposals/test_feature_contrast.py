"""Contrast of boxes against sums over single pixels, and against cases worked out by hand."""

import pytest
import torch
from torch.nn import functional

from simdetr.mining.ranking import feature_contrast

GRID = (32, 48)


def by_pixels(box, level):
    """The same for one box, on a map repeated 8 times; exact for boxes whose sides and margins are whole pixels."""
    fine = functional.interpolate(level[None], scale_factor=8, mode="nearest")[0]
    step = fine.shape[2] / GRID[1]
    x0, y0, x1, y1 = (round(value * step) for value in box)
    right, down = (max((high - low) // 2, 8) for low, high in ((x0, x1), (y0, y1)))
    inside = torch.zeros(fine.shape[1:], dtype=torch.bool)
    inside[y0:y1, x0:x1] = True
    around = torch.zeros_like(inside)
    around[max(y0 - down, 0) : y1 + down, max(x0 - right, 0) : x1 + right] = True
    around &= ~inside
    spread = (level - level.mean(dim=(1, 2), keepdim=True)).square().sum(dim=0).mean().sqrt()
    within, outside = fine[:, inside].mean(dim=1), fine[:, around].mean(dim=1)
    mean = level.mean(dim=(1, 2))
    cosine = functional.cosine_similarity(within - mean, outside - mean, dim=0)
    return float((within - outside).norm() / spread), float(1 - cosine)


def test_contrast_equals_sums_over_pixels():
    level = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    boxes = [[0, 0, 8, 8], [10, 4, 14, 10], [30, 20, 48, 32], [3, 3, 29, 27], [17, 9, 19, 11], [4, 0, 44, 32]]
    image = torch.tensor([0, 1, 1, 0, 1, 0])
    found = feature_contrast(torch.tensor(boxes).float(), image, level, GRID)
    expected = [by_pixels(box, level[index]) for box, index in zip(boxes, image.tolist(), strict=True)]
    for values, own in zip(found, zip(*expected, strict=True), strict=True):
        assert values.tolist() == pytest.approx(own, rel=1e-4)


def test_an_object_stands_out_and_its_part_does_not():
    level = torch.zeros(1, 3, 8, 12)
    level[:, 0] = 1.0
    level[:, :, 2:4, 4:6] = torch.tensor([0.0, 1.0, 0.0])[None, :, None, None]
    whole, part, ground = [16, 8, 24, 16], [18, 10, 20, 12], [32, 20, 40, 28]
    found, angle = feature_contrast(torch.tensor([whole, part, ground]).float(), torch.zeros(3).long(), level, GRID)
    assert found[0] > 2 and found[1] < found[0] / 2 and found[2] < 1e-6
    assert angle[0] > 1.9 and angle[1] < angle[0] and angle[2] < 1e-6


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_no_unit_and_no_place(scale):
    level = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    box, image = torch.tensor([[8.0, 8.0, 24.0, 24.0]]), torch.zeros(1).long()
    torch.testing.assert_close(
        feature_contrast(box, image, level * scale + 3 * scale, GRID),
        feature_contrast(box, image, level, GRID),
        rtol=1e-4,
        atol=0,
    )


def test_neither_surroundings_nor_differences_give_nothing():
    level = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    whole, image = torch.tensor([[0.0, 0.0, 48.0, 32.0]]), torch.zeros(1).long()
    assert torch.stack(feature_contrast(whole, image, level, GRID)).tolist() == [[0], [0]]
    box = torch.tensor([[8.0, 8.0, 24.0, 24.0]])
    flat = torch.full((1, 4, 4, 6), 0.3)
    assert torch.stack(feature_contrast(box, image, flat, GRID)).tolist() == [[0], [0]]
    assert feature_contrast(box[:0], image[:0], level, GRID)[0].shape == (0,)

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from simdetr.detectors.backbone import _nearest, resize_mask


@pytest.mark.parametrize("stride", [4, 8, 14, 16, 32, 64])
def test_pixels_are_those_of_interpolate(stride):
    """Every size up to 1400 px with the two usual sizes of its map; exact fractions would miss some (26 of 106)."""
    for pixels in range(stride, 1400):
        for cells in {-(-pixels // stride), pixels // stride}:
            row = torch.arange(pixels, dtype=torch.float32)[None, None]
            expected = F.interpolate(row, size=cells, mode="nearest")[0, 0].long()
            assert torch.equal(_nearest(pixels, cells, row.device), expected), (pixels, cells)


def test_masks_of_a_batch():
    mask = torch.rand(3, 37, 53, generator=torch.Generator().manual_seed(0)) > 0.5
    for size in ((5, 7), (37, 53), (1, 1), (40, 60)):
        expected = F.interpolate(mask[:, None].float(), size=size, mode="nearest")[:, 0] > 0.5
        found = resize_mask(mask, size)
        assert found.dtype == torch.bool and torch.equal(found, expected)

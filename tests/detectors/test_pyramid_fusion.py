"""Fusion against bilinear interpolation by hand, its order and its names (specification T20)."""

import numpy as np
import torch

from simdetr.detectors.vidt import FusionBlock, PyramidFusion, ResidualUnit

SIZES = [(12, 10), (6, 5), (3, 3), (2, 2)]


def corner_aligned(array, height, width):
    """Bilinear resize [h, w] whose corner cells keep their values, cell by cell."""
    out = np.empty((height, width))
    for row in range(height):
        for column in range(width):
            y = row * (array.shape[0] - 1) / (height - 1)
            x = column * (array.shape[1] - 1) / (width - 1)
            top, left = min(int(y), array.shape[0] - 2), min(int(x), array.shape[1] - 2)
            weights = np.outer([1 - (y - top), y - top], [1 - (x - left), x - left])
            out[row, column] = (weights * array[top : top + 2, left : left + 2]).sum()
    return out


@torch.no_grad()
def test_coarse_maps_are_enlarged_with_aligned_corners():
    block = FusionBlock(4, coarsest=False)
    for unit in (block.resConfUnit1, block.resConfUnit2):
        torch.nn.init.zeros_(unit.conv3.weight)
        torch.nn.init.zeros_(unit.conv3.bias)
    torch.manual_seed(0)
    features, coarser = torch.randn(1, 4, 7, 9), torch.randn(1, 4, 4, 5)
    enlarged = torch.from_numpy(np.stack([corner_aligned(channel, 7, 9) for channel in coarser[0].numpy()])).float()
    expected = features[0] + torch.einsum("oc,chw->ohw", block.smoothing.weight[:, :, 0, 0], enlarged)
    expected = expected + block.smoothing.bias[:, None, None]
    torch.testing.assert_close(block(features, coarser)[0], expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_maps_come_out_coarse_first_and_know_only_coarser_ones():
    torch.manual_seed(0)
    fusion = PyramidFusion([3, 5, 6, 8], 32)
    maps = [torch.randn(2, width, *size) for width, size in zip([3, 5, 6, 8], SIZES, strict=True)]
    before = fusion(maps)
    assert [tuple(m.shape) for m in before] == [(2, 32, *size) for size in reversed(SIZES)]
    changed = [*maps]
    changed[1] = maps[1] + torch.randn_like(maps[1])
    after = fusion(changed)
    equal = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert equal == [True, True, False, False]
    assert all(torch.equal(m, kept) for m, kept in zip(maps[2:], changed[2:], strict=True))  # inputs are not touched


@torch.no_grad()
def test_residual_unit_by_hand():
    torch.manual_seed(0)
    unit = ResidualUnit(8)
    features = torch.randn(1, 8, 5, 5)
    hidden = unit.conv3(unit.conv2(unit.conv1(features.relu()).relu()).relu())
    torch.testing.assert_close(unit(features), features + hidden)
    assert unit.conv2.weight.shape == (2, 2, 3, 3)


def test_names_and_count_of_the_original():
    fusion = PyramidFusion([192, 384, 768, 256], 256)
    names = {name.split(".")[1] for name in fusion.state_dict()}
    assert names == {f"{kind}{level}{end}" for level in range(4) for kind, end in KINDS}
    assert not any(name.startswith("multi_scaler.refinenet_3.resConfUnit1") for name in fusion.state_dict())
    assert "multi_scaler.refinenet_0.resConfUnit1.conv1.weight" in fusion.state_dict()
    projections = sum(256 * (width + 1 + 2) for width in (192, 384, 768, 256))
    unused = 256 * 256 + 256 + sum(p.numel() for p in ResidualUnit(256).parameters())
    count = sum(parameter.numel() for parameter in fusion.parameters())
    assert count - projections + unused == 823_296
    assert fusion.multi_scaler["layer_2_rn"].bias.count_nonzero() == 0


KINDS = [("layer_", "_rn"), ("p_norm_", ""), ("refinenet_", "")]


def test_every_parameter_learns():
    fusion = PyramidFusion([3, 5, 6, 8], 32)
    maps = [torch.randn(2, width, *size) for width, size in zip([3, 5, 6, 8], SIZES, strict=True)]
    sum(m.square().sum() for m in fusion(maps)).backward()
    assert all(parameter.grad is not None for parameter in fusion.parameters())

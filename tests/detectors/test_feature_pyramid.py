"""The pyramid on a plain transformer's map."""

import pytest
import torch

from simdetr.detectors.backbone import SimpleFeaturePyramid


@pytest.mark.parametrize(("height", "width"), [(4, 6), (1, 3)])
def test_twice_once_and_half_the_resolution(height, width):
    pyramid = SimpleFeaturePyramid(12, 8)
    maps = pyramid(torch.randn(2, 12, height, width, generator=torch.Generator().manual_seed(0)))
    expected = [(2 * height, 2 * width), (height, width), (-(-height // 2), -(-width // 2))]
    assert [tuple(m.shape) for m in maps] == [(2, 8, *size) for size in expected]
    for features in maps:
        # the last layer is a norm over channels
        torch.testing.assert_close(features.mean(dim=1), torch.zeros_like(features[:, 0]), rtol=0, atol=1e-5)


def test_a_cell_reaches_its_own_place():
    pyramid = SimpleFeaturePyramid(4, 8).eval()
    tokens = torch.zeros(1, 4, 8, 8)
    changed = tokens.clone()
    changed[..., 6, 1] = 1.0
    for before, after, scale in zip(pyramid(tokens), pyramid(changed), (2, 1, 0.5), strict=True):
        rows, columns = (before != after).any(dim=1)[0].nonzero(as_tuple=True)
        assert abs(rows.float().mean() / scale - 6) <= 1 and abs(columns.float().mean() / scale - 1) <= 1


def test_every_parameter_learns():
    pyramid = SimpleFeaturePyramid(4, 8)
    sum(features.square().sum() for features in pyramid(torch.randn(1, 4, 4, 4))).backward()
    assert all(parameter.grad is not None for parameter in pyramid.parameters())

"""Deformable DETRs whose tensors all matter, and what compares them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from simdetr.detectors import DeformableDETR

VARIANTS = ("base", "refine", "two_stage", "single_scale", "dc5", "learned positions", "three levels")


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, make_deformable, shake) -> DeformableDETR:
    """A small Deformable DETR in evaluation mode whose tensors are all different and all matter."""
    return shake(make_deformable(request.param))


@pytest.fixture
def make_plain(make_deformable, shake) -> Callable[..., DeformableDETR]:
    """The same of the base variant, with changes."""
    return lambda **changes: shake(make_deformable(**changes))


@pytest.fixture
def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two images, the second padded at the bottom and right, and their mask."""
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, 70:], mask[1, :, 100:] = True, True
    return images.masked_fill(mask[:, None], 0.0), mask


@pytest.fixture
def equal_states():
    """Whether two state dicts are equal bit by bit."""

    def compare(one, other) -> bool:
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    return compare

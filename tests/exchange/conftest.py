"""Deformable DETRs whose tensors all matter, and what compares them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from simdetr.detectors import DeformableDETR

VARIANTS = {
    "base": {},
    "refine": {"with_box_refine": True},
    "two_stage": {"with_box_refine": True, "two_stage": True},
    "single_scale": {"num_feature_levels": 1},
    "dc5": {"num_feature_levels": 1, "dilation": True, "backbone": "resnet50"},
    "learned positions": {"position_encoding": "learned"},
    "three levels": {"num_feature_levels": 3, "num_encoder_layers": 1},
}
"""Of Deformable DETR, those that the original published and some more."""


SMALL = {
    "num_classes": 7,
    "backbone": "resnet18",
    "hidden_dim": 64,
    "num_heads": 4,
    "num_encoder_layers": 2,
    "num_decoder_layers": 3,
    "ffn_dim": 128,
    "num_queries": 20,
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> DeformableDETR:
    """A small Deformable DETR in evaluation mode whose tensors are all different and all matter."""
    return randomise(DeformableDETR(**(SMALL | VARIANTS[request.param])).eval())


@pytest.fixture
def make_plain() -> Callable[..., DeformableDETR]:
    """The same of the base variant, with changes."""
    return lambda **changes: randomise(DeformableDETR(**(SMALL | changes)).eval())


def randomise(module: nn.Module, seed: int = 1) -> nn.Module:
    """Random values of a useful size for every parameter and statistic of batch norm."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "sampling_offsets.bias" in name:
            tensor.copy_(2.0 * noise)
        elif name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
            tensor.copy_(1.0 + 0.2 * noise.abs())
        else:
            tensor.copy_(noise / tensor[0].numel() ** 0.5 if tensor.dim() > 1 else 0.1 * noise)
    return module


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

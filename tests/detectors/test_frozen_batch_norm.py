"""Frozen batch norm: torchvision's values in half the passes, in the precision of its input."""

import pytest
import timm
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from simdetr.detectors.backbone import Backbone, FrozenBatchNorm, with_one_pass


@pytest.fixture
def pair(shake):
    theirs = shake(FrozenBatchNorm2d(5))
    ours = FrozenBatchNorm(5)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_values_and_gradients_are_torchvisions(pair):
    x = torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    inputs = [x.clone().requires_grad_() for _ in pair]
    outputs = [layer(value) for layer, value in zip(pair, inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    for output in outputs:
        (output * x).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def test_half_precision_stays(pair):
    ours, theirs = pair
    x = torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    assert theirs(x.bfloat16()).dtype == torch.float32
    found = ours(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), theirs(x), rtol=0.03, atol=0.03)


def test_the_input_is_not_kept(pair):
    ours, _ = pair
    kept = []
    x = torch.randn(2, 5, 4, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ours(x).sum().backward()
    assert sum(kept) <= 5


def test_a_network_keeps_its_names_and_values():
    body = timm.create_model("test_resnet", features_only=True, out_indices=(2, 3, 4))
    frozen = timm.layers.freeze_batch_norm_2d(body).eval()
    state, x = frozen.state_dict(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = frozen(x)
        found = with_one_pass(frozen)(x)
    assert list(frozen.state_dict()) == list(state)
    assert all(torch.equal(frozen.state_dict()[name], state[name]) for name in state)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not any(type(module) is FrozenBatchNorm2d for module in frozen.modules())


def test_backbones_use_it_and_half_precision_reaches_their_maps():
    backbone = Backbone("test_resnet")
    assert any(isinstance(module, FrozenBatchNorm) for module in backbone.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 64))
    assert {features.dtype for features in maps} == {torch.bfloat16}

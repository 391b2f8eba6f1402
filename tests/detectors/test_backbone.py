"""Backbones of every family: shapes, freezing, names, bad input."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.norm_act import FrozenBatchNorm2d as TimmFrozenBatchNorm2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from simdetr.detectors import Backbone
from simdetr.detectors.backbone import (
    FrozenBatchNorm,
    NormedConvolution,
    SimpleFeaturePyramid,
    _nearest,
    resize_mask,
    with_folded_norms,
)

FAMILIES = {
    "resnet18": (64, 96),
    "convnext_atto": (64, 96),
    "mobilenetv3_small_050": (64, 96),
    "swin_tiny_patch4_window7_224": (68, 100),
    "vit_tiny_patch16_224": (64, 96),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_of_every_family(name):
    height, width = FAMILIES[name]
    backbone = Backbone(name, pyramid_channels=32).eval()
    assert backbone.strides == [8, 16, 32]
    assert height % backbone.pad_multiple == 0 == width % backbone.pad_multiple
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, height, width))
    for features, channels, stride in zip(maps, backbone.channels, backbone.strides, strict=True):
        assert features.shape == (1, channels, -(-height // stride), -(-width // stride))


def test_maps_are_timms():
    """NHWC maps of Swin are turned, ResNet's come as they are."""
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    for name, axes in (("resnet18", (0, 1, 2, 3)), ("swin_tiny_patch4_window7_224", (0, 3, 1, 2))):
        backbone = Backbone(name).eval()
        with torch.no_grad():
            maps, expected = backbone(images), backbone.body(images.contiguous(memory_format=torch.channels_last))
        for found, features in zip(maps, expected, strict=True):
            torch.testing.assert_close(found, features.permute(axes), rtol=0, atol=0)


def test_coarsest_map_only():
    backbone = Backbone("resnet18", num_maps=1)
    assert (backbone.channels, backbone.strides) == ([512], [32])
    plain = Backbone("vit_tiny_patch16_224", num_maps=1)
    assert (plain.channels, plain.strides, plain.pyramid) == ([192], [16], None)
    assert plain(torch.zeros(1, 3, 32, 48))[0].shape == (1, 192, 2, 3)


def test_dilation_keeps_stride_16():
    backbone = Backbone("resnet50", num_maps=1, output_stride=16)
    assert backbone.strides == [16]
    assert backbone(torch.zeros(1, 3, 64, 64))[0].shape == (1, 2048, 4, 4)
    with pytest.raises(ValueError, match=r"swin_tiny.*cannot be built.*dilated"):
        Backbone("swin_tiny_patch4_window7_224", num_maps=1, output_stride=16)


def frozen(backbone):
    return {name for name, parameter in backbone.body.named_parameters() if not parameter.requires_grad}


def test_stem_of_resnet50_is_frozen_as_in_the_original():
    backbone = Backbone("resnet50")
    names = frozen(backbone)
    assert {name.split(".")[0] for name in names} == {"conv1", "layer1"}
    parameters = dict(backbone.body.named_parameters())
    assert sum(parameters[name].numel() for name in names) == 222_400
    assert sum(parameter.numel() for parameter in parameters.values()) == 23_454_912
    assert sum(buffer.numel() for buffer in backbone.body.buffers()) == 106_240


@pytest.mark.parametrize(
    ("name", "first_trainable"),
    [
        ("convnext_atto", "stages_1."),
        ("swin_tiny_patch4_window7_224", "layers_1."),
        ("mobilenetv3_small_050", "blocks.1."),
        ("vit_tiny_patch16_224", "model.blocks.0."),
    ],
)
def test_stem_of_other_families(name, first_trainable):
    backbone = Backbone(name)
    trainable = [key for key, parameter in backbone.body.named_parameters() if parameter.requires_grad]
    assert trainable[0].startswith(first_trainable)
    assert frozen(backbone)
    assert not frozen(Backbone(name, freeze_stem=False))


def test_batch_norm_frozen_or_not():
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    fixed = Backbone("resnet18").train()
    assert any(isinstance(module, TimmFrozenBatchNorm2d) for module in fixed.modules())
    before = {name: buffer.clone() for name, buffer in fixed.named_buffers()}
    fixed(images)
    assert all(torch.equal(buffer, before[name]) for name, buffer in fixed.named_buffers())
    learning = Backbone("resnet18", frozen_batch_norm=False, freeze_stem=False).train()
    assert not any(isinstance(module, TimmFrozenBatchNorm2d) for module in learning.modules())
    learning(images)
    assert not torch.equal(learning.body.bn1.running_mean, torch.zeros(64))


def test_wholly_frozen_backbone_stays_as_it_is():
    backbone = Backbone("convnext_atto", freeze_all=True).train()
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert backbone.training and not backbone.body.training
    assert not backbone(torch.zeros(1, 3, 32, 32))[0].requires_grad


def test_swin_keeps_its_windows_in_every_stage():
    backbone = Backbone("swin_tiny_patch4_window7_224")
    last = backbone.body.layers_3.blocks[1]
    assert tuple(last.window_size) == (7, 7) and tuple(last.shift_size) == (3, 3)


def test_weights_of_timm_load_by_prefix():
    """Names under ``body`` are timm's own, so a classifier's checkpoint fits."""
    state = timm.create_model("resnet18", pretrained=False).state_dict()
    report = Backbone("resnet18").body.load_state_dict(state, strict=False)
    assert report.missing_keys == []
    assert all(key.startswith("fc.") or key.endswith("num_batches_tracked") for key in report.unexpected_keys)


def test_bad_names():
    with pytest.raises(ValueError, match="'resnet1801' is not a timm model; similar names"):
        Backbone("resnet1801")
    with pytest.raises(ValueError, match=r"hiera_tiny_224.*network for any image size"):
        Backbone("hiera_tiny_224")
    with pytest.raises(ValueError, match="num_maps must be 1 or 3, got 2"):
        Backbone("resnet18", num_maps=2)


# ----------------------------------------------------------------------------------------------------------------------
# The pyramid on a plain transformer's map.


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


# ----------------------------------------------------------------------------------------------------------------------
# Frozen batch norm: torchvision's values in half the passes, in the precision of its input.


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
        found = with_folded_norms(frozen)(x)
    assert list(frozen.state_dict()) == list(state)
    assert all(torch.equal(frozen.state_dict()[name], state[name]) for name in state)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not any(type(module) is FrozenBatchNorm2d for module in frozen.modules())


@pytest.mark.parametrize(
    ("name", "folded"),
    [("test_resnet", 15), ("test_efficientnet", 12), ("tf_efficientnet_lite0", 48), ("resnetv2_50", 32)],
)
def test_gradients_are_those_of_the_norm_after_the_convolution(name, folded, shake):
    """Of networks that pad evenly and as TensorFlow does, and of one with norms that follow no convolution."""
    network = timm.create_model(name, features_only=True, out_indices=(-2, -1))
    body = shake(timm.layers.freeze_batch_norm_2d(network)).double()
    ours = with_folded_norms(copy.deepcopy(body))
    assert sum(isinstance(module, NormedConvolution) for module in ours.modules()) == folded
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    for each in (body, ours):
        sum(features.square().mean() for features in each(x)).backward()
    for expected, found in zip(body.parameters(), ours.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(
                found.grad, expected.grad, rtol=1e-9, atol=1e-9 * float(expected.grad.abs().max())
            )


def test_a_convolution_that_is_read_twice_keeps_its_norm_apart():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 5, 1), FrozenBatchNorm2d(5)

        def forward(self, x):
            read = self.conv(x)
            return self.norm(read) + read

    assert not any(isinstance(module, NormedConvolution) for module in with_folded_norms(Twice()).modules())


def test_backbones_use_it_and_half_precision_reaches_their_maps():
    backbone = Backbone("test_resnet")
    assert any(isinstance(module, FrozenBatchNorm) for module in backbone.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 64))
    assert {features.dtype for features in maps} == {torch.bfloat16}


# ----------------------------------------------------------------------------------------------------------------------
# Padding masks: torch's own nearest pixels.


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

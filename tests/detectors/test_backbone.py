"""Backbones of every family: shapes, freezing, names, bad input."""

import pytest
import timm
import torch
from timm.layers.norm_act import FrozenBatchNorm2d

from simdetr.detectors import Backbone

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
            maps, expected = backbone(images), backbone.body(images)
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
    assert any(isinstance(module, FrozenBatchNorm2d) for module in fixed.modules())
    before = {name: buffer.clone() for name, buffer in fixed.named_buffers()}
    fixed(images)
    assert all(torch.equal(buffer, before[name]) for name, buffer in fixed.named_buffers())
    learning = Backbone("resnet18", frozen_batch_norm=False, freeze_stem=False).train()
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in learning.modules())
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

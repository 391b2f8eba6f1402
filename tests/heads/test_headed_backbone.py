"""A head on a backbone alone: what it reads, what it may change, and whose weights it starts from."""

from __future__ import annotations

import pytest
import torch

from simdetr.detectors import DeformableDETR
from simdetr.exchange.weights import checkpoint_config, load_weights, save_detector
from simdetr.heads import HeadedBackbone

UNFROZEN = {"frozen_batch_norm": False, "freeze_stem": False}


@pytest.fixture
def make(parts):
    """Build a headed backbone with a fixed seed."""

    def build(backbone="test_resnet", doubles=False, **settings):
        torch.manual_seed(0)
        return HeadedBackbone(
            3, lambda sizes: parts.MeanHead(sizes, doubles=doubles), backbone, **{**UNFROZEN, **settings}
        )

    return build


@pytest.mark.parametrize(("backbone", "stride"), [("resnet18", 8), ("resnet18", 16), ("resnet18", 32)])
@torch.no_grad()
def test_levels_keep_the_output_stride(make, backbone, stride, batch):
    features = make(backbone, output_stride=stride).features(*batch[:2])
    assert [level.stride for level in features.levels] == [min(s, stride) for s in (8, 16, 32)]
    for level in features.levels:
        assert level.features.shape[2:] == (64 // level.stride, 96 // level.stride)
        assert level.mask.shape == (2, *level.features.shape[2:])
        assert not level.mask[0].any() and float(level.mask[1].float().mean()) == pytest.approx(1 / 3)


@pytest.mark.parametrize("backbone", ["test_resnet", "resnet18", "swin_pico", "convnext_atto"])
@torch.no_grad()
def test_a_neck_changes_what_the_next_stage_reads(make, backbone, batch):
    if backbone == "swin_pico":
        pytest.importorskip("simdetr.detectors.swin_ram")
        backbone = "swin_tiny_patch4_window7_224"
    necked, plain = make(backbone, doubles=True).train(), make(backbone).train()
    for headed in (necked, plain):
        for module in headed.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
    images, mask, _ = batch
    torch.manual_seed(5)
    changed = necked.features(images, mask)
    torch.manual_seed(5)
    unchanged = plain.features(images, mask)
    assert changed.taps == [8, 16, 32] and unchanged.taps == []
    torch.testing.assert_close(changed.levels[0].features, 2 * unchanged.levels[0].features)
    assert not torch.allclose(changed.levels[1].features, 2 * unchanged.levels[1].features)
    necked.eval()
    plain.eval()
    for one, other in zip(necked.features(images, mask).levels, plain.features(images, mask).levels, strict=True):
        assert torch.equal(one.features, other.features)
    assert not any(module._forward_hooks for module in necked.modules()), "hooks go with the forward pass"


def test_a_plain_transformer_has_no_stages_for_a_neck(make, batch):
    headed = make("test_vit", doubles=True)
    with pytest.raises(ValueError, match="a plain vision transformer has no stages between its maps"):
        headed.features(*batch[:2])
    assert len(make("test_vit").eval()(*batch[:2])["pred_logits"]) == 2


def test_every_parameter_has_a_gradient(make, batch):
    headed = make()
    losses = headed.losses(*batch)
    torch.testing.assert_close(losses["loss"], losses["mean_loss"])
    losses["loss"].backward()
    assert not [name for name, parameter in headed.named_parameters() if parameter.grad is None]


def test_starts_from_the_backbone_of_any_detector(make, parts, tmp_path):
    torch.manual_seed(1)
    plain = DeformableDETR(7, **parts.SMALL_DETR)
    save_detector(plain, checkpoint_config(plain, None), tmp_path)
    headed = make()
    report = load_weights(headed, tmp_path)
    assert all(name.startswith("backbone.body.") for name in report.kept)
    for name, value in headed.backbone.state_dict().items():
        assert torch.equal(value, plain.backbone.state_dict()[name])
    with pytest.raises(ValueError, match="all tensors of its backbone"):
        load_weights(make("resnet18"), tmp_path)

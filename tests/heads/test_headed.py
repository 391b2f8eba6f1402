"""A detector with a head: the detector's predictions stay, losses add up, both learn, both come back from a file."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from simdetr.detectors import DeformableDETR
from simdetr.exchange.weights import checkpoint_config, load_weights, save_detector
from simdetr.heads import HeadedDetector
from simdetr.training.detection_task import DetectionTask

KINDS = ["detr", "refined", "two-stage", "vidt"]


@pytest.fixture
def make(parts):
    """Build a headed detector with a fixed seed."""

    def build(kind="refined", reads="queries", doubles=False, **settings):
        torch.manual_seed(0)
        return HeadedDetector(3, lambda sizes: parts.MeanHead(sizes, reads, doubles), parts.DETECTORS[kind], **settings)

    return build


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reads", ["levels", "queries"])
@torch.no_grad()
def test_the_detectors_own_predictions_stay(make, kind, reads, batch):
    headed = make(kind, reads).eval()
    images, mask, _ = batch
    own, both = headed.detector(images, mask), headed(images, mask)
    if reads == "queries":
        assert torch.equal(own["pred_logits"], both["pred_logits"]) and torch.equal(
            own["pred_boxes"], both["pred_boxes"]
        )
        assert both["mean"].shape == (2, 3)
    else:
        assert both["pred_logits"].shape == (2, 1, 3)


def test_what_a_plain_detector_does_not_bring_learns_with_its_own_rate(make, tmp_path):
    """Its class heads, for it has other classes, and the head itself."""
    plain = DeformableDETR(**{**make("two-stage").detector.init_args, "num_classes": 5})
    save_detector(plain, checkpoint_config(plain, None), tmp_path / "detector")
    task = DetectionTask(make("two-stage"), init_weights=str(tmp_path / "detector"), lr=1e-4, new_lr=2e-3)
    new = next(group for group in task.new_optimiser().param_groups if group["name"] == "new")
    chosen = {id(parameter) for parameter in new["params"]}
    names = {name for name, parameter in task.detector.named_parameters() if id(parameter) in chosen}
    assert {name.split(".")[0] for name in names} == {"head", "detector"}
    assert all("class_embed" in name for name in names if name.startswith("detector."))
    assert {name for name, _ in task.detector.named_parameters() if name.startswith("head.")} <= names
    assert "detector.backbone" not in task.load_report.summary() and task.load_report.kept[0].startswith("detector.")


@pytest.mark.parametrize("kind", KINDS)
def test_losses_add_up_and_every_parameter_learns(make, kind, batch):
    headed = make(kind, detector_weight=0.5).train()
    losses = headed.losses(*batch)
    own = headed.detector.losses(*batch)
    torch.testing.assert_close(losses["loss"], 0.5 * own["loss"] + losses["mean_loss"])
    assert losses["mean_highest"].requires_grad is False
    losses["loss"].backward()
    without = [name for name, p in headed.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_detectors_loss_it_has_gradients_all_the_same(make, kind, batch):
    headed = make(kind, detector_weight=0.0).train()
    losses = headed.losses(*batch)
    torch.testing.assert_close(losses["loss"], losses["mean_loss"])
    losses["loss"].backward()
    gradients = {name: p.grad for name, p in headed.named_parameters() if p.requires_grad}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    # the IoU, vector and cell heads of ViDT+ have no part in detections, and none in this loss
    assert all(name.startswith(("detector.iou", "detector.vector", "detector.transformer.")) for name in missing)
    boxes = [gradient for name, gradient in gradients.items() if "bbox_embed" in name and gradient is not None]
    assert boxes and any(float(gradient.abs().sum()) > 0 for name, gradient in gradients.items() if "body" in name)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_neck_sees_every_level_and_changes_training_alone(make, kind, batch):
    images, mask, _ = batch
    necked, plain = make(kind, doubles=True), make(kind)
    assert torch.equal(necked.eval()(images, mask)["pred_boxes"], plain.eval()(images, mask)["pred_boxes"])
    _, features = necked.detector.decoded(images, mask, necked.head.pass_level)
    assert (
        features.taps
        == [level.stride for level in features.levels]
        == list(necked.detector.feature_sizes.level_strides)
    )
    changed, unchanged = necked.train()._decoded(images, mask)[1], plain.train()._decoded(images, mask)[1]
    for one, other in zip(changed.levels, unchanged.levels, strict=True):
        torch.testing.assert_close(one.features, 2 * other.features)
    assert not torch.allclose(changed.queries.states[-1], unchanged.queries.states[-1])


def test_groups_find_the_backbone(make, batch):
    headed = make()
    assert isinstance(headed.get_submodule(headed.body_name), nn.Module)
    assert any(name.startswith(f"{headed.backbone_name}.") for name, _ in headed.named_parameters())
    assert headed.core is headed.detector


def test_starts_from_a_plain_detectors_folder(make, parts, tmp_path, batch):
    torch.manual_seed(1)
    plain = DeformableDETR(7, **parts.SMALL_DETR, with_box_refine=True)
    save_detector(plain, checkpoint_config(plain, None), tmp_path)
    headed = make()
    report = load_weights(headed, tmp_path)
    assert {name.split(".")[1] for name in report.replaced} == {"class_embed"}
    assert all(name.startswith("head.") for name in report.missing) and report.missing and not report.unexpected
    state = plain.state_dict()
    assert all(torch.equal(headed.state_dict()[name], state[name.removeprefix("detector.")]) for name in report.kept)


def test_refuses_what_does_not_fit(make):
    with pytest.raises(ValueError, match=r"detector_weight must be at least 0, got -1"):
        make(detector_weight=-1)


# ----------------------------------------------------------------------------------------------------------------------
# A head on a backbone alone: what it reads, what it may change, and whose weights it starts from.


@pytest.fixture
def make_headed_backbone(parts):
    """Build a headed backbone with a fixed seed."""

    def build(backbone="test_resnet", doubles=False, **settings):
        return parts.on_backbone(lambda sizes: parts.MeanHead(sizes, doubles=doubles), backbone, **settings)

    return build


@pytest.mark.parametrize(("backbone", "stride"), [("resnet18", 8), ("resnet18", 16), ("resnet18", 32)])
@torch.no_grad()
def test_levels_keep_the_output_stride(make_headed_backbone, backbone, stride, batch):
    features = make_headed_backbone(backbone, output_stride=stride).features(*batch[:2])
    assert [level.stride for level in features.levels] == [min(s, stride) for s in (8, 16, 32)]
    for level in features.levels:
        assert level.features.shape[2:] == (64 // level.stride, 96 // level.stride)
        assert level.mask.shape == (2, *level.features.shape[2:])
        assert not level.mask[0].any() and float(level.mask[1].float().mean()) == pytest.approx(1 / 3)


@pytest.mark.parametrize("backbone", ["test_resnet", "resnet18", "swin_pico", "convnext_atto"])
@torch.no_grad()
def test_a_neck_changes_what_the_next_stage_reads(make_headed_backbone, backbone, batch):
    if backbone == "swin_pico":
        pytest.importorskip("simdetr.detectors.swin_ram")
        backbone = "swin_tiny_patch4_window7_224"
    necked, plain = make_headed_backbone(backbone, doubles=True).train(), make_headed_backbone(backbone).train()
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


def test_a_plain_transformer_has_no_stages_for_a_neck(make_headed_backbone, batch):
    headed = make_headed_backbone("test_vit", doubles=True)
    with pytest.raises(ValueError, match="a plain vision transformer has no stages between its maps"):
        headed.features(*batch[:2])
    assert len(make_headed_backbone("test_vit").eval()(*batch[:2])["pred_logits"]) == 2


def test_every_parameter_has_a_gradient(make_headed_backbone, batch):
    headed = make_headed_backbone()
    losses = headed.losses(*batch)
    torch.testing.assert_close(losses["loss"], losses["mean_loss"])
    losses["loss"].backward()
    assert not [name for name, parameter in headed.named_parameters() if parameter.grad is None]


def test_starts_from_the_backbone_of_any_detector(make_headed_backbone, parts, tmp_path):
    torch.manual_seed(1)
    plain = DeformableDETR(7, **parts.SMALL_DETR)
    save_detector(plain, checkpoint_config(plain, None), tmp_path)
    headed = make_headed_backbone()
    report = load_weights(headed, tmp_path)
    assert all(name.startswith("backbone.body.") for name in report.kept)
    for name, value in headed.backbone.state_dict().items():
        assert torch.equal(value, plain.backbone.state_dict()[name])
    with pytest.raises(ValueError, match="all tensors of its backbone"):
        load_weights(make_headed_backbone("resnet18"), tmp_path)

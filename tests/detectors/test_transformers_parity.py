"""The whole detector and its losses against transformers' Deformable DETR with the same weights (T6 to T8)."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from simdetr.detectors import DetectionLoss
from simdetr.exchange.parameter_names import (
    drop_copies,
    fit_to,
    from_transformers,
    plain_heads,
    restore_copies,
    to_transformers,
)

transformers = pytest.importorskip("transformers", reason="transformers is the reference here")

VARIANTS = ("base", "refine", "two_stage", "single_scale", "dc5")


def build_reference(variant, backbone="resnet18", position="sine"):
    """transformers' model of the size of the fixture ``make_detector``, with heads untied where they should be."""
    config = transformers.DeformableDetrConfig(
        backbone="resnet50" if variant == "dc5" else backbone,
        num_labels=7,
        d_model=64,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_queries=20,
        two_stage_num_proposals=20,
        num_feature_levels=1 if variant in ("single_scale", "dc5") else 4,
        dilation=variant == "dc5",
        with_box_refine=variant in ("refine", "two_stage"),
        two_stage=variant == "two_stage",
        auxiliary_loss=True,
        class_cost=2,
        disable_custom_kernels=True,
        position_embedding_type=position,
    )
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    if config.with_box_refine:
        # transformers ties all heads when it builds a model from nothing
        model.bbox_embed = torch.nn.ModuleList(copy.deepcopy(head) for head in model.bbox_embed)
        model.class_embed = torch.nn.ModuleList(copy.deepcopy(head) for head in model.class_embed)
        model.model.decoder.bbox_embed = model.bbox_embed
        if config.two_stage:
            model.model.decoder.class_embed = model.class_embed
    return model


@pytest.fixture(params=VARIANTS)
def pair(request, make_deformable, shake):
    """Our detector and transformers' with the same random weights."""
    ours = shake(make_deformable(request.param))
    theirs = build_reference(request.param)
    theirs.load_state_dict(to_transformers(plain_heads(ours.state_dict()), "memory"), strict=True)
    return ours, theirs


def reference_targets(targets):
    return [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]


def test_predictions_and_losses_are_equal(pair, batch):
    ours, theirs = pair
    images, mask, targets = batch
    with torch.no_grad():
        found = ours(images, mask)
        expected = theirs(pixel_values=images, pixel_mask=(~mask).long(), labels=reference_targets(targets))
    torch.testing.assert_close(found["pred_logits"], expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["pred_boxes"], expected.pred_boxes, rtol=1e-4, atol=1e-5)
    assert found["pred_logits"].std() > 0.1 and found["pred_boxes"].std() > 0.05, "the comparison must mean something"
    for layer, reference in zip(found["aux_outputs"], expected.auxiliary_outputs, strict=True):
        torch.testing.assert_close(layer["pred_logits"], reference["logits"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer["pred_boxes"], reference["pred_boxes"], rtol=1e-4, atol=1e-5)
    if "enc_outputs" in found:
        boxes = found["enc_outputs"]["pred_boxes"]
        torch.testing.assert_close(
            found["enc_outputs"]["pred_logits"], expected.enc_outputs_class[..., :1], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(boxes, expected.enc_outputs_coord_logits.sigmoid(), rtol=1e-4, atol=1e-5)

    losses = DetectionLoss()(found, targets)
    names = [name for name in expected.loss_dict if name.startswith(("loss_ce", "loss_bbox", "loss_giou"))]
    assert len(names) == 9
    for name in names:
        torch.testing.assert_close(losses[name], expected.loss_dict[name], rtol=1e-5, atol=1e-6)
    weights = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    total = sum(weights["_".join(name.split("_")[:2])] * value for name, value in losses.items() if name[:5] == "loss_")
    torch.testing.assert_close(losses["loss"], total, rtol=1e-6, atol=1e-6)


def test_weights_survive_the_round_trip(pair):
    ours, theirs = pair
    state = ours.state_dict()
    back = fit_to(from_transformers(theirs.state_dict()), state)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_files_written_by_transformers_can_be_read(pair, tmp_path):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path)
    state = ours.state_dict()
    stored = from_transformers(load_file(tmp_path / "model.safetensors"))
    assert len(stored) < len(state), "transformers leaves out copies of heads"
    restored = fit_to(restore_copies(stored, state), state)
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[name], state[name]) for name in state)


def test_files_written_for_transformers_can_be_read(pair, batch, tmp_path):
    ours, theirs = pair
    theirs.config.save_pretrained(tmp_path)
    save_file(
        to_transformers(drop_copies(plain_heads(ours.state_dict()))), tmp_path / "model.safetensors", {"format": "pt"}
    )
    again, report = transformers.DeformableDetrForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    images, mask, _ = batch
    with torch.no_grad():
        expected = theirs(pixel_values=images, pixel_mask=(~mask).long()).logits
        found = again.eval()(pixel_values=images, pixel_mask=(~mask).long()).logits
    torch.testing.assert_close(found, expected)


def test_learned_positions_are_equal(make_deformable, shake, batch):
    ours = shake(make_deformable("base", position_encoding="learned"))
    theirs = build_reference("base", position="learned")
    theirs.load_state_dict(to_transformers(plain_heads(ours.state_dict()), "memory"), strict=True)
    images, mask, _ = batch
    with torch.no_grad():
        found, expected = ours(images, mask), theirs(pixel_values=images, pixel_mask=(~mask).long())
    torch.testing.assert_close(found["pred_logits"], expected.logits, rtol=1e-4, atol=1e-4)
    assert from_transformers(theirs.state_dict()).keys() == ours.state_dict().keys()


@pytest.mark.parametrize("variant", ["base", "refine", "two_stage"])
def test_objectness_becomes_a_part_of_their_class_heads(variant, make_deformable, shake, batch):
    ours, theirs = shake(make_deformable(variant, objectness=True)), build_reference(variant)
    theirs.load_state_dict(to_transformers(plain_heads(ours.state_dict()), "memory"), strict=True)
    images, mask, _ = batch
    with torch.no_grad():
        found, expected = ours(images, mask), theirs(pixel_values=images, pixel_mask=(~mask).long())
    assert found["pred_objectness"].std() > 0.1
    torch.testing.assert_close(found["pred_logits"], expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["pred_boxes"], expected.pred_boxes, rtol=0, atol=1e-5)


def test_their_encoder_chooses_by_its_first_class(make_deformable, shake, batch):
    """A published head of the encoder, all of whose rows differ: ours has the first row and chooses the same cells."""
    theirs, ours = shake(build_reference("two_stage")), make_deformable("two_stage")
    own = ours.state_dict()
    ours.load_state_dict(fit_to(restore_copies(from_transformers(theirs.state_dict()), own), own), strict=True)
    images, mask, _ = batch
    with torch.no_grad():
        found, expected = ours(images, mask), theirs(pixel_values=images, pixel_mask=(~mask).long())
    assert expected.enc_outputs_class.shape[-1] == 7 and found["enc_outputs"]["pred_logits"].shape[-1] == 1
    torch.testing.assert_close(found["pred_logits"], expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["pred_boxes"], expected.pred_boxes, rtol=1e-4, atol=1e-5)

"""Published detectors are told from their tensors, at full size; what tensors do not tell is asked for or named."""

from __future__ import annotations

import pytest
import torch

from simdetr.detectors import DeformableDETR, ViDT
from simdetr.exchange.formats import UnknownArchitectureError, deformable_detr_of, resnet_of, swin_of, vidt_of
from simdetr.exchange.parameter_names import from_official, from_official_vidt, to_official, to_official_vidt

DEFORMABLE = {
    "base": {},
    "refine": {"with_box_refine": True},
    "two stage": {"with_box_refine": True, "two_stage": True},
    "single scale": {"num_feature_levels": 1},
    "five levels": {"num_feature_levels": 5, "num_encoder_layers": 3, "num_decoder_layers": 2, "ffn_dim": 2048},
    "learned": {"position_encoding": "learned", "num_queries": 100},
    "batch norm": {"frozen_batch_norm": False, "hidden_dim": 128},
    **{name: {"backbone": name} for name in ("resnet18", "resnet34", "resnet101", "resnet152", "wide_resnet50_2")},
}
VIDT = {
    "nano": {"backbone": "swin_nano"},
    "tiny": {},
    "small": {"backbone": "swin_small_patch4_window7_224"},
    "base": {"backbone": "swin_base_patch4_window7_224", "num_decoder_layers": 4},
    "vidt": {"fusion": False, "iou_aware": False, "mask_vectors": False, "token_labels": False, "num_queries": 100},
    "shared": {"with_box_refine": False, "hidden_dim": 128, "ffn_dim": 512},
}
NOT_IN_TENSORS = ("freeze_stem", "drop_path")


def arguments_of(detector):
    return {name: value for name, value in detector.init_args.items() if name not in NOT_IN_TENSORS}


@pytest.mark.parametrize("variant", DEFORMABLE)
def test_deformable_detr(variant):
    with torch.device("meta"):
        detector = DeformableDETR(91, **DEFORMABLE[variant])
        found = deformable_detr_of(from_official(to_official(detector.state_dict())), {})
        rebuilt = DeformableDETR(**found.init_args)
    assert arguments_of(rebuilt) == arguments_of(detector)
    guesses = ("dilation=False", "num_heads=8")
    assert found.assumed == (guesses if variant != "two stage" else (*guesses, "num_queries=300"))


@pytest.mark.parametrize("variant", VIDT)
def test_vidt(variant):
    with torch.device("meta"):
        detector = ViDT(91, **VIDT[variant])
        found = vidt_of(from_official_vidt(to_official_vidt(detector.state_dict())), {})
        rebuilt = ViDT(**found.init_args)
    assert arguments_of(rebuilt) == arguments_of(detector)
    assert found.assumed == ("num_heads=8",)


def test_vidt_without_neck():
    with torch.device("meta"):
        detector = ViDT(91, backbone="swin_nano", neck=False)
        found = vidt_of(from_official_vidt(to_official_vidt(detector.state_dict())), {})
        rebuilt = ViDT(**found.init_args)
    assert found.init_args["num_classes"] == 91 and found.assumed == ()
    shapes = {name: tensor.shape for name, tensor in rebuilt.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in detector.state_dict().items()}


def test_what_is_told_goes_first():
    with torch.device("meta"):
        state = DeformableDETR(91, num_heads=4, num_points=2, num_feature_levels=1).state_dict()
    with pytest.raises(UnknownArchitectureError, match=r"heads x points is 8; .*--detector\.num_heads"):
        deformable_detr_of(state, {})
    found = deformable_detr_of(state, {"num_heads": 4, "dilation": True, "backbone": "resnet50.tv_in1k"})
    assert found.assumed == ()
    told = {"num_heads": 4, "num_points": 2, "dilation": True, "backbone": "resnet50.tv_in1k"}
    assert told.items() <= found.init_args.items()
    with pytest.raises(UnknownArchitectureError, match="heads x points is 8"):
        deformable_detr_of(state, {"num_heads": 3})


def test_other_backbones_have_to_be_named():
    with torch.device("meta"):
        convnext = DeformableDETR(91, backbone="convnext_atto").state_dict()
        wide_windows = ViDT(91, backbone="swin_base_patch4_window12_384").state_dict()
    with pytest.raises(UnknownArchitectureError, match=r"--detector\.backbone"):
        resnet_of(convnext)
    with pytest.raises(UnknownArchitectureError, match=r"--detector\.backbone"):
        swin_of(wide_windows)
    assert deformable_detr_of(convnext, {"backbone": "convnext_atto"}).init_args["backbone"] == "convnext_atto"


def test_layers_that_differ_are_refused():
    with torch.device("meta"):
        state = DeformableDETR(91).state_dict()
        state["transformer.decoder.layers.0.cross_attn.attention_weights.bias"] = torch.empty(256)
    with pytest.raises(UnknownArchitectureError, match="expected the same in all layers"):
        deformable_detr_of(state, {})

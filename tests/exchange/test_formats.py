"""Published detectors are told from their tensors, at full size; what tensors do not tell is asked for or named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simdetr.data.annotations import Category
from simdetr.detectors import DeformableDETR, ViDT
from simdetr.exchange.formats import (
    FORMATS,
    OWN,
    UnknownArchitectureError,
    config_from_transformers,
    config_to_transformers,
    deformable_detr_of,
    images_from_transformers,
    images_to_transformers,
    label_names,
    recognise,
    resnet_of,
    swin_of,
    vidt_of,
)
from simdetr.exchange.parameter_names import (
    drop_copies,
    from_official,
    from_official_vidt,
    to_official,
    to_official_vidt,
    to_transformers,
)

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


# ----------------------------------------------------------------------------------------------------------------------
# Settings of Deformable DETR there and back, in the forms that versions 4 and 5 of transformers write.


OURS = {
    "num_classes": 3,
    "backbone": "resnet18",
    "hidden_dim": 64,
    "num_heads": 4,
    "num_encoder_layers": 2,
    "num_decoder_layers": 3,
    "ffn_dim": 128,
    "dropout": 0.2,
    "num_queries": 20,
    "num_feature_levels": 3,
    "num_points": 2,
    "with_box_refine": True,
    "two_stage": True,
    "dilation": True,
    "position_encoding": "learned",
}
TENSORS = {"class_embed.0.bias": torch.zeros(3)}
FILE = Path("folder/model.safetensors")


def test_settings_there_and_back():
    config = config_to_transformers(OURS, (Category(7, "cat"), Category(9, "dog"), Category(11, "cow")))
    assert config["id2label"] == {"0": "cat", "1": "dog", "2": "cow"}
    back = config_from_transformers(config, {}, TENSORS, FILE)
    assert back["init_args"] == OURS
    assert back["categories"] == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}, {"id": 2, "name": "cow"}]
    with torch.device("meta"):
        assert DeformableDETR(**back["init_args"]).num_classes == 3


def test_transformers_itself_understands_them():
    transformers = pytest.importorskip("transformers")
    config = transformers.DeformableDetrConfig(**config_to_transformers(OURS, ()))
    assert config.backbone_config.backbone == "resnet18" and config.backbone_config.output_stride == 16
    assert config.two_stage_num_proposals == 20 and config.auxiliary_loss and config.class_cost == 2
    written_by_version_5 = config.to_dict()
    assert "backbone" not in written_by_version_5
    assert config_from_transformers(written_by_version_5, {}, TENSORS, FILE)["init_args"] == OURS


def test_version_4_leaves_defaults_out():
    """The published base detector on the Hub: little more than its name and its classes."""
    config = {"model_type": "deformable_detr", "id2label": {"0": "N/A", "1": "person"}, "num_queries": 300}
    back = config_from_transformers(config, {}, {"model.decoder.class_embed.0.bias": torch.zeros(91)}, FILE)
    with torch.device("meta"):
        detector = DeformableDETR(**back["init_args"])
        assert detector.init_args == DeformableDETR(91).init_args
    assert back["categories"][1:3] == [{"id": 1, "name": "person"}, {"id": 2, "name": "class 2"}]
    assert back["image_settings"]["short_side"] == 800


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "d_fine"}, r"holds transformers' 'd_fine', expected 'deformable_detr'.*`simdetr import`"),
        ({"encoder_ffn_dim": 64}, r"'encoder_ffn_dim': 64, 'decoder_ffn_dim': 128.*must be equal"),
        ({"use_timm_backbone": False, "backbone_config": {"model_type": "resnet"}}, r"transformers' own \('resnet'\)"),
    ],
)
def test_what_is_no_deformable_detr_of_ours_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        config_from_transformers(config_to_transformers(OURS, ()) | changes, {}, TENSORS, FILE)


def test_equal_names_stay_different_classes():
    categories = (Category(1, "bolt"), Category(2, "nut"), Category(8, "bolt"))
    assert label_names(categories, 3) == ["bolt (1)", "nut", "bolt (8)"]
    assert label_names((), 2) == ["class 0", "class 1"]


def test_image_settings():
    ours = {"short_side": 480, "max_side": 640, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.2]}
    assert images_from_transformers(images_to_transformers(ours)) == ours
    assert images_from_transformers({"size": 600, "max_size": 900})["max_side"] == 900
    squashed = images_from_transformers({"size": {"height": 512, "width": 640}, "do_normalize": False})
    assert squashed == {"short_side": 512, "max_side": 640, "mean": [0.0] * 3, "std": [1.0] * 3}


# ----------------------------------------------------------------------------------------------------------------------
# Every format is told from the others by names alone.


@pytest.fixture(scope="module")
def state():
    with torch.device("meta"):
        return DeformableDETR(91).state_dict()


def detr(state):
    return {
        name.replace("cross_attn", "multihead_attn"): None
        for name in to_official(state)
        if "sampling_offsets" not in name and "attention_weights" not in name
    }


def vidt(state):
    with torch.device("meta"):
        return to_official_vidt(ViDT(91).state_dict())


FILES = {
    "simdetr": lambda state: state,
    "Deformable DETR": to_official,
    "DETReg": lambda state: {**to_official(state), "feature_embed.layers.0.weight": None},
    "DETR": lambda state: {**detr(state), "transformer.decoder.layers.0.multihead_attn.in_proj_weight": None},
    "UP-DETR": lambda state: {**detr(state), "patch2query.weight": None, "feature_align.layers.0.bias": None},
    "ViDT": vidt,
    "transformers' Deformable DETR": lambda state: to_transformers(drop_copies(state)),
}


@pytest.mark.parametrize("title", FILES)
def test_format_is_recognised(title, state):
    assert recognise(FILES[title](state)).title == title


def test_transformers_names_in_memory_too(state):
    assert recognise(to_transformers(state, "memory")).title == "transformers' Deformable DETR"


def test_every_format_is_tested():
    assert [known.title for known in FORMATS] == list(dict.fromkeys(known.title for known in FORMATS))
    assert {known.title for known in FORMATS} == set(FILES)


def test_everything_else_has_our_names():
    assert recognise(["conv1.weight"]) is recognise([]) is OWN
    assert recognise(["layer1.0.conv1.weight", "fc.bias"]) is OWN

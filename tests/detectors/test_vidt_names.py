"""Names of ViDT's checkpoints: exact ones, what is left out, and the way there and back."""

from __future__ import annotations

import pytest
import torch

from simdetr.detectors import ViDT
from simdetr.exchange.parameter_names import from_official_vidt, has_neck, to_official_vidt

VARIANTS = {
    "vidt plus": {},
    "vidt": {"fusion": False, "iou_aware": False, "mask_vectors": False, "token_labels": False},
    "shared heads": {"with_box_refine": False},
    "no neck": {"neck": False},
}
UNUSED = {
    "backbone.norm1.weight",
    "backbone.norm3.bias",
    "backbone.layers.0.blocks.1.attn.relative_position_index",
    "backbone.layers.1.downsample.expansion.weight",
    "backbone.layers.3.downsample.norm2.bias",
    "transformer.level_embed",
    "fusion.multi_scaler.refinenet_3.smoothing.weight",
    "fusion.multi_scaler.refinenet_3.resConfUnit1.conv2.bias",
}


@pytest.fixture(params=VARIANTS)
def detector(request):
    with torch.device("meta"):
        return ViDT(5, backbone="swin_pico", hidden_dim=32, num_heads=2, num_queries=9, **VARIANTS[request.param])


def test_there_and_back(detector):
    state = detector.state_dict()
    official = to_official_vidt(state)
    assert len(official) == len(state) and has_neck(official) == has_neck(state)
    unused = {name: torch.zeros(1) for name in UNUSED}
    back = from_official_vidt(official | (unused if has_neck(state) else {}))
    assert back.keys() == state.keys()
    assert all(back[name] is state[name] for name in state)


def test_names_of_the_original():
    with torch.device("meta"):
        names = to_official_vidt(ViDT(91, backbone="swin_nano").state_dict()).keys()
    assert {
        "backbone.patch_embed.proj.weight",
        "backbone.patch_embed.norm.bias",
        "backbone.det_token",
        "backbone.det_pos_embed",
        "backbone.layers.0.blocks.0.attn.relative_position_bias_table",
        "backbone.layers.2.blocks.5.attn.qkv.weight",
        "backbone.layers.2.blocks.5.det_pos_linear.weight",
        "backbone.layers.0.downsample.norm.weight",
        "backbone.layers.3.downsample.reduction.weight",
        "transformer.reference_points.weight",
        "transformer.enc_output_norm.weight",
        "transformer.token_embed.bias",
        "transformer.decoder.layers.5.cross_attn.sampling_offsets.weight",
        "transformer.decoder.bbox_embed.6.layers.2.bias",
        "tgt_proj.0.weight",
        "query_pos_proj.1.bias",
        "fusion.multi_scaler.layer_3_rn.weight",
        "fusion.multi_scaler.refinenet_0.resConfUnit1.conv3.weight",
        "class_embed.6.weight",
        "vector_embed.6.layers.2.bias",
        "iou_embed.6.layers.2.bias",
    } <= names
    assert not any(name.startswith(("backbone.body.", "backbone.tail.", "backbone.layers.4.")) for name in names)

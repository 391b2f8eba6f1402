"""Names of parameters: exact keys, counts of the original's checkpoints, copies (specification T5 and T8)."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from simdetr.detectors import DeformableDETR
from simdetr.detectors.state_dict_names import (
    drop_copies,
    from_official,
    from_transformers,
    restore_copies,
    to_official,
    to_transformers,
)

FULL_SIZE = {
    "base": ({}, 561, 545),
    "refine": ({"with_box_refine": True}, 597, 585),
    "two_stage": ({"with_box_refine": True, "two_stage": True}, 630, 598),
    "single_scale": ({"num_feature_levels": 1}, 549, 533),
}


@pytest.mark.parametrize("variant", FULL_SIZE)
def test_number_of_keys(variant):
    settings, official, stored = FULL_SIZE[variant]
    with torch.device("meta"):
        model = DeformableDETR(91, **settings)
    state = to_official(model.state_dict())
    assert len(state) == official
    assert from_official(state).keys() == model.state_dict().keys()
    # transformers stores each head once; for each packed weight and bias of self-attention it has three
    distinct = len(list(model.named_parameters())) + len(list(model.named_buffers()))
    assert distinct + 2 * 2 * 6 == stored


def test_names_of_the_original(make_detector):
    names = to_official(make_detector("two_stage").state_dict()).keys()
    assert {
        "backbone.0.body.conv1.weight",
        "backbone.0.body.bn1.running_var",
        "backbone.0.body.layer4.1.conv2.weight",
        "input_proj.3.0.weight",
        "input_proj.3.1.bias",
        "transformer.level_embed",
        "transformer.enc_output_norm.weight",
        "transformer.pos_trans.bias",
        "transformer.encoder.layers.1.self_attn.sampling_offsets.weight",
        "transformer.encoder.layers.1.norm2.bias",
        "transformer.decoder.layers.2.cross_attn.attention_weights.bias",
        "transformer.decoder.layers.2.self_attn.in_proj_weight",
        "transformer.decoder.layers.2.self_attn.out_proj.bias",
        "transformer.decoder.layers.2.norm3.weight",
        "transformer.decoder.layers.2.linear2.weight",
        "class_embed.3.bias",
        "bbox_embed.3.layers.2.weight",
        "transformer.decoder.class_embed.3.bias",
        "transformer.decoder.bbox_embed.3.layers.2.weight",
    } <= names
    assert not any("num_batches_tracked" in name for name in names)
    base = to_official(make_detector("base", position_encoding="learned").state_dict()).keys()
    assert {"query_embed.weight", "transformer.reference_points.bias", "backbone.1.row_embed.weight"} <= base
    assert not any(name.startswith("transformer.decoder.bbox_embed") for name in base)


def test_names_of_transformers(make_detector):
    state = make_detector("base").state_dict()
    disk, memory = to_transformers(state, "disk"), to_transformers(state, "memory")
    assert "model.backbone.conv_encoder.model.conv1.weight" in disk
    assert "model.decoder.layers.0.self_attn.out_proj.weight" in disk and "model.decoder.layers.0.fc1.bias" in disk
    assert "model.backbone.model.conv1.weight" in memory
    assert (
        "model.decoder.layers.0.self_attn.o_proj.weight" in memory and "model.encoder.layers.1.mlp.fc2.bias" in memory
    )
    packed = state["transformer.decoder.layers.1.self_attn.in_proj_weight"]
    torch.testing.assert_close(disk["model.decoder.layers.1.self_attn.k_proj.weight"], packed[64:128], rtol=0, atol=0)
    for renamed in (disk, memory):
        back = from_transformers(renamed)
        assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("variant", ["base", "refine", "two_stage"])
def test_copies_are_dropped_and_restored(variant, make_detector, tmp_path):
    model = make_detector(variant)
    state = model.state_dict()
    kept = drop_copies(state)
    assert len(kept) == len({tensor.data_ptr() for tensor in state.values()}) < len(state)
    # safetensors refuses tensors that share memory
    save_file(kept, tmp_path / "weights.safetensors")
    other = make_detector(variant, seed=1)
    other.load_state_dict(restore_copies(load_file(tmp_path / "weights.safetensors"), other.state_dict()))
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def test_either_copy_of_a_head_is_enough(make_detector):
    model = make_detector("two_stage")
    state = model.state_dict()
    without = {name: tensor for name, tensor in state.items() if not name.startswith(("class_embed", "bbox_embed"))}
    assert restore_copies(without, state).keys() == state.keys()


def test_a_head_that_is_nowhere_stays_missing(make_detector):
    model = make_detector("refine")
    state = {name: tensor for name, tensor in model.state_dict().items() if "class_embed" not in name}
    restored = restore_copies(state, model.state_dict())
    assert not any("class_embed" in name for name in restored)

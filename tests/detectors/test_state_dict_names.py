"""Names of parameters: exact keys, counts of the original's checkpoints, copies (specification T5 and T8)."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from simdetr.detectors import DeformableDETR
from simdetr.exchange.parameter_names import (
    add_objectness,
    drop_copies,
    fit_to,
    fold_objectness,
    from_official,
    from_transformers,
    plain_heads,
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


@pytest.mark.parametrize("objectness", [False, True])
@pytest.mark.parametrize("variant", ["base", "refine", "two_stage"])
def test_copies_are_dropped_and_restored(variant, objectness, make_detector, tmp_path):
    model = make_detector(variant, objectness=objectness)
    state = model.state_dict()
    kept = drop_copies(state)
    assert len(kept) == len({tensor.data_ptr() for tensor in state.values()}) < len(state)
    # safetensors refuses tensors that share memory
    save_file(kept, tmp_path / "weights.safetensors")
    other = make_detector(variant, seed=1, objectness=objectness)
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


def copies(state):
    """Groups of names that stand for one tensor."""
    places = {}
    for name, tensor in state.items():
        places.setdefault((tensor.data_ptr(), tuple(tensor.shape)), set()).add(name)
    return {frozenset(names) for names in places.values()}


@pytest.mark.parametrize("objectness", [False, True])
@pytest.mark.parametrize("variant", ["base", "refine", "two_stage"])
def test_plain_heads_have_a_row_per_class_and_the_copies_of_the_original(variant, objectness, make_detector, shake):
    state = shake(make_detector(variant, objectness=objectness)).state_dict()
    plain = plain_heads(state)
    assert not any("object_embed" in name for name in plain)
    assert {len(plain[name]) for name in plain if "class_embed" in name} == {7}
    assert copies(plain) == copies({name: state[name] for name in plain})
    if variant == "two_stage":
        for part in ("weight", "bias"):
            torch.testing.assert_close(plain[f"class_embed.3.{part}"][:1], state[f"class_embed.3.{part}"])
        assert plain["class_embed.3.weight"][1:].count_nonzero() == 0
        torch.testing.assert_close(plain["class_embed.3.bias"][1:].sigmoid(), torch.full((6,), 0.01))


@pytest.mark.parametrize("variant", ["base", "two_stage"])
def test_objectness_comes_out_of_class_heads_and_goes_back(variant, make_detector, shake, batch):
    images, mask, _ = batch
    source, target = shake(make_detector(variant)), make_detector(variant, objectness=True)
    target.load_state_dict(add_objectness(source.state_dict(), target.state_dict()))
    back = make_detector(variant, seed=2)
    back.load_state_dict(fold_objectness(target.state_dict()))
    with torch.no_grad():
        outputs = [detector(images, mask) for detector in (source, target, back)]
    for name in ("pred_logits", "pred_boxes"):
        for other in outputs[1:]:
            torch.testing.assert_close(other[name], outputs[0][name], rtol=0, atol=1e-5)
    prior = outputs[1]["pred_objectness"].sigmoid()
    torch.testing.assert_close(prior, torch.full_like(prior, 0.01))


def test_a_head_shared_by_layers_is_no_head_of_an_encoder(make_detector):
    """A detector without two stages says nothing about cells: the encoder's logit stays new."""
    own = make_detector("two_stage", num_classes=7).state_dict()
    given = restore_copies(drop_copies(make_detector("base").state_dict()), own)
    assert len(fit_to(given, own)["class_embed.3.weight"]) == 7
    assert len(fit_to(given | {"transformer.enc_output.weight": torch.zeros(1)}, own)["class_embed.3.weight"]) == 1


@pytest.mark.parametrize(("count", "wanted"), [(20, 12), (12, 20)])
def test_learned_queries_are_kept_as_far_as_there_are_any(count, wanted, make_detector):
    given, own = (make_detector("base", num_queries=number, seed=number).state_dict() for number in (count, wanted))
    found = fit_to(given, own)["query_embed.weight"]
    assert torch.equal(found[:12], given["query_embed.weight"][:12])
    assert torch.equal(found[12:], own["query_embed.weight"][12:])

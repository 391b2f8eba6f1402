"""Names of parameters: exact keys, counts of the original's checkpoints, copies (specification T5 and T8)."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from simdetr.detectors import DeformableDETR, ViDT
from simdetr.exchange.parameter_names import (
    add_objectness,
    drop_copies,
    fit_to,
    fold_objectness,
    from_detr,
    from_official,
    from_official_vidt,
    from_transformers,
    has_neck,
    plain_heads,
    restore_copies,
    to_official,
    to_official_vidt,
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


def test_names_of_the_original(make_deformable):
    names = to_official(make_deformable("two_stage").state_dict()).keys()
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
    base = to_official(make_deformable("base", position_encoding="learned").state_dict()).keys()
    assert {"query_embed.weight", "transformer.reference_points.bias", "backbone.1.row_embed.weight"} <= base
    assert not any(name.startswith("transformer.decoder.bbox_embed") for name in base)


def test_names_of_transformers(make_deformable):
    state = make_deformable("base").state_dict()
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
def test_copies_are_dropped_and_restored(variant, objectness, make_deformable, tmp_path):
    model = make_deformable(variant, objectness=objectness)
    state = model.state_dict()
    kept = drop_copies(state)
    assert len(kept) == len({tensor.data_ptr() for tensor in state.values()}) < len(state)
    # safetensors refuses tensors that share memory
    save_file(kept, tmp_path / "weights.safetensors")
    other = make_deformable(variant, seed=1, objectness=objectness)
    other.load_state_dict(restore_copies(load_file(tmp_path / "weights.safetensors"), other.state_dict()))
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def test_either_copy_of_a_head_is_enough(make_deformable):
    model = make_deformable("two_stage")
    state = model.state_dict()
    without = {name: tensor for name, tensor in state.items() if not name.startswith(("class_embed", "bbox_embed"))}
    assert restore_copies(without, state).keys() == state.keys()


def test_a_head_that_is_nowhere_stays_missing(make_deformable):
    model = make_deformable("refine")
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
def test_plain_heads_have_a_row_per_class_and_the_copies_of_the_original(variant, objectness, make_deformable, shake):
    state = shake(make_deformable(variant, objectness=objectness)).state_dict()
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
def test_objectness_comes_out_of_class_heads_and_goes_back(variant, make_deformable, shake, batch):
    images, mask, _ = batch
    source, target = shake(make_deformable(variant)), make_deformable(variant, objectness=True)
    target.load_state_dict(add_objectness(source.state_dict(), target.state_dict()))
    back = make_deformable(variant, seed=2)
    back.load_state_dict(fold_objectness(target.state_dict()))
    with torch.no_grad():
        outputs = [detector(images, mask) for detector in (source, target, back)]
    for name in ("pred_logits", "pred_boxes"):
        for other in outputs[1:]:
            torch.testing.assert_close(other[name], outputs[0][name], rtol=0, atol=1e-5)
    prior = outputs[1]["pred_objectness"].sigmoid()
    torch.testing.assert_close(prior, torch.full_like(prior, 0.01))


def test_a_head_shared_by_layers_is_no_head_of_an_encoder(make_deformable):
    """A detector without two stages says nothing about cells: the encoder's logit stays new."""
    own = make_deformable("two_stage", num_classes=7).state_dict()
    given = restore_copies(drop_copies(make_deformable("base").state_dict()), own)
    assert len(fit_to(given, own)["class_embed.3.weight"]) == 7
    assert len(fit_to(given | {"transformer.enc_output.weight": torch.zeros(1)}, own)["class_embed.3.weight"]) == 1


@pytest.mark.parametrize(("count", "wanted"), [(20, 12), (12, 20)])
def test_learned_queries_are_kept_as_far_as_there_are_any(count, wanted, make_deformable):
    given, own = (make_deformable("base", num_queries=number, seed=number).state_dict() for number in (count, wanted))
    found = fit_to(given, own)["query_embed.weight"]
    assert torch.equal(found[:12], given["query_embed.weight"][:12])
    assert torch.equal(found[12:], own["query_embed.weight"][12:])


# ----------------------------------------------------------------------------------------------------------------------
# DETR into Deformable DETR: torch's own transformer layers carry DETR's names and order of steps.


@pytest.fixture
def detr():
    """State dict of a small DETR; torch's layers have the original's names, its norms the original's places."""
    model = nn.Module()
    model.transformer = nn.Module()
    model.transformer.encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2, enable_nested_tensor=False
    )
    model.transformer.decoder = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(64, 4, 96, batch_first=True), 3, norm=nn.LayerNorm(64)
    )
    model.input_proj = nn.Conv2d(512, 64, 1)
    model.query_embed = nn.Embedding(20, 64)
    model.class_embed = nn.Linear(64, 8)
    model.bbox_embed = nn.Sequential(nn.Linear(64, 4))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(("variant", "level"), [("base", 2), ("single_scale", 0)])
def test_the_projection_belongs_to_the_last_map_of_the_backbone(variant, level, detr, make_deformable):
    own = make_deformable(variant).state_dict()
    taken = from_detr(detr.state_dict(), own)
    assert torch.equal(taken[f"input_proj.{level}.0.weight"], detr.input_proj.weight)
    assert own[f"input_proj.{level}.0.weight"].shape == detr.input_proj.weight.shape


def test_every_tensor_has_the_role_that_it_had(detr, make_deformable):
    state, detector = detr.state_dict(), make_deformable("base")
    taken = from_detr(state, detector.state_dict())
    assert taken.keys() <= detector.state_dict().keys()
    assert not any(name.startswith(("class_embed", "bbox_embed", "query_embed")) for name in taken)
    detector.load_state_dict(
        {name: value for name, value in taken.items() if value.shape == detector.state_dict()[name].shape}, strict=False
    )
    theirs, ours = detr.transformer.decoder.layers[1], detector.transformer.decoder.layers[1]
    states, query = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    theirs.eval()
    with torch.no_grad():
        # self-attention and its norm, as torch computes them and as our layer does
        expected = theirs.norm1(states + theirs.self_attn(states + query, states + query, states)[0])
        placed = states + query
        found = ours.norm2(states + ours.self_attn(placed, placed, states, need_weights=False)[0])
        torch.testing.assert_close(found, expected)
        # attention that looks at one place alone returns its value, projected: the same two matrices
        one = torch.randn(2, 1, 64)
        expected = theirs.norm2(states + theirs.multihead_attn(states, one, one)[0])
        value = ours.cross_attn.output_proj(ours.cross_attn.value_proj(one))
        torch.testing.assert_close(ours.norm1(states + value), expected)
    encoder = "transformer.encoder.layers.0"
    assert torch.equal(taken[f"{encoder}.linear1.weight"], state[f"{encoder}.linear1.weight"])
    assert torch.equal(taken[f"{encoder}.self_attn.value_proj.bias"], state[f"{encoder}.self_attn.in_proj_bias"][128:])
    assert torch.equal(taken[f"{encoder}.self_attn.output_proj.weight"], state[f"{encoder}.self_attn.out_proj.weight"])
    assert torch.equal(taken[f"{encoder}.norm2.weight"], state[f"{encoder}.norm2.weight"])


def test_the_backbone_keeps_its_names(make_deformable):
    body = {f"backbone.0.body.{k}": v for k, v in make_deformable("base").backbone.body.state_dict().items()}
    taken = from_detr(body, make_deformable("base").state_dict())
    assert taken.keys() == {name.replace("backbone.0.body.", "backbone.body.") for name in body}


# ----------------------------------------------------------------------------------------------------------------------
# Names of ViDT's checkpoints: exact ones, what is left out, and the way there and back.


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


def test_names_of_the_original_vidt():
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

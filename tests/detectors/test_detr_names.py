"""DETR into Deformable DETR: torch's own transformer layers carry DETR's names and order of steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from simdetr.exchange.parameter_names import from_detr


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
def test_the_projection_belongs_to_the_last_map_of_the_backbone(variant, level, detr, make_detector):
    own = make_detector(variant).state_dict()
    taken = from_detr(detr.state_dict(), own)
    assert torch.equal(taken[f"input_proj.{level}.0.weight"], detr.input_proj.weight)
    assert own[f"input_proj.{level}.0.weight"].shape == detr.input_proj.weight.shape


def test_every_tensor_has_the_role_that_it_had(detr, make_detector):
    state, detector = detr.state_dict(), make_detector("base")
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


def test_the_backbone_keeps_its_names(make_detector):
    body = {f"backbone.0.body.{k}": v for k, v in make_detector("base").backbone.body.state_dict().items()}
    taken = from_detr(body, make_detector("base").state_dict())
    assert taken.keys() == {name.replace("backbone.0.body.", "backbone.body.") for name in body}

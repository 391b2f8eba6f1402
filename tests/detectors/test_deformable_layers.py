"""Encoder and decoder layers: order of operations, positions, padding."""

import pytest
import torch
import torch.nn.functional as F

from simdetr.detectors.deformable_transformer import DeformableDecoderLayer, DeformableEncoderLayer, Memory

SHAPES = [(4, 3), (2, 2)]
CELLS = 16


@pytest.fixture
def memory():
    tokens = torch.randn(2, CELLS, 8, generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(2, CELLS, dtype=torch.bool)
    padding[1, [2, 5, 8, 11, 13, 15]] = True
    return Memory(tokens, SHAPES, torch.ones(2, 2, 2), padding)


def build(kind, shake):
    return shake(kind(8, 16, 0.1, 2, 2, 3).eval())


def rand(*size, seed=1):
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed))


def test_encoder_layer_is_the_written_formula(memory, shake):
    layer = build(DeformableEncoderLayer, shake)
    positions, references = rand(1, CELLS, 8), rand(2, CELLS, 2, 2, seed=2)
    x = memory.tokens
    x = layer.norm1(x + layer.self_attn(x + positions, references, x, SHAPES, memory.padding))
    x = layer.norm2(x + layer.linear2(F.relu(layer.linear1(x))))
    torch.testing.assert_close(layer(memory, positions, references), x)


def test_decoder_layer_is_the_written_formula(memory, shake):
    """Self-attention is followed by norm2 and cross-attention by norm1, as in the original."""
    layer = build(DeformableDecoderLayer, shake)
    target, query, references = rand(2, 5, 8), rand(2, 5, 8, seed=2), rand(2, 5, 2, 4, seed=3)
    found = layer(target, query, references, memory)
    projected = F.linear(target + query, layer.self_attn.in_proj_weight[:16], layer.self_attn.in_proj_bias[:16])
    value = F.linear(target, layer.self_attn.in_proj_weight[16:], layer.self_attn.in_proj_bias[16:])
    heads = [tensor.view(2, 5, 2, 4).transpose(1, 2) for tensor in (*projected.chunk(2, dim=-1), value)]
    scores = (heads[0] @ heads[1].mT / 2.0).softmax(-1)
    attended = layer.self_attn.out_proj((scores @ heads[2]).transpose(1, 2).reshape(2, 5, 8))
    x = layer.norm2(target + attended)
    x = layer.norm1(x + layer.cross_attn(x + query, references, memory.tokens, SHAPES, memory.padding))
    x = layer.norm3(x + layer.linear2(F.relu(layer.linear1(x))))
    torch.testing.assert_close(found, x)


def test_padding_cannot_be_read(memory, shake):
    layer = build(DeformableDecoderLayer, shake)
    inputs = rand(2, 5, 8), rand(2, 5, 8, seed=2), rand(2, 5, 2, 2, seed=3)
    garbage = torch.where(memory.padding[..., None], 1e4, memory.tokens)
    expected = layer(*inputs, memory)
    torch.testing.assert_close(layer(*inputs, memory._replace(tokens=garbage)), expected, rtol=0, atol=0)


def test_dropout_is_on_in_training_only(memory, shake):
    layer = build(DeformableEncoderLayer, shake)
    inputs = memory, rand(1, CELLS, 8), rand(2, CELLS, 2, 2, seed=2)
    torch.testing.assert_close(layer(*inputs), layer(*inputs), rtol=0, atol=0)
    layer.train()
    assert not torch.equal(layer(*inputs), layer(*inputs))

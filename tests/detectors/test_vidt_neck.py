"""The decoder without encoder: memory, the body's own prediction, cells' classes, initialisation."""

import pytest
import torch

from simdetr.detectors.deformable_detr import BoxHead
from simdetr.detectors.deformable_transformer import cell_boxes, inverse_sigmoid
from simdetr.detectors.vidt import VidtNeck, flatten_maps

SIZES = [(2, 3), (4, 5)]


def make_neck(refine=True, classes=5, layers=3):
    torch.manual_seed(0)
    neck = VidtNeck(
        16,
        num_heads=2,
        num_layers=layers,
        ffn_dim=32,
        dropout=0.0,
        num_levels=2,
        num_points=2,
        refine=refine,
        token_classes=classes,
        class_bias=-4.0,
    )
    heads = torch.nn.ModuleList(BoxHead(16, -2.0) for _ in range(layers + 1))
    for head in heads:
        torch.nn.init.normal_(head.layers[-1].weight, std=0.3)
    return neck.eval(), heads


def make_maps():
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(2, 16, *size, generator=generator) for size in SIZES]
    masks = [torch.zeros(2, *size, dtype=torch.bool) for size in SIZES]
    masks[0][1, :, 2:] = True
    masks[1][1, :, 3:] = True
    masks[1][1, 2:] = True
    return maps, masks


def make_queries():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 7, 16, generator=generator), torch.randn(2, 7, 16, generator=generator)


def test_memory_of_maps():
    maps, masks = make_maps()
    memory = flatten_maps(maps, masks)
    assert memory.shapes == SIZES and memory.tokens.shape == (2, 26, 16)
    torch.testing.assert_close(memory.tokens[1, 6 + 2 * 5 + 3], maps[1][1, :, 2, 3])
    expected = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[2 / 3, 1.0], [3 / 5, 2 / 4]]])  # width, height
    torch.testing.assert_close(memory.valid_ratios, expected)
    assert memory.padding.equal(torch.cat([mask.flatten(1) for mask in masks], dim=1))
    assert flatten_maps(maps, [mask[:1] for mask in masks]).padding is None


@pytest.mark.parametrize("refine", [True, False])
@torch.no_grad()
def test_first_prediction_is_the_bodys_and_starts_the_decoder(refine):
    (neck, heads), (target, query) = make_neck(refine), make_queries()
    memory = flatten_maps(*make_maps())
    states, boxes, _ = neck(target, query, memory, heads, 3)
    assert len(states) == len(boxes) == 4 and torch.equal(states[0], target)
    points = neck.reference_points(query).sigmoid()
    logits = heads[0](target)
    logits[..., :2] += inverse_sigmoid(points)
    torch.testing.assert_close(boxes[0], logits.sigmoid())
    start = boxes[0] if refine else points
    later_states, later_boxes = neck.decoder(target, query, start, memory, heads[1:])
    torch.testing.assert_close(later_states, states[1:])
    torch.testing.assert_close(later_boxes, boxes[1:])


@torch.no_grad()
def test_fewer_layers_are_the_first_ones():
    (neck, heads), (target, query) = make_neck(), make_queries()
    memory = flatten_maps(*make_maps())
    states, boxes, _ = neck(target, query, memory, heads, 3)
    for layers in range(4):
        fewer_states, fewer_boxes, _ = neck(target, query, memory, heads, layers)
        assert len(fewer_boxes) == layers + 1
        assert all(torch.equal(a, b) for a, b in zip(fewer_states, states[: layers + 1], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(fewer_boxes, boxes[: layers + 1], strict=True))


def test_gradient_stops_between_layers_but_reaches_the_reference():
    (neck, heads), (target, query) = make_neck(), make_queries()
    _, boxes, _ = neck(target, query, flatten_maps(*make_maps()), heads, 3)
    boxes[1].sum().backward(retain_graph=True)
    assert heads[0].layers[-1].weight.grad is None and heads[1].layers[-1].weight.grad is not None
    assert neck.reference_points.weight.grad is None
    boxes[0].sum().backward()
    assert neck.reference_points.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_cells_classes():
    neck, _ = make_neck()
    maps, masks = make_maps()
    levels = neck.label_cells(flatten_maps(maps, masks), masks)
    assert [tuple(level.shape) for level in levels] == [(2, *size, 5) for size in SIZES]
    state = neck.enc_output_norm(neck.enc_output(maps[1][0, :, 2, 3]))
    torch.testing.assert_close(levels[1][0, 2, 3], neck.token_embed(state))
    usable = cell_boxes(masks)[1][:, 6:].view(2, 4, 5)
    assert not usable[1, 3].any()
    nothing = neck.token_embed(neck.enc_output_norm(neck.enc_output(torch.zeros(16))))
    torch.testing.assert_close(levels[1][~usable], nothing.expand(int((~usable).sum()), -1))


def test_initialisation():
    neck, _ = make_neck()
    bound = (6 / (16 + 32)) ** 0.5
    for layer in neck.decoder.layers:
        assert 0.8 * bound < layer.linear1.weight.abs().max() <= bound
        assert layer.cross_attn.sampling_offsets.weight.count_nonzero() == 0
    assert neck.token_embed.bias.tolist() == [-4.0] * 5
    assert neck.reference_points.bias.count_nonzero() == 2  # PyTorch's default, unlike in Deformable DETR
    assert not any(name.startswith(("enc_", "token_")) for name, _ in make_neck(classes=None)[0].named_parameters())

"""The transformer: references, padding invariance, refinement, two-stage gradients (specification T12, T15, T16)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from simdetr.detectors.deformable_transformer import (
    DeformableDecoderLayer,
    DeformableEncoderLayer,
    LayerSizes,
    Memory,
    cell_boxes,
    cell_references,
    inverse_sigmoid,
)
from simdetr.detectors.position_encoding import sine_cell_positions


def test_inverse_sigmoid():
    values = torch.tensor([0.2, 0.5, 0.9])
    torch.testing.assert_close(inverse_sigmoid(values), torch.logit(values))
    edges = inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    limit = torch.log(torch.tensor(1e5))
    torch.testing.assert_close(edges, torch.stack((-limit, -limit, limit, limit)))


def test_references_of_cells_by_hand():
    """Two levels; the second image is valid in half of the width and all of the height of both."""
    ratios = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.5, 1.0], [0.5, 1.0]]])
    found = cell_references([(2, 4), (1, 2)], ratios)
    assert found.shape == (2, 10, 2, 2)
    torch.testing.assert_close(found[0, 1], torch.tensor([[0.375, 0.25], [0.375, 0.25]]))
    # column 1 of 4 is at 0.375 of the padded map, 0.75 of the valid half, and 0.375 of the other padded map
    torch.testing.assert_close(found[1, 1], torch.tensor([[0.375, 0.25], [0.375, 0.25]]))
    uneven = cell_references([(2, 4), (1, 2)], torch.tensor([[[0.75, 1.0], [1.0, 1.0]]]))
    torch.testing.assert_close(uneven[0, 1], torch.tensor([[0.375, 0.25], [0.5, 0.25]]))
    torch.testing.assert_close(uneven[0, 9], torch.tensor([[0.75 * 0.75, 0.5], [0.75, 0.5]]))


@pytest.mark.parametrize("variant", ["base", "refine", "two_stage"])
def test_padding_changes_nothing(variant, make_deformable, shake):
    """The same maps, alone and inside larger ones whose padding holds garbage, give the same boxes."""
    detector = shake(make_deformable(variant, num_queries=10, exclude_invalid_proposals=True))
    generator = torch.Generator().manual_seed(0)
    sizes, padded_sizes = [(12, 8), (6, 4), (3, 2), (2, 1)], [(16, 14), (8, 7), (4, 4), (3, 2)]
    small = [torch.randn(2, 64, *size, generator=generator) for size in sizes]
    large = [50.0 * torch.randn(2, 64, *size, generator=generator) for size in padded_sizes]
    masks = [torch.ones(2, *size, dtype=torch.bool) for size in padded_sizes]
    for level, (height, width) in enumerate(sizes):
        large[level][..., :height, :width] = small[level]
        masks[level][:, :height, :width] = False
    nothing = [torch.zeros(2, *size, dtype=torch.bool) for size in sizes]

    def run(maps, level_masks):
        positions = [sine_cell_positions(mask, 64) for mask in level_masks]
        query = None if variant == "two_stage" else detector.query_embed.weight
        chooser = detector.class_embed[-1] if variant == "two_stage" else None
        with torch.no_grad():
            return detector.transformer(maps, level_masks, positions, query, detector.bbox_embed, chooser)

    alone, inside = run(small, nothing), run(large, masks)
    for states, boxes, padded_states, padded_boxes in zip(*alone[:2], *inside[:2], strict=True):
        torch.testing.assert_close(padded_states, states, rtol=0, atol=1e-4)
        torch.testing.assert_close(padded_boxes, boxes, rtol=0, atol=1e-4)


def test_refined_boxes_are_the_next_references(make_deformable, shake, batch):
    detector = shake(make_deformable("refine"))
    seen = []
    for layer in detector.transformer.decoder.layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    with torch.no_grad():
        out = detector(batch[0])
    assert seen[0].shape[-1] == 2
    for reference, prediction in zip(seen[1:], out["aux_outputs"], strict=True):
        # nothing is padded, so that every level sees the box as it is
        torch.testing.assert_close(reference[:, :, 0], prediction["pred_boxes"], rtol=0, atol=0)


def test_refinement_does_not_reach_back(make_deformable, shake, batch):
    """The loss of a layer's boxes teaches its own head and not the heads before, whose boxes it started from."""
    detector = shake(make_deformable("refine"))
    out = detector(*batch[:2])
    out["pred_boxes"].square().sum().backward()
    gradients = [head.layers[-1].weight.grad for head in detector.bbox_embed]
    assert gradients[0] is None and gradients[1] is None
    assert gradients[2].abs().sum() > 0


@pytest.mark.parametrize("variant", ["base", "refine"])
def test_gradient_reaches_references_and_queries(variant, make_deformable, shake, batch):
    detector = shake(make_deformable(variant))
    first = detector(*batch[:2])["aux_outputs"][0]
    first["pred_boxes"].square().sum().backward()
    assert detector.transformer.reference_points.weight.grad.abs().sum() > 0
    assert detector.query_embed.weight.grad[:, :64].abs().sum() > 0
    assert detector.query_embed.weight.grad[:, 64:].abs().sum() > 0


def test_only_the_encoder_loss_teaches_the_proposals(make_deformable, shake, batch):
    detector = shake(make_deformable("two_stage"))
    transformer = detector.transformer
    proposing = [detector.class_embed[3].weight, detector.bbox_embed[3].layers[0].weight]
    proposing += [transformer.enc_output.weight, transformer.enc_output_norm.weight]
    out = detector(*batch[:2])
    layers = [out, *out["aux_outputs"]]
    decoder_loss = sum(layer["pred_logits"].square().sum() + layer["pred_boxes"].square().sum() for layer in layers)
    decoder_loss.backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in proposing)
    assert transformer.pos_trans.weight.grad.abs().sum() > 0
    (out["enc_outputs"]["pred_logits"].square().sum() + out["enc_outputs"]["pred_boxes"].square().sum()).backward()
    assert all(torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0 for parameter in proposing)


def test_two_stage_starts_from_the_best_cells(make_deformable, shake, batch):
    """Queries start at the boxes of the cells with the highest objectness."""
    detector = shake(make_deformable("two_stage"))
    seen = []
    detector.transformer.decoder.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    with torch.no_grad():
        out = detector(batch[0])["enc_outputs"]
    best = out["pred_logits"][..., 0].topk(20, dim=1).indices
    expected = out["pred_boxes"].gather(1, best[..., None].expand(-1, -1, 4))
    torch.testing.assert_close(seen[0][:, :, 0], expected)


@pytest.mark.parametrize("exclude", [False, True])
def test_invalid_cells_can_be_kept_from_becoming_queries(exclude, make_deformable, batch):
    images, mask, _ = batch
    detector = make_deformable("two_stage", exclude_invalid_proposals=exclude)
    transformer, seen = detector.transformer, []
    transformer.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    with torch.no_grad():
        # tokens have one length after the norm, so that none can score above those that were zeroed before it
        detector.class_embed[3].weight[0] = transformer.enc_output_norm(transformer.enc_output(torch.zeros(64)))
        detector(images, mask)
    # boxes of cells that may not propose are 1 in every coordinate
    invalid = (seen[0] == 1.0).all(dim=2)
    assert invalid[1].all() if not exclude else not invalid.any()


def test_too_few_cells_for_the_queries(make_deformable):
    detector = make_deformable("two_stage", num_queries=500)
    with pytest.raises(ValueError, match=r"num_queries=500 of the feature maps' cells.*only 85"):
        detector(torch.zeros(1, 3, 64, 64))


# ----------------------------------------------------------------------------------------------------------------------
# Encoder and decoder layers: order of operations, positions, padding.


SHAPES = [(4, 3), (2, 2)]
CELLS = 16


@pytest.fixture
def memory():
    tokens = torch.randn(2, CELLS, 8, generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(2, CELLS, dtype=torch.bool)
    padding[1, [2, 5, 8, 11, 13, 15]] = True
    return Memory(tokens, SHAPES, torch.ones(2, 2, 2), padding)


def build(kind, shake):
    return shake(kind(LayerSizes(8, 16, 0.1, 2, 2, 3)).eval())


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


# ----------------------------------------------------------------------------------------------------------------------
# Boxes of cells, worked out by hand on two levels with padding (specification T16).


def test_boxes_of_two_levels_with_padding():
    first = torch.zeros(1, 4, 6, dtype=torch.bool)
    first[:, 3:] = True
    first[:, :, 5:] = True
    second = torch.zeros(1, 2, 3, dtype=torch.bool)
    logits, usable = cell_boxes([first, second])
    assert logits.shape == (1, 30, 4)
    for level, (height, width, valid_h, valid_w, start) in enumerate([(4, 6, 3, 5, 0), (2, 3, 2, 3, 24)]):
        for row in range(height):
            for column in range(width):
                index = start + row * width + column
                if row >= valid_h or column >= valid_w:
                    assert not usable[0, index]
                    assert (logits[0, index] == torch.inf).all()
                    continue
                assert usable[0, index]
                side = 0.05 * 2**level
                expected = torch.tensor([(column + 0.5) / valid_w, (row + 0.5) / valid_h, side, side])
                torch.testing.assert_close(logits[0, index].sigmoid(), expected)


def test_cells_at_the_border_may_not_propose():
    # 60 cells on a side: the first centre is 0.5 / 60 < 0.01
    _, usable = cell_boxes([torch.zeros(1, 60, 60, dtype=torch.bool)])
    grid = usable.view(60, 60)
    assert grid[1:-1, 1:-1].all()
    assert not grid[0].any() and not grid[-1].any() and not grid[:, 0].any() and not grid[:, -1].any()


def test_levels_whose_boxes_fill_the_image_may_not_propose():
    cells = torch.zeros(1, 2, 2, dtype=torch.bool)
    _, usable = cell_boxes([cells] * 6)
    # 0.05 · 2^4 = 0.8 is allowed, 0.05 · 2^5 = 1.6 is not
    assert usable.view(6, 4).all(dim=1).tolist() == [True] * 5 + [False]

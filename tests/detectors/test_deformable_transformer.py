"""The transformer: references, padding invariance, refinement, two-stage gradients (specification T12, T15, T16)."""

import pytest
import torch

from simdetr.detectors.deformable_transformer import cell_references, inverse_sigmoid
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
def test_padding_changes_nothing(variant, make_detector, shake):
    """The same maps, alone and inside larger ones whose padding holds garbage, give the same boxes."""
    detector = shake(make_detector(variant, num_queries=10, exclude_invalid_proposals=True))
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


def test_refined_boxes_are_the_next_references(make_detector, shake, batch):
    detector = shake(make_detector("refine"))
    seen = []
    for layer in detector.transformer.decoder.layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    with torch.no_grad():
        out = detector(batch[0])
    assert seen[0].shape[-1] == 2
    for reference, prediction in zip(seen[1:], out["aux_outputs"], strict=True):
        # nothing is padded, so that every level sees the box as it is
        torch.testing.assert_close(reference[:, :, 0], prediction["pred_boxes"], rtol=0, atol=0)


def test_refinement_does_not_reach_back(make_detector, shake, batch):
    """The loss of a layer's boxes teaches its own head and not the heads before, whose boxes it started from."""
    detector = shake(make_detector("refine"))
    out = detector(*batch[:2])
    out["pred_boxes"].square().sum().backward()
    gradients = [head.layers[-1].weight.grad for head in detector.bbox_embed]
    assert gradients[0] is None and gradients[1] is None
    assert gradients[2].abs().sum() > 0


@pytest.mark.parametrize("variant", ["base", "refine"])
def test_gradient_reaches_references_and_queries(variant, make_detector, shake, batch):
    detector = shake(make_detector(variant))
    first = detector(*batch[:2])["aux_outputs"][0]
    first["pred_boxes"].square().sum().backward()
    assert detector.transformer.reference_points.weight.grad.abs().sum() > 0
    assert detector.query_embed.weight.grad[:, :64].abs().sum() > 0
    assert detector.query_embed.weight.grad[:, 64:].abs().sum() > 0


def test_only_the_encoder_loss_teaches_the_proposals(make_detector, shake, batch):
    detector = shake(make_detector("two_stage"))
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


def test_two_stage_starts_from_the_best_cells(make_detector, shake, batch):
    """Queries start at the boxes of the cells with the highest objectness."""
    detector = shake(make_detector("two_stage"))
    seen = []
    detector.transformer.decoder.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    with torch.no_grad():
        out = detector(batch[0])["enc_outputs"]
    best = out["pred_logits"][..., 0].topk(20, dim=1).indices
    expected = out["pred_boxes"].gather(1, best[..., None].expand(-1, -1, 4))
    torch.testing.assert_close(seen[0][:, :, 0], expected)


@pytest.mark.parametrize("exclude", [False, True])
def test_invalid_cells_can_be_kept_from_becoming_queries(exclude, make_detector, batch):
    images, mask, _ = batch
    detector = make_detector("two_stage", exclude_invalid_proposals=exclude)
    transformer, seen = detector.transformer, []
    transformer.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    with torch.no_grad():
        # tokens have one length after the norm, so that none can score above those that were zeroed before it
        detector.class_embed[3].weight[0] = transformer.enc_output_norm(transformer.enc_output(torch.zeros(64)))
        detector(images, mask)
    # boxes of cells that may not propose are 1 in every coordinate
    invalid = (seen[0] == 1.0).all(dim=2)
    assert invalid[1].all() if not exclude else not invalid.any()


def test_too_few_cells_for_the_queries(make_detector):
    detector = make_detector("two_stage", num_queries=500)
    with pytest.raises(ValueError, match=r"num_queries=500 of the feature maps' cells.*only 85"):
        detector(torch.zeros(1, 3, 64, 64))

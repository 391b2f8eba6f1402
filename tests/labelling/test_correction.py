"""Jitter against known numbers and by hand, the networks by hand and by brute force, training to its end and beyond."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.ops import generalized_box_iou, roi_align

from simdetr.boxes import denormalise, normalise, paired_iou, pairwise_iou
from simdetr.data.annotations import ImageLabels, LabelError
from simdetr.data.images import open_images
from simdetr.data.label_files import read_labels
from simdetr.data.labels import Labels
from simdetr.detectors.backbone import Backbone
from simdetr.detectors.deformable_transformer import flatten_maps
from simdetr.detectors.detector import Level
from simdetr.detectors.position_encoding import sine_box_positions
from simdetr.exchange.weights import LoadedDetector
from simdetr.labelling import correction
from simdetr.labelling.correction import (
    BoxCorrector,
    CorrectorFit,
    FittedCorrector,
    QueryCorrector,
    correct_boxes,
    displaced,
    fit_corrector,
    jitter_boxes,
    load_corrector,
)
from simdetr.labelling.corrector_networks import (
    Boxes,
    LevelReader,
    best_matches,
    build_corrector,
    decoder_to_start_from,
    moved,
    pooled,
    sizes_of_decoder,
)
from simdetr.training.detection_task import NonFiniteLossError
from simdetr.training.run_folder import RunMismatchError

FAR = torch.tensor([[1000.0, 1000.0, 1100.0, 1100.0]])
CHANNELS, STRIDES = (4, 6), (8, 16)
SMALL = {"cascade": {"width": 16, "dim": 8}, "queries": {"dim": 16, "ffn_dim": 16, "num_heads": 2, "num_points": 2}}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------------------------------------------------------------
# Jitter.


@pytest.mark.parametrize(
    ("shift", "growth", "iou", "giou"),
    [
        ((0.35, 0.35), (1, 1), 0.26783, 0.13340),
        ((0.35, 0), (1, 1), 0.48148, 0.48148),
        ((0, 0), (0.5, 0.5), 0.25, 0.25),
        ((0, 0), (0.5, 1), 0.5, 0.5),
        ((0, 0), (1.5, 1.5), 0.44444, 0.44444),
    ],
)
def test_displaced_boxes_by_hand(shift, growth, iou, giou):
    found = displaced(FAR, torch.tensor([shift]), torch.tensor([growth], dtype=torch.float32))
    assert float(pairwise_iou(found, FAR)) == pytest.approx(iou, abs=1e-5)
    assert float(generalized_box_iou(found, FAR)) == pytest.approx(giou, abs=1e-5)


def test_the_anchor_stays_where_it_is():
    growth = torch.tensor([[0.5, 2.0]])
    still = torch.zeros(1, 2)
    assert displaced(FAR, still, growth, "corner").tolist() == [[1000, 1000, 1050, 1200]]
    assert displaced(FAR, still, growth, "centre").tolist() == [[1025, 950, 1075, 1150]]
    assert displaced(FAR, torch.tensor([[0.1, -0.2]]), growth, "centre").tolist() == [[1035, 930, 1085, 1130]]


@pytest.mark.parametrize(("anchor", "accepted"), [("corner", 0.7305), ("centre", 0.9016)])
def test_shares_of_accepted_draws(anchor, accepted):
    draws = 1_000_000
    found, rows = jitter_boxes(FAR, (3000, 3000), draws, seeded(), anchor=anchor)
    assert len(found) / draws == pytest.approx(accepted, abs=0.002)
    assert not rows.any()
    overlap = pairwise_iou(found, FAR)[:, 0]
    assert float(overlap.min()) > 0.3
    if anchor == "corner":
        assert float((overlap > 0.5).sum()) / draws == pytest.approx(0.2433, abs=0.002)
        assert float((overlap > 0.7).sum()) / draws == pytest.approx(0.0211, abs=0.001)


def test_jitter_is_within_its_bounds_and_cut_to_the_image():
    box = torch.tensor([[20.0, 30.0, 60.0, 50.0]])
    found, _ = jitter_boxes(box, (500, 500), 2000, seeded(), alpha=0.2, beta=0.4, min_iou=0.0)
    sides = (found[:, 2:] - found[:, :2]) / torch.tensor([40.0, 20.0])
    shift = (found[:, :2] - box[:, :2]) / torch.tensor([40.0, 20.0])
    assert 0.6 <= float(sides.min()) < 0.61 and 1.39 < float(sides.max()) <= 1.4001
    assert 0.19 < float(shift.max()) <= 0.2001 and -0.2001 <= float(shift.min()) < -0.19
    cut, _ = jitter_boxes(torch.tensor([[0.0, 0.0, 60.0, 50.0]]), (50, 60), 500, seeded())
    assert len(cut) and float(cut.min()) == 0.0
    assert float(cut[:, 2].max()) <= 60 and float(cut[:, 3].max()) <= 50


def test_rows_say_which_box_each_came_from():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [100.0, 100.0, 140.0, 120.0], [300.0, 10.0, 310.0, 50.0]])
    found, rows = jitter_boxes(boxes, (400, 400), 50, seeded())
    assert set(rows.tolist()) == {0, 1, 2} and (rows.diff() >= 0).all()
    assert torch.equal(pairwise_iou(found, boxes).argmax(dim=1), rows)


def test_a_draw_near_another_box_stays():
    """What counts is the best overlap with any box, as in the published code."""
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 12.0, 12.0]])
    found, rows = jitter_boxes(boxes, (100, 100), 400, seeded(), min_iou=0.6)
    own = paired_iou(found, boxes[rows])
    assert float(own.min()) <= 0.6 < float(pairwise_iou(found, boxes).amax(dim=1).min())


def test_gentle_draws_are_nearer():
    def mean(share):
        found, _ = jitter_boxes(FAR, (3000, 3000), 20_000, seeded(), min_iou=0.0, gentle=share)
        return float(pairwise_iou(found, FAR).mean())

    assert mean(0.0) + 0.05 < mean(0.5) < mean(1.0) - 0.05


def test_same_seed_same_jitter_and_none_without_boxes():
    once, again = (jitter_boxes(FAR, (3000, 3000), 40, seeded(5))[0] for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, jitter_boxes(FAR, (3000, 3000), 40, seeded(6))[0])
    found, rows = jitter_boxes(torch.zeros(0, 4), (10, 10), 5, seeded())
    assert found.shape == (0, 4) and rows.shape == (0,)
    assert jitter_boxes(FAR, (3000, 3000), 0, seeded())[0].shape == (0, 4)


@pytest.mark.parametrize("wrong", [{"beta": 1.0}, {"alpha": -0.1}, {"min_iou": 1.0}, {"gentle": 1.1}])
def test_jitter_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        jitter_boxes(FAR, (3000, 3000), 1, seeded(), **wrong)


def test_unknown_anchor():
    with pytest.raises(ValueError, match="anchor: expected 'corner' or 'centre', got 'middle'"):
        jitter_boxes(FAR, (3000, 3000), 1, seeded(), anchor="middle")


# ----------------------------------------------------------------------------------------------------------------------
# Networks.


def levels_of(height=64, width=96, images=2, valid=None, seed=0):
    """Random maps of two levels; ``valid`` cells are no padding."""
    levels = []
    for index, (channels, stride) in enumerate(zip(CHANNELS, STRIDES, strict=True)):
        shape = (height // stride, width // stride)
        mask = torch.zeros(images, *shape, dtype=torch.bool)
        for row, (high, wide) in enumerate(valid or []):
            mask[row, high // stride :], mask[row, :, wide // stride :] = True, True
        features = torch.randn(images, channels, *shape, generator=seeded(seed + index))
        levels.append(Level(features, stride, mask))
    return levels


def batch_of(*boxes, image=None, sizes=((64, 96), (64, 96))):
    rows = torch.zeros(len(boxes), dtype=torch.int64) if image is None else torch.tensor(image)
    return Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), rows, torch.tensor(sizes))


def corrector(kind="cascade", seed=0, spread=0.0, **options):
    """A small corrector; with a ``spread``, its outputs are not 0 any more."""
    torch.manual_seed(seed)
    cls = {"cascade": BoxCorrector, "queries": QueryCorrector}[kind]
    network = cls(CHANNELS, STRIDES, **{**SMALL[kind], **options})
    lasts = [s[-1] for s in network.stages] if kind == "cascade" else [h.layers[-1] for h in network.heads]
    for last in lasts:
        torch.nn.init.normal_(last.weight, std=spread) if spread else None
    return network


EXAMPLE = batch_of((10.3, 9.7, 41.9, 33.1), (0, 0, 96, 64), (70, 3, 95, 20), image=(0, 1, 1))


def test_a_new_cascade_is_the_very_identity():
    for found in corrector()(levels_of(), EXAMPLE):
        assert torch.equal(found, EXAMPLE.xyxy)


def test_new_queries_are_the_identity():
    for found in corrector("queries")(levels_of(), EXAMPLE):
        torch.testing.assert_close(found, EXAMPLE.xyxy, rtol=0, atol=2e-3)


def test_three_linear_maps_compose():
    """Each stage moves by a tenth of the side and stretches by a tenth: 1.1 ** 3 = 1.331."""
    network = corrector()
    step = torch.tensor([0.1, 0.0, math.log(1.1), 0.0])
    for number, stage in enumerate(network.stages, 1):
        stage[-1].bias.data = step * torch.tensor([10.0, 10.0, 5.0, 5.0]) * number
    boxes = batch_of((30, 20, 40, 40))
    outputs = network(levels_of(), boxes)
    centre, side = 35.0, 10.0
    for found in outputs:
        centre, side = centre + 0.1 * side, side * 1.1
        expected = torch.tensor([[centre - side / 2, 20, centre + side / 2, 40]])
        torch.testing.assert_close(found, expected)
    assert side == pytest.approx(13.31)


def test_moved_boxes_are_bounded_and_exact():
    box = torch.tensor([[0.1, 0.7, 3.3, 9.9]])
    assert torch.equal(moved(box, torch.zeros(1, 4)), box)
    far = moved(box, torch.tensor([[0.0, 0.0, 100.0, -100.0]]))
    assert float(far[0, 2] - far[0, 0]) == pytest.approx(3.2 * 1000 / 16, rel=1e-4)
    assert float(far[0, 3] - far[0, 1]) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("kind", ["cascade", "queries"])
def test_stages_start_from_the_boxes_before_without_their_gradient(kind):
    network = corrector(kind, spread=0.5)
    outputs = network(levels_of(), EXAMPLE)
    assert all((found - EXAMPLE.xyxy).abs().max() > 0.1 for found in outputs)
    own = (network.stages if kind == "cascade" else network.heads)[0]
    parameter = own[-1].bias if kind == "cascade" else own.layers[-1].bias
    assert torch.autograd.grad(outputs[0].sum(), parameter, retain_graph=True)[0].abs().sum() > 0
    assert torch.autograd.grad(outputs[2].sum(), parameter, allow_unused=True)[0] is None


def test_stage_inputs_are_cut_to_the_image():
    network = corrector()
    # far out of the image: if it were not cut, the second stage would start from there
    network.stages[0][-1].bias.data = torch.tensor([100.0, 0.0, 0.0, 0.0])
    found = network(levels_of(), batch_of((60, 10, 90, 40), sizes=((64, 80), (64, 96))))
    assert found[0].tolist() == [[360, 10, 390, 40]]
    assert found[1][0].tolist() == [80, 10, 80, 40]


@pytest.mark.parametrize("kind", ["cascade", "queries"])
def test_padding_is_not_read(kind):
    network = corrector(kind, spread=0.5)
    valid = [(48, 64), (64, 96)]
    levels = levels_of(valid=valid)
    filled = [level._replace(features=level.features.masked_fill(level.mask[:, None], 1e4)) for level in levels]
    boxes = batch_of((5, 5, 60, 45), (30, 20, 63, 47), (3, 3, 90, 60), image=(0, 0, 1), sizes=valid)
    assert all(level.mask.any() for level in levels)
    for once, again in zip(network(levels, boxes), network(filled, boxes), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("kind", ["cascade", "queries"])
def test_boxes_do_not_see_each_other(kind):
    network = corrector(kind, spread=0.5)
    levels = levels_of()
    together = network(levels, EXAMPLE)[-1]
    for row in range(3):
        one = Boxes(EXAMPLE.xyxy[row : row + 1], EXAMPLE.image[row : row + 1], EXAMPLE.sizes_hw)
        torch.testing.assert_close(network(levels, one)[-1], together[row : row + 1], rtol=1e-4, atol=1e-3)
    empty = Boxes(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), EXAMPLE.sizes_hw)
    assert [found.shape for found in network(levels, empty)] == [(0, 4)] * 3


def test_boxes_are_read_from_the_map_of_their_size():
    """Strides 8, 16 and 32 are for sides below 224, 448 and above, over two: 224 px at stride 16."""
    maps = [torch.randn(2, 3, 512 // s, 512 // s, generator=seeded(s)) for s in (8, 16, 32)]
    sides = [10.0, 111.0, 223.0, 224.0, 447.0, 448.0, 500.0]
    boxes = torch.tensor([[4.0, 6.0, 4 + side, 6 + side] for side in sides])
    image = torch.tensor([0, 1, 0, 1, 0, 1, 0])
    found = pooled(maps, (8, 16, 32), boxes, image)
    for row, level in enumerate([0, 0, 0, 1, 1, 2, 2]):
        roi = torch.cat([image[row : row + 1, None].float(), boxes[row : row + 1]], dim=1)
        expected = roi_align(maps[level], roi, 7, 1 / (8, 16, 32)[level], 2, aligned=True)
        assert torch.equal(found[row], expected[0]), sides[row]


def test_each_box_learns_from_the_true_box_it_overlaps_most():
    truth = [torch.tensor([[0.0, 0.0, 10.0, 10.0], [8.0, 0.0, 18.0, 10.0]]), torch.zeros(0, 4)]
    boxes = torch.tensor([[1.0, 0.0, 11.0, 10.0], [7.0, 0.0, 17.0, 10.0], [0.0, 0.0, 10.0, 10.0]])
    wanted, overlap = best_matches(boxes, torch.tensor([0, 0, 1]), truth)
    assert wanted[:2].tolist() == [[0, 0, 10, 10], [8, 0, 18, 10]]
    assert overlap.tolist() == pytest.approx([9 / 11, 9 / 11, 0])


@pytest.mark.parametrize(
    ("overlap", "learning"), [(0.29, 0), (0.31, 1), (0.49, 1), (0.5, 2), (0.69, 2), (0.71, 3), (1.0, 3)]
)
def test_a_stage_learns_from_boxes_that_overlap_enough(overlap, learning):
    """One box of 64 x 32 px cut from below: its IoU is the part that is left, its loss 1 - GIoU = 1 - IoU."""
    boxes = batch_of((16, 16, 80, 16 + 32 * overlap))
    losses = corrector().losses(levels_of(), boxes, [torch.tensor([[16.0, 16.0, 80.0, 48.0]]), torch.zeros(0, 4)])
    expected = [1 - overlap if stage < learning else 0.0 for stage in range(3)]
    total = sum(expected) + losses["judge"].item()
    assert [losses[f"stage{n}"].item() for n in (1, 2, 3)] == pytest.approx(expected, abs=1e-5)
    assert losses["loss"].item() == pytest.approx(total, abs=1e-5)


def test_losses_are_means_over_the_matched_boxes():
    boxes = batch_of((0, 0, 32, 24), (0, 0, 32, 16), (40, 40, 50, 50))
    losses = corrector().losses(levels_of(), boxes, [torch.tensor([[0.0, 0.0, 32.0, 32.0]]), torch.zeros(0, 4)])
    assert losses["stage1"].item() == pytest.approx((0.25 + 0.5) / 2, abs=1e-6)
    assert losses["stage3"].item() == pytest.approx(0.25, abs=1e-6)


def test_query_losses_by_hand():
    """Wanted (0, 0, 48, 64) of 96 x 64, found three quarters of its height: cxcywh differ by 1/8 and 1/4, IoU 3/4."""
    boxes = batch_of((0, 0, 48, 48))
    losses = corrector("queries").losses(
        levels_of(), boxes, [torch.tensor([[0.0, 0.0, 48.0, 64.0]]), torch.zeros(0, 4)]
    )
    expected = 5 * (1 / 8 + 1 / 4) + 2 * (1 - 3 / 4)
    assert [losses[f"stage{n}"].item() for n in (1, 2, 3)] == pytest.approx([expected] * 3, abs=1e-3)


@pytest.mark.parametrize("kind", ["cascade", "queries"])
@pytest.mark.parametrize("boxes", [EXAMPLE, batch_of()], ids=["no object", "no box"])
def test_with_nothing_to_learn_from_losses_are_0_and_attached(kind, boxes):
    network = corrector(kind, spread=0.5)
    losses = network.losses(levels_of(), boxes, [torch.zeros(0, 4), torch.zeros(0, 4)])
    assert {name: value.item() for name, value in losses.items()} == dict.fromkeys(losses, 0.0)
    assert set(losses) == {"loss", "stage1", "stage2", "stage3", "judge"}
    losses["loss"].backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert gradients and not any(gradient.any() for gradient in gradients)


def test_boxes_that_match_nothing_teach_the_judge_alone():
    network = corrector()
    losses = network.losses(levels_of(), EXAMPLE, [torch.zeros(0, 4), torch.tensor([[1.0, 50.0, 3.0, 52.0]])])
    assert [losses[f"stage{n}"].item() for n in (1, 2, 3)] == [0, 0, 0]
    # a new judge gives logits of 0, whose cross-entropy is ln 2 whatever is true
    assert losses["judge"].item() == pytest.approx(math.log(2))
    losses["loss"].backward()
    assert not network.stages[0][-1].weight.grad.any() and network.judge[-1].weight.grad.any()


@pytest.mark.parametrize("kind", ["cascade", "queries"])
def test_the_judge_hears_the_overlap_of_boxes_before_after_and_true(kind, monkeypatch):
    network, asked = corrector(kind), []
    monkeypatch.setattr(network, "overlap_logits", lambda _, boxes: asked.append(boxes) or boxes.xyxy[:, 0] * 0.1)
    truth = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
    boxes = batch_of((8, 8, 40, 24), (0, 0, 5, 5), (50, 8, 90, 40), image=(0, 1, 0))
    loss = network.losses(levels_of(), boxes, [truth, torch.zeros(0, 4)])["judge"]
    (judged,) = asked
    # two boxes of the image with an object, twice, for nothing has moved yet, and one true box in four
    expected = torch.tensor([[8.0, 8, 40, 24], [50, 8, 90, 40]])
    torch.testing.assert_close(judged.xyxy, torch.cat([expected, expected, truth]), atol=2e-3, rtol=0)
    assert not judged.image.any()
    logits, overlaps = torch.tensor([0.8, 5.0, 0.8, 5.0, 0.8]), torch.tensor([0.5, 0, 0.5, 0, 1])
    entropy = torch.nn.functional.binary_cross_entropy(logits.sigmoid(), overlaps)
    assert loss.item() == pytest.approx(entropy.item(), abs=1e-3)


def test_features_learn_at_a_third():
    network = corrector(spread=0.5)
    levels = levels_of()
    for level in levels:
        level.features.requires_grad_()
    first = network(levels, EXAMPLE)[0]
    scaled = torch.autograd.grad(first.square().sum(), levels[0].features)[0]
    maps = network.projection(levels)
    read = pooled(maps, STRIDES, EXAMPLE.xyxy, EXAMPLE.image)
    plain = moved(EXAMPLE.xyxy, network.stages[0](read) / torch.tensor([10.0, 10.0, 5.0, 5.0]))
    assert torch.equal(plain, first)
    full = torch.autograd.grad(plain.square().sum(), levels[0].features)[0]
    torch.testing.assert_close(scaled, full / 3)


@pytest.mark.parametrize("kind", ["cascade", "queries"])
def test_a_corrector_can_fit_what_the_maps_show(kind):
    """A map that is 1 inside the object: from jittered boxes the losses must fall far below those of the identity."""
    truth = torch.tensor([[16.0, 24.0, 56.0, 56.0]])
    levels = []
    for channels, stride in zip(CHANNELS, STRIDES, strict=True):
        features = 0.1 * torch.randn(1, channels, 64 // stride, 96 // stride, generator=seeded())
        features[0, 0, int(24 // stride) : int(56 // stride), int(16 // stride) : int(56 // stride)] += 2
        levels.append(Level(features, stride, torch.zeros(1, 64 // stride, 96 // stride, dtype=torch.bool)))
    network = corrector(kind, **({"width": 32} if kind == "cascade" else {}))
    optimiser = torch.optim.AdamW(network.parameters(), lr=6e-3)
    starts, _ = jitter_boxes(truth, (64, 96), 20, seeded(1))
    boxes = Boxes(starts, torch.zeros(len(starts), dtype=torch.int64), torch.tensor([[64, 96]]))
    for _ in range(35):
        optimiser.zero_grad()
        network.losses(levels, boxes, [truth])["loss"].backward()
        optimiser.step()
    before, after = pairwise_iou(starts, truth).mean(), pairwise_iou(network(levels, boxes)[-1], truth).mean()
    assert before.item() < 0.5 and after.item() > 0.7
    # of the true box, whether it is moved or refused, no more than 0.02 is lost; the others still rise
    every = Boxes(torch.cat([truth, starts]), torch.zeros(len(starts) + 1, dtype=torch.int64), boxes.sizes_hw)
    with torch.no_grad():
        moved, gain = correction._moved(network, levels, every)
    kept = torch.where((gain >= correction.MIN_GAIN)[:, None], moved, every.xyxy)
    overlap = pairwise_iou(kept, truth)[:, 0]
    assert overlap[0].item() > 0.98 and overlap[1:].mean().item() > before.item() + 0.1


def test_the_reader_takes_what_has_maps(make_other):
    images, mask = torch.rand(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, 32:] = True
    backbone = Backbone("test_resnet")
    levels = LevelReader(backbone)(images, mask)
    assert [level.stride for level in levels] == [8, 16, 32]
    assert [tuple(level.features.shape[1:]) for level in levels] == [
        (c, 64 // s, 96 // s) for c, s in zip(backbone.channels, (8, 16, 32), strict=True)
    ]
    assert levels[0].mask[1].sum() == levels[0].mask[1].numel() // 2 and not levels[0].mask[0].any()
    assert not any(level.features.requires_grad for level in levels)
    reader = LevelReader(backbone.train())
    assert not backbone.training and not reader.train().training
    with pytest.raises(
        ValueError, match=r"features: TransformersDetector gives no feature maps; take a Deformable DETR"
    ):
        LevelReader(make_other("detr"))


def test_the_reader_gives_what_the_encoder_made(make_detector):
    images, mask = torch.rand(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, 32:] = True
    detector = make_detector(num_feature_levels=3).eval()
    expected = []
    hook = detector.transformer.encoder.register_forward_hook(lambda *call: expected.append(call[2].tokens))
    detector(images, mask)
    hook.remove()
    levels = LevelReader(detector)(images, mask)
    tokens = torch.cat([level.features.flatten(2).mT for level in levels], dim=1)
    assert torch.equal(tokens, expected[0]) and [level.stride for level in levels] == [8, 16, 32]
    assert not detector.transformer.encoder._forward_hooks


def two_stage(make_detector, **changes):
    options = {"num_feature_levels": 3, "with_box_refine": True, "two_stage": True, "num_decoder_layers": 3}
    return make_detector(**{**options, **changes}).eval()


def test_queries_begin_as_the_decoder_they_start_from(make_detector):
    """A lone proposal attends to nothing but itself in the detector too."""
    torch.manual_seed(0)
    detector = two_stage(make_detector)
    for head in detector.bbox_embed:
        torch.nn.init.normal_(head.layers[-1].weight, std=0.5)
    reader = LevelReader(detector)
    assert decoder_to_start_from(reader) is detector
    network = build_corrector("queries", reader, sizes_of_decoder(detector))
    network.start_from(detector)
    images, mask = torch.rand(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, 48:], mask[1, :, 64:] = True, True
    levels = reader(images, mask)
    found = network(
        levels,
        batch_of((10, 10, 50, 44), (40, 20, 90, 60), (5, 9, 30, 44), image=(0, 0, 1), sizes=((64, 96), (48, 64))),
    )
    memory = flatten_maps([level.features for level in levels], [level.mask for level in levels])
    transformer = detector.transformer
    for row, (box, image, size) in enumerate(
        [((10, 10, 50, 44), 0, (64, 96)), ((40, 20, 90, 60), 0, (64, 96)), ((5, 9, 30, 44), 1, (48, 64))]
    ):
        own = memory._replace(
            **{name: getattr(memory, name)[image : image + 1] for name in ("tokens", "valid_ratios", "padding")}
        )
        reference = normalise(torch.tensor([box]).float(), size)[None]
        embedding = sine_box_positions(reference, 8)
        query, target = transformer.pos_trans_norm(transformer.pos_trans(embedding)).chunk(2, dim=-1)
        boxes = transformer.decoder(target, query, reference, own, detector.bbox_embed)[1]
        for stage, expected in zip(found, boxes, strict=True):
            torch.testing.assert_close(stage[row], denormalise(expected[0], size)[0], rtol=1e-4, atol=1e-3)


def test_what_was_learnt_before_learns_slower(features, scenes, truth, tmp_path, make_detector, monkeypatch):
    torch.manual_seed(0)
    loaded = LoadedDetector(two_stage(make_detector), (), features.image_settings)
    seen = []
    real = correction.adamw
    monkeypatch.setattr(correction, "adamw", lambda groups, *rest: seen.extend(groups) or real(groups, *rest))
    settings = CorrectorFit(**{**TINY, "kind": "queries", "options": {}, "steps": 2, "lr": 0.01, "decoder_lr": 0.001})
    fitted = fit_corrector(loaded, open_images(scenes), truth, tmp_path / "c", settings)
    assert fitted.network.init_args == {"dim": 16, "ffn_dim": 16, "num_heads": 2, "num_points": 2}
    new = {"content", "judge"}
    for group, rate in zip(seen, (0.01, 0.001), strict=True):
        ids = {id(parameter) for parameter in group["params"]}
        names = {name.split(".")[0] for name, value in fitted.network.named_parameters() if id(value) in ids}
        assert group["initial_lr"] == rate
        assert names == (new if rate == 0.01 else {"decoder", "heads", "pos_trans", "pos_trans_norm"})
    with pytest.raises(ValueError, match=r"options: the detector's decoder is of other sizes, .*from_decoder=False"):
        fit_corrector(loaded, open_images(scenes), truth, tmp_path / "d", replace(settings, options={"dim": 32}))


@pytest.mark.parametrize("change", [{"two_stage": False}, {"num_decoder_layers": 2}, {"hidden_dim": 12}])
def test_decoders_that_are_no_start(make_detector, change):
    assert decoder_to_start_from(LevelReader(two_stage(make_detector, **change))) is None
    assert decoder_to_start_from(LevelReader(Backbone("test_resnet"))) is None


def test_unknown_kinds_and_options():
    reader = LevelReader(Backbone("test_resnet"))
    with pytest.raises(ValueError, match="kind: expected one of 'cascade', 'queries', got 'roi'"):
        build_corrector("roi", reader, {})
    with pytest.raises(ValueError, match=r"options: .*widht"):
        build_corrector("cascade", reader, {"widht": 3})
    with pytest.raises(ValueError, match="width and dim: expected at least 1, got 0"):
        build_corrector("cascade", reader, {"width": 0})
    with pytest.raises(ValueError, match="dim: expected a multiple of 8 and of num_heads=8, got 20"):
        build_corrector("queries", reader, {"dim": 20})


# ----------------------------------------------------------------------------------------------------------------------
# Training and correction.

TINY = {"options": SMALL["cascade"], "steps": 4, "batch_size": 2, "boxes_per_image": 8, "checkpoint_every_steps": 2}


@pytest.fixture
def features(make_detector):
    """A loaded detector; its maps are those of a random network."""
    torch.manual_seed(0)
    detector = make_detector(num_feature_levels=3).eval()
    return LoadedDetector(detector, (), {"short_side": 64, "max_side": 96})


@pytest.fixture(scope="session")
def truth(scenes):
    return read_labels(scenes / "instances.json")


def weights(folder):
    return (folder / correction.WEIGHTS_NAME).read_bytes()


@pytest.mark.parametrize("kind", ["cascade", "queries"])
def test_fit_is_kept_and_loaded(kind, features, scenes, truth, tmp_path, monkeypatch):
    source = open_images(scenes)
    settings = CorrectorFit(**{**TINY, "kind": kind, "options": SMALL[kind]})
    fitted = fit_corrector(features, source, truth, tmp_path / "c", settings)
    record = json.loads((tmp_path / "c" / "corrector.json").read_text())
    assert record["settings"]["steps"] == 4 and record["options"] == fitted.network.init_args
    assert not (tmp_path / "c" / correction.RESUME_NAME).exists()
    loaded = load_corrector(tmp_path / "c", features)
    first, second = (correct_boxes(each, source, truth) for each in (fitted, loaded))
    assert np.array_equal(first.boxes_xyxy, second.boxes_xyxy)
    monkeypatch.setattr(correction, "_train", lambda *_: pytest.fail("finished work is done again"))
    again = fit_corrector(features, source, truth, tmp_path / "c", settings)
    assert np.array_equal(first.boxes_xyxy, correct_boxes(again, source, truth).boxes_xyxy)


def test_a_killed_fit_resumes_with_the_same_weights(features, scenes, truth, tmp_path, monkeypatch):
    source, settings = open_images(scenes), CorrectorFit(**{**TINY, "steps": 5, "mosaic": 0.5})
    extra = truth.select(truth.image_ids[6:])
    whole = fit_corrector(features, source, truth, tmp_path / "whole", settings, extra=extra)
    real, calls = correction._losses, []

    def dies(*args):
        calls.append(args[4])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(correction, "_losses", dies)
    with pytest.raises(KeyboardInterrupt):
        fit_corrector(features, source, truth, tmp_path / "killed", settings, extra=extra)
    fit_corrector(features, source, truth, tmp_path / "killed", settings, extra=extra)
    assert calls == [0, 1, 2, 3, 2, 3, 4]
    assert weights(tmp_path / "whole") == weights(tmp_path / "killed")
    assert whole.record["losses"] == json.loads((tmp_path / "killed" / "corrector.json").read_text())["losses"]


def test_the_seed_decides(features, scenes, truth, tmp_path):
    source = open_images(scenes)
    state = torch.random.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit_corrector(features, source, truth, tmp_path / name, CorrectorFit(**{**TINY, "steps": 2, "seed": seed}))
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_backbone_stays_as_it_is(features, scenes, truth, tmp_path):
    before = {name: value.clone() for name, value in features.detector.state_dict().items()}
    fit_corrector(features, open_images(scenes), truth, tmp_path / "c", CorrectorFit(**{**TINY, "steps": 2}))
    after = features.detector.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in features.detector.parameters())


def test_extra_boxes_share_the_batches(scenes, truth):
    data = correction._TrainingData(
        open_images(scenes),
        [truth.select(truth.image_ids[:2]), truth.select(truth.image_ids[2:])],
        {"short_side": 64, "max_side": 96, "mean": (0.5,) * 3, "std": (0.5,) * 3},
        CorrectorFit(steps=4, batch_size=4, extra_share=0.25, extra_until=0.5),
    )
    plan = list(data.draws(0))
    assert [sum(part for part, _ in step) for step in plan] == [1, 1, 0, 0]
    assert [number for step in plan for part, number in step if part == 0] == list(range(14))
    assert list(data.draws(2)) == plan[2:]
    seen = [int(data[(0, number)][1]["image_index"]) for number in range(4)]
    assert sorted(seen[:2]) == sorted(seen[2:]) == [0, 1]


def test_other_settings_boxes_or_features_need_another_folder(features, scenes, truth, tmp_path, make_detector):
    source, settings = open_images(scenes), CorrectorFit(**{**TINY, "steps": 1})
    fit_corrector(features, source, truth, tmp_path / "c", settings)
    with pytest.raises(RunMismatchError, match=r"settings.lr is 0.001 there, 0.1 asked"):
        fit_corrector(features, source, truth, tmp_path / "c", CorrectorFit(**{**TINY, "steps": 1, "lr": 0.1}))
    with pytest.raises(RunMismatchError, match="boxes"):
        fit_corrector(features, source, truth.select(truth.image_ids[:5]), tmp_path / "c", settings)
    other = LoadedDetector(make_detector(num_feature_levels=3, hidden_dim=32), (), features.image_settings)
    with pytest.raises(RunMismatchError, match="features"):
        fit_corrector(other, source, truth, tmp_path / "c", settings)
    with pytest.raises(ValueError, match=r"features: .* reads the maps of other weights"):
        load_corrector(tmp_path / "c", other)
    with pytest.raises(
        FileNotFoundError, match=r"expected corrector.safetensors and corrector.json in .*fit one first"
    ):
        load_corrector(tmp_path / "nothing", features)


def test_nothing_to_learn_from(features, scenes, truth, tmp_path):
    source = open_images(scenes)
    rows = [ImageLabels.build(truth.image_ids[0], (64, 80), [[3, 3, 3, 9]], [0])]
    empty = Labels.from_images(rows, truth.categories)
    with pytest.raises(ValueError, match="labels: expected at least one box with an area"):
        fit_corrector(features, source, empty, tmp_path / "c")
    with pytest.raises(ValueError, match="extra: expected at least one box with an area"):
        fit_corrector(features, source, truth, tmp_path / "c", extra=empty)
    with pytest.raises(LabelError, match="are not in"):
        fit_corrector(features, source.subset(source.ids[:3]), truth, tmp_path / "c")
    assert not (tmp_path / "c" / correction.RECORD_NAME).exists()


def test_a_loss_that_is_not_finite_stops_the_fit(features, scenes, truth, tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"at step [01]\. Lower lr"):
        fit_corrector(features, open_images(scenes), truth, tmp_path / "c", CorrectorFit(**{**TINY, "lr": 1e30}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"extra_share": 1.5}, "extra_share: expected 0 to 1, got 1.5"),
        ({"lr": 0.0}, "lr: expected above 0, got 0.0"),
        ({"warmup": 1.0}, "warmup: expected 0 to below 1"),
    ],
)
def test_settings_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        CorrectorFit(**wrong)


def as_fitted(features, network=None):
    """A corrector without training: the identity unless changed."""
    reader = correction.level_reader(features)
    torch.manual_seed(0)
    network = network or BoxCorrector(reader.channels, reader.strides, **SMALL["cascade"])
    return FittedCorrector(network.eval(), reader, correction.image_settings_of(features), {})


def test_the_identity_corrects_nothing_whatever_the_batch(features, scenes, truth):
    """Rows stay in order: images without boxes in between, crowds, boxes past the border."""
    rows = [truth.image(i) for i in range(len(truth))]
    rows[2] = ImageLabels.build(rows[2].image_id, (64, 80), [], [])
    rows[4] = ImageLabels.build(rows[4].image_id, (64, 80), [[1, 2, 30, 40], [5, 5, 9, 9]], [0, 0], crowd=[True, False])
    labels = Labels.from_images(rows, truth.categories)
    for batch_size in (1, 5):
        found = correct_boxes(as_fitted(features), open_images(scenes), labels, batch_size=batch_size)
        assert len(found) == len(labels.boxes_xyxy) and not found.uncorrected.any()
        np.testing.assert_allclose(found.boxes_xyxy, labels.boxes_xyxy, atol=1e-3)
        np.testing.assert_allclose(found.shift_iou, 1.0, atol=1e-3)


def test_corrections_are_in_pixels_of_the_original(features, scenes, truth):
    """A network that moves every box by a quarter of its side, on images resized by another factor."""
    corrector = as_fitted(features)
    corrector.network.stages[2][-1].bias.data = torch.tensor([0.25 * 10 * 3, 0.0, 0.0, 0.0])
    rows = [ImageLabels.build(truth.image_ids[i], (64, 80), [[8 + i, 10, 28 + i, 30]], [0]) for i in range(3)]
    labels = Labels.from_images(rows, truth.categories)
    object.__setattr__(corrector, "image_settings", {**corrector.image_settings, "short_side": 48})
    found = correct_boxes(corrector, open_images(scenes), labels, min_gain=-1)
    np.testing.assert_allclose(found.boxes_xyxy, labels.boxes_xyxy + np.array([5, 0, 5, 0]), atol=1e-3)
    np.testing.assert_allclose(found.shift_iou, 15 / 25, atol=1e-3)
    applied = found.applied(labels)
    assert np.array_equal(applied.boxes_xyxy, found.boxes_xyxy) and applied.image_ids == labels.image_ids
    np.testing.assert_allclose(applied.areas, 400, rtol=1e-4)


def test_corrections_that_gain_too_little_are_refused(features, scenes, truth, monkeypatch):
    """A judge that likes boxes by where they begin: what moves to the right by a quarter gains."""
    corrector = as_fitted(features)
    corrector.network.stages[2][-1].bias.data = torch.tensor([0.25 * 10 * 3, 0.0, 0.0, 0.0])
    likes = lambda levels, boxes: torch.logit(boxes.xyxy[:, 0] / 100)  # noqa: E731
    monkeypatch.setattr(corrector.network, "overlap_logits", likes)
    rows = [ImageLabels.build(truth.image_ids[0], (64, 80), [[8, 10, 12, 30], [8, 10, 48, 30]], [0, 0], areas=[7, 8])]
    labels = Labels.from_images(rows, truth.categories)
    found = correct_boxes(corrector, open_images(scenes), labels, min_gain=0.05)
    np.testing.assert_allclose(found.gain, [0.01, 0.1], atol=1e-4)
    assert found.refused.tolist() == [True, False] and not found.uncorrected.any()
    np.testing.assert_allclose(found.boxes_xyxy, [[8, 10, 12, 30], [18, 10, 58, 30]], atol=1e-3)
    np.testing.assert_allclose(found.shift_iou, 0.6, atol=1e-3)
    np.testing.assert_allclose(found.applied(labels).areas, [7, 800], rtol=1e-4)
    assert not correct_boxes(corrector, open_images(scenes), labels, min_gain=0.0).refused.any()


def test_unusable_results_leave_the_box_as_it_was(features, own_scenes):
    truth = read_labels(own_scenes / "instances.json")
    corrector = as_fitted(features)
    # far to the right: what lies past the border is cut to nothing
    corrector.network.stages[2][-1].bias.data = torch.tensor([1e4, 0.0, 0.0, 0.0])
    found = correct_boxes(corrector, open_images(own_scenes), truth)
    assert found.uncorrected.all() and np.array_equal(found.boxes_xyxy, truth.boxes_xyxy)
    assert (found.shift_iou == 1).all() and not found.gain.any() and not found.refused.any()
    corrector.network.stages[2][-1].bias.data.fill_(torch.nan)
    found = correct_boxes(corrector, open_images(own_scenes), truth)
    assert found.uncorrected.all() and np.array_equal(found.applied(truth).areas, truth.areas)
    # an empty box beside good ones, and an image that cannot be read
    rows = [truth.image(0), truth.image(1)]
    rows[0] = ImageLabels.build(rows[0].image_id, (64, 80), [[5, 5, 30, 30], [7, 7, 7, 20], [9, 9, 40, 50]], [0, 0, 0])
    labels = Labels.from_images(rows, truth.categories)
    (own_scenes / truth.image_ids[1]).write_bytes(b"no image") if (own_scenes / truth.image_ids[1]).exists() else (
        own_scenes / "images" / truth.image_ids[1]
    ).write_bytes(b"no image")
    found = correct_boxes(as_fitted(features), open_images(own_scenes / "instances.json"), labels, batch_size=1)
    assert found.uncorrected.tolist() == [False, True, False] + [True] * len(rows[1])
    assert np.array_equal(found.boxes_xyxy[found.uncorrected], labels.boxes_xyxy[found.uncorrected])


def test_many_boxes_go_in_portions(features, scenes, truth, monkeypatch):
    corrector = as_fitted(features)
    torch.nn.init.normal_(corrector.network.stages[0][-1].weight, std=0.5)
    whole = correct_boxes(corrector, open_images(scenes), truth, min_gain=-1)
    assert (whole.shift_iou < 0.999).any()
    monkeypatch.setattr(correction, "_BOXES_AT_ONCE", 3)
    parts = correct_boxes(corrector, open_images(scenes), truth, min_gain=-1)
    np.testing.assert_allclose(parts.boxes_xyxy, whole.boxes_xyxy, rtol=1e-5, atol=1e-3)


def test_no_boxes_at_all_and_images_that_are_not_there(features, scenes, truth):
    empty = Labels.from_images([ImageLabels.build(truth.image_ids[0], (64, 80), [], [])], truth.categories)
    assert len(correct_boxes(as_fitted(features), open_images(scenes), empty)) == 0
    with pytest.raises(LabelError, match="are not in"):
        correct_boxes(as_fitted(features), open_images(scenes).subset([truth.image_ids[0]]), truth)

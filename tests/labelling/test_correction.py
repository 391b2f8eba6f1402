"""Jitter against known numbers and by hand, the networks by hand and by brute force, training to its end and beyond."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torchvision.ops import generalized_box_iou, roi_align

from simdetr.boxes import paired_iou, pairwise_iou
from simdetr.data.annotations import ImageLabels, LabelError
from simdetr.data.images import open_images
from simdetr.data.label_files import read_labels
from simdetr.data.labels import Labels
from simdetr.data.scenes import render_scenes
from simdetr.detectors import DeformableDETR
from simdetr.detectors.backbone import Backbone
from simdetr.detectors.detector import Level
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
from simdetr.labelling.corrector_networks import Boxes, LevelReader, best_matches, build_corrector, moved, pooled
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
    assert float(found[1][0, 0]) == 80.0


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
    assert [float(losses[f"stage{n}"]) for n in (1, 2, 3)] == pytest.approx(expected, abs=1e-5)
    assert float(losses["loss"]) == pytest.approx(sum(expected), abs=1e-5)


def test_losses_are_means_over_the_matched_boxes():
    boxes = batch_of((0, 0, 32, 24), (0, 0, 32, 16), (40, 40, 50, 50))
    losses = corrector().losses(levels_of(), boxes, [torch.tensor([[0.0, 0.0, 32.0, 32.0]]), torch.zeros(0, 4)])
    assert float(losses["stage1"]) == pytest.approx((0.25 + 0.5) / 2, abs=1e-6)
    assert float(losses["stage3"]) == pytest.approx(0.25, abs=1e-6)


def test_query_losses_by_hand():
    """Wanted (0, 0, 48, 64) of 96 x 64, found three quarters of its height: cxcywh differ by 1/8 and 1/4, IoU 3/4."""
    boxes = batch_of((0, 0, 48, 48))
    losses = corrector("queries").losses(levels_of(), boxes, [torch.tensor([[0.0, 0.0, 48.0, 64.0]]), torch.zeros(0, 4)])
    expected = 5 * (1 / 8 + 1 / 4) + 2 * (1 - 3 / 4)
    assert [float(losses[f"stage{n}"]) for n in (1, 2, 3)] == pytest.approx([expected] * 3, abs=1e-3)


@pytest.mark.parametrize("kind", ["cascade", "queries"])
@pytest.mark.parametrize("boxes", [EXAMPLE, batch_of()], ids=["none matches", "no box"])
def test_without_a_match_the_loss_is_0_and_attached(kind, boxes):
    network = corrector(kind, spread=0.5)
    losses = network.losses(levels_of(), boxes, [torch.zeros(0, 4), torch.tensor([[1.0, 50.0, 3.0, 52.0]])])
    assert {name: float(value) for name, value in losses.items()} == dict.fromkeys(losses, 0.0)
    losses["loss"].backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert gradients and not any(gradient.any() for gradient in gradients)


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
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3)
    starts, _ = jitter_boxes(truth, (64, 96), 40, seeded(1))
    boxes = Boxes(starts, torch.zeros(len(starts), dtype=torch.int64), torch.tensor([[64, 96]]))
    for _ in range(60):
        optimiser.zero_grad()
        network.losses(levels, boxes, [truth])["loss"].backward()
        optimiser.step()
    before, after = pairwise_iou(starts, truth).mean(), pairwise_iou(network(levels, boxes)[-1], truth).mean()
    assert float(before) < 0.5 and float(after) > 0.8


def test_the_reader_takes_what_has_maps(make_other):
    images, mask = torch.rand(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, 32:] = True
    backbone = Backbone("test_resnet")
    levels = LevelReader(backbone)(images, mask)
    assert [level.stride for level in levels] == [8, 16, 32]
    assert [tuple(level.features.shape[1:]) for level in levels] == [(c, 64 // s, 96 // s) for c, s in zip(backbone.channels, (8, 16, 32), strict=True)]
    assert levels[0].mask[1].sum() == levels[0].mask[1].numel() // 2 and not levels[0].mask[0].any()
    assert not any(level.features.requires_grad for level in levels)
    reader = LevelReader(backbone.train())
    assert not backbone.training and not reader.train().training
    with pytest.raises(ValueError, match=r"features: TransformersDetector gives no feature maps; take a Deformable DETR"):
        LevelReader(make_other("detr"))


def test_unknown_kinds_and_options():
    reader = LevelReader(Backbone("test_resnet"))
    with pytest.raises(ValueError, match="kind: expected one of 'cascade', 'queries', got 'roi'"):
        build_corrector("roi", reader, {})
    with pytest.raises(ValueError, match="options: .*widht"):
        build_corrector("cascade", reader, {"widht": 3})
    with pytest.raises(ValueError, match="width, dim and context: expected above 0, got 0"):
        build_corrector("cascade", reader, {"width": 0})
    with pytest.raises(ValueError, match="dim: expected a multiple of 8 and of num_heads=8, got 20"):
        build_corrector("queries", reader, {"dim": 20})

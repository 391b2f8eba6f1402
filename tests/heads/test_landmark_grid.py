"""Landmarks by subregion: losses against numbers worked out by hand, every option has an effect, padding has none.

With all weights of the last layers at 0 every anchor node has uniform scores, so that each class loss is log(M + 1),
and its point is its own position (or the image's middle, for absolute points).
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from simdetr.detectors.detector import Features, FeatureSizes, Level, Queries
from simdetr.heads import LandmarkHead
from simdetr.heads.landmark_grid import (
    BACKGROUND_ALONE,
    GridLandmarks,
    GridOutputs,
    anchor_positions,
    cell_owners,
    pool_valid,
    select_anchors,
    select_cells,
)
from simdetr.heads.landmark_losses import point_error
from simdetr.heads.landmark_targets import valid_cells

SIZES = FeatureSizes(2, (6, 8, 10), (8, 16, 32))
LOG3 = math.log(3)


def features_of(height=64, width=80, seed=0, dtype=torch.float32, mask=None):
    """Three maps of two images, as a backbone gives them."""
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for channels, stride in zip(SIZES.level_channels, SIZES.level_strides, strict=True):
        size = (height // stride, width // stride)
        padding = torch.zeros(2, *size, dtype=torch.bool) if mask is None else mask[:, ::stride, ::stride]
        levels.append(Level(torch.randn(2, channels, *size, generator=generator, dtype=dtype), stride, padding))
    return Features(levels, None, [])


def targets_of(boxes=((0.2, 0.25, 0.3, 0.4),), points=((0.9, 0.8),), labels=(1,)):
    """Landmarks of the first image; the second has none."""
    first = {
        "labels": torch.tensor(labels, dtype=torch.int64),
        "boxes": torch.tensor(boxes).view(-1, 4),
        "points": torch.tensor(points).view(-1, 2),
    }
    return [first, {name: values[:0] for name, values in first.items()}]


def head_of(flat=True, sizes=SIZES, **options):
    torch.manual_seed(0)
    head = LandmarkHead(sizes, variant="grid", **({"grid": (2, 2)} | options))
    if flat:
        for layer in (head.variant.class_embed, head.variant.point_embed):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(head.variant.class_embed.bias)
    return head


def terms_of(features=None, targets=None, **options):
    """Terms of a head with flat outputs, as numbers."""
    features, targets = features or features_of(), targets or targets_of()
    head = head_of(**options)
    losses = head.losses(head(features), features, targets)
    return {name: float(value) for name, value in (losses.terms | losses.diagnostics).items()}


def test_shapes_and_start():
    head, features = head_of(flat=False, grid=(2, 3)), features_of()
    outputs = head(features)
    assert outputs.logits.shape == (2, 6, 5, 3) and outputs.points.shape == (2, 6, 5, 2)
    expected = anchor_positions((2, 3), 5, torch.device("cpu")).expand(2, -1, -1, -1)
    torch.testing.assert_close(outputs.points, expected)
    absolute = head_of(flat=False, grid=(2, 3), point_output="absolute")(features)
    torch.testing.assert_close(absolute.points, torch.full((2, 6, 5, 2), 0.5))


def test_the_coarsest_map_that_is_large_enough_is_read():
    """Maps are 8 × 10, 4 × 5 and 2 × 2."""
    features = features_of()
    for grid, read in (((2, 2), 2), ((2, 3), 1), ((4, 5), 1), ((5, 5), 0), ((8, 10), 0)):
        head = head_of(grid=grid)
        assert head.variant._chosen(features.levels) == read
        head(features)
    assert head_of(grid=(2, 2), level=0).variant._chosen(features.levels) == 0
    assert head_of(grid=(2, 2), level=-2).variant._chosen(features.levels) == 1
    assert list(head_of(level=-2).variant.projections) == ["1"]
    for options in ({"grid": (9, 2)}, {"grid": (4, 5), "level": 2}):
        with pytest.raises(ValueError, match=r"grid: . x . subregions, but the feature maps have"):
            head_of(**options)(features)
    wrong = Features([*features.levels[:2], features.levels[2]._replace(features=torch.zeros(2, 9, 2, 2))], None, [])
    with pytest.raises(ValueError, match=r"levels\[2\]: expected \[B, 10, h, w\], got \[2, 9, 2, 2\]"):
        head_of()(wrong)


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        # one positive cell of the first image's four and one of background, four of background of the second
        ({}, 5 * (2 + 4)),
        ({"anchors": 1}, 2 + 4),
        ({"selection": "all"}, 5 * 8),
        ({"selection": "positive"}, 5 * 1),
        ({"top_anchors": 1}, 2 + 4),
        ({"top_anchors": 3}, 3 * (2 + 4)),
        ({"anchor_threshold": 0.6}, 5 * (2 + 4)),  # 1 - P of background is 2/3
        ({"anchor_threshold": 0.7}, 0),
        ({"top_anchors": 2, "anchor_threshold": 0.6}, 2 * (2 + 4)),
        ({"top_anchors": 2, "anchor_threshold": 0.7}, 0),
    ],
)
def test_what_is_selected_is_what_counts(options, samples):
    assert terms_of(**options)["loss_class"] == pytest.approx(samples * LOG3)


def test_losses_are_divided_by_the_number_of_landmarks_unless_summed():
    three = targets_of([[0.2, 0.25, 0.3, 0.4]] * 3, [[0.9, 0.8]] * 3, [1, 1, 1])
    divided, summed = terms_of(targets=three), terms_of(targets=three, reduction="sum")
    for name in ("loss_class", "loss_point"):
        assert summed[name] == pytest.approx(3 * divided[name])


@pytest.mark.parametrize("mode", ["eq4", "eq5", "eq7"])
@pytest.mark.parametrize("unit", ["fraction", "cell", "pixel"])
def test_all_positive_subregions_learn_the_same_point(unit, mode):
    """A box over the upper two of 2 × 3 subregions' left columns, its point far away in the last one."""
    targets = targets_of([[1 / 3, 0.2, 0.5, 0.2]], [[0.9, 0.8]])
    terms = terms_of(targets=targets, grid=(2, 3), unit=unit, mode=mode, beta=0.2)
    size = {"fraction": (1, 1), "cell": (3, 2), "pixel": (80, 64)}[unit]
    units, positions = torch.tensor(size), anchor_positions((2, 3), 5, torch.device("cpu"))[:2]
    errors = point_error(positions * units, torch.tensor([0.9, 0.8]) * units, 0.2)
    expected = {"eq4": errors.sum() / 3, "eq5": errors.sum(), "eq7": errors.square().sum() / 3}[mode]
    assert terms["loss_point"] == pytest.approx(expected.item(), rel=1e-5)
    assert terms["true_probability"] == pytest.approx(1 / 3)
    if mode == "eq4":
        assert terms["reversal_rate"] == pytest.approx((0.5 * errors / 3 > 1).float().mean().item())


def test_the_equations_differ_in_the_default_unit():
    """A point a twentieth of the image away: what the point loss is beside the class loss, by equation and unit."""
    centre = anchor_positions((4, 5), 1, torch.device("cpu"))[7, 0]
    targets = targets_of([[*centre.tolist(), 0.1, 0.1]], [(centre + 0.05).tolist()])
    assert LandmarkHead(SIZES, variant="grid").init_args["unit"] == "cell"

    def share(mode, **options):
        terms = terms_of(targets=targets, mode=mode, grid=(4, 5), anchors=1, selection="positive", **options)
        return 0.5 * terms["loss_point"] / terms["loss_class"]

    fractions = [share(mode, unit="fraction") for mode in ("eq4", "eq5", "eq7")]
    cells = [share(mode) for mode in ("eq4", "eq5", "eq7")]
    # 0.25 and 0.2 cells away: S = 0.2 + 0.15; P = 1/3, u = log 3
    assert cells == pytest.approx([0.5 * s / LOG3 for s in (0.35 / 3, 0.35, 0.35**2 / 3)], rel=1e-4)
    # 0.05 of each side away: S = 2 · 0.0125, so that nearly all of the loss is the class's by any equation
    assert fractions == pytest.approx([0.5 * s / LOG3 for s in (0.025 / 3, 0.025, 0.025**2 / 3)], rel=1e-4)
    assert max(fractions) < 0.02 and max(cells) > 0.1


def test_anchors_of_one_prediction_count_alike():
    """Five identical predictions: five times the loss of one; the best alone: once."""
    options = {"point_output": "absolute", "selection": "positive"}
    one, five, best = (terms_of(**options, **more) for more in ({"anchors": 1}, {}, {"top_anchors": 1}))
    for name in ("loss_class", "loss_point"):
        assert five[name] == pytest.approx(5 * one[name])
        assert best[name] == pytest.approx(one[name])


def test_the_best_anchor_is_the_most_confident_one():
    head, features = head_of(top_anchors=1, selection="positive"), features_of()
    outputs = head(features)
    logits = outputs.logits.detach().clone().requires_grad_()
    with torch.no_grad():
        logits[:, :, 3, 2] = -1.0  # less background there
    head.losses(GridOutputs(logits, outputs.points), features, targets_of()).total.backward()
    assert (logits.grad[0, 0].abs().sum(dim=1) > 0).tolist() == [False, False, False, True, False]


def test_a_threshold_above_every_confidence_leaves_the_graph_whole():
    head, features = head_of(flat=False, anchor_threshold=1.0), features_of()
    losses = head.losses(head(features), features, targets_of())
    assert losses.total.item() == 0.0
    losses.total.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in head.parameters())


def test_landmarks_without_point_or_extent():
    blind = terms_of(targets=targets_of(points=((math.nan, math.nan),)), selection="positive")
    assert blind["loss_point"] == 0.0 and blind["loss_class"] == pytest.approx(5 * LOG3)
    bare = terms_of(targets=targets_of(boxes=((0.9, 0.8, 0.0, 0.0),)), selection="positive")
    assert bare["loss_class"] == pytest.approx(5 * LOG3) and bare["loss_point"] > 0
    neither = targets_of(boxes=((0.9, 0.8, 0.0, 0.0),), points=((math.nan, math.nan),))
    assert terms_of(targets=neither, selection="positive")["loss_class"] == 0.0


def test_a_batch_without_landmarks_learns_nothing():
    head, features = head_of(flat=False).train(), features_of()
    losses = head.losses(head(features), features, targets_of([], [], []))
    assert losses.total.item() == 0.0 and losses.total.requires_grad
    losses.total.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in head.parameters())


def test_every_parameter_takes_part():
    head, features = head_of(flat=False).train(), features_of()
    head.losses(head(features), features, targets_of()).total.backward()
    assert all(p.grad is not None for p in head.parameters())
    learning = {name for name, p in head.named_parameters() if p.grad.abs().max() > 0}
    unread = {name for name, _ in head.named_parameters() if ".projections.0." in name or ".projections.1." in name}
    assert learning == {name for name, _ in head.named_parameters()} - unread and unread


@pytest.mark.parametrize("options", [{}, {"selection": "all", "grid": (3, 3), "unit": "pixel"}, {"level": 0}])
def test_padding_does_not_matter(options):
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[0, :, 64:] = True
    mask[1, 48:] = True
    features = features_of(64, 96, mask=mask)
    filled = [
        level._replace(features=level.features.masked_fill(level.mask[:, None], 1e4)) for level in features.levels
    ]
    head = head_of(flat=False, **options)
    found = []
    for levels in (features.levels, filled):
        torch.manual_seed(1)
        bundle = features._replace(levels=levels)
        outputs = head(bundle)
        found.append((*outputs, head.losses(outputs, bundle, targets_of()).total))
    for clean, other in zip(*found, strict=True):
        assert torch.equal(clean, other)


def test_padded_images_are_read_as_they_would_be_alone():
    """The subregions are those of the valid image."""
    mask = torch.zeros(2, 64, 128, dtype=torch.bool)
    mask[0, :, 64:] = True
    features = features_of(64, 128, mask=mask)
    cut = []
    for level in features.levels:
        half = level.mask.shape[2] // 2
        cut.append(Level(level.features[..., :half], level.stride, level.mask[..., :half]))
    head = head_of(flat=False, level=0)
    together, alone = head(features), head(features._replace(levels=cut))
    torch.testing.assert_close(together.logits[0], alone.logits[0])


def test_what_is_not_finite_is_named():
    features = features_of()
    features.levels[2].features[1, 4, 0, 1] = math.nan
    with pytest.raises(ValueError, match=r"levels\[2\]: expected finite values, got nan at index \(1, 4, 0, 1\)"):
        head_of()(features)
    features.levels[2].mask[1, :, 1] = True  # in the padding it may be anything
    assert head_of(flat=False)(features).logits.isfinite().all()


def test_the_same_seed_gives_the_same_loss():
    head, features = head_of(flat=False), features_of()

    def loss(seed):
        torch.manual_seed(seed)
        return head.losses(head(features), features, targets_of()).total

    assert torch.equal(loss(1), loss(1))
    assert len({loss(seed).item() for seed in range(4)}) > 1


def test_the_whole_head_by_finite_differences():
    sizes = FeatureSizes(2, (3,), (16,))
    torch.manual_seed(0)
    variant = GridLandmarks(sizes, head_of().variant.rule, (2, 2), 5, None, "offset", "all", None, 0.0, dim=4).double()
    head = head_of(sizes=sizes, selection="all").double()
    head.variant = variant
    nn.init.normal_(variant.point_embed.weight)
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[1, :, 3:] = True

    def total(maps):
        features = Features([Level(maps, 16, mask)], None, [])
        return head.losses(head(features), features, targets_of()).total

    maps = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(total, (maps,))


def test_predictions():
    head, features = head_of(flat=False).eval(), features_of()
    outputs = head(features)
    found = head.predictions(outputs, features)
    assert {name: tuple(values.shape) for name, values in found.items()} == {
        "pred_logits": (2, 20, 2),
        "pred_boxes": (2, 20, 4),
        "pred_points": (2, 20, 2),
        "point_cells": (2, 2),
    }
    wide = head_of(flat=False, grid=(2, 4))
    assert wide.predictions(wide(features), features)["point_cells"].tolist() == [[0.25, 0.5]] * 2  # width and height
    assert torch.equal(found["pred_boxes"][..., :2], found["pred_points"])
    assert not found["pred_boxes"][..., 2:].any()
    probability = outputs.logits.softmax(dim=-1).flatten(1, 2)
    real = found["pred_logits"].amax(dim=-1) > -torch.inf
    assert torch.equal(real, probability.argmax(dim=-1) < 2) and 0 < real.sum() < 40
    torch.testing.assert_close(found["pred_logits"].amax(dim=-1)[real].sigmoid(), 1 - probability[real][:, 2])
    assert torch.equal(found["pred_logits"].argmax(dim=-1)[real], probability[real].argmax(dim=-1))


def test_on_a_detector_its_own_predictions_stay():
    head = head_of(flat=False)
    features = features_of()._replace(queries=Queries([], [], [], []))
    assert set(head.predictions(head(features), features)) == {"landmark_logits", "landmark_points"}


# ----------------------------------------------------------------------------------------------------------------------
# Subregions: pooling against torch's on divisible sizes, owners against a plain loop, selections have their effect.


NAN = math.nan
ALL = torch.ones(1, 9, dtype=torch.bool)


def masked(sizes, height, width):
    mask = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for index, (rows, columns) in enumerate(sizes):
        mask[index, :rows, :columns] = False
    return mask


def test_pooling_is_the_mean_over_each_subregion_of_the_valid_part():
    features = torch.randn(3, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    sizes = [(8, 12), (4, 12), (6, 4)]
    mask = masked(sizes, 8, 12)
    pooled = pool_valid(features, mask, (2, 4))
    for index, (rows, columns) in enumerate(sizes):
        expected = F.adaptive_avg_pool2d(features[index, :, :rows, :columns], (2, 4))
        torch.testing.assert_close(pooled[index], expected)
    assert [sides.tolist() for sides in valid_cells(mask)] == [[8, 4, 6], [12, 12, 4]]


def test_cells_that_a_border_cuts_count_by_their_part():
    features = torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 1, 3)
    pooled = pool_valid(features, masked([(1, 3)], 1, 3), (1, 2))
    torch.testing.assert_close(pooled.flatten(), torch.tensor([(1 + 0.5 * 2) / 1.5, (0.5 * 2 + 4) / 1.5]))
    finer = pool_valid(features, masked([(1, 2)], 1, 3), (1, 4))  # more subregions than cells
    torch.testing.assert_close(finer.flatten(), torch.tensor([1.0, 1.0, 2.0, 2.0]))


@pytest.mark.parametrize("filling", [1e4, math.nan, math.inf])
def test_padding_does_not_matter_to_cells(filling):
    features = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    mask = masked([(5, 4), (2, 7)], 5, 7)
    filled = features.masked_fill(mask[:, None], filling)
    assert torch.equal(pool_valid(features, mask, (2, 3)), pool_valid(filled, mask, (2, 3)))


def test_anchors_are_centres_and_a_quincunx_around_them():
    one = anchor_positions((2, 5), 1, torch.device("cpu"))
    assert one.shape == (10, 1, 2)
    torch.testing.assert_close(one[[0, 6], 0], torch.tensor([[0.1, 0.25], [0.3, 0.75]]))
    five = anchor_positions((2, 5), 5, torch.device("cpu"))
    torch.testing.assert_close(five[:, 0], one[:, 0])
    torch.testing.assert_close(five.mean(dim=1), one[:, 0])
    assert {(round(x, 4), round(y, 4)) for x, y in (five[0, 1:] - five[0, :1]).tolist()} == {
        (sx * 0.05, sy * 0.125) for sx in (-1, 1) for sy in (-1, 1)
    }


def owners(boxes, points=None, grid=(3, 3), present=None):
    """Owners of one image, row by row."""
    boxes = torch.tensor([boxes], dtype=torch.float32).view(1, -1, 4)
    points = boxes[..., :2] if points is None else torch.tensor([points], dtype=torch.float32)
    present = torch.ones(boxes.shape[:2], dtype=torch.bool) if present is None else torch.tensor([present])
    return cell_owners(boxes, points, present, grid).view(grid).tolist()


def test_all_subregions_that_a_box_reaches_into_are_its_own():
    assert owners([[0.5, 0.5, 0.6, 0.1]]) == [[-1, -1, -1], [0, 0, 0], [-1, -1, -1]]
    # a box that ends where a subregion begins, up to rounding, does not reach into it
    assert owners([[0.5, 0.5, 1 / 3, 1 / 3]]) == [[-1, -1, -1], [-1, 0, -1], [-1, -1, -1]]
    # the image's lower right end, where points of road markings may lie
    assert owners([[0.9, 0.95, 0.2, 0.1]], [[1.0, 1.0]]) == [[-1] * 3, [-1] * 3, [-1, -1, 0]]


def test_the_larger_overlap_wins_and_of_equals_the_smaller_landmark():
    small, large = [0.25, 0.5, 0.1, 0.1], [0.4, 0.5, 0.5, 0.2]
    assert owners([small, large])[1] == [1, 1, -1]
    assert owners([large, small])[1] == [0, 0, -1]
    whole, half = [0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 1.0]
    for pair, names in (([whole, half], (0, 1)), ([half, whole], (1, 0))):
        first_column = [row[0] for row in owners(pair)]
        last_column = [row[2] for row in owners(pair)]
        assert first_column == [names[1]] * 3 and last_column == [names[0]] * 3


def test_a_point_alone_takes_the_subregion_that_holds_it():
    assert owners([[0.5, 0.1, 0.0, 0.0]]) == [[-1, 0, -1], [-1] * 3, [-1] * 3]
    assert owners([[1.0, 1.0, 0.0, 0.0]]) == [[-1] * 3, [-1] * 3, [-1, -1, 0]]
    # but not one that a box reaches into
    assert owners([[0.5, 0.1, 0.0, 0.0], [0.5, 0.1, 0.1, 0.1]])[0] == [-1, 1, -1]
    # nor any without or outside: neither box nor point
    assert owners([[0.5, 0.5, 0.0, 0.0]], [[NAN, NAN]]) == [[-1] * 3] * 3
    assert owners([[1.2, 0.5, 0.0, 0.0]]) == [[-1] * 3] * 3
    assert owners([[-0.01, 0.5, 0.0, 0.0]]) == [[-1] * 3] * 3


def test_what_fills_up_owns_nothing():
    assert owners([[0.5, 0.5, 0.1, 0.1], [0.5, 0.5, 0.9, 0.9]], present=[True, False])[1] == [-1, 0, -1]


def test_owners_by_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(4, 6, 4, generator=generator) * torch.tensor([1.0, 1.0, 0.6, 0.6])
    boxes[:, 4, 2:] = 0.0
    points = boxes[..., :2].clone()
    present = torch.rand(4, 6, generator=generator) > 0.2
    found = cell_owners(boxes, points, present, (4, 5))
    for image, (row, column) in itertools.product(range(4), itertools.product(range(4), range(5))):
        best = (0.0, 0.0, -1)
        for index in range(6):
            cx, cy, w, h = boxes[image, index].tolist()
            wide = min(cx + w / 2, (column + 1) / 5) - max(cx - w / 2, column / 5)
            high = min(cy + h / 2, (row + 1) / 4) - max(cy - h / 2, row / 4)
            held = w == 0 and int(cx * 5) == column and int(cy * 4) == row and best[2] < 0
            if present[image, index] and ((w > 0 and wide > 0 and high > 0 and wide * high > best[0]) or held):
                best = (max(wide * high, 0.0), w * h, index)
        assert found[image, row * 5 + column] == best[2]


def test_selection_of_subregions():
    positive = torch.zeros(4, 20, dtype=torch.bool)
    positive[0, [3, 4, 8]] = True
    positive[2, :15] = True
    positive[3] = True
    balanced = select_cells(positive, "balanced", torch.Generator().manual_seed(0))
    assert (balanced & positive).sum(dim=1).tolist() == [3, 0, 15, 20]
    assert (balanced & ~positive).sum(dim=1).tolist() == [3, BACKGROUND_ALONE, 5, 0]
    assert select_cells(positive, "all").all()
    assert torch.equal(select_cells(positive, "positive"), positive)


def test_the_same_seed_selects_the_same_background():
    positive = torch.zeros(2, 20, dtype=torch.bool)
    positive[0, :5] = True

    def drawn(seed):
        return select_cells(positive, "balanced", torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    torch.manual_seed(5)
    default = select_cells(positive, "balanced")
    torch.manual_seed(5)
    assert torch.equal(default, select_cells(positive, "balanced"))
    # each of the background is as likely as any other
    generator = torch.Generator().manual_seed(0)
    counts = sum(select_cells(positive, "balanced", generator).float() for _ in range(600)) / 600
    torch.testing.assert_close(counts[0, 5:], torch.full((15,), 5 / 15), atol=0.08, rtol=0)
    torch.testing.assert_close(counts[1], torch.full((20,), 4 / 20), atol=0.08, rtol=0)


def test_selection_of_anchors():
    confidence = torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.2, 0.2]])
    assert select_anchors(confidence).all()
    assert select_anchors(confidence, top=1)[0].tolist() == [False, True, False]
    assert select_anchors(confidence, top=1)[1].sum() == 1
    assert select_anchors(confidence, top=2)[0].tolist() == [False, True, True]
    assert select_anchors(confidence, top=9).all()
    assert select_anchors(confidence, threshold=0.5).tolist() == [[False, True, True], [False] * 3]
    assert select_anchors(confidence, top=2, threshold=0.6)[0].tolist() == [False, True, False]

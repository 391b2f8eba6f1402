"""Subregions: pooling against torch's on divisible sizes, owners against a plain loop, selections have their effect."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from simdetr.heads.landmark_grid import (
    BACKGROUND_ALONE,
    anchor_positions,
    cell_owners,
    pool_valid,
    select_anchors,
    select_cells,
)
from simdetr.heads.landmark_targets import valid_cells

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
def test_padding_does_not_matter(filling):
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

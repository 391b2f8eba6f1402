"""Ranking and choice of shapes against a plain loop, and the regions made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from simdetr.boxes import pairwise_iou
from simdetr.mining.level_sets import LevelSets, Shapes
from simdetr.mining.ranking import feature_contrast, rank_shapes, shapes_to_regions


def shapes_with(boxes, image, edge=1.0, grid=(20, 30)):
    """Full rectangles as shapes, one run per row."""
    starts, lengths, owner = [], [], []
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        starts += [y * grid[1] + x0 for y in range(y0, y1)]
        lengths += [x1 - x0] * (y1 - y0)
        owner += [number] * (y1 - y0)
    count = len(boxes)
    return Shapes(
        grid=grid,
        image=torch.tensor(image, dtype=torch.int64),
        cluster=torch.arange(count) % 3,
        count=torch.tensor([(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes], dtype=torch.int64),
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        edge=torch.as_tensor(edge, dtype=torch.float32).expand(count).clone(),
        starts=torch.tensor(starts, dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        shape_of=torch.tensor(owner, dtype=torch.int64),
    )


def random_boxes(count, seed):
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, [25, 15], (count, 2))
    return np.hstack([corner, np.minimum(corner + rng.integers(2, 12, (count, 2)), [30, 20])]).tolist()


def by_loop(shapes, images, settings):
    """The same choice, one image and one box at a time."""
    height, width = shapes.grid
    chosen = {}
    for b in range(images):
        own = (shapes.image == b).nonzero().flatten().tolist()
        looks = {}
        for s in own:
            x0, y0, x1, y1 = shapes.boxes[s].tolist()
            area = (x1 - x0) * (y1 - y0)
            touched = (x0 == 0) + (y0 == 0) + (x1 == width) + (y1 == height)
            looks[s] = float(shapes.edge[s]) ** settings.edge_power * settings.border_factor**touched
            looks[s] *= (area / height / width) ** 0.5
        ranked = sorted(own, key=lambda s: -looks[s])[: settings.max_ranked]
        iou = {(s, t): float(pairwise_iou(shapes.boxes[[s]], shapes.boxes[[t]])) for s in ranked for t in ranked}
        score = {s: looks[s] * sum(iou[s, t] > 0.6 for t in ranked) ** settings.recurrence_power for s in ranked}
        best = max(score.values(), default=0.0)
        for _ in range(settings.max_boxes):
            top = max(score, key=score.get, default=None)
            if top is None or score[top] < settings.min_relative_score * best:
                break
            chosen[top] = score.pop(top) / best**settings.balance
            score = {s: value * (1 - iou[s, top] ** 2) for s, value in score.items() if iou[s, top] <= settings.max_iou}
    return chosen


@pytest.mark.parametrize(
    "settings",
    [
        LevelSets(),
        LevelSets(max_boxes=3, max_iou=0.3, edge_power=2.0),
        LevelSets(max_ranked=10, border_factor=0.2, min_relative_score=0.4, balance=1.0, recurrence_power=1.0),
    ],
    ids=["default", "few", "strict"],
)
def test_choice_equals_a_loop(settings):
    image = np.sort(np.random.default_rng(1).choice([0, 1, 3], 60))
    edge = torch.rand(60, generator=torch.Generator().manual_seed(2)) + 0.1
    shapes = shapes_with(random_boxes(60, 0), image, edge)
    kept, scores = rank_shapes(shapes, 4, settings)
    expected = by_loop(shapes, 4, settings)
    assert kept.tolist() == list(expected)
    assert scores[kept].tolist() == pytest.approx(list(expected.values()), rel=1e-4)
    assert int((scores > 0).sum()) == len(kept)


def test_the_encoder_decides_between_equal_shapes():
    shapes = shapes_with([[2, 2, 8, 8], [20, 10, 26, 16]], [0, 0])
    level = torch.zeros(1, 3, 10, 15)
    level[:, 0] = 1.0
    for box, first in ((0, (slice(1, 4), slice(1, 4))), (1, (slice(5, 8), slice(10, 13)))):
        seen = level.clone()
        seen[:, 1, *first] = 2.0
        kept, _ = rank_shapes(shapes, 1, LevelSets(), {32: seen, 16: seen})
        assert kept[0] == box
    kept, scores = rank_shapes(shapes, 1, LevelSets())
    assert scores[0] == scores[1]


def test_no_shapes_give_no_boxes():
    shapes = shapes_with([], [])
    kept, scores = rank_shapes(shapes, 2, LevelSets())
    assert len(kept) == len(scores) == 0
    regions = shapes_to_regions(shapes, kept, scores, {(16, 3): None}, torch.ones(2, 5, 2, 3), [(40, 60), (40, 60)])
    assert [len(own) for own in regions] == [0, 0]
    assert regions[0].features.shape == (0, 5)


def test_regions_have_pixels_origin_and_the_average_of_the_map():
    boxes = [[0, 0, 10, 10], [12, 2, 20, 18], [3, 3, 9, 9]]
    shapes = shapes_with(boxes, [0, 0, 2])
    last_map = torch.rand(3, 5, 2, 3, generator=torch.Generator().manual_seed(3))
    scores = torch.tensor([0.5, 0.7, 0.9])
    labels = {(32, 2): None, (16, 2): None}
    regions = shapes_to_regions(
        shapes, torch.tensor([1, 0, 2]), scores, labels, last_map, [(40, 60), (20, 30), (200, 30)]
    )
    assert [len(own) for own in regions] == [2, 0, 1]
    assert regions[0].boxes_xyxy.tolist() == [[24, 4, 40, 36], [0, 0, 20, 20]]
    assert regions[2].boxes_xyxy.tolist() == [[3, 30, 9, 90]]
    assert regions[0].area.tolist() == [8 * 16 * 4, 400]
    assert regions[0].score.tolist() == pytest.approx([0.7, 0.5])
    assert list(zip(regions[0].stride, regions[0].k, regions[0].cluster, strict=True)) == [(32, 2, 1), (32, 2, 0)]
    assert (regions[2].stride[0], regions[2].k[0], regions[2].cluster[0]) == (16, 2, 0)
    fine = functional.interpolate(last_map, (20, 30), mode="nearest")
    expected = fine[0, :, 2:18, 12:20].mean(dim=(1, 2))
    np.testing.assert_allclose(regions[0].features[0], expected.numpy(), atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Contrast of boxes against sums over single pixels, and against cases worked out by hand.


GRID = (32, 48)


def by_pixels(box, level):
    """The same for one box, on a map repeated 8 times; exact for boxes whose sides and margins are whole pixels."""
    fine = functional.interpolate(level[None], scale_factor=8, mode="nearest")[0]
    step = fine.shape[2] / GRID[1]
    x0, y0, x1, y1 = (round(value * step) for value in box)
    right, down = (max((high - low) // 2, 8) for low, high in ((x0, x1), (y0, y1)))
    inside = torch.zeros(fine.shape[1:], dtype=torch.bool)
    inside[y0:y1, x0:x1] = True
    around = torch.zeros_like(inside)
    around[max(y0 - down, 0) : y1 + down, max(x0 - right, 0) : x1 + right] = True
    around &= ~inside
    spread = (level - level.mean(dim=(1, 2), keepdim=True)).square().sum(dim=0).mean().sqrt()
    within, outside = fine[:, inside].mean(dim=1), fine[:, around].mean(dim=1)
    mean = level.mean(dim=(1, 2))
    cosine = functional.cosine_similarity(within - mean, outside - mean, dim=0)
    return float((within - outside).norm() / spread), float(1 - cosine)


def test_contrast_equals_sums_over_pixels():
    level = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    boxes = [[0, 0, 8, 8], [10, 4, 14, 10], [30, 20, 48, 32], [3, 3, 29, 27], [17, 9, 19, 11], [4, 0, 44, 32]]
    image = torch.tensor([0, 1, 1, 0, 1, 0])
    found = feature_contrast(torch.tensor(boxes).float(), image, level, GRID)
    expected = [by_pixels(box, level[index]) for box, index in zip(boxes, image.tolist(), strict=True)]
    for values, own in zip(found, zip(*expected, strict=True), strict=True):
        assert values.tolist() == pytest.approx(own, rel=1e-4)


def test_an_object_stands_out_and_its_part_does_not():
    level = torch.zeros(1, 3, 8, 12)
    level[:, 0] = 1.0
    level[:, :, 2:4, 4:6] = torch.tensor([0.0, 1.0, 0.0])[None, :, None, None]
    whole, part, ground = [16, 8, 24, 16], [18, 10, 20, 12], [32, 20, 40, 28]
    found, angle = feature_contrast(torch.tensor([whole, part, ground]).float(), torch.zeros(3).long(), level, GRID)
    assert found[0] > 2 and found[1] < found[0] / 2 and found[2] < 1e-6
    assert angle[0] > 1.9 and angle[1] < angle[0] and angle[2] < 1e-6


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_no_unit_and_no_place(scale):
    level = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    box, image = torch.tensor([[8.0, 8.0, 24.0, 24.0]]), torch.zeros(1).long()
    torch.testing.assert_close(
        feature_contrast(box, image, level * scale + 3 * scale, GRID),
        feature_contrast(box, image, level, GRID),
        rtol=1e-4,
        atol=0,
    )


def test_neither_surroundings_nor_differences_give_nothing():
    level = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    whole, image = torch.tensor([[0.0, 0.0, 48.0, 32.0]]), torch.zeros(1).long()
    assert torch.stack(feature_contrast(whole, image, level, GRID)).tolist() == [[0], [0]]
    box = torch.tensor([[8.0, 8.0, 24.0, 24.0]])
    flat = torch.full((1, 4, 4, 6), 0.3)
    assert torch.stack(feature_contrast(box, image, flat, GRID)).tolist() == [[0], [0]]
    assert feature_contrast(box[:0], image[:0], level, GRID)[0].shape == (0,)

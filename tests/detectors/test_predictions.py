"""Post-processing with crafted logits."""

from __future__ import annotations

import pytest
import torch

from simdetr.boxes import normalise, pairwise_iou
from simdetr.detectors import best_per_query, postprocess
from simdetr.detectors.predictions import distinct_points, findings


def crafted():
    """One image, two queries, three classes; query 1 scores best with class 2 and third with class 0."""
    logits = torch.tensor([[[-4.0, 1.0, -3.0], [0.5, -5.0, 2.0]]])
    boxes_xyxy = torch.tensor([[10.0, 20.0, 110.0, 60.0], [0.0, 0.0, 200.0, 100.0]])
    return {"pred_logits": logits, "pred_boxes": normalise(boxes_xyxy, (100, 200))[None]}, boxes_xyxy


def test_a_query_can_appear_with_two_labels():
    outputs, boxes_xyxy = crafted()
    found = postprocess(outputs, torch.tensor([[100, 200]]), top_k=3)[0]
    torch.testing.assert_close(found["scores"], torch.tensor([2.0, 1.0, 0.5]).sigmoid())
    assert found["labels"].tolist() == [2, 1, 0]
    torch.testing.assert_close(found["boxes_xyxy"], boxes_xyxy[[1, 0, 1]])


def test_boxes_are_scaled_to_each_image():
    outputs, boxes_xyxy = crafted()
    twice = {name: tensor.expand(2, -1, -1) for name, tensor in outputs.items()}
    small, large = postprocess(twice, [(100, 200), (300, 400)], top_k=1)
    torch.testing.assert_close(small["boxes_xyxy"], boxes_xyxy[1:])
    torch.testing.assert_close(large["boxes_xyxy"], torch.tensor([[0.0, 0.0, 400.0, 300.0]]))


def test_never_more_than_there_are():
    outputs, _ = crafted()
    found = postprocess(outputs, [(100, 200)])[0]
    assert found["scores"].shape == (6,) and found["labels"].shape == (6,) and found["boxes_xyxy"].shape == (6, 4)
    assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)


def test_results_carry_no_gradient_and_are_float32():
    outputs, _ = crafted()
    outputs = {name: tensor.bfloat16().requires_grad_() for name, tensor in outputs.items()}
    found = postprocess(outputs, [(100, 200)])[0]
    assert not found["scores"].requires_grad and found["boxes_xyxy"].dtype == found["scores"].dtype == torch.float32


def test_wrong_arguments():
    outputs, _ = crafted()
    with pytest.raises(ValueError, match="orig_sizes has 2 rows, but outputs has 1 images"):
        postprocess(outputs, [(1, 1), (2, 2)])
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        postprocess(outputs, [(1, 1)], top_k=0)


def test_points_come_with_their_query_and_with_the_heads_classes():
    outputs, _ = crafted()
    points, own = torch.tensor([[[0.1, 0.2], [0.9, 0.5]]]), outputs["pred_logits"].flip(1)
    found = postprocess({**outputs, "pred_points": points, "point_logits": own}, [(100, 200)], top_k=3)[0]
    # the logits of both queries have changed places, so the best is now query 0 with class 2
    torch.testing.assert_close(found["scores"], torch.tensor([2.0, 1.0, 0.5]).sigmoid())
    assert found["labels"].tolist() == [2, 1, 0]
    torch.testing.assert_close(found["points"], torch.tensor([[20.0, 20.0], [180.0, 50.0], [20.0, 20.0]]))
    assert "points" not in postprocess(outputs, [(100, 200)])[0]


def test_each_query_once_with_its_best_class():
    outputs, boxes_xyxy = crafted()
    found = best_per_query(outputs, [(100, 200)])[0]
    torch.testing.assert_close(found["scores"], torch.tensor([2.0, 1.0]).sigmoid())
    assert (found["labels"].tolist(), found["queries"].tolist()) == ([2, 1], [1, 0])
    torch.testing.assert_close(found["boxes_xyxy"], boxes_xyxy[[1, 0]])
    both = findings(outputs, [(100, 200)], top_k=3)[0]
    assert both.detections["queries"].tolist() == [1, 0, 1] and both.objects["queries"].tolist() == [1, 0]


@pytest.mark.parametrize("reading", [postprocess, best_per_query])
def test_boxes_are_cut_to_the_image_and_those_outside_are_none(reading):
    boxes_xyxy = torch.tensor([[-10.0, 20.0, 110.0, 160.0], [-30.0, 0.0, -5.0, 50.0], [0.0, 0.0, torch.nan, 5.0]])
    outputs = {
        "pred_logits": torch.tensor([[[0.0], [5.0], [9.0]]]),
        "pred_boxes": normalise(boxes_xyxy, (100, 200))[None],
    }
    found = reading(outputs, [(100, 200)], top_k=1)[0]
    assert found["queries"].tolist() == [0]  # the others do not take its place
    torch.testing.assert_close(found["boxes_xyxy"], torch.tensor([[0.0, 20.0, 110.0, 100.0]]))


def test_logits_that_are_not_numbers_are_no_detections():
    outputs, _ = crafted()
    logits = outputs["pred_logits"].clone()
    logits[0, 1] = torch.nan
    for reading in (postprocess, best_per_query):
        assert set(reading(outputs | {"pred_logits": logits}, [(100, 200)])[0]["queries"].tolist()) == {0}


def test_boxes_suppress_those_of_their_class_or_any():
    """Two boxes that overlap by 0.8, the second of both classes."""
    boxes_xyxy = torch.tensor([[0.0, 0.0, 100.0, 50.0], [0.0, 0.0, 80.0, 50.0]])
    logits = torch.tensor([[[3.0, -torch.inf], [2.0, 1.0]]])
    outputs = {"pred_logits": logits, "pred_boxes": normalise(boxes_xyxy, (100, 200))[None]}

    def kept(reading, **options):
        found = reading(outputs, [(100, 200)], **options)[0]
        return list(zip(found["queries"].tolist(), found["labels"].tolist(), strict=True))

    assert kept(postprocess) == [(0, 0), (1, 0), (1, 1)]
    assert kept(postprocess, iou_threshold=0.7) == [(0, 0), (1, 1)]
    assert kept(postprocess, iou_threshold=0.9) == [(0, 0), (1, 0), (1, 1)]
    assert kept(best_per_query) == [(0, 0), (1, 0)]
    assert kept(best_per_query, iou_threshold=0.7) == [(0, 0)]
    assert kept(postprocess, min_score=0.8) == [(0, 0), (1, 0)]  # 0.95, 0.88; 0.73 goes


@pytest.mark.parametrize("seed", range(3))
def test_overlaps_by_a_plain_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(40, 2, generator=generator) * 50
    boxes = torch.cat((corners, corners + 10 + torch.rand(40, 2, generator=generator) * 40), dim=1)
    logits = torch.randn(40, 3, generator=generator)
    left = sorted(((float(logits[q, c]), q, c) for q in range(40) for c in range(3)), reverse=True)
    overlaps, expected = pairwise_iou(boxes, boxes), []
    while left:
        best = left.pop(0)
        expected.append(best[1:])
        left = [row for row in left if row[2] != best[2] or overlaps[row[1], best[1]] <= 0.5]
    outputs = {"pred_logits": logits[None], "pred_boxes": normalise(boxes, (100, 100))[None]}
    found = postprocess(outputs, [(100, 100)], top_k=20, iou_threshold=0.5)[0]
    assert len(expected) > 20
    assert list(zip(found["queries"].tolist(), found["labels"].tolist(), strict=True)) == expected[:20]


@pytest.mark.parametrize("reading", [postprocess, best_per_query])
def test_places_of_landmarks_do_not_depend_on_the_threshold(reading):
    """A grid of 2 × 4 subregions of 100 × 100 px: the second point repeats the first, the third is another landmark."""
    points = torch.tensor([[[0.25, 0.5], [0.29, 0.5], [0.45, 0.5]]])
    outputs = {
        "pred_logits": torch.tensor([[[2.0], [-1.0], [0.0]]]),
        "pred_boxes": torch.cat((points, torch.zeros_like(points)), dim=2),
        "pred_points": points,
        "point_cells": torch.tensor([[0.25, 0.5]]),
    }
    for min_score in (0.0, 0.4):
        found = reading(outputs, [(200, 400)], min_score=min_score)[0]
        torch.testing.assert_close(found["points"], torch.tensor([[100.0, 100.0], [180.0, 100.0]]))
    every = reading(outputs, [(200, 400)], point_radius=0.0)[0]
    assert every["queries"].tolist() == [0, 2, 1]
    del outputs["point_cells"]  # as of queries
    assert reading(outputs, [(200, 400)])[0]["queries"].tolist() == [0, 2, 1]


# ----------------------------------------------------------------------------------------------------------------------
# Several predictions of one landmark: by hand, against a plain loop, and what must not move or merge.


SIZE = (720, 1280)
DIAGONAL = (720**2 + 1280**2) ** 0.5


def of_class_0(*places):
    return torch.tensor(places), torch.zeros(len(places), dtype=torch.int64)


def test_the_less_confident_of_a_class_goes():
    points = torch.tensor([[10.0, 12.0], [14.0, 13.0], [50.0, 50.0], [10.0, 10.0]])  # best first
    classes = torch.tensor([2, 1, 1, 1])
    assert distinct_points(points, classes, SIZE, 5.01 / DIAGONAL).tolist() == [0, 1, 2]  # 3 is 5 px away from 1
    assert distinct_points(points, classes, SIZE, 4.99 / DIAGONAL).tolist() == [0, 1, 2, 3]


def test_two_lights_35_px_apart_are_two():
    points, classes = of_class_0([600.0, 300.0], [635.0, 300.0])
    assert distinct_points(points, classes, SIZE).tolist() == [0, 1]
    assert distinct_points(points, classes, SIZE, cells=torch.tensor([1280 / 24, 720 / 12])).tolist() == [0, 1]
    assert distinct_points(points, classes, SIZE, 0.03).tolist() == [0]  # only if asked for


def test_a_grid_repeats_itself_within_half_a_subregion():
    cells = torch.tensor([40.0, 20.0])
    points, classes = of_class_0([100.0, 100.0], [119.0, 100.0], [121.0, 100.0], [100.0, 109.0], [100.0, 111.0])
    assert distinct_points(points, classes, SIZE, cells=cells).tolist() == [0, 2, 4]
    assert distinct_points(points, classes, SIZE, 0.0, cells).tolist() == [0, 1, 2, 3, 4]
    assert distinct_points(points, torch.arange(5), SIZE, cells=cells).tolist() == [0, 1, 2, 3, 4]


def test_a_chain_is_not_one_landmark():
    """Each is near the next, but only what is near one that stays goes."""
    points, classes = of_class_0([0.0, 0.0], [8.0, 0.0], [4.0, 0.0])
    assert distinct_points(points, classes, SIZE, 5 / DIAGONAL).tolist() == [0, 1]


def test_the_unsure_change_nothing_for_the_others():
    generator = torch.Generator().manual_seed(0)
    points = 100 * torch.rand(60, 2, generator=generator)
    classes = torch.randint(0, 2, (60,), generator=generator)
    every = distinct_points(points, classes, SIZE, 15 / DIAGONAL).tolist()
    for count in range(0, 60, 7):
        found = distinct_points(points[:count], classes[:count], SIZE, 15 / DIAGONAL).tolist()
        assert found == [index for index in every if index < count]


def test_without_landmarks_and_with_a_wrong_radius():
    nothing = distinct_points(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), SIZE, 0.03)
    assert nothing.shape == (0,) and nothing.dtype == torch.int64
    with pytest.raises(ValueError, match=r"point_radius: expected None, 0 or .* got -1"):
        distinct_points(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), SIZE, -1)


@pytest.mark.parametrize("seed", range(5))
def test_by_a_plain_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    points = 100 * torch.rand(60, 2, generator=generator)
    classes = torch.randint(0, 3, (60,), generator=generator)
    left, expected = list(range(60)), []
    while left:
        best = left[0]
        expected.append(best)
        left = [i for i in left if classes[i] != classes[best] or (points[i] - points[best]).norm() > 20]
    assert 3 < len(expected) < 60
    assert distinct_points(points, classes, SIZE, 20 / DIAGONAL).tolist() == expected

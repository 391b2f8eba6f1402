"""Box arithmetic against torchvision, scalar re-derivations and hand-drawn cases."""

import pytest
import torch
import torchvision.ops as ops

from simdetr import boxes


def random_xyxy(count, seed):
    generator = torch.Generator().manual_seed(seed)
    corner, size = (torch.rand(count, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return torch.cat((corner, corner + size + 0.01), dim=1)


@pytest.mark.parametrize(
    ("function", "source", "wanted"),
    [
        (boxes.xyxy_to_cxcywh, "xyxy", "cxcywh"),
        (boxes.cxcywh_to_xyxy, "cxcywh", "xyxy"),
        (boxes.xyxy_to_xywh, "xyxy", "xywh"),
        (boxes.xywh_to_xyxy, "xywh", "xyxy"),
    ],
)
def test_formats_match_torchvision(function, source, wanted):
    values = random_xyxy(50, seed=0)
    torch.testing.assert_close(function(values), ops.box_convert(values, source, wanted), rtol=0, atol=0)
    # leading dimensions are free
    torch.testing.assert_close(function(values.view(5, 10, 4)).view(50, 4), function(values), rtol=0, atol=0)


def test_formats_by_hand():
    xyxy = torch.tensor([[10.0, 20.0, 40.0, 60.0]])
    assert boxes.xyxy_to_cxcywh(xyxy).tolist() == [[25.0, 40.0, 30.0, 40.0]]
    assert boxes.xyxy_to_xywh(xyxy).tolist() == [[10.0, 20.0, 30.0, 40.0]]
    assert boxes.area(xyxy).tolist() == [1200.0]


def test_round_trips():
    xyxy = random_xyxy(100, seed=1)
    torch.testing.assert_close(boxes.cxcywh_to_xyxy(boxes.xyxy_to_cxcywh(xyxy)), xyxy)
    torch.testing.assert_close(boxes.xywh_to_xyxy(boxes.xyxy_to_xywh(xyxy)), xyxy)
    torch.testing.assert_close(boxes.denormalise(boxes.normalise(xyxy, (37, 91)), (37, 91)), xyxy)


def test_normalise_divides_x_by_width_and_y_by_height():
    result = boxes.normalise(torch.tensor([[0.0, 0.0, 100.0, 50.0]]), (200, 400))
    torch.testing.assert_close(result, torch.tensor([[0.125, 0.125, 0.25, 0.25]]))
    torch.testing.assert_close(boxes.denormalise(result, (200, 400)), torch.tensor([[0.0, 0.0, 100.0, 50.0]]))


def test_overlaps_match_torchvision():
    a, b = random_xyxy(30, seed=2), random_xyxy(20, seed=3)
    torch.testing.assert_close(boxes.pairwise_iou(a, b), ops.box_iou(a, b))
    paired = boxes.paired_giou(a[:20], b)
    torch.testing.assert_close(paired, ops.generalized_box_iou(a[:20], b).diagonal())


def test_paired_iou_is_the_diagonal_of_all_pairs():
    a, b = random_xyxy(20, seed=6), random_xyxy(20, seed=7)
    torch.testing.assert_close(boxes.paired_iou(a, b), ops.box_iou(a, b).diagonal())
    inside = torch.tensor([[0.0, 0.0, 1.0, 0.25]])
    torch.testing.assert_close(boxes.paired_iou(inside, torch.tensor([[0.0, 0.0, 1.0, 1.0]])), torch.tensor([0.25]))
    assert torch.autograd.gradcheck(boxes.paired_iou, (a[:6].requires_grad_(), b[:6].requires_grad_()))


def test_batched_giou_is_torchvisions_of_every_set():
    first, second = random_xyxy(24, seed=3).view(2, 3, 4, 4), random_xyxy(10, seed=4).view(2, 5, 4)
    found = boxes.batched_giou(first.transpose(0, 1), second)
    assert found.shape == (3, 2, 4, 5)
    for row in range(3):
        for column in range(2):
            expected = ops.generalized_box_iou(first[column, row], second[column])
            torch.testing.assert_close(found[row, column], expected)


def test_giou_by_hand():
    unit = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    others = torch.tensor([[0.0, 0.0, 1.0, 1.0], [2.0, 0.0, 3.0, 1.0], [0.25, 0.25, 0.75, 0.75]])
    expected = torch.tensor([1.0, -1.0 / 3.0, 0.25])
    torch.testing.assert_close(boxes.paired_giou(unit.expand(3, -1), others), expected)


def test_paired_giou_passes_gradcheck():
    a = random_xyxy(6, seed=4).requires_grad_()
    b = random_xyxy(6, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(boxes.paired_giou, (a, b))


def test_iou_of_empty_boxes_is_zero():
    nothing = torch.zeros(1, 4)
    assert boxes.pairwise_iou(nothing, nothing).tolist() == [[0.0]]
    assert boxes.pairwise_iou(torch.zeros(0, 4), nothing).shape == (0, 1)


def test_clip_and_has_area():
    clipped = boxes.clip(torch.tensor([[-5.0, -5.0, 20.0, 30.0], [50.0, 2.0, 60.0, 9.0]]), (25, 15))
    assert clipped.tolist() == [[0.0, 0.0, 15.0, 25.0], [15.0, 2.0, 15.0, 9.0]]
    assert boxes.has_area(clipped).tolist() == [True, False]
    odd = torch.tensor([[0.0, 0.0, float("nan"), 5.0], [0.0, 0.0, 3.0, 3.0], [4.0, 0.0, 1.0, 5.0]])
    assert boxes.has_area(odd).tolist() == [False, True, False]
    assert boxes.has_area(odd, min_side=3.0).tolist() == [False, False, False]


def test_suppress_overlaps_keeps_the_confident_one():
    three = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [20.0, 20.0, 30.0, 30.0]])
    scores = torch.tensor([0.3, 0.8, 0.5])
    assert boxes.suppress_overlaps(three, scores, 0.55).tolist() == [1, 2]
    assert boxes.suppress_overlaps(three, scores, 0.95).tolist() == [1, 2, 0]

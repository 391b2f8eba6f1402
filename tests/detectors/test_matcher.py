"""The matcher against brute force and scalar costs (specification T13)."""

import itertools
import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import generalized_box_iou

from simdetr.boxes import cxcywh_to_xyxy
from simdetr.detectors.matcher import HungarianMatcher, focal_class_cost, pad_targets


def random_case(seed, layers=1, batch=1, queries=5, classes=4, counts=(3,)):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, batch, queries, classes, generator=generator, dtype=torch.float64) * 2
    boxes = torch.rand(layers, batch, queries, 4, generator=generator, dtype=torch.float64) * 0.5 + 0.1
    targets = [
        {
            "labels": torch.randint(classes, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.5 + 0.1,
        }
        for count in counts
    ]
    return logits, boxes, targets


def scalar_cost(logit, box, wanted):
    p = 1 / (1 + math.exp(-logit))
    positive = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8)
    negative = 0.75 * p**2 * -math.log(1 - p + 1e-8)
    distance = sum(abs(a - b) for a, b in zip(box.tolist(), wanted.tolist(), strict=True))
    giou = generalized_box_iou(cxcywh_to_xyxy(box[None]), cxcywh_to_xyxy(wanted[None].double())).item()
    return 2 * (positive - negative) + 5 * distance - 2 * giou


def test_cost_terms_match_scalars():
    logits, boxes, targets = random_case(0, layers=2, batch=2, counts=(3, 2))
    costs = HungarianMatcher().costs(logits, boxes, targets)
    assert costs.shape == (2, 2, 5, 3)
    for layer, image, query in itertools.product(range(2), range(2), range(5)):
        for index, (label, box) in enumerate(zip(*targets[image].values(), strict=True)):
            expected = scalar_cost(logits[layer, image, query, label].item(), boxes[layer, image, query], box)
            assert costs[layer, image, query, index].item() == pytest.approx(expected, abs=1e-6)


def test_focal_cost_of_an_even_chance():
    # 0.25 · 0.25 · ln 2 − 0.75 · 0.25 · ln 2
    assert focal_class_cost(torch.zeros(1)).item() == pytest.approx(-0.125 * math.log(2), abs=1e-6)


@pytest.mark.parametrize(("queries", "count"), [(6, 4), (4, 4), (3, 4), (5, 1)])
def test_equals_brute_force(queries, count):
    matcher = HungarianMatcher()
    for seed in range(50):
        logits, boxes, targets = random_case(seed, queries=queries, counts=(count,))
        cost = matcher.costs(logits, boxes, targets)[0, 0]
        query, target = matcher(logits[0], boxes[0], targets)[0]
        assert len(query) == min(queries, count)
        if queries >= count:
            best = min(
                sum(cost[q, t].item() for t, q in enumerate(chosen))
                for chosen in itertools.permutations(range(queries), count)
            )
        else:
            best = min(
                sum(cost[q, t].item() for q, t in enumerate(chosen))
                for chosen in itertools.permutations(range(count), queries)
            )
        assert cost[query, target].sum().item() == pytest.approx(best, abs=1e-6)


def test_images_are_matched_on_their_own():
    logits, boxes, targets = random_case(1, batch=3, queries=6, counts=(2, 0, 5))
    matcher = HungarianMatcher()
    together = matcher(logits[0], boxes[0], targets)
    assert [len(query) for query, _ in together] == [2, 0, 5]
    for image in range(3):
        alone = matcher(logits[0, image : image + 1], boxes[0, image : image + 1], targets[image : image + 1])[0]
        assert torch.equal(together[image][0], alone[0]) and torch.equal(together[image][1], alone[1])
    query, target = together[2]
    assert query.dtype == target.dtype == torch.int64
    assert sorted(target.tolist()) == [0, 1, 2, 3, 4] and len(set(query.tolist())) == 5


def test_layers_of_different_size_are_solved_in_one_call():
    matcher = HungarianMatcher()
    logits, boxes, targets = random_case(2, layers=3, batch=2, queries=6, counts=(2, 4))
    many_logits, many_boxes, _ = random_case(3, layers=1, batch=2, queries=40, counts=(0, 0))
    costs = [matcher.costs(logits, boxes, targets), matcher.costs(many_logits, many_boxes, targets)]
    decoder, encoder = matcher.assign(costs, [2, 4])
    assert decoder.query.shape == (3, 6) and encoder.query.shape == (1, 6)
    assert decoder.image[0].tolist() == [0, 0, 1, 1, 1, 1]
    for layer in range(3):
        alone = matcher(logits[layer], boxes[layer], targets)
        assert torch.equal(decoder.query[layer], torch.cat([query for query, _ in alone]))
        assert torch.equal(decoder.target[layer], torch.cat([target for _, target in alone]))


def test_no_targets_at_all():
    logits, boxes, targets = random_case(4, batch=2, counts=(0, 0))
    assert [len(query) for query, _ in HungarianMatcher()(logits[0], boxes[0], targets)] == [0, 0]


def test_broken_predictions_are_matched_last():
    logits, boxes, targets = random_case(5, queries=4, counts=(3,))
    boxes[0, 0, 1] = float("nan")
    query, _ = HungarianMatcher()(logits[0], boxes[0], targets)[0]
    assert query.tolist() == [0, 2, 3]


def test_identical_predictions_take_the_targets():
    _, _, targets = random_case(6, counts=(4,))
    boxes = targets[0]["boxes"].flip(0)[None]
    logits = torch.zeros(1, 4, 4)
    query, target = HungarianMatcher()(logits, boxes, targets)[0]
    assert query.tolist() == [0, 1, 2, 3] and target.tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("classes", [7, 300])
def test_assignments_of_the_usual_formulation(classes):
    """Layer by layer and image by image, from the probabilities of all classes, by torchvision and scipy."""
    counts = (5, 0, 12)
    logits, boxes, targets = random_case(7, layers=3, batch=3, queries=20, classes=classes, counts=counts)
    matcher = HungarianMatcher()
    found = matcher.assign([matcher.costs(logits, boxes, targets)], counts)[0]
    for layer in range(3):
        expected = []
        for image, target in enumerate(targets):
            p = logits[layer, image].sigmoid()
            focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
            wanted = target["boxes"].double()
            giou = generalized_box_iou(cxcywh_to_xyxy(boxes[layer, image]), cxcywh_to_xyxy(wanted))
            cost = 2 * focal[:, target["labels"]] + 5 * torch.cdist(boxes[layer, image], wanted, p=1) - 2 * giou
            rows, columns = linear_sum_assignment(cost)
            expected += [(image, *pair) for pair in zip(rows.tolist(), columns.tolist(), strict=True)]
        assert torch.stack(found, dim=-1)[layer].tolist() == [list(row) for row in expected]


def test_padding_of_targets_does_no_harm():
    """A query without size at the place of the padding's point: nothing is divided by zero."""
    logits, boxes, targets = random_case(8, batch=2, counts=(1, 3))
    boxes[0, 0, 0] = torch.tensor([0.5, 0.5, 1e-9, 1e-9])
    labels, padded = pad_targets(targets)
    assert labels.tolist() == [[targets[0]["labels"].item(), 0, 0], targets[1]["labels"].tolist()]
    assert torch.equal(padded[0, 0], targets[0]["boxes"][0]) and torch.equal(padded[1], targets[1]["boxes"])
    assert (padded[0, 1:] == 0.5).all()
    assert torch.isfinite(HungarianMatcher().costs(logits, boxes, targets)).all()


def test_weights_of_the_terms_matter():
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.9, 0.9, 0.1, 0.1]]])
    logits = torch.tensor([[[-5.0], [5.0]]])
    targets = [{"labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
    assert HungarianMatcher(0.0, 5.0, 2.0)(logits, boxes, targets)[0][0].tolist() == [0]
    assert HungarianMatcher(2.0, 0.0, 0.0)(logits, boxes, targets)[0][0].tolist() == [1]
    with pytest.raises(ValueError, match="all 0"):
        HungarianMatcher(0.0, 0.0, 0.0)

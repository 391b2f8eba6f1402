"""DETR's loss: against a brute-force matching and definitions written out."""

import itertools
import math

import pytest
import torch

from simdetr.boxes import cxcywh_to_xyxy, paired_giou, pairwise_giou
from simdetr.detectors.vidt import softmax_log_odds
from simdetr.detectors.vidt_losses import NeckFreeLoss


def make_case(queries=5, classes=3, counts=(2, 0, 1)):
    generator = torch.Generator().manual_seed(len(counts) + queries)
    logits = torch.randn(len(counts), queries, classes + 1, generator=generator) * 2
    boxes = torch.rand(len(counts), queries, 4, generator=generator) * 0.5 + 0.2
    targets = [
        {
            "labels": torch.randint(classes, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.5 + 0.2,
        }
        for count in counts
    ]
    return logits.requires_grad_(), boxes.requires_grad_(), targets


def outputs_of(logits, boxes):
    return {"pred_logits": softmax_log_odds(logits), "pred_boxes": boxes}


def cheapest(logits, boxes, target):
    """Query of each target by trying all assignments."""
    probability = logits.softmax(-1)
    cost = 5 * torch.cdist(boxes, target["boxes"], p=1) - 2 * probability[:, target["labels"]]
    cost = cost - 2 * pairwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target["boxes"]))
    ways = itertools.permutations(range(len(boxes)), len(target["labels"]))
    return list(min(ways, key=lambda way: sum(float(cost[query, index]) for index, query in enumerate(way))))


@pytest.mark.parametrize("counts", [(2, 0, 1), (3,), (4, 4), (5,)])
def test_terms_by_hand(counts):
    logits, boxes, targets = make_case(counts=counts)
    found = NeckFreeLoss()(logits, outputs_of(logits, boxes), targets)
    with torch.no_grad():
        weighted, weights, l1, giou = 0.0, 0.0, 0.0, 0.0
        for image, target in enumerate(targets):
            wanted = [3] * 5
            for index, query in enumerate(cheapest(logits[image], boxes[image], target)):
                wanted[query] = int(target["labels"][index])
                l1 += float((boxes[image, query] - target["boxes"][index]).abs().sum())
                pair = (cxcywh_to_xyxy(side[None]) for side in (boxes[image, query], target["boxes"][index]))
                giou += 1 - float(paired_giou(*pair))
            for query, label in enumerate(wanted):
                weight = 0.1 if label == 3 else 1.0
                weighted -= weight * math.log(float(logits[image, query].softmax(-1)[label]))
                weights += weight
    objects = sum(counts)
    assert found["loss_ce"].item() == pytest.approx(weighted / weights, rel=1e-5)
    assert found["loss_bbox"].item() == pytest.approx(l1 / objects, rel=1e-5)
    assert found["loss_giou"].item() == pytest.approx(giou / objects, rel=1e-5)
    total = weighted / weights + 5 * l1 / objects + 2 * giou / objects
    assert found["loss"].item() == pytest.approx(total, rel=1e-5)


def test_nothing_to_find():
    logits, boxes, targets = make_case(counts=(0, 0))
    found = NeckFreeLoss()(logits, outputs_of(logits, boxes), targets)
    found["loss"].backward()
    assert found["loss_bbox"] == found["loss_giou"] == 0
    torch.testing.assert_close(found["loss"], -logits.log_softmax(-1)[..., -1].mean())
    assert boxes.grad is not None and boxes.grad.abs().sum() == 0 and logits.grad.abs().sum() > 0


def test_broken_predictions_reach_the_loss():
    logits, boxes, targets = make_case()
    with torch.no_grad():
        logits[0, 1, 2] = torch.nan
    assert torch.isnan(NeckFreeLoss()(logits, outputs_of(logits, boxes), targets)["loss"])


def test_the_class_for_no_object_is_no_label():
    logits, boxes, targets = make_case()
    targets[0]["labels"][0] = 3
    with pytest.raises(ValueError, match="num_classes=3"):
        NeckFreeLoss()(logits, outputs_of(logits, boxes), targets)

"""Landmarks by query: matching against all permutations, losses against sums over plain loops, every option matters."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from simdetr.boxes import cxcywh_to_xyxy, paired_giou
from simdetr.detectors.detector import Features, FeatureSizes, Level, Queries
from simdetr.detectors.matcher import HungarianMatcher
from simdetr.heads import LandmarkHead
from simdetr.heads.landmark_losses import LandmarkRule, background_loss, landmark_losses, point_error, record_logits
from simdetr.heads.landmark_queries import QueryOutputs
from simdetr.heads.landmark_targets import LandmarkTargets

CLASSES, WIDTH = 3, 16


def features_of(predictions=2, queries=6, images=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(images, queries, *shape, generator=generator, dtype=dtype)

    level = Level(torch.zeros(images, 4, 8, 10, dtype=dtype), 8, torch.zeros(images, 8, 10, dtype=torch.bool))
    lists = [[2 * rand(size) - 1 for _ in range(predictions)] for size in (WIDTH, 2, CLASSES, 4)]
    states, references, logits, boxes = lists
    references = [0.5 + 0.4 * place for place in references]
    return Features([level], Queries(states, references, logits, [0.2 + 0.3 * (box + 1) / 2 for box in boxes]), [])


def targets_of(counts=(3, 1), seed=1):
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for count in counts:
        boxes = 0.2 + 0.3 * torch.rand(count, 4, generator=generator)
        targets.append(
            {
                "labels": torch.randint(0, CLASSES, (count,), generator=generator),
                "boxes": boxes,
                "points": cxcywh_to_xyxy(boxes)[:, 2:],
            }
        )
    return targets


def head_of(predictions=2, shake=True, **options):
    torch.manual_seed(0)
    head = LandmarkHead(FeatureSizes(CLASSES, (4,), (8,), WIDTH, predictions), **options)
    if shake:
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return head


def test_points_start_at_the_references():
    head, features = head_of(shake=False), features_of()
    outputs = head(features)
    torch.testing.assert_close(outputs.points, torch.stack(features.queries.references))
    assert outputs.logits.shape == (2, 2, 6, CLASSES + 1)
    # most queries are no landmark, and no class is more likely than another
    probability = head_of(shake=False).variant.class_embed[0].bias.softmax(dim=0)
    torch.testing.assert_close(probability, torch.tensor([0.01 / 3] * 3 + [0.99]))


def test_points_are_moved_in_logits():
    head, features = head_of(), features_of()
    layers = head.variant.point_embed[1].layers
    states, reference = features.queries.states[1], features.queries.references[1]
    moves = layers[2](torch.relu(layers[1](torch.relu(layers[0](states)))))
    torch.testing.assert_close(head(features).points[1], torch.sigmoid(torch.logit(reference) + moves))


def test_each_prediction_has_weights_of_its_own_unless_shared():
    own, shared = head_of(), head_of(shared=True)
    assert len(own.variant.point_embed) == len(own.variant.class_embed) == 2
    assert len(shared.variant.point_embed) == len(shared.variant.class_embed) == 1
    features = features_of()
    same = features._replace(queries=Queries(*([side[0]] * 2 for side in features.queries)))
    first, second = own(same).points
    assert not torch.equal(first, second)
    first, second = shared(same).points
    assert torch.equal(first, second)
    # a detector may be set to use fewer layers in evaluation
    assert len(own(features_of(predictions=1)).points) == 1


def plain_cost(head, outputs, queries, target, place, own_classes):
    """Cost of one query and one landmark, by the definition; ``place`` is (prediction, image, query)."""
    label, box, point = target
    scores = outputs.logits[place].double()
    if own_classes:
        cost = -2 * scores.softmax(dim=0)[label]
    else:
        p = scores[label].sigmoid()
        cost = 2 * (-0.25 * (1 - p) ** 2 * (p + 1e-8).log() + 0.75 * p**2 * (1 - p + 1e-8).log())
    if not point.isnan().any():
        cost = cost + 5 * (outputs.points[place] - point).abs().sum()
    if head.variant.match_boxes and (box[2:] > 0).all():
        own = queries.boxes[place[0]][place[1:]]
        overlap = paired_giou(cxcywh_to_xyxy(own[None]), cxcywh_to_xyxy(box[None]))[0]
        cost = cost + 5 * (own - box).abs().sum() - 2 * overlap
    return float(cost)


@pytest.mark.parametrize("class_weight", ["softmax", "sigmoid"])
@pytest.mark.parametrize("match_boxes", [True, False])
@torch.no_grad()
def test_matching_is_the_cheapest_of_all_permutations(class_weight, match_boxes):
    head, features = head_of(class_weight=class_weight, match_boxes=match_boxes), features_of(queries=5)
    targets = targets_of((3, 2))
    targets[0]["points"][1] = math.nan
    targets[1]["boxes"][0, 2:] = 0.0
    outputs, wanted = head(features), LandmarkTargets.of(targets, torch.device("cpu"))
    costs = head.variant.costs(outputs, features.queries, wanted)
    matches = HungarianMatcher.assign([costs], wanted.counts)[0]
    for prediction, image in itertools.product(range(2), range(2)):
        rows = list(zip(*(targets[image][name] for name in ("labels", "boxes", "points")), strict=True))
        table = [
            [
                plain_cost(head, outputs, features.queries, row, (prediction, image, query), class_weight == "softmax")
                for row in rows
            ]
            for query in range(5)
        ]
        torch.testing.assert_close(costs[prediction, image, :, : len(rows)], torch.tensor(table), atol=1e-5, rtol=1e-5)
        orders = itertools.permutations(range(5), len(rows))
        least = min(sum(table[query][row] for row, query in enumerate(order)) for order in orders)
        of_image = matches.image[prediction] == image
        queries, rows_found = matches.query[prediction][of_image], matches.target[prediction][of_image]
        assert sorted(rows_found.tolist()) == list(range(len(rows))) and len(set(queries.tolist())) == len(rows)
        # equal ways are common: by L1, two points may change places
        found = sum(table[query][row] for query, row in zip(queries, rows_found, strict=True))
        assert found == pytest.approx(least)


def test_boxes_decide_where_points_do_not():
    """Two queries with the same class and point; only one has the landmark's box."""
    features = features_of(predictions=1, queries=2, images=1)
    boxes = torch.tensor([[[0.5, 0.5, 0.1, 0.1], [0.5, 0.5, 0.4, 0.4]]])
    points = torch.tensor([[[[0.5, 0.5]] * 2]])
    outputs = QueryOutputs(torch.zeros(1, 1, 2, CLASSES + 1), points)
    queries = features.queries._replace(boxes=[boxes])
    target = {"labels": torch.tensor([0]), "boxes": boxes[0, 1:], "points": torch.tensor([[0.5, 0.5]])}
    wanted = LandmarkTargets.of([target], torch.device("cpu"))
    with_boxes = head_of().variant.costs(outputs, queries, wanted)[0, 0, :, 0]
    assert with_boxes[1] < with_boxes[0]
    without = head_of(match_boxes=False).variant.costs(outputs, queries, wanted)[0, 0, :, 0]
    assert without[0] == without[1]


@pytest.mark.parametrize("class_weight", ["softmax", "sigmoid"])
@pytest.mark.parametrize("options", [{}, {"mode": "eq7", "unit": "cell"}, {"background_weight": 0.7, "unit": "pixel"}])
def test_every_prediction_learns_by_the_definition(class_weight, options):
    head, features, targets = head_of(class_weight=class_weight, **options), features_of(), targets_of()
    rule = LandmarkRule(options.get("mode", "eq4"), class_weight=class_weight, unit=options.get("unit", "cell"))
    units = torch.tensor({"fraction": [1, 1], "cell": [5, 4], "pixel": [80, 64]}[rule.unit])
    outputs = head(features)
    wanted = LandmarkTargets.of(targets, torch.device("cpu"))
    matches = HungarianMatcher.assign([head.variant.costs(outputs, features.queries, wanted)], wanted.counts)[0]
    total = torch.zeros(())
    for prediction, image, query in itertools.product(range(2), range(2), range(6)):
        scores = outputs.logits[prediction, image, query][None]
        of_it = (matches.image[prediction] == image) & (matches.query[prediction] == query)
        if not of_it.any():
            total = total + options.get("background_weight", 0.1) * background_loss(scores, rule)[0]
            continue
        index = int(matches.target[prediction][of_it])
        points = outputs.points[prediction, image, query] * units, targets[image]["points"][index] * units
        error = point_error(*points, rule.beta)[None]
        total = total + landmark_losses(scores, targets[image]["labels"][[index]], error, rule).total[0]
    losses = head.losses(outputs, features, targets)
    torch.testing.assert_close(losses.total, total / 4)  # landmarks
    torch.testing.assert_close(losses.total, losses.terms["loss_class"] + 0.5 * losses.terms["loss_point"])
    summed = head_of(class_weight=class_weight, reduction="sum", **options)
    torch.testing.assert_close(summed.losses(outputs, features, targets).total, total)


def test_sigmoid_classes_are_the_detectors():
    head, features = head_of(class_weight="sigmoid"), features_of()
    assert not [name for name, _ in head.named_parameters() if "class" in name]
    outputs = head(features)
    assert torch.equal(outputs.logits, torch.stack(features.queries.logits))
    assert set(head.predictions(outputs, features)) == {"pred_points"}


def test_predictions_are_the_last_ones():
    head, features = head_of(), features_of()
    outputs = head(features)
    found = head.predictions(outputs, features)
    assert torch.equal(found["pred_points"], outputs.points[-1])
    assert torch.equal(found["point_logits"], record_logits(outputs.logits[-1]))


def test_landmarks_without_point_learn_their_class_alone():
    head, features, targets = head_of(), features_of(), targets_of()
    for target in targets:
        target["points"] = torch.full_like(target["points"], math.nan)
    losses = head.losses(head(features), features, targets)
    assert losses.terms["loss_point"] == 0.0 and losses.total > 0
    losses.total.backward()
    assert not any(p.grad.any() for p in head.variant.point_embed.parameters())
    assert all(p.grad.any() for p in head.variant.class_embed.parameters())


def test_more_landmarks_than_queries():
    head, features = head_of(), features_of(queries=2)
    losses = head.losses(head(features), features, targets_of((5, 0)))
    assert losses.total.isfinite()


def test_a_broken_prediction_reaches_the_loss():
    head, features = head_of(), features_of()
    outputs = head(features)
    outputs.points[1, 0, 2] = math.nan
    assert head.losses(outputs, features, targets_of()).total.isnan()


def test_what_is_not_finite_or_of_another_width_is_named():
    features = features_of()
    features.queries.states[1][1, 4, 7] = math.inf
    with pytest.raises(ValueError, match=r"queries.states\[1\]: expected finite values, got inf at index \(1, 4, 7\)"):
        head_of()(features)
    features.queries.states[0] = torch.zeros(2, 6, WIDTH + 1)
    with pytest.raises(ValueError, match=r"queries.states\[0\]: expected \[B, Q, 16\], got \[2, 6, 17\]"):
        head_of()(features)


def test_the_whole_head_by_finite_differences():
    head, features = head_of().double(), features_of(queries=2, dtype=torch.float64)
    targets = targets_of((2, 1))

    def total(*states):
        bundle = features._replace(queries=features.queries._replace(states=list(states)))
        return head.losses(head(bundle), bundle, targets).total

    states = [values.clone().requires_grad_() for values in features.queries.states]
    assert torch.autograd.gradcheck(total, states)


def test_the_number_of_landmarks_is_that_of_all_processes(monkeypatch):
    head, features, targets = head_of(), features_of(), targets_of()
    alone = head.losses(head(features), features, targets).total
    monkeypatch.setattr("simdetr.heads.landmarks.global_mean_count", lambda count, device: torch.tensor(2.0 * count))
    torch.testing.assert_close(head.losses(head(features), features, targets).total, alone / 2)

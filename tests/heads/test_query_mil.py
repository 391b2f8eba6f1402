"""Queries that learn from image-level labels."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from simdetr.data.annotations import Category
from simdetr.data.images import open_images
from simdetr.detectors.detector import Features, FeatureSizes, Level, Queries
from simdetr.heads import HeadedBackbone, HeadedDetector, QueryMILHead
from simdetr.heads.localisation_losses import contrastive_attention_loss
from simdetr.training.relabel import InferenceSettings, detect

CLASSES, QUERIES = 3, 5
SIZES = FeatureSizes(CLASSES, (8, 8), (8, 16), 8, 2)
TARGETS = [{"labels": torch.tensor([0, 2, 2])}, {"labels": torch.tensor([1])}]
NO_LABELS = [{"labels": torch.empty(0, dtype=torch.int64)}] * 2


def make_head(**options):
    torch.manual_seed(0)
    return QueryMILHead(SIZES, **options).train()


def make_features(padded=0.0, sides=(4, 2)):
    generator = torch.Generator().manual_seed(0)
    levels = []
    for side, stride in zip(sides, (8, 16), strict=True):
        mask = torch.zeros(2, side, side, dtype=torch.bool)
        mask[1, :, side // 2 :] = True
        features = torch.randn(2, 8, side, side, generator=generator)
        levels.append(Level(features.masked_fill(mask[:, None], padded), stride, mask))
    logits = [3 * torch.randn(2, QUERIES, CLASSES, generator=generator) for _ in range(2)]
    boxes = [torch.rand(2, QUERIES, 4, generator=generator) for _ in range(2)]
    states = [torch.randn(2, QUERIES, 8, generator=generator) for _ in range(2)]
    return Features(levels, Queries(states, [box[..., :2] for box in boxes], logits, boxes), [])


def losses_of(head, features=None, targets=TARGETS):
    features = make_features() if features is None else features
    return head.losses(head(features), features, targets)


def test_image_logits_are_log_mean_exp_over_the_queries():
    features = make_features()
    found = make_head()(features).image_logits
    for layer, logits in zip(found, features.queries.logits, strict=True):
        torch.testing.assert_close(layer, logits.exp().mean(dim=1).log())
    same = features._replace(queries=features.queries._replace(logits=[torch.full((2, QUERIES, CLASSES), 1e3)]))
    torch.testing.assert_close(make_head()(same).image_logits, torch.full((1, 2, CLASSES), 1e3))


def test_losses():
    features = make_features()
    head = make_head(contrastive_weight=0.5, margin=2.0)
    found = losses_of(head, features)
    shown = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    each = [F.binary_cross_entropy_with_logits(x.exp().mean(1).log(), shown) for x in features.queries.logits]
    torch.testing.assert_close(found.terms["cls"], sum(each) / 2)
    torch.testing.assert_close(found.total, found.terms["cls"] + 0.5 * found.terms["ca"])
    assert 0 < found.terms["ca"] <= 4
    taps = [tap(level, embed=True) for tap, level in zip(head.attention, features.levels, strict=True)]
    expected = [contrastive_attention_loss(tap.embeddings, tap.usable, 2.0, "euclidean") for tap in taps]
    torch.testing.assert_close(found.terms["ca"], sum(expected) / 2)
    assert int(found.diagnostics["empty_masks"]) == sum(int((~tap.usable).sum()) for tap in taps)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("taps", [1]),
        ("contrastive_weight", 0.5),
        ("margin", 1.0),
        ("distance", "cosine"),
        ("foreground_threshold", 0.5),
        ("background_threshold", 0.5),
        ("embedding_size", 16),
    ],
)
def test_no_option_is_idle(option, value):
    default = {"margin": 2.0}
    totals = [
        float(losses_of(make_head(**options)).total.detach())
        for options in (default, default, default | {option: value})
    ]
    assert totals[0] == totals[1] != pytest.approx(totals[2], rel=1e-5)


def test_without_contrastive_loss_there_is_no_attention():
    head = make_head(contrastive_weight=0)
    assert not list(head.parameters()) and set(losses_of(head).terms) == {"cls"}


def test_a_batch_without_labels_costs_nothing_but_stays_in_the_graph():
    features = make_features()
    for logits in features.queries.logits:
        logits.requires_grad_()
    head = make_head()
    found = losses_of(head, features, NO_LABELS)
    found.total.backward()
    assert float(found.total.detach()) == 0
    leaves = [*head.parameters(), *features.queries.logits]
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


def test_what_padding_holds_changes_nothing():
    first, second = (losses_of(make_head(margin=2.0), make_features(padded=value)) for value in (0.0, 1e4))
    torch.testing.assert_close(first.total, second.total)


def test_the_box_is_that_of_the_best_query_of_the_class():
    features = make_features()
    head = make_head().eval()
    outputs = head(features)
    found = head.predictions(outputs, features)
    assert found["pred_logits"].shape == (2, 1, CLASSES) and found["pred_boxes"].shape == (2, 1, 4)
    for image in range(2):
        logits = features.queries.logits[-1][image]
        shown = int((logits.exp().mean(dim=0)).argmax())
        row = found["pred_logits"][image, 0]
        assert int(row.argmax()) == shown and torch.isinf(row).sum() == CLASSES - 1
        assert float(row[shown]) == pytest.approx(math.log(float(logits[:, shown].exp().mean())), rel=1e-5)
        best = features.queries.boxes[-1][image, int(logits[:, shown].argmax())]
        torch.testing.assert_close(found["pred_boxes"][image, 0], best)
        given = head.best_boxes(outputs, torch.full((2, 1), 1))[image, 0]
        torch.testing.assert_close(given, features.queries.boxes[-1][image, int(logits[:, 1].argmax())])


def test_every_wanted_class_gets_its_box():
    features = make_features()
    head = make_head(num_boxes=CLASSES).eval()
    found = head.predictions(head(features), features)
    classes = found["pred_logits"].argmax(dim=2)
    assert [sorted(row) for row in classes.tolist()] == [[0, 1, 2], [0, 1, 2]]
    for image in range(2):
        for row, shown in enumerate(classes[image].tolist()):
            best = int(features.queries.logits[-1][image, :, shown].argmax())
            torch.testing.assert_close(found["pred_boxes"][image, row], features.queries.boxes[-1][image, best])


@pytest.mark.parametrize("kind", ["detr", "refined", "two-stage", "vidt"])
def test_it_trains_on_detectors(parts, batch, kind):
    images, mask, targets = batch
    torch.manual_seed(0)
    detector = HeadedDetector(
        CLASSES, partial(QueryMILHead, taps=[0, 1], margin=2.0), parts.DETECTORS[kind], 0.0
    ).train()
    optimiser = torch.optim.AdamW(detector.parameters(), 1e-3)
    values = []
    for _ in range(6):
        losses = detector.losses(images, mask, targets)
        optimiser.zero_grad()
        losses["loss"].backward()
        assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)
        optimiser.step()
        values.append(float(losses["query_mil_cls"].detach()))
    assert values[-1] < values[0]


def test_boxes_reach_the_labels_and_it_is_rebuilt(parts, scenes):
    torch.manual_seed(0)
    detector = HeadedDetector(CLASSES, partial(QueryMILHead, taps=[0], num_boxes=2), parts.DETECTORS["detr"], 0.0)
    source = open_images(scenes / "images")
    categories = tuple(Category(i, f"class {i}") for i in range(CLASSES))
    labels = detect(detector, source, categories, InferenceSettings(64, 96))
    assert len(labels.boxes_xyxy) == 2 * len(source)
    again = HeadedDetector.from_init_args(json.loads(json.dumps(detector.init_args)))
    again.load_state_dict(detector.state_dict())
    assert again.init_args == detector.init_args
    same = detect(again, source, categories, InferenceSettings(64, 96))
    assert (same.boxes_xyxy == labels.boxes_xyxy).all() and (same.scores == labels.scores).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": -1.0}, r"^margin must be at least 0, got -1\.0"),
        ({"contrastive_weight": -1.0}, r"^contrastive_weight must be at least 0, got -1\.0"),
        ({"distance": "l1"}, r"distance: expected one of 'euclidean', 'cosine', got 'l1'"),
        ({"taps": [2]}, r"taps: expected ascending levels among 0 to 1, got \[2\]"),
        ({"foreground_threshold": 0.1}, r"foreground_threshold: expected more than background_threshold"),
        ({"num_boxes": 0}, r"num_boxes: expected 1 to the number of classes \(3\), got 0"),
        ({"num_boxes": 4}, r"num_boxes: expected 1 to the number of classes \(3\), got 4"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        make_head(**options)


def test_inputs_that_cannot_be():
    with pytest.raises(ValueError, match=r"labels of image 1 of the batch: expected 0 to 2, got 3"):
        losses_of(make_head(), targets=[TARGETS[0], {"labels": torch.tensor([3])}])
    with pytest.raises(ValueError, match=r"features of level 1: expected a map of at least 2 x 2, got 1 x 1"):
        losses_of(make_head(), make_features(sides=(4, 1)))
    with pytest.raises(ValueError, match=r"QueryMILHead reads the queries of a decoder, but a backbone alone has none"):
        HeadedBackbone(CLASSES, QueryMILHead, "test_resnet")

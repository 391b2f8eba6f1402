"""Gradient reversal: its arithmetic, discriminators and their losses, which objects are compared, on a detector."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from simdetr.detectors import DeformableDETR
from simdetr.detectors.detector import Features, FeatureSizes, Level, Queries
from simdetr.exchange.weights import checkpoint_config, load_detector, load_weights, save_detector
from simdetr.heads import HeadedBackbone, HeadedDetector
from simdetr.heads.gradient_reversal import (
    DomainAdversary,
    ImageDiscriminator,
    ObjectDiscriminator,
    adversary_alarms,
    consistency_loss,
    domain_loss,
    reversal_scale,
    reverse_gradient,
    top_queries,
)

LN2 = math.log(2)
SIZES = FeatureSizes(3, (8, 6), (8, 16), 5, 2)

# ----------------------------------------------------------------------------------------------------------------------
# The reversal.


def test_forward_is_the_identity_to_the_bit_and_negates_nothing():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    for scale in (0.0, 0.3, 7.0):
        assert torch.equal(reverse_gradient(values, scale), values)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 2.5])
def test_gradients_by_hand(scale):
    """f = w x, D = v f, L = (v f - t)² / 2: the discriminator's gradient stays, the feature's is turned."""
    w, v = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.7, -1.3))
    x, t = 2.0, 0.4
    (0.5 * (v * reverse_gradient(w * x, scale) - t) ** 2).backward()
    y = 0.7 * x
    assert float(v.grad) == pytest.approx(y * (-1.3 * y - t), rel=1e-12)
    assert float(w.grad) == pytest.approx(-scale * -1.3 * x * (-1.3 * y - t), rel=1e-12)


def test_without_scale_features_rest_while_the_discriminator_learns():
    features, judge = nn.Linear(3, 4), ObjectDiscriminator(4, 8, 0.0)
    logits = judge(reverse_gradient(features(torch.randn(6, 3)), 0.0))
    domain_loss(logits, torch.arange(6) < 3).loss.backward()
    assert all(not p.grad.any() for p in features.parameters())
    assert all(p.grad.any() for p in judge.parameters())


def test_two_reversals_cancel():
    values = torch.randn(5, requires_grad=True)
    reverse_gradient(reverse_gradient(values, 1.0), 1.0).pow(2).sum().backward()
    assert torch.equal(values.grad, 2 * values.detach())


@pytest.mark.parametrize(
    ("progress", "wanted"), [(0, 0.0), (0.1, 0.462117), (0.25, 0.848284), (0.5, 0.986614), (1, 0.999909)]
)
def test_schedule(progress, wanted):
    assert reversal_scale(progress, 1.0) == pytest.approx(wanted, abs=5e-7)
    assert reversal_scale(progress) == pytest.approx(0.1 * wanted, abs=1e-7)
    assert reversal_scale(progress, 0.3, "constant") == 0.3


def test_wrong_scales_are_named():
    with pytest.raises(ValueError, match=r"scale must be at least 0, got -0.1"):
        reverse_gradient(torch.zeros(1), -0.1)
    with pytest.raises(ValueError, match=r"highest must be at least 0, got -1"):
        reversal_scale(0.5, -1.0)
    with pytest.raises(ValueError, match=r"progress: expected a share of the training in \[0, 1\], got 1.5"):
        reversal_scale(1.5)
    with pytest.raises(ValueError, match=r"schedule: expected one of 'rising', 'constant', got 'late'"):
        reversal_scale(0.5, 1.0, "late")


# ----------------------------------------------------------------------------------------------------------------------
# Discriminators and their losses.


def test_discriminators_are_those_of_the_literature():
    image, objects = ImageDiscriminator(256), ObjectDiscriminator(256)
    assert [tuple(p.shape) for p in image.parameters()] == [(512, 256, 1, 1), (512,), (1, 512, 1, 1), (1,)]
    assert [tuple(p.shape) for p in objects.parameters() if p.ndim == 2] == [(1024, 256), (1024, 1024), (1, 1024)]
    assert [part.p for part in objects.modules() if isinstance(part, nn.Dropout)] == [0.5, 0.5]
    assert image(torch.zeros(2, 256, 3, 4)).shape == (2, 3, 4) and objects(torch.zeros(7, 256)).shape == (7,)


def test_loss_and_accuracy_by_hand():
    logits, unlabelled = torch.tensor([2.0, -1.0, 3.0]), torch.tensor([True, True, False])
    loss, accuracy = domain_loss(logits, unlabelled)
    softplus = [math.log1p(math.exp(x)) for x in (-2.0, 1.0, 3.0)]
    assert float(loss) == pytest.approx(0.5 * (softplus[0] + softplus[1]) / 2 + 0.5 * softplus[2], rel=1e-6)
    assert float(accuracy) == pytest.approx(0.5 * 0.5 + 0.5 * 0.0)
    even = torch.tensor([0.3, -0.2, 1.0, 2.0])
    half = torch.tensor([True, True, False, False])
    torch.testing.assert_close(domain_loss(even, half).loss, F.binary_cross_entropy_with_logits(even, half.float()))


def test_cells_of_padding_say_nothing():
    logits = torch.randn(2, 3, 4)
    valid = torch.ones(2, 3, 4)
    valid[1, :, 2:] = 0
    wanted = domain_loss(torch.tensor([1.0, -1.0]), torch.tensor([True, False]))
    found = domain_loss(
        torch.where(valid > 0, torch.tensor([1.0, -1.0])[:, None, None], 1e4 * logits),
        torch.tensor([True, False]),
        valid,
    )
    torch.testing.assert_close(found.loss, wanted.loss)
    assert float(found.accuracy) == 1.0


def test_one_domain_alone_is_a_loss_of_zero():
    logits = torch.randn(4, requires_grad=True)
    for flags in (torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)):
        loss, accuracy = domain_loss(logits, flags)
        assert float(loss.detach()) == 0 and float(accuracy) == 0 and loss.requires_grad


def test_of_equal_inputs_nothing_can_be_told():
    torch.manual_seed(0)
    judge = ObjectDiscriminator(4, 16, 0.0)
    half = torch.randn(64, 4)
    inputs, unlabelled = torch.cat([half, half]), torch.arange(128) < 64
    optimiser = torch.optim.Adam(judge.parameters(), lr=0.01)
    for _ in range(200):
        optimiser.zero_grad()
        loss = domain_loss(judge(inputs), unlabelled).loss
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        found = domain_loss(judge(inputs), unlabelled)
    assert float(found.loss) == pytest.approx(LN2, abs=1e-3) and float(found.accuracy) == 0.5


def test_consistency_by_hand():
    cells = [torch.tensor([[[0.0, 2.0]], [[1.0, 9.0]]]), torch.tensor([[[1.0]], [[-1.0]]])]
    valid = [torch.tensor([[[True, True]], [[True, False]]]), torch.ones(2, 1, 1, dtype=torch.bool)]
    objects, image = torch.tensor([0.5, -0.5, 3.0]), torch.tensor([0, 0, 1])

    def chance(x):
        return 1 / (1 + math.exp(-x))

    means = [((chance(0) + chance(2)) / 2 + chance(1)) / 2, (chance(1) + chance(-1)) / 2]
    wanted = (abs(means[0] - chance(0.5)) + abs(means[0] - chance(-0.5)) + abs(means[1] - chance(3))) / 3
    assert float(consistency_loss(cells, valid, objects, image)) == pytest.approx(wanted, rel=1e-5)
    assert float(consistency_loss(cells, valid, objects[:0], image[:0])) == 0


def test_alarms():
    assert adversary_alarms({"image": 0.05, "object": 0.6}, [2.0, 1.0, 1.9]) == [] == adversary_alarms({}, [])
    (alarm,) = adversary_alarms({"image": 0.5, "object": 0.04}, [1.0, 0.9])
    assert "the discriminator of objects is right on 4.0% only" in alarm
    assert "rose from 0.9 to 1.8" in adversary_alarms({"image": 0.5}, [2.0, 0.9, 1.8])[0]
    assert len(adversary_alarms({"image": 0.01}, [1.0, 2.0])) == 2


def two_gaussians(count, generator):
    """Two classes along x, two domains along y, which has nothing to do with the class."""
    label, unlabelled = torch.randint(2, (count,), generator=generator), torch.arange(count) % 2 == 1
    points = torch.randn(count, 2, generator=generator) + 2.5 * torch.stack([2 * label - 1, 2 * unlabelled - 1], dim=1)
    return points, label, unlabelled


def accuracies(scale, seed, steps=600):
    """Of the discriminator and of the task, on new points; only labelled ones teach the task."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 10)
    change = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
    task, judge = nn.Linear(2, 1), ObjectDiscriminator(2, 32, 0.0)
    optimiser = torch.optim.SGD(
        [{"params": [*change.parameters(), *task.parameters()]}, {"params": judge.parameters(), "lr": 0.3}], lr=0.15
    )
    points, label, unlabelled = two_gaussians(1000, generator)
    for step in range(steps):
        drawn = torch.randint(1000, (200,), generator=generator)
        vectors, away = points[drawn] + change(points[drawn]), unlabelled[drawn]
        known = label[drawn][~away].float()
        loss = F.binary_cross_entropy_with_logits(task(vectors[~away])[:, 0], known)
        seen = vectors.detach() if scale is None else reverse_gradient(vectors, reversal_scale(step / steps, scale))
        optimiser.zero_grad()
        (loss + domain_loss(judge(seen), away).loss).backward()
        optimiser.step()
    points, label, unlabelled = two_gaussians(4000, generator)
    with torch.no_grad():
        vectors = points + change(points)
        right = (task(vectors)[:, 0] > 0) == (label == 1)
        return float(domain_loss(judge(vectors), unlabelled).accuracy), float(right.float().mean())


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_features_stop_telling_the_domain_and_still_tell_the_class(seed):
    told, before = accuracies(None, seed)
    hidden, after = accuracies(1.0, seed)
    assert told > 0.95 and hidden < 0.6 and after > before - 0.02


# ----------------------------------------------------------------------------------------------------------------------
# Which objects.


def test_top_queries_by_hand():
    logits = torch.tensor([[[5.0], [1.0], [3.0]], [[0.0], [2.0], [1.0]], [[9.0], [8.0], [7.0]]])
    found = top_queries(logits, torch.tensor([0, 1]), 2)
    assert found.image.tolist() == [0, 0, 1, 1] and found.query.tolist() == [0, 2, 1, 2]
    three = top_queries(logits, torch.tensor([0, 1]), 2, total=3)
    assert list(zip(three.image.tolist(), three.query.tolist(), strict=True)) == [(0, 0), (1, 1), (0, 2)]
    assert len(top_queries(logits, torch.tensor([2]), 10).query) == 3


def features_of(batch=4, queries=6):
    generator = torch.Generator().manual_seed(0)
    levels = [
        Level(
            torch.randn(batch, c, s, s, generator=generator, requires_grad=True),
            64 // s,
            torch.zeros(batch, s, s, dtype=torch.bool),
        )
        for c, s in ((8, 6), (6, 3))
    ]
    states = torch.randn(batch, queries, 5, generator=generator, requires_grad=True)
    boxes = torch.rand(batch, queries, 4, generator=generator) * 0.3 + 0.3
    found = Queries([states], [boxes[..., :2]], [torch.randn(batch, queries, 3, generator=generator)], [boxes])
    return Features(levels, found, [])


def targets_of(*counts, unlabelled=2):
    generator = torch.Generator().manual_seed(1)
    rows = [
        {"labels": torch.zeros(n, dtype=torch.int64), "boxes": torch.rand(n, 4, generator=generator) * 0.3 + 0.3}
        for n in counts
    ]
    nothing = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4), "labelled": False}
    return [*rows, *([nothing] * unlabelled)]


def adversary(**options):
    torch.manual_seed(0)
    small = {"image_hidden": 16, "object_hidden": 16, "dropout": 0.0, "schedule": "constant"}
    return DomainAdversary(SIZES, **{**small, **options})


def test_as_many_objects_of_both_domains_each_query_once():
    head, features = adversary(), features_of()
    targets = targets_of(2, 3)
    chosen = head._objects(features, targets, torch.tensor([False, False, True, True]))
    pairs = list(zip(chosen.image.tolist(), chosen.query.tolist(), strict=True))
    assert [sum(image == i for image, _ in pairs) for i in range(4)][:2] == [2, 3]
    assert sum(image >= 2 for image, _ in pairs) == 5 and len(set(pairs)) == 10
    matched = head.matcher(features.queries.logits[-1], features.queries.boxes[-1], targets)
    assert [query for image, query in pairs if image == 1] == matched[1][0].tolist()
    top = adversary(objects="top", num_objects=4)._objects(features, targets, torch.tensor([False, False, False, True]))
    assert sum(image == 3 for image in top.image.tolist()) == 4 == len(top.image) - 4


def test_losses_are_the_parts_added(caplog):
    head, features = (
        adversary(highest_scale=0.2, consistency_weight=0.1, image_weight=2.0, object_weight=0.5),
        features_of(),
    )
    targets = targets_of(2, 3)
    found = head.losses(head(features), features, targets)
    away = torch.tensor([False, False, True, True])
    image = torch.stack(
        [
            domain_loss(judge(level.features), away).loss
            for judge, level in zip(head.image_discriminators, features.levels, strict=True)
        ]
    ).mean()
    chosen = head._objects(features, targets, away)
    logits = head.object_discriminator(features.queries.states[-1][chosen.image, chosen.query])
    objects = domain_loss(logits, away[chosen.image])
    valid = [~level.mask for level in features.levels]
    cells = [judge(level.features) for judge, level in zip(head.image_discriminators, features.levels, strict=True)]
    agreed = consistency_loss(cells, valid, logits, chosen.image)
    torch.testing.assert_close(
        found.terms, {"image": image, "object": objects.loss, "consistency": agreed}, check_device=True
    )
    torch.testing.assert_close(found.total, 2.0 * image + 0.5 * objects.loss + 0.1 * agreed)
    assert float(found.diagnostics["scale"]) == pytest.approx(0.2)
    torch.testing.assert_close(found.diagnostics["object_accuracy"], objects.accuracy)
    assert float(found.diagnostics["alarm"]) in (0.0, 1.0) and not caplog.records


def test_features_get_the_gradient_turned_and_scaled():
    def gradients(**options):
        head, features = adversary(**options), features_of()
        head.losses(head(features), features, targets_of(2, 3)).total.backward()
        judge = [p.grad.clone() for p in head.parameters()]
        return features.levels[0].features.grad, features.queries.states[-1].grad, judge

    one, ten = gradients(highest_scale=0.1), gradients(highest_scale=1.0)
    for first, second in zip(one[:2], ten[:2], strict=True):
        assert first.abs().sum() > 0
        torch.testing.assert_close(10 * first, second)
    torch.testing.assert_close(one[2], ten[2])
    none = gradients(highest_scale=0.0)
    assert not none[0].any() and not none[1].any() and all(p.any() for p in none[2][:4])
    head, features = adversary(highest_scale=1.0), features_of()
    levels = [level._replace(features=level.features.detach().requires_grad_()) for level in features.levels]
    away = torch.tensor([False, False, True, True])
    torch.stack(
        [domain_loss(j(x.features), away).loss for j, x in zip(head.image_discriminators, levels, strict=True)]
    ).mean().backward()
    torch.testing.assert_close(ten[0], -levels[0].features.grad)


def test_a_batch_of_one_domain_teaches_nothing_and_is_warned_of_once(caplog):
    head, features = adversary(consistency_weight=0.1), features_of()
    with caplog.at_level(logging.WARNING):
        for targets in (targets_of(1, 1, 2, 0, unlabelled=0), targets_of(unlabelled=4)):
            found = head.losses(head(features), features, targets)
            assert float(found.total.detach()) == 0 and not any(float(term) for term in found.terms.values())
            found.total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())
    assert not features.levels[0].features.grad.any()
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "all images of a batch are labelled" in said[0] and "data.unlabelled" in said[0]


def test_without_boxes_the_objects_teach_nothing():
    head, features = adversary(consistency_weight=0.1), features_of()
    found = head.losses(head(features), features, targets_of(0, 0))
    assert (
        float(found.terms["object"]) == 0 and float(found.terms["consistency"]) == 0 and float(found.terms["image"]) > 0
    )
    found.total.backward()
    assert features.queries.states[-1].grad is None or not features.queries.states[-1].grad.any()
    assert all(p.grad is not None for p in head.parameters())
    assert "object_accuracy" not in found.diagnostics, "no object was judged, so none was judged wrongly"
    alone = adversary(image_weight=0.0)
    assert float(alone.losses(alone(features), features, targets_of(0, 0)).diagnostics["alarm"]) == 0


def test_alarms_know_the_tasks_loss_from_the_adversarys():
    """By hand: the whole loss doubles while the task's, less 2 of images and 0.5 of objects, falls; then that rises."""
    head = adversary(image_weight=2.0, object_weight=0.5)
    epochs = [
        {"loss": 3.0, "x_domain_image": 0.5, "x_domain_object": 0.4, "x_domain_image_accuracy": 0.01},
        {"loss": 6.0, "x_domain_image": 2.1, "x_domain_object": 0.4, "x_domain_image_accuracy": 0.5},
    ]
    assert head.alarms(epochs, "x_domain_") == [] == head.alarms([], "x_domain_")
    assert len(head.alarms(epochs[:1], "x_domain_")) == 1, "the last epoch counts"
    assert head.alarms([*epochs, {"loss": 3.2}], "x_domain_") == adversary_alarms({}, [1.8, 1.6, 3.2]) != []
    assert head.alarms(epochs[:1], "domain_") == []


def test_padding_of_a_level_says_nothing():
    head, found = adversary(), []
    for value in (0.0, 1e4):
        features = features_of()
        mask = torch.zeros(4, 6, 6, dtype=torch.bool)
        mask[1, 3:] = True
        first = features.levels[0]._replace(
            features=features.levels[0].features.masked_fill(mask[:, None], value), mask=mask
        )
        features = features._replace(levels=[first, features.levels[1]])
        found.append(head.losses(head(features), features, targets_of(2, 3)).total)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"highest_scale": -0.1}, "highest_scale must be at least 0, got -0.1"),
        ({"image_weight": -1.0}, "image_weight must be at least 0, got -1"),
        ({"image_weight": 0.0, "object_weight": 0.0}, "image_weight and object_weight are both 0; set at least one"),
        (
            {"object_weight": 0.0, "consistency_weight": 0.1},
            "consistency_weight: expected 0 with only one discriminator",
        ),
        ({"schedule": "late"}, "schedule: expected one of 'rising', 'constant', got 'late'"),
        ({"objects": "all"}, "objects: expected one of 'matched', 'top', got 'all'"),
        ({"num_objects": 0}, "num_objects must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1"),
        ({"levels": [1, 0]}, "levels: expected ascending levels among 0 to 1"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        adversary(**options)


def test_wrong_targets_are_named():
    head, features = adversary(), features_of()
    with pytest.raises(ValueError, match=r"targets: expected one per image \(4\), got 3"):
        head.losses(head(features), features, targets_of(1))


# ----------------------------------------------------------------------------------------------------------------------
# On a detector.


def make(parts, kind="refined", **options):
    torch.manual_seed(0)
    small = {"image_hidden": 16, "object_hidden": 16, "dropout": 0.0}
    return HeadedDetector(3, lambda sizes: DomainAdversary(sizes, **{**small, **options}), parts.DETECTORS[kind])


@pytest.fixture
def mixed(batch):
    """The batch of two images, and both once more as unlabelled ones."""
    images, mask, targets = batch
    nothing = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4), "labelled": False}
    return torch.cat([images, 0.5 * images]), torch.cat([mask, mask]), [*targets, nothing, nothing]


@pytest.mark.parametrize("kind", ["detr", "refined", "two-stage", "vidt"])
def test_the_detector_learns_from_labelled_images_alone(kind, parts, batch, mixed):
    headed = make(parts, kind).train()
    for module in headed.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    losses = headed.losses(*mixed)
    own = headed.detector.losses(*batch)
    for name in own:
        if name != "loss":
            torch.testing.assert_close(losses[name], own[name], atol=1e-4, rtol=1e-4)
    domain = losses["domain_image"] + losses["domain_object"]
    torch.testing.assert_close(losses["loss"], own["loss"] + domain, atol=1e-4, rtol=1e-4)
    losses["loss"].backward()
    assert not [name for name, p in headed.named_parameters() if p.requires_grad and p.grad is None]


def test_a_batch_of_unlabelled_images_is_no_loss(parts, mixed):
    images, mask, targets = mixed
    losses = make(parts).train().losses(images[2:], mask[2:], targets[2:])
    assert float(losses["loss"].detach()) == 0
    losses["loss"].backward()


def test_scale_follows_the_progress(parts):
    headed = make(parts)
    assert headed.head.scale == 0.0
    headed.set_progress(0.25)
    assert headed.head.scale == pytest.approx(0.0848284, abs=1e-7)


@torch.no_grad()
def test_inference_and_files_leave_the_discriminators_out(parts, batch, tmp_path):
    headed = make(parts).eval()
    called = []
    for part in headed.head.modules():
        part.register_forward_hook(lambda *_: called.append(1))
    both, own = headed(*batch[:2]), headed.detector(*batch[:2])
    assert both.keys() == own.keys() and torch.equal(both["pred_logits"], own["pred_logits"])
    assert len(called) == 1, "the head itself, and none of its parts"
    save_detector(headed, checkpoint_config(headed, None), tmp_path)
    loaded = load_detector(tmp_path).detector
    assert type(loaded) is DeformableDETR and not loaded.training
    assert torch.equal(loaded(*batch[:2])["pred_logits"], own["pred_logits"])
    assert not [name for name in loaded.state_dict() if "discriminator" in name]
    report = load_weights(make(parts), tmp_path)
    assert not report.missing and any("object_discriminator" in name for name in report.kept), (
        "training goes on with them"
    )


def test_a_backbone_alone_is_refused():
    with pytest.raises(
        ValueError, match=r"DomainAdversary reads the queries of a decoder, but a backbone alone has none"
    ):
        HeadedBackbone(2, DomainAdversary, "test_resnet", frozen_batch_norm=False)

"""Equations 1 to 7 against numbers worked out by hand, their derivatives, and what is coupled to what.

The numbers were worked out by hand with the background as class 0; here it is the last.
"""

from __future__ import annotations

import logging
import math

import pytest
import torch

from simdetr.heads.landmark_losses import LandmarkRule, background_loss, landmark_losses, point_error, record_logits

LITERAL = {"point_weight": 1.0, "beta": 1.0, "weight_gradient": "coupled"}
MODES = ["eq4", "eq5", "eq6", "eq7"]


def one_sample(scores, true, error_xy, **changes):
    """Losses and gradients of one sample in double precision: losses, d total / d scores, d total / d point."""
    rule = LandmarkRule(**(LITERAL | changes))
    logits = torch.tensor([scores], dtype=torch.float64, requires_grad=True)
    point = torch.tensor([error_xy], dtype=torch.float64, requires_grad=True)
    errors = point_error(point, torch.zeros_like(point), rule.beta)
    losses = landmark_losses(logits, torch.tensor([true]), errors, rule)
    losses.total.sum().backward()
    return losses, logits.grad[0], point.grad[0]


def test_equations_1_to_4_by_hand():
    losses, by_scores, by_point = one_sample([0.0, 0.0, 0.0], 0, [0.2, 0.0])
    assert losses.class_loss.item() == pytest.approx(math.log(3), abs=1e-6)
    assert losses.probability.item() == pytest.approx(1 / 3)
    assert losses.point_loss.item() == pytest.approx(0.02 / 3, abs=1e-8)
    assert losses.total.item() == pytest.approx(1.105279, abs=1e-6)
    torch.testing.assert_close(by_scores, torch.tensor([-0.662222, 0.331111, 0.331111]).double(), atol=1e-6, rtol=0)
    assert by_scores.sum().abs() < 1e-15
    torch.testing.assert_close(by_point, torch.tensor([0.0666667, 0.0]).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("mode", "total", "by_true_score"),
    [("eq4", 0.2391436, -0.1968), ("eq6", 0.2391436, -0.1968), ("eq5", 0.2431436, -0.2), ("eq7", 0.2234636, -0.199936)],
)
def test_modes_by_hand(mode, total, by_true_score):
    losses, by_scores, _ = one_sample([math.log(8), 0.0, 0.0], 0, [0.2, 0.0], mode=mode)
    assert losses.total.item() == pytest.approx(total, abs=1e-7)
    assert by_scores[0].item() == pytest.approx(by_true_score, abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_scores_matter_by_their_differences_alone(mode):
    scores = torch.tensor([0.3, -1.2, 0.8, 0.1])
    plain, by_scores, _ = one_sample(scores.tolist(), 1, [0.4, -0.3], mode=mode)
    shifted, by_shifted, _ = one_sample((scores + 700.0).tolist(), 1, [0.4, -0.3], mode=mode)
    assert shifted.total.item() == pytest.approx(plain.total.item(), rel=1e-6)
    torch.testing.assert_close(by_shifted, by_scores, atol=1e-5, rtol=1e-5)
    order = [3, 1, 0, 2]  # the true class stays
    permuted, by_permuted, _ = one_sample(scores[order].tolist(), 1, [0.4, -0.3], mode=mode)
    assert permuted.total.item() == pytest.approx(plain.total.item())
    torch.testing.assert_close(by_permuted, by_scores[order])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("error", [0.0, 3.0, 1e30, math.inf])
def test_background_has_no_point(mode, error):
    losses, by_scores, by_point = one_sample([1.0, 0.0, -1.0], 2, [error, -error], mode=mode)
    assert losses.point_loss.item() == 0.0
    assert by_point.tolist() == [0.0, 0.0]
    expected = -torch.tensor([1.0, 0.0, -1.0]).double().log_softmax(0)[2]
    torch.testing.assert_close(losses.total[0], expected)
    assert by_scores[2] < 0 < by_scores[0]


def test_unknown_class_mutes_the_point_and_known_class_frees_it():
    _, _, muted = one_sample([-40.0, 0.0, 0.0], 0, [0.2, 0.7])
    assert muted.abs().max() < 1e-16
    free, _, by_point = one_sample([40.0, 0.0, 0.0], 0, [0.2, 0.7])
    uncoupled, _, by_uncoupled = one_sample([40.0, 0.0, 0.0], 0, [0.2, 0.7], mode="eq5")
    torch.testing.assert_close(free.total, uncoupled.total)
    torch.testing.assert_close(by_point, by_uncoupled)


def test_pixels_reverse_the_class_gradient():
    """An error of (40, 30) px has S = 69."""
    losses, by_scores, _ = one_sample([math.log(8), 0.0, 0.0], 0, [40.0, 30.0])
    assert losses.reversed.tolist() == [True]
    assert by_scores[0].item() == pytest.approx(0.2 * (69 * 0.8 - 1), rel=1e-9)
    _, held, by_point = one_sample([math.log(8), 0.0, 0.0], 0, [40.0, 30.0], weight_gradient="auto")
    assert held[0].item() == pytest.approx(-0.2)
    assert by_point.tolist() == pytest.approx([0.8, 0.8])  # the weight is held, not lost


@pytest.mark.parametrize("mode", ["eq4", "eq6", "eq7"])
def test_detached_and_auto(mode):
    """Detached: -(1 - P) whatever S. Auto: coupled where that does not reverse, else detached; never positive."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(400, 4, generator=generator, dtype=torch.float64)
    classes = torch.randint(0, 3, (400,), generator=generator)
    errors = 4 * torch.rand(400, generator=generator, dtype=torch.float64)

    def gradients(weight_gradient):
        rule = LandmarkRule(**(LITERAL | {"weight_gradient": weight_gradient, "mode": mode}))
        scores = logits.clone().requires_grad_()
        losses = landmark_losses(scores, classes, errors, rule)
        losses.total.sum().backward()
        return scores.grad, losses

    coupled, losses = gradients("coupled")
    detached, also = gradients("detached")
    auto, _ = gradients("auto")
    torch.testing.assert_close(losses.total, also.total)
    true = torch.arange(400), classes
    torch.testing.assert_close(detached[true], losses.probability - 1)
    torch.testing.assert_close(auto, torch.where(losses.reversed[:, None], detached, coupled))
    assert 20 < losses.reversed.sum() < 380
    assert (coupled[true] > 0).sum() == losses.reversed.sum()
    assert (auto[true] <= 0).all()


@pytest.mark.parametrize("class_weight", ["softmax", "sigmoid"])
@pytest.mark.parametrize("mode", MODES)
def test_derivatives_of_the_coupled_loss(mode, class_weight):
    generator = torch.Generator().manual_seed(1)
    columns = 4 if class_weight == "softmax" else 3
    logits = torch.randn(6, columns, generator=generator, dtype=torch.float64, requires_grad=True)
    points = torch.randn(6, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    targets, classes = torch.randn(6, 2, generator=generator).double(), torch.tensor([0, 1, 2, 3, 3, 0])
    rule = LandmarkRule(mode, 0.7, 0.3, "coupled", class_weight)

    def total(scores, places):
        return landmark_losses(scores, classes, point_error(places, targets, rule.beta), rule).total

    assert torch.autograd.gradcheck(total, (logits, points))


@pytest.mark.parametrize("class_weight", ["softmax", "sigmoid"])
@pytest.mark.parametrize("weight_gradient", ["auto", "detached"])
@pytest.mark.parametrize("mode", MODES)
def test_derivatives_of_held_weights(mode, weight_gradient, class_weight):
    """Points: those of the loss. Scores: those of the loss with its weights, where held, as plain numbers."""
    generator = torch.Generator().manual_seed(1)
    columns = 4 if class_weight == "softmax" else 3
    logits = 2 * torch.randn(8, columns, generator=generator, dtype=torch.float64)
    points = torch.randn(8, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    targets, classes = torch.randn(8, 2, generator=generator).double(), torch.arange(8) % 4
    rule = LandmarkRule(mode, 0.7, 0.3, weight_gradient, class_weight)

    def losses(scores, places):
        return landmark_losses(scores, classes, point_error(places, targets, rule.beta), rule)

    assert torch.autograd.gradcheck(lambda places: losses(logits, places).total, (points,))

    there = losses(logits, points.detach())
    held = torch.ones(8, dtype=torch.bool) if weight_gradient == "detached" else there.reversed
    if mode != "eq5":
        assert held.any()
    numbers = there.point_loss.clone()
    coupled = LandmarkRule(mode, 0.7, 0.3, "coupled", class_weight)

    def by_definition(scores):
        moving = landmark_losses(scores, classes, point_error(points.detach(), targets, 0.3), coupled)
        return moving.class_loss + 0.7 * torch.where(held, numbers, moving.point_loss)

    scores = logits.clone().requires_grad_()
    found = torch.autograd.grad(losses(scores, points.detach()).total.sum(), scores)[0]
    assert torch.autograd.gradcheck(by_definition, (scores,))
    torch.testing.assert_close(found, torch.autograd.grad(by_definition(scores).sum(), scores)[0])


def test_sigmoid_scores():
    """P is the class's own sigmoid; the class loss is the cross-entropy of all classes, which the background lacks."""
    losses, by_scores, by_point = one_sample([math.log(4), -1.0], 0, [0.2, 0.0], class_weight="sigmoid")
    assert losses.probability.item() == pytest.approx(0.8)
    assert losses.class_loss.item() == pytest.approx(-math.log(0.8) + math.log(1 + math.exp(-1)))
    assert losses.point_loss.item() == pytest.approx(0.8 * 0.02)
    assert by_scores[0].item() == pytest.approx(0.2 * (0.02 * 0.8 - 1))  # as with softmax
    assert by_point[0].item() == pytest.approx(0.8 * 0.2)
    background, _, _ = one_sample([math.log(4), -1.0], 2, [9.0, 0.0], class_weight="sigmoid")
    assert background.total.item() == pytest.approx(-math.log(0.2) + math.log(1 + math.exp(-1)))
    rule = LandmarkRule(class_weight="sigmoid")
    torch.testing.assert_close(
        background_loss(torch.tensor([[math.log(4), -1.0]]), rule), background.total.detach().float()
    )


def test_background_loss_is_that_of_the_background():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    losses = landmark_losses(logits, torch.full((5,), 3), torch.zeros(5), LandmarkRule())
    torch.testing.assert_close(background_loss(logits, LandmarkRule()), losses.class_loss)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("class_weight", ["softmax", "sigmoid"])
def test_extreme_scores_stay_finite(mode, class_weight):
    for value in (-1e4, 1e4):
        scores = torch.tensor([[value, 0.0, 0.0]], requires_grad=True)
        rule = LandmarkRule(mode, class_weight=class_weight)
        losses = landmark_losses(scores, torch.tensor([0]), torch.tensor([1.5]), rule)
        losses.total.sum().backward()
        assert losses.total.isfinite().all() and scores.grad.isfinite().all()


def test_point_error():
    points = torch.tensor([[0.05, 0.5], [0.3, 0.3], [0.1, 0.1]], requires_grad=True)
    targets = torch.tensor([[0.0, 0.0], [0.3, 0.3], [math.nan, math.nan]])
    errors = point_error(points, targets, 0.1)
    torch.testing.assert_close(errors, torch.tensor([0.05**2 / 0.2 + 0.45, 0.0, 0.0]))
    errors.sum().backward()
    torch.testing.assert_close(points.grad, torch.tensor([[0.5, 1.0], [0.0, 0.0], [0.0, 0.0]]))


def test_records_have_one_class_and_the_confidence_of_any():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.1, 0.2], [-3.0, -1.0, -2.0]])
    records = record_logits(logits)
    probability = logits.softmax(dim=-1)
    assert (records == -torch.inf).tolist() == [[False, True], [True, True], [True, False]]
    assert records[0, 0].sigmoid().item() == pytest.approx(1 - probability[0, 2].item())
    assert records[2, 1].sigmoid().item() == pytest.approx(1 - probability[2, 2].item())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "eq8"}, "mode: expected one of 'eq4', 'eq5', 'eq6', 'eq7', got 'eq8'"),
        ({"weight_gradient": "on"}, "weight_gradient: expected one of 'auto', 'coupled', 'detached'"),
        ({"class_weight": "focal"}, "class_weight: expected one of 'softmax', 'sigmoid'"),
        ({"unit": "metre"}, "unit: expected one of 'fraction', 'pixel', 'cell'"),
        ({"point_weight": -0.1}, r"point_weight \(lambda\) must be at least 0, got -0.1"),
        ({"point_weight": math.nan}, "point_weight"),
        ({"beta": 0.0}, "beta must be above 0, got 0.0"),
    ],
)
def test_bad_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        LandmarkRule(**wrong)


@pytest.mark.parametrize(
    ("settings", "warnings"),
    [
        ({}, 0),
        ({"weight_gradient": "coupled", "unit": "fraction"}, 0),  # 0.5 · 1.9 = 0.95
        ({"weight_gradient": "coupled", "unit": "fraction", "point_weight": 0.53}, 1),
        ({"weight_gradient": "coupled"}, 1),  # cells
        ({"weight_gradient": "auto", "point_weight": 5.0}, 0),
        ({"weight_gradient": "coupled", "unit": "pixel"}, 1),
        ({"weight_gradient": "coupled", "unit": "fraction", "mode": "eq7"}, 1),  # 0.5 · 1.9²
        ({"weight_gradient": "coupled", "mode": "eq5", "point_weight": 5.0}, 0),
    ],
)
def test_one_warning_where_a_class_may_be_unlearned(settings, warnings, caplog):
    with caplog.at_level(logging.WARNING):
        LandmarkRule(**settings)
    assert [record.message.startswith("weight_gradient 'coupled'") for record in caplog.records] == [True] * warnings

"""Losses of localisation, by hand, by gradient and by bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from simdetr.heads.localisation_losses import (
    check_not_negative,
    check_one_class,
    class_loss,
    contrastive_attention_loss,
    distances,
    foreground_consistency_loss,
    image_classes,
    log_odds,
    mean_where,
)

EARLY = torch.tensor([[[0.0, 0.1, 0.3], [0.2, 0.9, 0.6], [0.1, 0.5, 1.0]]])
LATE = torch.tensor([[[0.0, 0.0, 0.1], [0.1, 0.8, 0.6], [0.0, 0.4, 1.0]]])
KNOWN = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]])
YES, NO = torch.tensor([True]), torch.tensor([False])


def unit_vectors(batch, width, seed=0):
    return F.normalize(torch.randn(batch, 3, width, generator=torch.Generator().manual_seed(seed)).double(), dim=2)


def consistency(early, late, reduction="mean", usable=None, early_padding=None, late_padding=None):
    early_padding = torch.zeros_like(early, dtype=torch.bool) if early_padding is None else early_padding
    late_padding = torch.zeros_like(late, dtype=torch.bool) if late_padding is None else late_padding
    usable = torch.ones(len(early), dtype=torch.bool) if usable is None else usable
    return foreground_consistency_loss(early, late, early_padding, late_padding, usable, reduction)


def test_hinge_of_known_vectors():
    near = distances(KNOWN[:, 0], KNOWN[:, 1], "euclidean")
    far = distances(KNOWN[:, 0], KNOWN[:, 2], "euclidean")
    torch.testing.assert_close(torch.cat([near, far]), torch.tensor([0.632456, 1.414214]))
    leaf = KNOWN.clone().requires_grad_()
    satisfied = contrastive_attention_loss(leaf, YES, 0.5, "euclidean")
    satisfied.backward()
    assert float(satisfied.detach()) == 0 and not leaf.grad.any()
    assert float(contrastive_attention_loss(KNOWN, YES, 1.0, "euclidean")) == pytest.approx(0.218242, abs=1e-6)


def test_cosine_distance_of_known_vectors():
    assert distances(KNOWN[:, 0], KNOWN[:, 1], "cosine").tolist() == [pytest.approx(0.2)]
    assert float(contrastive_attention_loss(KNOWN, YES, 1.0, "cosine")) == pytest.approx(0.2)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_bounds_of_the_hinge(distance):
    same = unit_vectors(5, 4)
    same[:, 2] = same[:, 1]
    every = torch.ones(5, dtype=torch.bool)
    assert float(contrastive_attention_loss(same, every, 0.3, distance)) == pytest.approx(0.3)
    worst = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]])
    assert float(contrastive_attention_loss(worst, YES, 0.3, distance)) == pytest.approx(2.3)
    vectors = unit_vectors(50, 3)
    each = [float(contrastive_attention_loss(row[None], YES, 0.3, distance)) for row in vectors]
    assert 0 <= min(each) <= max(each) <= 2.3


def test_nothing_dropped_leaves_the_distance_to_the_background():
    vectors = unit_vectors(4, 3)
    vectors[:, 0] = vectors[:, 1]
    leaf = vectors.requires_grad_()
    found = contrastive_attention_loss(leaf, torch.ones(4, dtype=torch.bool), 1.5, "euclidean")
    expected = (1.5 - (vectors[:, 1] - vectors[:, 2]).norm(dim=1)).clamp(min=0).mean()
    torch.testing.assert_close(found, expected)
    found.backward()
    assert torch.isfinite(leaf.grad).all()


def test_images_with_an_empty_mask_are_left_out():
    vectors = torch.cat([KNOWN, KNOWN.flip(1), torch.zeros(1, 3, 2)]).requires_grad_()
    both = contrastive_attention_loss(vectors, torch.tensor([True, True, False]), 1.0, "euclidean")
    first = contrastive_attention_loss(vectors, torch.tensor([True, False, False]), 1.0, "euclidean")
    assert float(first.detach()) == pytest.approx(0.218242, abs=1e-6) != float(both.detach())
    none = contrastive_attention_loss(vectors, torch.tensor([False] * 3), 1.0, "euclidean")
    none.backward()
    assert float(none.detach()) == 0 and not vectors.grad.any()


def test_consistency_of_known_maps():
    assert float(consistency(EARLY, LATE, "sum")) == pytest.approx(0.09)
    assert float(consistency(EARLY, LATE, "mean")) == pytest.approx(0.01)
    assert float(consistency(EARLY, EARLY.clone())) == 0


def test_only_early_attention_learns_from_consistency():
    early, late = EARLY.clone().requires_grad_(), LATE.clone().requires_grad_()
    consistency(early, late, "sum").backward()
    torch.testing.assert_close(early.grad, 2 * (EARLY - LATE))
    assert late.grad is None


def test_late_attention_is_resized_to_early():
    late = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(0))
    early = F.interpolate(late[:, None], (6, 6), mode="bilinear")[:, 0]
    assert float(consistency(early, late)) == pytest.approx(0, abs=1e-12)
    assert float(consistency(early + 0.1, late)) == pytest.approx(0.01)


def test_padding_takes_no_part_in_consistency():
    late_padding = torch.tensor([[[False, False, True]] * 2])
    early_padding = late_padding.repeat_interleave(2, 1).repeat_interleave(2, 2)
    early = torch.full((1, 4, 6), 0.5).masked_fill(early_padding, 0.9)
    for stored in (0.0, 1e4):
        late = torch.full((1, 2, 3), 0.25).masked_fill(late_padding, stored)
        found = consistency(early, late, early_padding=early_padding, late_padding=late_padding)
        assert float(found) == pytest.approx(0.0625)


def test_consistency_is_the_mean_over_usable_images():
    early, late = torch.cat([EARLY, EARLY]), torch.cat([LATE, 1 - LATE])
    assert float(consistency(early, late, usable=torch.tensor([True, False]))) == pytest.approx(0.01)
    assert float(consistency(early, late, usable=torch.tensor([False, False]))) == 0
    assert float(consistency(early, late)) > 0.05


def test_class_losses_are_torchs_over_labelled_images():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    targets = [
        {"labels": torch.tensor([2])},
        {"labels": torch.tensor([], dtype=torch.int64)},
        {"labels": torch.ones(2).long()},
    ]
    classes = image_classes(targets, 4, torch.device("cpu"))
    assert classes.labelled.tolist() == [True, False, True]
    assert classes.shown.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    expected = F.cross_entropy(logits[[0, 2]], torch.tensor([2, 1]))
    torch.testing.assert_close(class_loss(logits, classes, "softmax"), expected)
    binary = F.binary_cross_entropy_with_logits(logits[[0, 2]], classes.shown[[0, 2]])
    torch.testing.assert_close(class_loss(logits, classes, "bce"), binary)


@pytest.mark.parametrize("kind", ["softmax", "bce"])
def test_without_labels_the_class_loss_is_zero_and_attached(kind):
    logits = torch.randn(2, 3).requires_grad_()
    classes = image_classes([{"labels": torch.empty(0).long()}] * 2, 3, logits.device)
    loss = class_loss(logits, classes, kind)
    loss.backward()
    assert float(loss.detach()) == 0 and not logits.grad.any()


def test_several_classes_need_bce():
    fine = [{"labels": torch.tensor([1, 1])}, {"labels": torch.empty(0).long()}]
    check_one_class(fine)
    with pytest.raises(ValueError, match=r"image 2 of the batch: .*'softmax', got \[0, 3\]; choose class_loss='bce'"):
        check_one_class([*fine, {"labels": torch.tensor([3, 0, 3])}])


def test_log_odds_are_those_of_the_softmax():
    logits = 3 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_odds(logits).sigmoid(), logits.softmax(dim=1))
    sure = log_odds(torch.tensor([[200.0, 0.0]]))
    assert torch.isfinite(sure).all() and float(sure[0, 0]) > 15 and float(sure[0, 1]) == pytest.approx(-200)
    assert torch.isfinite(log_odds(torch.zeros(1, 1))).all()


def test_gradients():
    vectors = unit_vectors(2, 3).requires_grad_()
    usable = torch.tensor([True, True])
    for distance in ("euclidean", "cosine"):
        assert torch.autograd.gradcheck(lambda z, d=distance: contrastive_attention_loss(z, usable, 2.0, d), (vectors,))
    early = torch.rand(2, 4, 4).double().requires_grad_()
    late = torch.rand(2, 2, 2).double()
    for reduction in ("mean", "sum"):
        assert torch.autograd.gradcheck(lambda a, r=reduction: consistency(a, late, r), (early,))


def test_mean_where():
    values = torch.tensor([1.0, float("nan"), 3.0])
    assert float(mean_where(values, torch.tensor([True, False, True]))) == 2
    assert float(mean_where(values, torch.tensor([False] * 3))) == 0


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_negative_margins_are_refused(value):
    with pytest.raises(ValueError, match=r"^margin must be at least 0, got"):
        check_not_negative({"weight": 0.0, "margin": value})

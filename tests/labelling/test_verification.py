"""Votes of nearest shots against cases worked out by hand and against a plain loop."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from simdetr.labelling.crop_features import CropFeatures
from simdetr.labelling.verification import REASONS, Confusion, Gallery, confusion, neighbours_for, verify

A, B = 0, 1
FOUR = Gallery.of([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]], [A, A, B, B], ["a", "b", "c", "d"])


def random_case(seed=0, shots=40, candidates=200, dim=6, classes=5):
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(classes, dim))
    kinds, wanted = draw.permutation(np.arange(shots) % classes), draw.integers(0, classes, candidates)
    gallery = Gallery.of(centres[kinds] + draw.normal(size=(shots, dim)), kinds, [f"s{i}" for i in range(shots)])
    features = centres[draw.integers(0, classes, candidates)] + draw.normal(size=(candidates, dim))
    return features.astype(np.float32), wanted, gallery


@pytest.mark.parametrize(("shots", "k"), [(1, 1), (2, 1), (3, 2), (5, 2), (10, 4), (30, 10), (31, 10), (3000, 10)])
def test_the_rule_for_k(shots, k):
    assert neighbours_for(shots) == k


def test_no_shot_has_no_k():
    with pytest.raises(ValueError, match="shots_per_class: expected at least 1, got 0"):
        neighbours_for(0)


def test_the_case_worked_out_by_hand():
    assert FOUR.mean == pytest.approx([0.5, 0.5])
    queries = [[0.8, 0.3], [0.45, 0.55], [5, 4.6], [0.5, 0.5]]
    votes = verify(queries, [A, B, A, A], FOUR, k=1)
    assert votes.vote.tolist() == [A, B, A, -2]
    assert votes.reason.tolist() == ["", "", "", "no_direction"]
    everything = verify(queries, [A, B, A, A], FOUR, k=4)
    by_shot = np.full((4, 4), np.nan)
    np.put_along_axis(by_shot, everything.nearest, everything.similarity, axis=1)
    assert by_shot[0] == pytest.approx([0.9806, 0.9806, -0.9806, -0.9806], abs=5e-5)
    assert by_shot[1] == pytest.approx([-1, -1, 1, 1])
    assert by_shot[2] == pytest.approx([0.0465, 0.0465, -0.0465, -0.0465], abs=5e-5)
    assert verify(queries[:1], [A], FOUR, k=2).vote.tolist() == [A]
    raw = verify(queries[2:3], [A], FOUR, k=4, centred=False)
    assert raw.similarity.max() - raw.similarity.min() == pytest.approx(0.81 - 0.68, abs=0.01)
    assert np.isfinite(everything.similarity[:3]).all()


def test_margins_of_the_case():
    votes = verify([[0.8, 0.3], [0.45, 0.55], [5, 4.6]], [A, B, A], FOUR, k=1)
    assert votes.margin == pytest.approx([2 * 0.980581, 2, 2 * 0.046462], abs=1e-5)
    sure = verify([[0.8, 0.3], [0.45, 0.55], [5, 4.6]], [A, B, A], FOUR, k=1, min_margin=0.5)
    assert sure.reason.tolist() == ["", "", "unsure"]
    assert sure.vote.tolist() == [A, B, A]


def test_the_confusion_table():
    near_a, near_b = [0.9, 0.1], [0.1, 0.9]
    # detector, vote, truth: A/A/A keep, A/B/B remove, A/B/A lose, A/A/B keep
    queries = [near_a] * 4 + [near_b] * 3 + [near_b] * 2 + [near_a]
    truth = [A] * 4 + [B] * 3 + [A] * 2 + [B]
    votes = verify(queries, [A] * 10, FOUR, k=1)
    found = confusion(votes, [A] * 10, truth)
    assert found == Confusion(true_kept=4, false_removed=3, true_lost=2, false_kept=1)
    assert (found.precision_before, found.precision_after) == (0.6, 0.8)
    assert found.recall == pytest.approx(0.6667, abs=1e-4)
    assert votes.counts() == {"kept": 5, "other_class": 5}
    assert confusion(votes.kept, [A] * 10, truth) == found


def test_the_confusion_of_nothing_and_of_background():
    nothing = confusion(np.zeros(0, bool), [], [])
    assert np.isnan([nothing.precision_before, nothing.precision_after, nothing.recall]).all()
    background = confusion(np.array([True, False]), [A, A], [-1, -1])
    assert (background.false_kept, background.false_removed) == (1, 1)
    with pytest.raises(ValueError, match="wanted, truth: expected one for each of 2 candidates"):
        confusion(np.array([True, False]), [A], [A])


def test_when_all_shots_vote_every_vote_is_a_tie():
    queries = np.array([[0.8, 0.3], [0.45, 0.55], [0.2, 0.9]], np.float32)
    by_sum = verify(queries, [A, B, B], FOUR, k=4)
    assert by_sum.vote.tolist() == [A, B, B]
    rejected = verify(queries, [A, B, B], FOUR, k=4, ties="reject")
    assert rejected.reason.tolist() == ["tie"] * 3
    assert rejected.vote.tolist() == [-2] * 3
    assert np.isnan(rejected.margin).all()
    assert verify(queries, [A, B, B], FOUR, k=4, ties="lowest").vote.tolist() == [A] * 3


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_equal_sums_are_rejected(distance):
    """On the line of equal distance from both classes rounding must not decide."""
    votes = verify([[0.7, 0.7], [3.3, 3.3], [0.1, 0.1]], [A, A, B], FOUR, k=4, distance=distance)
    assert votes.reason.tolist() == ["tie"] * 3


def test_neither_scale_nor_shift_nor_order_changes_the_votes():
    features, wanted, gallery = random_case()
    votes = verify(features, wanted, gallery, k=3, ties="reject")
    assert 0 < votes.kept.sum() < len(votes) and "tie" in votes.reason
    shift = np.linspace(-2, 3, features.shape[1], dtype=np.float32)
    for change in (lambda x: 7.5 * x, lambda x: 1e-4 * x, lambda x: x + shift):
        other = verify(
            change(features), wanted, Gallery.of(change(gallery.features), gallery.classes, gallery.ids), k=3
        )
        same = verify(features, wanted, gallery, k=3)
        assert (other.vote == same.vote).all() and (other.nearest == same.nearest).all()
        np.testing.assert_allclose(other.similarity, same.similarity, atol=1e-5)
    order = np.random.default_rng(1).permutation(len(gallery))
    shuffled = Gallery.of(gallery.features[order], gallery.classes[order], [gallery.ids[i] for i in order])
    other = verify(features, wanted, shuffled, k=3, ties="reject")
    assert (other.vote == votes.vote).all() and (other.reason == votes.reason).all()
    assert (order[other.nearest] == votes.nearest).all()
    raw = verify(
        features + shift, wanted, Gallery.of(gallery.features + shift, gallery.classes, gallery.ids), centred=False
    )
    assert (raw.vote != verify(features, wanted, gallery, centred=False).vote).any()  # so centring is what does it


@pytest.mark.parametrize("ties", ["similarity", "reject", "lowest"])
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("centred", [True, False])
def test_against_a_plain_loop(ties, distance, centred):
    features, wanted, gallery = random_case(seed=3)
    votes = verify(features, wanted, gallery, k=4, ties=ties, distance=distance, centred=centred, chunk=7)
    shots, mean = gallery.features.astype(float), gallery.features.astype(float).mean(0) * centred
    tied = 0
    for row, feature in enumerate(features.astype(float)):
        q, g = feature - mean, shots - mean
        near = -np.linalg.norm(g - q, axis=1) if distance == "euclidean" else None
        if near is None:
            near = g @ q / np.linalg.norm(g, axis=1) / np.linalg.norm(q)
        nearest = sorted(range(len(shots)), key=lambda i: -near[i])[:4]
        assert votes.nearest[row].tolist() == nearest
        np.testing.assert_allclose(votes.similarity[row], near[nearest], atol=1e-6)
        kinds = gallery.classes[nearest].tolist()
        best = max(map(kinds.count, kinds))
        firsts = sorted({kind for kind in kinds if kinds.count(kind) == best})
        tied += len(firsts) > 1
        sums = [sum(near[i] for i in nearest if gallery.classes[i] == kind) for kind in firsts]
        expected = {"similarity": firsts[int(np.argmax(sums))], "lowest": firsts[0]}.get(ties, -2)
        expected = firsts[0] if len(firsts) == 1 else expected
        assert votes.vote[row] == expected
        assert (votes.reason[row] == "") == (expected == wanted[row])
        if expected != -2:
            others = gallery.classes != expected
            assert votes.margin[row] == pytest.approx(near[~others].max() - near[others].max(), abs=1e-5)
    assert 5 < tied < 150


def test_the_size_of_the_chunks_changes_nothing():
    features, wanted, gallery = random_case(seed=5)
    features[11] = np.nan
    whole = verify(features, wanted, gallery)
    for chunk in (1, 13, 200, 999):
        part = verify(features, wanted, gallery, chunk=chunk)
        for name in ("vote", "reason", "nearest", "similarity", "margin"):
            np.testing.assert_array_equal(getattr(whole, name), getattr(part, name), err_msg=name)


def test_shots_given_twice_come_in_their_order():
    """Eight shots of one feature: rounding of a product must not choose among them."""
    draw = np.random.default_rng(0)
    shot, other = draw.normal(size=384), draw.normal(size=384)
    gallery = Gallery.of([other, *[shot] * 8, other], [B, *[A] * 8, B], [str(i) for i in range(10)])
    queries = draw.normal(size=(50, 384)) + shot
    votes = verify(queries, [A] * 50, gallery, k=3)
    assert votes.nearest.tolist() == [[1, 2, 3]] * 50
    assert votes.kept.all()
    itself = verify(gallery.features, gallery.classes, gallery, k=1)
    assert itself.nearest[:, 0].tolist() == [0, *[1] * 8, 0]
    assert itself.similarity == pytest.approx(1)


def test_negative_shots_reject():
    gallery = Gallery.of([[1, 0], [0.9, 0.1], [0.6, 0.7], [0, 1]], [A, A, -1, B], ["1", "2", "3", "4"])
    votes = verify([[0.6, 0.69], [0.95, 0.05], [0, 0.9]], [A, A, A], gallery, k=1)
    assert votes.vote.tolist() == [-1, A, B]
    assert votes.reason.tolist() == ["negative", "", "other_class"]
    assert verify([[0.6, 0.69]], [-1], gallery, k=1).reason.tolist() == ["unknown_class"]


def test_k_follows_the_class_with_the_fewest_shots():
    features = np.random.default_rng(0).normal(size=(46, 3))
    gallery = Gallery.of(features, [A] * 30 + [B] * 10 + [-1] * 6, ["x"] * 46)
    assert gallery.neighbours == 4
    assert verify(features, [A] * 46, gallery).nearest.shape == (46, 4)
    assert Gallery.of(features[:2], [-1, -1], ["x"] * 2).neighbours == 1
    assert Gallery.of(features[:3], [5, 2, 5], ["x"] * 3).neighbours == 1


def test_a_gallery_smaller_than_k(caplog):
    with caplog.at_level(logging.INFO):
        votes = verify([[0.8, 0.3]], [A], FOUR, k=30)
    assert votes.nearest.shape == (1, 4)
    assert "30 neighbours of 4 shots" in caplog.text


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_a_gallery_of_one_class_says_so(distance, caplog):
    """A single shot is the mean, so it has no direction itself; nothing becomes NaN."""
    gallery = Gallery.of([[1.0, 2.0]], [A], ["x"])
    votes = verify([[3, 4], [0, 1]], [A, B], gallery, distance=distance)
    assert votes.reason.tolist() == ["", "unknown_class"]
    assert np.isinf(votes.margin).all() and np.isfinite(votes.similarity).all()
    assert "one class" in caplog.text


def test_the_first_reason_that_holds_is_given():
    nan = [np.nan, np.nan]
    values = np.array([nan, nan, nan, nan, [0.9, 0.1], [0.5, 0.5], [0.7, 0.7], [0, 1], [0.9, 0.1]], np.float32)
    faults = np.array(["too_small", "outside", "unreadable", "", "", "", "", "", ""])
    wanted = [A, 9, A, A, 9, A, A, A, A]
    votes = verify(CropFeatures(values, faults), wanted, FOUR, k=4, ties="similarity")
    expected = ["too_small", "outside", "unreadable", "unreadable", "unknown_class", "no_direction", "tie"]
    assert votes.reason.tolist() == [*expected, "other_class", ""]
    assert (votes.nearest[:4] == -1).all() and np.isnan(votes.similarity[:4]).all() and (votes.vote[:4] == -2).all()
    assert votes.vote[4] == A  # for pictures of what it looks like
    assert votes.counts() == {"kept": 1} | {name: 1 for name in REASONS if name in expected} | {
        "unreadable": 2,
        "other_class": 1,
    }


def test_no_candidates():
    votes = verify(np.zeros((0, 2)), [], FOUR)
    assert len(votes) == 0 and votes.nearest.shape == (0, 1) and votes.counts() == {"kept": 0}
    assert len(verify([], [], FOUR)) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.zeros((2, 3))}, r"features: expected shape \[M, 2\] as the gallery's, got \(2, 3\)"),
        ({"features": np.zeros(2)}, r"features: expected shape \[M, 2\]"),
        ({"wanted_classes": [A]}, r"wanted_classes: expected one for each of 2 candidates, got shape \(1,\)"),
        ({"k": 0}, "k: expected at least 1, got 0"),
        ({"chunk": 0}, "chunk: expected at least 1, got 0"),
        ({"ties": "first"}, "ties: expected one of similarity, reject, lowest, got 'first'"),
        ({"distance": "dot"}, "distance: expected one of cosine, euclidean, got 'dot'"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"features": np.ones((2, 2)), "wanted_classes": [A, B], "gallery": FOUR}
    with pytest.raises(ValueError, match=message):
        verify(**(arguments | change))


@pytest.mark.parametrize(
    ("features", "classes", "ids", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), [], r"features: expected \[n, D\] of at least one shot, got \(0, 2\)"),
        (np.zeros(3), [0, 1, 2], ["x"] * 3, r"features: expected \[n, D\]"),
        (np.zeros((2, 2)), [0], ["x"] * 2, r"classes, ids: expected one for each of the 2 shots, got \(1,\) and 2"),
        (np.zeros((2, 2)), [0, 1], ["x"], r"got \(2,\) and 1"),
        (np.zeros((2, 2)), [0, -2], ["x"] * 2, "classes: expected integers from -1, got int64 down to -2"),
        (np.zeros((2, 2)), [0.5, 1], ["x"] * 2, "classes: expected integers from -1, got float64"),
        (np.full((2, 2), np.nan), [0, 1], ["x"] * 2, r"of at least one shot, got \(0, 2\)"),
    ],
)
def test_bad_galleries(features, classes, ids, message):
    with pytest.raises(ValueError, match=message):
        Gallery.of(features, classes, ids)


def test_shots_without_a_feature_are_left_out(caplog):
    values = np.array([[1, 0], [np.nan, np.nan], [0, 1]], np.float32)
    gallery = Gallery.of(CropFeatures(values, np.array(["", "too_small", ""])), [A, 7, B], ["a", "lost", "b"])
    assert gallery.ids == ("a", "b") and gallery.classes.tolist() == [A, B]
    assert "1 of 3 shots" in caplog.text and "lost" in caplog.text and "[7]" in caplog.text
    assert verify([[1, 0]], [7], gallery).reason.tolist() == ["unknown_class"]
    with pytest.raises(ValueError, match=r"features: expected finite numbers, got others in row 1 \('lost'\)"):
        Gallery(values, np.array([A, 7, B]), ("a", "lost", "b"))

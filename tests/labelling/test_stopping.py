"""Errors left against hand-computed ones, a brute-force jackknife and a thousand simulated audits; rules by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.labels import Labels
from simdetr.labelling.annotator import SimulatedAnnotator
from simdetr.labelling.stopping import (
    AcceptRate,
    Audit,
    Budget,
    Decision,
    ErrorBound,
    ErrorEstimate,
    Kappa,
    Round,
    box_kappa,
    draw_audit,
    errors_left,
)


def detections(scores_by_image):
    """Labels of images with boxes of these scores."""
    rows = [
        ImageLabels.build(f"{i:05d}", (9, 9), [(0, 0, 1, 1)] * len(scores), np.zeros(len(scores)), scores)
        for i, scores in enumerate(scores_by_image)
    ]
    return Labels.from_images(rows, [Category(1, "object")])


def audit_of(images):
    """From per image its detections as (score, wrong), and its missed objects."""
    rows = [(i, score, wrong) for i, (found, _) in enumerate(images) for score, wrong in found]
    owner, scores, wrong = zip(*rows, strict=True) if rows else ((), (), ())
    return Audit(np.array(owner), np.array(scores), np.array(wrong), np.array([missed for _, missed in images]))


RIGHT, WRONG = (0.5, False), (0.5, True)
FOUR = [([RIGHT, WRONG], 1), ([RIGHT, RIGHT], 0), ([WRONG, RIGHT], 0), ([RIGHT, RIGHT], 0)]


def test_estimate_by_hand():
    found = errors_left(audit_of(FOUR), detections([[0.5, 0.5]] * 10))
    assert (found.wrong, found.missed, found.total) == (5, 2.5, 7.5)  # a quarter of 20, a quarter of 10
    assert 0 < found.low < 7.5 < found.high
    assert (found.confidence, found.images, found.detections) == (0.95, 10, 20)
    assert found.basis == "random audit of 4 of 14 images with 8 detections in 1 strata of the score, 3 errors found"


def test_wrong_detections_by_score():
    images = [([(0.2, True)] * 6 + [(0.8, False)] * 6, 0)] * 10
    found = errors_left(audit_of(images), detections([[0.8, 0.8]] * 5 + [[0.2]] * 2))
    assert found.wrong == 2
    assert found.low <= 2 <= found.high
    unsure = audit_of([([(0.5, True)] * 6 + [(0.5, False)] * 6, 0)] * 10)
    assert errors_left(unsure, detections([[0.5] * 12])).wrong == 6


def test_interval_is_that_of_a_gamma_with_the_jackknife_variance():
    rng = np.random.default_rng(0)
    images = []  # every other one is without wrong detections
    for index in range(15):
        wrong = rng.random(rng.integers(2, 6)) < (0.8 if index % 2 else 0)
        images.append(([(0.5, bool(w)) for w in wrong], int(rng.integers(0, 3))))
    left = detections([[0.5] * 3] * 40)

    def estimate(some):
        found = [wrong for boxes, _ in some for _, wrong in boxes]
        return 120 * sum(found) / len(found) + 40 * np.mean([missed for _, missed in some])

    total = estimate(images)
    without = np.array([estimate(images[:i] + images[i + 1 :]) for i in range(15)])
    variance = 14 / 15 * ((without - total) ** 2).sum() * (1 + 15 / 40)
    variance *= (stats.t.ppf(0.975, 14) / stats.norm.ppf(0.975)) ** 2
    weight = max(40 / 15, 120 / sum(len(boxes) for boxes, _ in images))
    mean, variance = total + 0.5 * weight, variance + 0.5 * weight**2
    expected = stats.gamma.ppf([0.025, 0.975], mean**2 / variance, scale=variance / mean)
    found = errors_left(audit_of(images), left)
    assert found.total == pytest.approx(total)
    np.testing.assert_allclose([found.low, found.high], expected, rtol=1e-9)


def test_missed_objects_are_estimated_without_bias():
    missed = np.array([0, 3, 1, 0, 7, 2])
    differences = []
    for drawn in itertools.combinations(range(6), 2):
        left = detections([[]] * 4)
        found = errors_left(Audit(np.zeros(0), np.zeros(0), np.zeros(0), missed[list(drawn)]), left)
        differences.append(found.missed - (missed.sum() - missed[list(drawn)].sum()))
    assert sum(differences) == pytest.approx(0)


def test_audits_without_errors():
    clean = [([RIGHT] * 3, 0)] * 50
    found = errors_left(audit_of(clean), detections([[0.5] * 3] * 1000))
    assert (found.total, found.low) == (0, 0)
    assert 2.4 * 1000 / 50 < found.high < 3 * 1000 / 50  # the rule of three, which is one-sided at 95 %
    more = errors_left(audit_of(clean * 2), detections([[0.5] * 3] * 1000))
    assert more.high == pytest.approx(found.high / 2)


def test_nothing_left_and_nothing_detected():
    done = errors_left(audit_of(FOUR), detections([]))
    assert (done.total, done.low, done.high, done.images) == (0, 0, 0, 0)
    assert done.basis.endswith("; none is left")
    blind = errors_left(audit_of([([], 1), ([], 0)]), detections([[0.5], []]))
    assert (blind.wrong, blind.missed) == (0, 1)
    assert blind.basis.endswith("none of them has a detection, so those left are taken to be right")


def test_more_confidence_and_smaller_audits_widen_it():
    left = detections([[0.5, 0.5]] * 100)
    found = [errors_left(audit_of(FOUR), left, confidence) for confidence in (0.8, 0.95, 0.99)]
    widths = [estimate.high - estimate.low for estimate in found]
    assert widths == sorted(widths)
    many = errors_left(audit_of(FOUR * 5), left)
    assert many.total == found[1].total
    assert many.high - many.low < widths[1] / 1.8
    turned = errors_left(audit_of(FOUR[::-1]), left)
    assert (turned.low, turned.high) == pytest.approx((found[1].low, found[1].high))


def simulated(rng, images, audited, rate, shape, informative):
    """One audit, what is left, and the errors in it: images differ by a gamma variable of this shape."""
    hard = np.ones(images) if shape == math.inf else rng.gamma(shape, 1 / shape, images)
    counts = rng.poisson(5 * rng.gamma(3, 1 / 3, images))
    owner = np.repeat(np.arange(images), counts)
    scores = rng.beta(3, 1.5, len(owner)).astype(np.float32)
    share = (1 - scores) * 3 if informative else 1.0
    wrong = rng.random(len(owner)) < np.minimum(0.6 * rate * share * hard[owner], 0.95)
    missed = rng.poisson(2 * rate * hard)
    order = rng.permutation(images)
    seen = np.zeros(images, bool)
    seen[order[:audited]] = True
    new = np.cumsum(seen) - 1
    here = seen[owner]
    audit = Audit(new[owner[here]], scores[here], wrong[here], missed[seen])
    boxes = int((~here).sum())
    left = Labels(
        image_ids=NAMES[: images - audited],
        sizes_hw=np.full((images - audited, 2), 9),
        offsets=np.concatenate([[0], np.cumsum(counts[~seen])]),
        boxes_xyxy=np.zeros((boxes, 4), np.float32),
        classes=np.zeros(boxes, np.int64),
        scores=scores[~here],
        categories=(Category(1, "object"),),
        areas=np.zeros(boxes),
        crowd=np.zeros(boxes, bool),
    )
    return audit, left, int(wrong[~here].sum()), int(missed[~seen].sum())


NAMES = tuple(str(i) for i in range(2000))


@pytest.mark.parametrize(
    "setting",
    [
        (500, 20, 0.005, 0.5, True),  # six audits of ten see no error at all
        (500, 40, 0.03, 0.5, True),
        (800, 60, 0.1, 0.5, False),
        (800, 100, 0.3, 2.0, True),
        (1000, 200, 0.02, math.inf, False),
    ],
)
def test_intervals_cover_the_errors_left(setting):
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        audit, left, wrong, missed = simulated(rng, *setting)
        found = errors_left(audit, left)
        covered += found.low <= wrong + missed <= found.high
    assert 920 <= covered <= 980


def test_counting_detections_one_by_one_would_not_cover():
    """The reason for all this: exact binomial intervals, as if wrong detections were spread evenly over images."""
    rng, by_detection, by_image = np.random.default_rng(2), 0, 0
    for _ in range(200):
        audit, left, wrong, _ = simulated(rng, 500, 60, 0.3, 0.5, False)
        rate = stats.binomtest(int(audit.wrong.sum()), len(audit.wrong)).proportion_ci()
        by_detection += rate.low * len(left.scores) <= wrong <= rate.high * len(left.scores)
        found = errors_left(Audit(audit.owner, audit.scores, audit.wrong, np.zeros(60)), left)
        by_image += found.low <= wrong <= found.high
    assert by_detection < 0.75 * 200
    assert by_image > 0.9 * 200


def test_an_audit_from_inspections():
    rng = np.random.default_rng(3)
    truths, proposals = [], []
    for index in range(12):
        corners = rng.uniform(0, 80, (4, 2))
        boxes = np.concatenate([corners, corners + 10], axis=1)
        truths.append(ImageLabels.build(str(index), (100, 100), boxes, np.zeros(4)))
        shown = np.concatenate([boxes[: rng.integers(0, 5)], rng.uniform(0, 10, (2, 4)) + np.array([0, 0, 80, 80])])
        proposals.append(ImageLabels.build(str(index), (100, 100), shown, np.zeros(len(shown)), rng.random(len(shown))))
    labels = Labels.from_images(proposals, [Category(1, "object")])
    drawn = draw_audit(labels.image_ids, 5, seed=0)
    found = [SimulatedAnnotator().inspect(truths[int(i)], proposals[int(i)]) for i in drawn]
    audit = Audit.of(labels, found)
    assert audit.missed.tolist() == [len(inspection.drawn) for inspection in found]
    assert audit.wrong.sum() == 10  # the two invented ones of each
    for row, image_id in enumerate(drawn):
        np.testing.assert_array_equal(audit.scores[audit.owner == row], proposals[int(image_id)].scores)
        assert audit.wrong[audit.owner == row][-2:].all()
    rest = labels.select([i for i in labels.image_ids if i not in drawn])
    estimate = errors_left(audit, rest)
    assert estimate.wrong == pytest.approx(len(rest.scores) * 10 / len(audit.scores))
    with pytest.raises(ValueError, match="inspections: expected each image once"):
        Audit.of(labels, [found[0], found[0]])
    shorter = labels.sharpened(0.5, 1)
    with pytest.raises(ValueError, match=r"inspections: expected a verdict on each of the \d detections on '\d+', got"):
        Audit.of(shorter, found)


def test_audits_are_drawn_evenly_and_alike():
    ids = [str(i) for i in range(10)]
    assert draw_audit(ids, 4, seed=1) == draw_audit(ids[::-1], 4, seed=1)
    assert draw_audit(ids, 4, seed=1) != draw_audit(ids, 4, seed=2)
    assert sorted(draw_audit(ids, 99, seed=0)) == ids
    assert draw_audit(ids, 0, seed=0) == ()
    counts = np.bincount([int(i) for seed in range(1000) for i in draw_audit(ids, 3, seed)])
    assert stats.chisquare(counts).pvalue > 0.001
    with pytest.raises(ValueError, match="count: expected at least 0, got -1"):
        draw_audit(ids, -1, seed=0)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([], [], [], [0]), "missed: expected at least 2 audited images, got 1"),
        (([0], [0.5], [], [0, 0]), "owner, scores, wrong: expected one per detection, got 1, 1 and 0"),
        (([2], [0.5], [True], [0, 0]), "owner: expected images 0 to 1, got 2"),
        (([1], [0.5], [True], [0, -1]), "missed: expected counts of at least 0, got -1"),
        (([1], [np.nan], [True], [0, 0]), "scores: expected 0 to 1"),
    ],
)
def test_audits_of_bad_input(columns, message):
    with pytest.raises(ValueError, match=message):
        Audit(*(np.array(column) for column in columns))


def test_confidence_of_bad_input():
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="confidence: expected above 0 and below 1"):
            errors_left(audit_of(FOUR), detections([[0.5]]), confidence)


def spent(images=10, seconds=60.0, **counts):
    return Round(images=images, seconds=seconds, **counts)


def test_budget():
    history = [spent(), spent()]
    assert Budget(images=20).stop(history) == Decision(True, "20 of 20 images are spent")
    assert not Budget(images=21).stop(history).stop
    assert Budget(seconds=120).stop(history).stop
    both = Budget(images=100, seconds=100).stop(history)
    assert both == Decision(True, "20 of 100 images and 120 of 100 seconds are spent")
    assert not Budget(images=1).stop([]).stop


def test_accept_rate():
    good, fair, bad = (spent(accepted=a, corrected=50 - a // 2, rejected=50 - a + a // 2) for a in (98, 92, 50))
    assert good.accept_rate == 0.98
    assert AcceptRate().stop([bad, good, fair]) == Decision(
        True, "accepted 95.0% in the last 2 rounds, to stop at 95.0%"
    )
    assert not AcceptRate().stop([good, bad]).stop
    assert not AcceptRate().stop([good]).stop
    nothing = AcceptRate().stop([good, spent(drawn=9)])
    assert nothing == Decision(False, "1 of the last 2 rounds have proposals to accept")


def test_round_counts_what_a_person_did():
    truth = ImageLabels.build("a", (9, 9), [(0, 0, 4, 4), (5, 5, 9, 9)], [0, 0])
    shown = ImageLabels.build("a", (9, 9), [(0, 0, 4, 4), (0, 5, 4, 9)], [1, 0])
    person = SimulatedAnnotator(draw_seconds=(4, 4))
    done = Round.of([person.inspect(truth, shown), person.inspect(truth, truth)])
    assert done == Round(
        images=2, seconds=pytest.approx(4 * 1.6 + 1.6 + 4), accepted=2, corrected=1, rejected=1, drawn=1
    )
    assert done.accept_rate == 0.5


def test_kappa_of_boxes_by_hand(make_labels):
    before = make_labels(
        {
            "a": [(0, 0, 10, 10, 0, 0.9), (20, 0, 30, 10, 1, 0.9), (40, 0, 50, 10, 0, 0.9), (60, 0, 70, 10, 0, 0.1)],
            "b": [(0, 0, 10, 10, 1, 0.2)],
        },
        (1, 2),
    )
    after = make_labels(
        {
            "b": [(50, 50, 60, 60, 1, 0.3), (80, 0, 90, 10, 1, 0.8)],
            "a": [(0, 0, 10, 9, 0, 0.7), (20, 0, 30, 8, 0, 0.9), (60, 0, 70, 10, 0, 0.6), (40, 4, 50, 14, 0, 0.2)],
        },
        (1, 2),
    )
    # a: 0-0, 1-0, 0-none (IoU below .5, so two places: 0-none, none-none), none-0; b: none-none twice, none-1
    said = ([0, 1, 0, 2, 2, 2, 2, 2], [0, 0, 2, 2, 0, 2, 2, 1])
    assert box_kappa(before, after) == pytest.approx(cohen_kappa_score(*said))
    assert box_kappa(after, before) == pytest.approx(cohen_kappa_score(*said))
    assert box_kappa(before, before) == 1


def test_kappa_tells_agreement_of_a_single_class(make_labels):
    rng = np.random.default_rng(0)
    scores = rng.random((2, 200))

    def labels(values):
        return make_labels({str(i): [(0, 0, 10, 10, 0, score)] for i, score in enumerate(values)})

    near = np.clip(scores[0] + rng.normal(0, 0.01, 200), 0, 1)
    assert box_kappa(labels(scores[0]), labels(near)) > 0.9
    assert abs(box_kappa(*map(labels, scores))) < 0.2
    assert box_kappa(labels([]), labels([])) == 1
    with pytest.raises(ValueError, match="after: expected predictions on the images of before"):
        box_kappa(labels(scores[0]), labels(near[:5]))
    with pytest.raises(ValueError, match="after: expected the categories of before"):
        box_kappa(make_labels({"a": []}), make_labels({"a": []}, (1, 2)))


def test_kappa_rule(make_labels):
    same, other = make_labels({"a": [(0, 0, 9, 9, 0)]}), make_labels({"a": [(50, 50, 90, 90, 0)]})
    rounds = [spent(predictions=labels) for labels in (other, same, same, same, same)]
    assert Kappa().stop(rounds) == Decision(True, "successive detectors agree with kappa 1.000, to stop at 0.990")
    assert not Kappa().stop(rounds[:4]).stop  # the change from the first is among three comparisons
    assert Kappa(comparisons=2).stop(rounds[:4]).stop
    missing = Kappa().stop([*rounds, spent()])
    assert missing == Decision(False, "3 of 4 rounds have predictions to compare")


def test_error_bound():
    def left(high, found=1000):
        return spent(estimate=ErrorEstimate(1, 1, 2, 0, high, 0.95, "", 100, found))

    assert ErrorBound(errors=50, rounds=1).stop([left(90), left(50)]).stop
    assert not ErrorBound(errors=50, rounds=1).stop([left(50), left(50.1)]).stop
    assert not ErrorBound(errors=50).stop([left(90), left(50)]).stop
    assert not ErrorBound(errors=50).stop([left(50)]).stop
    by_share = ErrorBound(share=0.05).stop([left(90), left(40), left(50)])
    assert by_share == Decision(True, "at most 50 errors are left (95% interval), to stop at 50 in 2 rounds in a row")
    assert not ErrorBound(share=0.05).stop([left(40), left(50, found=900)]).stop
    assert "0 of the last 2 rounds have an estimate" in ErrorBound(errors=1).stop([spent()]).reason


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (Budget, {}, "images, seconds: expected at least one limit, got none"),
        (Budget, {"images": 0}, "images: expected above 0, got 0"),
        (Budget, {"seconds": math.nan}, "seconds: expected above 0, got nan"),
        (AcceptRate, {"rate": 1.1}, "rate: expected above 0, at most 1, got 1.1"),
        (AcceptRate, {"rounds": 0}, "rounds: expected at least 1, got 0"),
        (Kappa, {"agreement": 0.0}, "agreement: expected above 0, at most 1, got 0.0"),
        (Kappa, {"comparisons": 0}, "comparisons: expected at least 1, got 0"),
        (ErrorBound, {}, "errors, share: expected one of the two, got None and None"),
        (ErrorBound, {"errors": 1, "share": 0.1}, "errors, share: expected one of the two, got 1 and 0.1"),
        (ErrorBound, {"errors": 0}, "errors, share: expected a target above 0, got 0"),
        (ErrorBound, {"errors": 1, "rounds": 0}, "rounds: expected at least 1, got 0"),
    ],
)
def test_rules_of_bad_input(rule, options, message):
    with pytest.raises(ValueError, match=message):
        rule(**options)


def test_every_rule_goes_on_without_rounds():
    for rule in (Budget(images=1), AcceptRate(), Kappa(), ErrorBound(errors=1)):
        assert not rule.stop([]).stop

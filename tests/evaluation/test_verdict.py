"""Answers for scores whose answer is known: planted gains, losses, noise, saturation; labels saved by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from simdetr.evaluation.compare import difference_table, paired_differences
from simdetr.evaluation.early_warning import MiningFigures
from simdetr.evaluation.intervals import Interval
from simdetr.evaluation.verdict import Comparison, Evidence, LabelsSaved, costs_of, labels_saved, verdict

COUNTS = {0.01: 50, 0.1: 500, 1.0: 5000}


def rows_of(scores, metric="AP"):
    """{(arm, budget): [AP in percent by seed]} -> rows."""
    return [
        {
            "initialisation": arm,
            "label_budget": budget,
            "seed": seed,
            "labels": COUNTS[budget],
            "images": COUNTS[budget] // 5,
            "seconds": 10.0,
            "device": "cpu, 1 thread",
            metric: value / 100,
        }
        for (arm, budget), values in scores.items()
        for seed, value in enumerate(values)
    ]


def answer(scores, evidence=None, draws=None):
    rows = rows_of(scores)
    return verdict(rows, paired_differences(rows, "backbone", draws, 100), "stage2", "backbone", evidence)


BASE = [20.0, 21.0, 19.5]


def test_a_gain_in_every_seed_pays():
    found = answer({("backbone", 0.1): BASE, ("stage2", 0.1): [26.0, 27.2, 25.3]})
    assert found.answer == "pays"
    assert found.sentence.startswith("Pretraining pays: stage2 beats backbone (10 %: +6.0 AP (+5.5 to +6.5, seeds))")


def test_what_is_no_pretraining_is_not_called_so():
    rows = rows_of({("backbone", 0.1): BASE, ("random", 0.1): [1.0, 1.2, 0.9]})
    blank = Evidence(MiningFigures(500, 3.0, 0.6, 64, 60.0))
    found = verdict(rows, paired_differences(rows, "backbone"), "random", "backbone", blank)
    assert found.sentence.startswith("Starting from random does not pay here") and not found.reasons
    assert found.sentence.endswith("; nothing in the labels, the boxes or the scores says why.")


def test_no_difference_does_not_pay_and_says_why():
    blank = MiningFigures(500, 3.0, 0.6, 64, 60.0)
    found = answer({("backbone", 0.1): BASE, ("stage2", 0.1): [20.1, 21.0, 19.4]}, Evidence(blank))
    assert found.answer == "does not pay"
    assert (
        "Pretraining does not pay here" in found.sentence and "because 60% of the images have no prop" in found.sentence
    )
    worse = answer({("backbone", 0.1): BASE, ("stage2", 0.1): [15.0, 16.1, 14.4]})
    assert worse.answer == "does not pay" and "-5.0 AP" in worse.sentence


def test_noise_cannot_tell_and_asks_for_seeds():
    found = answer({("backbone", 0.1): BASE, ("stage2", 0.1): [24.0, 20.0, 23.5]})
    assert found.answer == "cannot tell yet"
    assert any("about 9 seeds are likely to tell" in reason for reason in found.reasons)
    single = answer({("backbone", 0.1): [20.0], ("stage2", 0.1): [30.0]})
    assert single.answer == "cannot tell yet" and any("one seed" in reason for reason in single.reasons)


def test_objects_that_are_found_and_not_named_are_a_reason():
    """AP is as before, but of all objects many more are found."""
    scores = {("backbone", 0.1): [2.3, 2.6, 2.0], ("stage2", 0.1): [2.9, 2.5, 2.2]}
    recall = {("backbone", 0.1): [11.0, 12.0, 10.5], ("stage2", 0.1): [17.0, 18.1, 17.2]}
    rows = [one | other for one, other in zip(rows_of(scores), rows_of(recall, "AR@100"), strict=True)]
    found = verdict(rows, paired_differences(rows, "backbone"), "stage2", "backbone")
    assert found.answer == "cannot tell yet"
    assert "10 %: stage2 finds more of the objects whatever their class (AR@100 +6.3, +5.3 to +7.2 over seeds)" in str(
        found.reasons
    )
    assert "finds more" not in str(answer(scores).reasons)  # nothing is known of recall there


def test_few_validation_images_can_take_an_answer_back():
    scores = {("backbone", 0.1): BASE, ("stage2", 0.1): [26.0, 27.2, 25.3]}
    rng = np.random.default_rng(0)
    draws = {}
    for (arm, _), values in scores.items():
        for seed, value in enumerate(values):
            noise = rng.normal(0, 0.05, 500)  # of each training by itself, so also of their difference
            draws["10 %", arm, seed] = dict.fromkeys(("AP", "AP50", "AP75"), value / 100 + noise)
    assert answer(scores).answer == "pays"
    assert answer(scores, draws=draws).answer == "cannot tell yet"


def test_arms_that_learn_nothing_tell_nothing():
    found = answer({("backbone", 0.01): [0.1, 0.1, 0.1], ("stage2", 0.01): [0.3, 0.31, 0.29]})
    assert found.answer == "cannot tell yet" and "neither arm learns much" in found.reasons[0]


def test_budgets_are_judged_one_by_one_and_a_saturated_baseline_is_named():
    scores = {
        ("backbone", 0.01): BASE,
        ("stage2", 0.01): [26.0, 27.2, 25.3],
        ("backbone", 0.1): [40.0, 40.2, 40.1],
        ("stage2", 0.1): [40.0, 40.3, 40.0],
    }
    found = answer(scores)
    assert found.by_budget == {"1 %": "pays", "10 %": "does not pay"}
    assert found.answer == "pays" and "pays with 1 % of the labels (10 %: does not pay)" in found.sentence
    flat = {("backbone", 0.01): [39.0, 39.2], ("stage2", 0.01): [39.0, 39.1]}
    flat |= {("backbone", 0.1): [40.0, 40.2], ("stage2", 0.1): [40.0, 40.1]}
    assert any("it is saturated" in reason for reason in answer(flat).reasons)


def test_stages_that_made_the_labels_worse_are_a_reason():
    same = {("backbone", 0.1): BASE, ("stage2", 0.1): BASE}
    worse = answer(same, Evidence(stage_recall=(0.5, 0.4), stage_quality=(0.2, 0.1)))
    assert any(reason.startswith("self-training made the labels worse") for reason in worse.reasons)
    better = answer(
        {("backbone", 0.1): BASE, ("stage2", 0.1): [26.0, 27.2, 25.3]},
        Evidence(stage_recall=(0.4, 0.5), stage_quality=(0.1, 0.2)),
    )
    assert any(reason.startswith("self-training made the labels better") for reason in better.reasons)


def test_labels_saved_are_interpolated_in_the_logarithm_and_bounded_beyond_what_was_measured():
    scores = {("backbone", 0.01): [10.0], ("backbone", 0.1): [20.0], ("backbone", 1.0): [30.0]}
    scores |= {("stage2", 0.01): [15.0], ("stage2", 0.1): [30.0], ("stage2", 1.0): [35.0]}
    halfway, exact, beyond = labels_saved(rows_of(scores), "backbone")
    assert halfway.needed == pytest.approx(math.sqrt(50 * 500)) and str(halfway) == "3.2 times as many"
    assert (exact.needed, exact.bound) == (pytest.approx(5000), "") and str(exact) == "10.0 times as many"
    assert (beyond.needed, beyond.bound, str(beyond)) == (5000, "at least", "more than were measured")
    (lower,) = labels_saved(rows_of({("backbone", 0.1): [20.0], ("stage2", 0.1): [15.0]}), "backbone")
    assert str(lower) == "at most 1.0 times as many"


def test_labels_saved_have_an_interval_over_images():
    scores = {("backbone", 0.01): [10.0], ("backbone", 0.1): [20.0], ("stage2", 0.01): [15.0]}
    draws = {
        (budget, arm, 0): {"AP": np.full(200, ap)}
        for budget, arm, ap in (("1 %", "backbone", 0.1), ("10 %", "backbone", 0.2))
    }
    draws["1 %", "stage2", 0] = {"AP": np.linspace(0.12, 0.18, 200)}
    (saved,) = labels_saved(rows_of(scores), "backbone", draws)
    assert saved.images.covers == "images" and 1 < saved.images.low < saved.times < saved.images.high < 10


def test_differences_are_paired_by_seed():
    rows = rows_of({("backbone", 0.1): [10.0, 30.0], ("stage2", 0.1): [12.0, 33.0]})
    (found,) = [one for one in paired_differences(rows[1:], "backbone") if one.metric == "AP"]
    assert found.by_seed == {1: pytest.approx(3.0)} and found.seeds is None  # the first seed has no partner
    (both,) = paired_differences(rows, "backbone")
    assert both.mean == pytest.approx(2.5)
    assert both.seeds.high - both.seeds.low == pytest.approx(2 * 12.706 * 0.5, rel=1e-3)
    assert "| 10 % | stage2 | +2.5 | 2 | -3.9 to +8.9 | – | – |" in difference_table([both])


def test_the_text_has_answer_table_cost_and_what_intervals_cover():
    rows = rows_of({("backbone", 0.1): BASE, ("stage2", 0.1): [26.0, 27.2, 25.3]})
    differences = paired_differences(rows, "backbone")
    found = Comparison(
        rows,
        {"backbone": "weights", "stage2": "a detector"},
        "backbone",
        "stage2",
        differences,
        [LabelsSaved("10 %", "stage2", 500, 2000, "at least")],
        {"stage2": verdict(rows, differences, "stage2", "backbone")},
        costs_of(rows, {"backbone": 0.0, "stage2": 3600.0}),
        ["only 50 images"],
    )
    text = found.text()
    assert text.startswith("**Pretraining pays") and "| 10 % | backbone | 3 | 20.2 ± 0.8 |" in text
    assert "stage2: 3,600 s of pretraining, 10 s per fine-tuning (cpu, 1 thread)" in text
    assert "at least 4.0 times" in text and "None covers another pretraining" in text and "only 50 images" in text
    assert json.dumps(rows) and str(Interval(-1.25, 2.0, "seeds")) == "-1.2 to +2.0"

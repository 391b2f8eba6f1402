from __future__ import annotations

import pytest

from simdetr.labelling.choices import NUM_VIEWS, AutolabelSettings, LoopSettings, SelectionSettings
from simdetr.labelling.consensus import VIEWS


def test_there_are_as_many_views_as_can_be_asked_for():
    assert len(VIEWS) == NUM_VIEWS


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"agreement": 5}, "agreement: expected a number from 0 to 1, got 5"),
        ({"min_score": -0.1}, "min_score: expected a number from 0 to 1, got -0.1"),
        ({"precision": float("nan")}, "precision: expected a number from 0 to 1, got nan"),
        ({"per_shot": 0}, "per_shot: expected at least 1, got 0"),
        ({"neighbours": 0}, "neighbours: expected at least 1, got 0"),
        ({"looks_per_image": 0.0}, "looks_per_image: expected a positive number, got 0.0"),
        ({"seen_again": NUM_VIEWS + 1}, "seen_again: expected 0 to 3, the number of views, got 4"),
    ],
)
def test_numbers_of_autolabel_outside_their_range_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        AutolabelSettings(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 0}, "clusters: expected at least 1, got 0; leave it out"),
        ({"budget": 0}, "budget: expected at least 1, got 0"),
        ({"top": 0}, "top: expected at least 1, got 0"),
        ({"min_score": 1.5}, "min_score: expected 0 to 1, got 1.5"),
        ({"size": "median"}, "size: expected one of 'mean', 'max', 'sum', got 'median'"),
        ({"aggregate": "min"}, "aggregate: expected one of 'top', 'mean', 'max', 'sum', got 'min'"),
        ({"centres_from": "all"}, "centres_from: expected one of 'pool', 'labelled', got 'all'"),
    ],
)
def test_choices_of_an_order_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SelectionSettings(**options)


def test_errors_left_need_audited_images():
    for wrong in ({"stop_share": 0.05}, {"audited_per_round": 1}):
        with pytest.raises(ValueError, match="audited_per_round: expected 0, or at least 2"):
            LoopSettings(**wrong)
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        LoopSettings(rounds=0)

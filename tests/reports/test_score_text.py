from __future__ import annotations

import pytest

from simdetr.reports.score_text import shown_score


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("AP", 0.1234, " 12.3 %"),
        ("point_error_px", 4.26, "  4.3 px"),
        ("point_error_percent_median", 1.5, "  1.5 % of the diagonal"),
        ("points", 38.0, "   38"),
        ("threshold", 0.255, "0.255"),
        ("MaxBoxAccV2", float("nan"), "    –"),
    ],
)
def test_scores_are_shown_with_their_units(name, value, text):
    assert shown_score(name, value) == text

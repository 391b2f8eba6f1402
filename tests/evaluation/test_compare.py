import math
import statistics

import pytest

from simdetr.evaluation.compare import comparison_table, format_mean, summarise_seeds


def row(initialisation, budget, seed, ap, **more):
    return {"initialisation": initialisation, "label_budget": budget, "seed": seed, "AP": ap, **more}


ROWS = [
    row("scratch", 0.01, 0, 0.10, AP50=0.2),
    row("pretrained", 0.01, 0, 0.20, AP50=0.3),
    row("scratch", 0.01, 1, 0.14, AP50=0.2),
    row("pretrained", 0.01, 1, 0.21, AP50=0.5),
    row("pretrained", 0.1, 0, 0.4, AP50=0.7),
]


def test_table_shows_means_deviations_and_gains():
    lines = comparison_table(ROWS).splitlines()
    assert lines[0] == "| labels | initialisation | seeds | AP | AP50 | AP gain over scratch |"
    assert lines[1] == "|---|---|--:|--:|--:|--:|"
    assert lines[2] == "| 1 % | scratch | 2 | 12.0 ± 2.8 | 20.0 ± 0.0 |  |"
    assert lines[3] == "| 1 % | pretrained | 2 | 20.5 ± 0.7 | 40.0 ± 14.1 | +8.5 |"
    assert lines[4] == "| 10 % | pretrained | 1 | 40.0 | 70.0 |  |"
    assert len(lines) == 5


def test_a_backbone_with_weights_is_the_baseline_where_there_is_one():
    rows = [{**row, "initialisation": row["initialisation"].replace("scratch", "backbone only")} for row in ROWS]
    lines = comparison_table(rows).splitlines()
    assert lines[0].endswith("AP gain over backbone only |")
    assert lines[3].endswith("| +8.5 |")


def test_summary_equals_the_standard_library():
    values = [0.31, 0.28, 0.36]
    (summary,) = summarise_seeds([row("a", "30 per class", seed, value) for seed, value in enumerate(values)])
    assert (summary.label_budget, summary.initialisation, summary.runs, summary.gain) == ("30 per class", "a", 3, None)
    assert summary.mean["AP"] == pytest.approx(100 * statistics.mean(values))
    assert summary.std["AP"] == pytest.approx(100 * statistics.stdev(values))


def test_groups_keep_the_order_of_the_rows_and_budgets_stay_together():
    rows = [row("b", 50, 0, 0.1), row("a", 1.0, 0, 0.1), row("a", 50, 0, 0.1)]
    order = [(s.label_budget, s.initialisation) for s in summarise_seeds(rows)]
    assert order == [("50 images", "b"), ("50 images", "a"), ("100 %", "a")]


def test_another_baseline():
    lines = comparison_table(ROWS, baseline="pretrained").splitlines()
    assert lines[0].endswith("AP gain over pretrained |")
    assert lines[2].endswith("| -8.5 |")
    assert "gain" not in comparison_table(ROWS, baseline="imagenet")


def test_a_metric_that_was_not_measured_is_a_dash():
    assert format_mean(math.nan, math.nan) == "–"
    assert "| 10.0 | – |" in comparison_table([row("a", "1 %", 0, 0.1, AP75=math.nan)])


def test_names_cannot_break_the_table():
    assert "a\\|b" in comparison_table([row("a|b", "1 %", 0, 0.1)])


def test_wrong_rows_are_named():
    with pytest.raises(ValueError, match="expected at least one finished run"):
        comparison_table([])
    with pytest.raises(ValueError, match=r"row 1 lacks \['AP'\]"):
        comparison_table([ROWS[0], {"initialisation": "a", "label_budget": "1 %"}])
    with pytest.raises(ValueError, match="AP50 is in 1 of 2 rows"):
        comparison_table([ROWS[0], row("a", "1 %", 0, 0.1)])

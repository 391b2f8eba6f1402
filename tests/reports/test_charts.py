"""Curves, sizes of clusters and falling losses as SVG."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from simdetr.reports.charts import (
    MAX_POINTS,
    STARTS,
    TITLES,
    Curve,
    class_first_border,
    draw_clustering,
    draw_curve,
    draw_flow,
    flow,
    gradient,
    panels,
    read_curve,
    size_histogram,
    to_svg,
)

CSV = """epoch,lr-AdamW,step,train/loss,train/loss_ce_0,val/AP
0,0.1,0,,,
0,,9,2.5,1.5,
0,,9,,,0.1
1,,19,1.5,0.5,
1,,19,,,nan
1,
"""
TAG = "{http://www.w3.org/2000/svg}"


def lines_of(svg: str) -> list[list[tuple[float, float]]]:
    """The points of every drawn curve, in the order of drawing."""
    root = ElementTree.fromstring(svg)
    paths = []
    for group in root.iter(f"{TAG}g"):
        if group.get("id", "").startswith("line2d"):
            for path in group.findall(f"{TAG}path"):
                numbers = path.get("d").replace("M", " ").replace("L", " ").split()
                paths.append(list(zip(map(float, numbers[::2]), map(float, numbers[1::2]), strict=True)))
    return paths


def test_lightning_csv_with_holes_and_a_torn_end_is_read_per_metric(tmp_path):
    (tmp_path / "metrics.csv").write_text(CSV)
    curve = read_curve("stage 1", tmp_path / "metrics.csv")
    assert curve.name == "stage 1"
    assert curve.metrics["train/loss"] == ([9, 19], [2.5, 1.5])
    assert curve.metrics["lr-AdamW"] == ([0], [0.1])
    assert curve.metrics["val/AP"][1][0] == 0.1 and np.isnan(curve.metrics["val/AP"][1][1])
    assert "epoch" not in curve.metrics and "step" not in curve.metrics


def test_a_file_without_steps_is_refused(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,loss\n0,1\n")
    with pytest.raises(ValueError, match="expected a Lightning metrics file with a column 'step'"):
        read_curve("x", tmp_path / "metrics.csv")
    (tmp_path / "metrics.csv").write_text("")
    with pytest.raises(ValueError, match="'step', got None"):
        read_curve("x", tmp_path / "metrics.csv")


def test_panels_leave_layers_and_learning_rates_out():
    series = ([0.0, 1.0], [1.0, 2.0])
    names = [
        "lr-AdamW",
        "train/loss_ce_3",
        "train/loss_ce",
        "train/loss",
        "val/AR@100s",
        "val/AR@100",
        "val/AR100",
        "val/AP",
    ]
    assert panels(Curve("x", dict.fromkeys(names, series))) == {
        "loss": ["train/loss", "train/loss_ce"],
        "accuracy": ["val/AP", "val/AR100", "val/AR@100"],
    }


def test_drawing_is_an_svg_element_in_the_pages_colour():
    curve = Curve("a <b> & c", {"train/loss<x>": ([0, 10, 20], [3.0, 2.0, 1.0]), "val/AP": ([10, 20], [0.1, 0.3])})
    svg = draw_curve(curve)
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{TAG}svg"
    assert "currentColor" in svg and "#010203" not in svg
    texts = {element.text for element in root.iter(f"{TAG}text")}
    assert {"loss", "accuracy", "train/loss<x>", "val/AP"} <= texts
    assert draw_curve(curve) == svg


def test_lines_fall_and_rise_as_the_values_do():
    svg = draw_curve(Curve("x", {"train/loss": ([0, 10, 20], [3.0, 2.0, 1.0])}))
    longest = max(lines_of(svg), key=len)
    (x0, y0), (x1, y1), (x2, y2) = longest
    assert x1 - x0 == pytest.approx(x2 - x1, rel=1e-3)
    assert y1 - y0 == pytest.approx(y2 - y1, rel=1e-3) and y1 > y0  # y grows downwards in SVG


def test_long_curves_are_averaged():
    steps = np.arange(5003)
    svg = draw_curve(Curve("x", {"train/loss": (steps, 5.0 - steps / 2000 + 0.1 * (-1.0) ** steps)}))
    longest = max(lines_of(svg), key=len)
    assert 50 <= len(longest) <= MAX_POINTS
    ys = np.array([y for _, y in longest])
    assert (np.diff(ys) >= 0).all() and ys[-1] > ys[0] + 50  # the alternation is averaged away, the fall stays


def test_missing_values_leave_gaps_and_infinite_losses_do_not_break_the_picture():
    svg = draw_curve(Curve("x", {"train/loss": ([0, 1, 2, 3], [1.0, float("nan"), float("inf"), 2.0])}))
    assert ElementTree.fromstring(svg).tag.endswith("svg") and "nan" not in svg


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match=r"curve 'x': no loss, AP or AR among its metrics \['lr'\]"):
        draw_curve(Curve("x", {"lr": ([0], [0.1])}))


def test_a_resumed_training_is_one_curve(tmp_path):
    (tmp_path / "a.csv").write_text("epoch,step,train/loss\n0,1,4.0\n0,2,3.0\n0,3,9.0\n")
    (tmp_path / "b.csv").write_text("epoch,step,train/loss\n0,3,2.0\n0,4,1.0\n")
    curve = read_curve("stage 1", tmp_path / "a.csv", tmp_path / "b.csv")
    assert curve.metrics == {"train/loss": ([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0])}


def test_histogram_counts_every_class_once():
    sizes = np.array([0, 0, 1, 2, 3, 3, 4, 7, 8, 1024, 2047])
    assert size_histogram(sizes) == {
        "0": 2, "1": 1, "2–3": 3, "4–7": 2, "8–15": 1, "16–31": 0, "32–63": 0, "64–127": 0, "128–255": 0,
        "256–511": 0, "512–1,023": 0, "1,024–2,047": 2,
    }  # fmt: skip
    assert size_histogram(np.array([40, 40])) == {"32–63": 2}  # begins where there are any
    many = np.random.default_rng(0).integers(0, 10**6, 5000)
    assert sum(size_histogram(many).values()) == 5000


def test_chart_shows_counts_and_iterations():
    record = {"sizes": [1, 5, 6, 0], "inertia": [24.0, 12.0, 6.0], "regions": 12}
    svg = draw_clustering(record)
    assert svg.startswith("<svg") and svg == draw_clustering(record)
    assert "currentColor" in svg
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    assert {"0", "1", "2–3", "4–7", "regions of a class", "inertia per region", "iteration"} <= set(texts)


def test_a_record_without_sizes_is_refused():
    with pytest.raises(ValueError, match="expected sizes, inertia and regions, got no sizes"):
        draw_clustering({"inertia": [1.0], "regions": 3})


def total(u: float, v: float, equation: str) -> float:
    return {"eq5": u + v, "eq6": u + math.exp(-u) * v, "eq7": u + math.exp(-u) * v**2}[equation]


def euler(start, equation: str, time: float, step: float = 1e-4) -> tuple[float, float]:
    """The way by small steps against differences of the total loss."""
    (u, v), h = start, 1e-6
    for _ in range(round(time / step)):
        down_u = (total(u + h, v, equation) - total(u - h, v, equation)) / (2 * h)
        down_v = (total(u, v + h, equation) - total(u, v - h, equation)) / (2 * h)
        u, v = max(0.0, u - step * down_u), max(0.0, v - step * down_v)
    return u, v


def half_times(start, equation: str, longest: float = 20.0) -> list[float]:
    """When u and when v come to half of their start; infinite for one that does not until the longest time."""
    times = np.linspace(0, longest, 5000)
    halved = flow(start, equation, times) <= np.array(start) / 2
    return [times[column.argmax()] if column.any() else math.inf for column in halved.T]


@pytest.mark.parametrize(
    ("equation", "expected"), [("eq5", (0.5, 0.5)), ("eq6", (0.813, 0.987)), ("eq7", (0.681, 0.722))]
)
def test_half_times_from_one_and_one(equation, expected):
    assert half_times((1.0, 1.0), equation) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("equation", "when_u_halves", "left_of_v"), [("eq5", 1.5, 0.0), ("eq6", 1.678, 0.80), ("eq7", 1.633, 0.68)]
)
def test_from_a_large_class_loss_the_class_comes_first_but_in_equation_5(equation, when_u_halves, left_of_v):
    half_u, half_v = half_times((3.0, 1.0), equation)
    assert half_u == pytest.approx(when_u_halves, rel=0.01)
    assert flow((3.0, 1.0), equation, [half_u])[0, 1] == pytest.approx(left_of_v, abs=0.01)
    if equation == "eq5":
        assert half_v == pytest.approx(0.5, rel=0.01)
    else:
        assert half_v > half_u


@pytest.mark.parametrize("equation", list(TITLES))
@pytest.mark.parametrize("start", [(3.0, 2.0), (0.5, 2.0)])
def test_the_way_equals_small_steps(equation, start):
    found = flow(start, equation, [0.0, 0.7, 1.5])
    assert found[0].tolist() == list(start)
    for row, time in ((1, 0.7), (2, 1.5)):
        assert found[row] == pytest.approx(euler(start, equation, time), abs=1e-3)


def test_losses_stop_at_zero():
    way = flow((2.0, 1.0), "eq5", np.linspace(0, 4, 9))
    assert way[:, 0] == pytest.approx(np.maximum(2 - np.linspace(0, 4, 9), 0), abs=1e-6)
    assert way[:, 1] == pytest.approx(np.maximum(1 - np.linspace(0, 4, 9), 0), abs=1e-6)
    assert (flow((3.0, 0.0), "eq7", [0.0, 1.0, 9.0])[:, 1] == 0).all()


@pytest.mark.parametrize("equation", list(TITLES))
def test_gradients_are_those_of_the_total_loss(equation):
    h = 1e-6
    for u, v in ((0.1, 0.4), (1.0, 3.0), (2.5, 0.7)):
        slopes = gradient(u, v, equation)
        assert slopes[0] == pytest.approx((total(u + h, v, equation) - total(u - h, v, equation)) / (2 * h), abs=1e-8)
        assert slopes[1] == pytest.approx((total(u, v + h, equation) - total(u, v - h, equation)) / (2 * h), abs=1e-8)


def test_the_class_falls_faster_above_the_border_only():
    for v in (0.2, 1.0, 2.5):
        borders = {equation: float(class_first_border(v, equation)) for equation in TITLES}
        assert math.isinf(borders["eq5"])
        assert v == pytest.approx(math.exp(borders["eq6"]) - 1)
        assert v**2 + 2 * v == pytest.approx(math.exp(borders["eq7"]))
        for equation in ("eq6", "eq7"):
            for apart, faster in ((0.01, True), (-0.01, False)):
                by_u, by_v = gradient(borders[equation] + apart, v, equation)
                assert (by_u > by_v) == faster
        assert gradient(0.7, v, "eq5") == (1, 1)


def test_the_class_loss_stalls_where_the_localisation_loss_is_large():
    for v in (1.5, 2.0, 4.0):
        assert gradient(math.log(v), v, "eq6")[0] == pytest.approx(0, abs=1e-12)
        way = flow((math.log(v), v), "eq6", [0.0, 0.01, 3 * v])
        assert way[1, 0] == pytest.approx(math.log(v), abs=1e-3)
        assert way[2, 0] < math.log(v) and way[2, 1] < v
    assert flow((0.5, 3.0), "eq6", [0.5])[0, 0] > 0.5  # below the stall the class loss even rises


def test_losses_that_need_very_long():
    # u rises to about ln v, where v² falls by twice the time
    assert half_times((2.0, 20.0), "eq6", 1e3)[1] == pytest.approx((20**2 - 10**2) / 2, rel=0.01)
    assert half_times((1.0, 1e3), "eq6", 1e4) == [math.inf, math.inf]


def test_the_figure_has_a_panel_per_equation_and_its_ways():
    figure = draw_flow()
    assert [axes.get_title(loc="left") for axes in figure.axes] == [f"equation {title}" for title in TITLES.values()]
    for axes, equation in zip(figure.axes, TITLES, strict=True):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("localisation loss v", "class loss u")
        lines = axes.get_lines()
        assert len(lines) == 2 * len(STARTS) + (0 if equation == "eq5" else 2)
        v, u = lines[2].get_data()  # the way of the second start
        assert (u[0], v[0]) == STARTS[1]
        when = np.linspace(0, 6.0, len(u))[np.flatnonzero(u <= STARTS[1][0] / 2)[0]]
        assert when == pytest.approx(half_times(STARTS[1], equation)[0], abs=0.02)
    assert to_svg(figure, "flow").startswith("<svg")


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="equation: expected one of eq5, eq6, eq7, got 'eq4'"):
        flow((1.0, 1.0), "eq4", [1.0])
    for start in ((-1.0, 1.0), (1.0, math.inf), (1.0, math.nan)):
        with pytest.raises(ValueError, match=r"start: expected finite \(u, v\) of at least 0"):
            flow(start, "eq6", [1.0])
    for times in ([], [1.0, 0.5], [-1.0, 0.0], 3.0):
        with pytest.raises(ValueError, match="times: expected ascending numbers from 0 on"):
            flow((1.0, 1.0), "eq6", times)

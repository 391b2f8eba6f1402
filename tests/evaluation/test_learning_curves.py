import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from simdetr.reports.charts import MAX_POINTS, Curve, draw_curve, panels, read_curve

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

"""The page of a comparison: what it shows, closed and without a network; costs from a run's own record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from simdetr.evaluation.compare import paired_differences
from simdetr.evaluation.verdict import Comparison, Evidence, costs_of, labels_saved, verdict
from simdetr.recipe import ComparisonJob
from simdetr.reports.comparison_page import (
    SUMMARY,
    check_rows,
    differences_figure,
    labels_figure,
    mining_evidence,
    pretraining_seconds,
    render_comparison,
    write_comparison,
)
from simdetr.training.arms import VARIANTS, Arm
from simdetr.training.run_folder import RunMismatchError

METRICS = ("AP", "AP50", "AP75", "AR@1", "AR@10", "AR@100")


@pytest.fixture
def comparison():
    """Two arms, two budgets, three seeds, with draws of images."""
    rng = np.random.default_rng(0)
    rows, draws = [], {}
    for budget, title, labels in ((0.01, "1 %", 40), (0.1, "10 %", 400)):
        for arm, ap in (("backbone", 0.2 + labels / 2000), ("stage2", 0.3 + labels / 2000)):
            for seed in range(3):
                scores = {metric: ap + 0.01 * rng.random() for metric in METRICS}
                row = {"initialisation": arm, "label_budget": budget, "seed": seed, "labels": labels, "images": 9}
                rows.append(row | scores | {"seconds": 12.0, "device": "cpu, 1 thread"})
                draws[title, arm, seed] = {name: scores[name] + rng.normal(0, 0.005, 100) for name in METRICS[:3]}
    differences = paired_differences(rows, "backbone", draws, 50)
    return Comparison(
        rows=rows,
        starts={"backbone": "weights <of> the backbone", "stage2": "a detector"},
        baseline="backbone",
        subject="stage2",
        differences=differences,
        saved=labels_saved(rows, "backbone", draws),
        verdicts={"stage2": verdict(rows, differences, "stage2", "backbone", Evidence())},
        costs=costs_of(rows, {"backbone": 0.0, "stage2": None}),
        warnings=["only 50 images were mined"],
        figures="50 images mined",
        commands={"the comparison": "simdetr compare --init run", "backbone, 1 %": "simdetr finetune"},
        num_images=50,
    )


def test_the_page_answers_first_and_shows_what_the_answer_rests_on(comparison, page_of):
    curves = {"1 %": {"backbone": ([1.0, 2.0], [3.0, 2.0]), "stage2": ([1.0, 2.0], [2.0, 1.0])}, "10 %": {}}
    page = page_of(render_comparison(comparison, "worth", curves), between=" ")
    assert "Answer: pays" in page.text and "Pretraining pays: stage2 beats backbone" in page.text
    for words in (
        "only 50 images were mined",
        "weights <of> the backbone",
        "pretraining of unknown cost, 12 s per fine-tuning",
        "simdetr compare --init run",
        "50 validation images",
        "None covers another pretraining",
        "more than were measured",
        "AP less that of backbone",
        "training loss, 1 %",
    ):
        assert words in page.text, words
    assert {link.removeprefix("#") for link in page.links if link.startswith("#")} >= {"answer", "cost", "commands"}
    assert not [source for source in (*page.sources, *page.links) if source.startswith("http")]


def test_every_metric_has_its_interval_and_recall_none_over_images(comparison):
    by_metric = {one.metric: one for one in comparison.differences if one.label_budget == "1 %"}
    assert [*by_metric] == list(METRICS)
    assert all(one.seeds is not None for one in by_metric.values())
    assert [name for name, one in by_metric.items() if one.images is not None] == ["AP", "AP50", "AP75"]


def test_each_row_of_differences_has_its_seeds_and_intervals_drawn(comparison):
    axes = differences_figure(comparison).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1 %, stage2", "10 %, stage2"]
    of_ap = [one for one in comparison.differences if one.metric == "AP"]
    drawn = [sorted(line.get_xdata()) for line in axes.get_lines() if line.get_marker() == "o"]
    assert drawn == [sorted(one.by_seed.values()) for one in of_ap]
    bars = [tuple(line.get_xdata()) for line in axes.get_lines() if line.get_linewidth() == 4]
    assert bars == [(one.both.low, one.both.high) for one in of_ap]
    assert [text.get_text() for text in axes.texts] == ["seeds", "images", "seeds and images"] * 2


def test_labels_are_marked_where_they_were_measured(comparison):
    axes = labels_figure(comparison).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["40", "400"]
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"backbone", "stage2"}


def test_the_summary_is_json_that_everyone_can_read(comparison, tmp_path):
    page = write_comparison(comparison, tmp_path, {})
    assert page.is_file()
    summary = json.loads((tmp_path / SUMMARY).read_text(), parse_constant=pytest.fail)
    assert summary["verdict"]["by_budget"] == {"1 %": "pays", "10 %": "pays"}
    assert {one["both"]["covers"] for one in summary["differences"] if one["both"]} == {"seeds and images"}


def test_pretraining_costs_what_led_to_the_detector(tmp_path):
    steps = {"mine": 10, "cluster": 1, "fit-stage1": 100, "relabel-stage1": 5, "fit-stage2": 200, "relabel-stage2": 7}
    lines = [json.dumps({"name": name, "seconds": seconds}) for name, seconds in steps.items()]
    (tmp_path / "steps.jsonl").write_text("\n".join([lines[2], *lines]))  # one step was done twice
    assert pretraining_seconds(Arm("stage1", "", Path("d"), tmp_path), tmp_path) == 111
    assert pretraining_seconds(Arm("stage2", "", Path("d"), tmp_path), tmp_path) == 316
    assert pretraining_seconds(Arm("backbone", ""), tmp_path) == 0
    assert pretraining_seconds(Arm("checkpoint", "", Path("d")), tmp_path) is None
    own = tmp_path / "own"
    own.mkdir()
    (own / "steps.jsonl").write_text("\n".join(json.dumps({"name": n, "seconds": 3}) for n in ("take", "fit-stage1")))
    assert pretraining_seconds(Arm("class-unaware", "", None, own, VARIANTS["class-unaware"]), tmp_path) == 16


def test_rows_of_an_earlier_version_are_refused(tmp_path):
    check_rows(tmp_path)
    (tmp_path / "comparison.json").write_text('[{"initialisation": "scratch", "AP": 0.1}]')
    with pytest.raises(RunMismatchError, match="is of an earlier version"):
        check_rows(tmp_path)


def test_a_detector_outside_a_run_has_no_mined_boxes_to_look_at(scenes, tmp_path):
    given = dict.fromkeys(("images", "val_images"), str(scenes))
    given |= dict.fromkeys(("labels", "val_labels"), str(scenes / "instances.json"))
    assert mining_evidence(ComparisonJob(**given, init=str(tmp_path), out=str(tmp_path / "out"))) == Evidence()

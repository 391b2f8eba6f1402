"""Label budgets: what is drawn is what `simdetr split` draws, nested and the same for every arm of a seed."""

from __future__ import annotations

import json

import pytest

from simdetr.data.label_files import read_labels
from simdetr.data.protocols import split
from simdetr.training.label_budgets import LabelBudget, coco_file, hold_out, read_budgets


def test_budgets_are_read_and_named():
    assert [budget.title for budget in read_budgets(None, ())] == ["1 %", "10 %"]
    assert [budget.value for budget in read_budgets((0.5,), (10,))] == [0.5, "10-shot"]
    assert [budget.name for budget in read_budgets(None, (1, 5))] == ["1-shot", "5-shot"]


@pytest.mark.parametrize(
    ("fractions", "shots", "said"),
    [
        ((0.1, 0.1), (), r"fractions: expected each once, got \[0.1, 0.1\]"),
        ((10.0,), (), r"fractions: expected numbers in \(0, 1\], got 10; 0.01 is 1 %"),
        ((), (0,), "shots: expected whole numbers of boxes per class"),
    ],
)
def test_wrong_budgets_are_refused(fractions, shots, said):
    with pytest.raises(ValueError, match=said):
        read_budgets(fractions, shots)


def test_shots_are_those_of_split_and_fractions_those_of_a_training(scenes, recipe, tmp_path):
    labels = scenes / "instances.json"
    drawn = LabelBudget("shots", 2).file(labels, tmp_path / "own", seed=3)
    (expected,) = split(labels, tmp_path / "split", "shots", amounts=[2], seeds=[3])
    assert json.loads(drawn.read_text()) == json.loads(expected.read_text())
    part = LabelBudget("fraction", 0.5)
    assert part.file(labels, tmp_path, 1) == labels
    data = recipe("--data.seed=1", *part.options()).training(tmp_path / "t").datamodule
    assert set(part.drawn(read_labels(labels), 1).image_ids) == set(data.labels.image_ids)


def test_labels_of_another_tool_are_made_coco_once(scenes, tmp_path):
    from simdetr.data.label_files import write_labels

    write_labels(read_labels(scenes / "instances.json"), tmp_path / "labels.parquet")
    made = coco_file(tmp_path / "labels.parquet", tmp_path / "made.json")
    assert made == tmp_path / "made.json" and len(read_labels(made)) == 12
    assert coco_file(scenes / "instances.json", tmp_path / "no.json") == scenes / "instances.json"


def test_what_is_held_out_is_the_same_again_and_not_trained_on(scenes, tmp_path):
    labels = scenes / "instances.json"
    train, val = hold_out(labels, str(scenes), 0.25, tmp_path)
    again = hold_out(labels, str(scenes), 0.25, tmp_path / "again")
    assert [path.read_text() for path in again] == [path.read_text() for path in (train, val)]
    ids = [set(read_labels(path).image_ids) for path in (train, val)]
    assert [len(part) for part in ids] == [9, 3] and not ids[0] & ids[1]
    with pytest.raises(ValueError, match=r"holdout: 0.01 of 12 labelled images leaves none"):
        hold_out(labels, str(scenes), 0.01, tmp_path / "few")
    with pytest.raises(ValueError, match="holdout: expected a part"):
        hold_out(labels, str(scenes), 1.0, tmp_path / "all")

from __future__ import annotations

import json

import pytest
import yaml

from simdetr.commands.main import main
from simdetr.data.coco import write_coco
from simdetr.data.label_files import read_labels
from simdetr.labelling import loop
from simdetr.labelling.annotator import SimulatedAnnotator


@pytest.fixture
def few(tmp_path, scenes):
    truth = read_labels(scenes / "instances.json")
    write_coco(truth.select(truth.image_ids[:5]), tmp_path / "shots.json")
    return tmp_path / "shots.json"


def test_autolabel_says_what_every_stage_kept(run, scenes, few, tiny_config, tmp_path, capsys):
    main(
        f"autolabel --images {scenes} --shots {few} --out {tmp_path / 'auto'} --init {run} --config {tiny_config} "
        f"--truth {scenes / 'instances.json'} --encoder colour-texture --score_rule per_class_top --per_shot 1 "
        "--corrector none --background_shots 0".split()
    )
    said = capsys.readouterr().out
    for stage in ("source: ", "verify: ", "correct: "):
        assert stage in said
    assert "; precision 0." in said and f"labels: {tmp_path / 'auto' / 'labels.json'}" in said
    assert read_labels(tmp_path / "auto" / "labels.json").num_classes


def test_no_candidate_is_one_clear_line(run, scenes, few, tiny_config, tmp_path, error_of):
    line = error_of("autolabel", "--images", scenes, "--shots", few, "--out", tmp_path / "auto", "--init", run,
                    "--config", tiny_config, "--encoder", "colour-texture", "--score_rule", "absolute",
                    "--min_score", 1)  # fmt: skip
    assert "was kept, so there is nothing new to learn" in line


def test_label_order_prints_the_first_and_writes_all(run, scenes, tmp_path, capsys):
    out = tmp_path / "order.csv"
    main(
        f"label-order --images {scenes} --init {run} --out {out} --encoder colour-texture --strategy random --show 2"
        .split()
    )  # fmt: skip
    said = capsys.readouterr().out
    assert said.count("images/") == 2 and f"12 images, by random: {out}" in said
    assert len(out.read_text(encoding="utf-8").splitlines()) == 13


def test_label_order_lists_what_cannot_be_read(run, own_scenes, tmp_path, capsys):
    lost = read_labels(own_scenes / "instances.json").image_ids[3]
    (own_scenes / lost).write_bytes(b"no image")
    out = tmp_path / "order.csv"
    main(f"label-order --images {own_scenes} --init {run} --out {out} --encoder colour-texture".split())
    said = capsys.readouterr().out
    assert f"cannot be read: {lost}\n5 images" in said


def test_label_simulate_hands_the_person_on(monkeypatch):
    """How the person works and errs reaches it, by any name of the command line."""
    people = []
    monkeypatch.setattr(loop, "simulate_labelling", lambda *_, annotator, **__: people.append(annotator) or [])
    words = "label-simulate --images a --truth b --val_images c --val_labels d --init e --out f"
    main(words.split())
    main(f"{words} --misses 0.1 --accepts_wrong 0.2 --accept_iou 0.9 --keeps_boxes false".split())
    assert people == [
        SimulatedAnnotator(accept_iou=0.7, keeps_boxes=True),
        SimulatedAnnotator(misses=0.1, accepts_wrong=0.2, accept_iou=0.9, keeps_boxes=False),
    ]


def test_label_simulate_prints_a_row_per_round(run, scenes, tiny_config, tmp_path, capsys):
    truth = scenes / "instances.json"
    main(
        f"label-simulate --images {scenes} --truth {truth} --val_images {scenes} --val_labels {truth} --init {run} "
        f"--out {tmp_path / 'loop'} --config {tiny_config} --encoder colour-texture --rounds 1 --images_per_round 3"
        .split()
    )  # fmt: skip
    assert "errors left" in capsys.readouterr().out
    person = yaml.safe_load((tmp_path / "loop" / "config.yaml").read_text())["labelling"]["person"]
    assert (person["accept_iou"], person["keeps_boxes"]) == (0.7, True)
    assert json.loads((tmp_path / "loop" / "rounds.json").read_text())[0]["images"] == 3

from __future__ import annotations

import json

import pytest

from simdetr.commands.main import main
from simdetr.data.label_files import read_labels
from simdetr.training.run_folder import RunFolder


def test_predict_writes_boxes_and_pictures(run, scenes, tmp_path, capsys):
    out, pictures = tmp_path / "found.json", tmp_path / "pictures"
    main(
        f"predict --images {scenes} --checkpoint {run} --out {out} --pictures {pictures} --min_score 0 --max_boxes 3"
        .split()
    )  # fmt: skip
    content = json.loads(out.read_text())
    assert len(content["images"]) == 12
    assert 0 < len(content["annotations"]) <= 36
    assert len(list(pictures.rglob("*.jpg"))) == 12


def test_relabel_leaves_no_overlaps_and_no_threshold(run, scenes, tmp_path):
    out = tmp_path / "labels.parquet"
    main(f"relabel --images {scenes} --checkpoint {run} --out {out} --max_boxes 5".split())
    relabelled, of_run = read_labels(out), read_labels(run / "stage1" / "labels.parquet")
    assert len(relabelled.boxes_xyxy) == len(of_run.boxes_xyxy)


def test_finetune_then_evaluate(run, scenes, tiny_config, tmp_path, capsys):
    truth = scenes / "instances.json"
    main(
        f"finetune --images {scenes} --labels {truth} --out {tmp_path / 'ft'} --config {tiny_config} --init {run} "
        "--data.batch_size 3".split()
    )
    out = tmp_path / "scores.json"
    main(f"evaluate --images {scenes} --labels {truth} --checkpoint {tmp_path / 'ft'} --out {out}".split())
    assert "AP50" in capsys.readouterr().out
    scores = json.loads(out.read_text())
    assert {"AP", "AP50", "AR@100"} <= scores.keys()


def test_pretrain_ends_with_what_to_do_next(run, scenes, tiny_config, capsys):
    main(["pretrain", "--images", str(scenes), "--out", str(run), "--config", str(tiny_config)])  # finished long ago
    folder = RunFolder(run)
    said = capsys.readouterr().out
    assert f"detector: {folder.detector(1)}; fine-tune it with simdetr finetune --init {run}" in said
    assert f"report: {folder.report}" in said


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("pretrain", ["--encoder", "Folder of ``simdetr encoder fit``", "--num_ranks"]),
        ("finetune", ["--init", "Run folder, detector folder or checkpoint to start from", "--auto_batch"]),
        ("evaluate", ["--precision {fp32,bf16}", "Images per forward pass"]),
        ("compare", ["--fractions", "Parts of the labelled images to train on"]),
    ],
)
def test_help_has_the_options_of_the_function_that_gets_them(command, options, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(words in said for words in options)

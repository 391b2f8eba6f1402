from __future__ import annotations

import json

from simdetr.commands.main import main
from simdetr.data.label_files import read_labels


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

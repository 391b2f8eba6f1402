from __future__ import annotations

import json

import pytest

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


@pytest.fixture
def coco_with_ids(own_scenes):
    """A COCO file whose image ids are of several kinds, none of them its place, and whose names are written oddly."""
    path = own_scenes / "instances.json"
    content = json.loads(path.read_text())
    new = dict(zip([row["id"] for row in content["images"]], [700, "b7", 12, "900", 5, 1], strict=True))
    for row in content["images"]:
        row["id"], row["file_name"] = new[row["id"]], f"./{row['file_name']}"
    for row in content["annotations"]:
        row["image_id"] = new[row["image_id"]]
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("command", ["predict --min_score 0", "relabel"])
def test_images_of_a_coco_file_keep_their_ids(command, run, coco_with_ids, tmp_path):
    out = tmp_path / "found.json"
    main(f"{command} --images {coco_with_ids} --checkpoint {run} --out {out}".split())
    found, given = json.loads(out.read_text()), json.loads(coco_with_ids.read_text())
    assert [row["id"] for row in found["images"]] == [row["id"] for row in given["images"]]
    sizes = {row["id"]: (row["width"], row["height"]) for row in found["images"]}
    assert {row["image_id"] for row in found["annotations"]} == set(sizes)
    folder = tmp_path / "folder.json"
    main(f"{command} --images {coco_with_ids.parent} --checkpoint {run} --out {folder}".split())
    by_name = {row["id"]: row["file_name"] for row in found["images"]}
    numbered = json.loads(folder.read_text())
    of_folder = {row["id"]: row["file_name"] for row in numbered["images"]}
    assert [(by_name[row["image_id"]], row["bbox"]) for row in found["annotations"]] == [
        (of_folder[row["image_id"]], row["bbox"]) for row in numbered["annotations"]
    ]


def test_predict_lists_what_it_cannot_read_and_writes_the_rest(run, own_scenes, tmp_path, error_of):
    sorted((own_scenes / "images").iterdir())[2].write_bytes(b"")
    out = tmp_path / "found.json"
    words = f"predict --images {own_scenes} --checkpoint {run} --out {out}"
    main(words.split())
    assert len(json.loads(out.read_text())["images"]) == 5
    assert "000002.jpg" in (tmp_path / "found_quarantine.csv").read_text()
    assert "--max_unreadable" in error_of(*words.split(), "--max_unreadable", "0.1")

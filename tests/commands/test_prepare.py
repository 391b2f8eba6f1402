from __future__ import annotations

import json

import pytest

from simdetr.commands.main import main


def test_split_writes_files_and_says_what_is_short(tmp_path, capsys):
    images = [{"id": n, "file_name": f"{n}.jpg", "height": 9, "width": 9} for n in range(4)]
    boxes = [{"id": n, "image_id": n, "category_id": 1 + (n == 3), "bbox": [1, 1, 4, 4]} for n in range(4)]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "[owl]"}]
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    common = ["split", "--labels", str(labels), "--out", str(tmp_path / "few"), "--seeds", "[0, 1]"]

    main([*common, "--protocol", "shots", "--amounts", "[3]"])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[0].endswith("shots-3-seed0.json: 4 images, 4 boxes; classes with fewer: [owl] (1)")
    main([*common, "--protocol", "classes", "--novel", "[cat]"])
    assert {path.name for path in (tmp_path / "few").iterdir()} == {
        "base.json",
        "novel.json",
        "shots-3-seed0.json",
        "shots-3-seed1.json",
    }
    main([*common, "--protocol", "classes", "--novel", "1"])
    assert (tmp_path / "few" / "novel-seed1.json").is_file()
    with pytest.raises(SystemExit):
        main([*common, "--protocol", "fractions", "--amounts", "[2]"])
    assert "expected a number in (0, 1], got 2" in capsys.readouterr().err


def test_split_of_another_tools_labels_fits_the_images_that_lie_beside_them(scenes, tmp_path, capsys):
    images = ["--images", str(scenes), "--link-images"]
    main(["convert", str(scenes / "instances.json"), str(tmp_path / "y"), "--to", "yolo", *images])
    few = ["--out", str(tmp_path / "few"), "--protocol", "shots", "--amounts", "[1]", "--seeds", "[0]"]
    main(["split", "--labels", str(tmp_path / "y"), *few])
    capsys.readouterr()
    main(["doctor", str(tmp_path / "y" / "images"), "--labels", str(tmp_path / "few" / "shots-1-seed0.json")])
    said = capsys.readouterr().out
    assert "nothing here would stop a run" in said and "missing" not in said


def changed(scenes, path, **changes):
    """The labels of the scenes with another content of some of their lists."""
    content = json.loads((scenes / "instances.json").read_text())
    path.write_text(
        json.dumps(content | {name: [entry | new for entry in content[name]] for name, new in changes.items()})
    )
    return path


def test_split_says_what_no_command_can_use_and_takes_texts_for_numbers(scenes, tmp_path, caplog, capsys):
    content = json.loads((scenes / "instances.json").read_text())
    content["annotations"] = [entry | {"image_id": str(entry["image_id"])} for entry in content["annotations"]]
    content["annotations"][0]["category_id"] = 99
    (tmp_path / "labels.json").write_text(json.dumps(content))
    common = ["--out", str(tmp_path), "--protocol", "fractions", "--amounts", "[1]"]
    main(["split", "--labels", str(tmp_path / "labels.json"), *common])
    assert "1 × unknown category, dropped" in caplog.text
    assert f"12 images, {len(content['annotations'])} boxes" in capsys.readouterr().out
    bad = changed(scenes, tmp_path / "bad.json", annotations={"bbox": [0.1, 0.1, 0.5, 0.5]})
    main(["split", "--labels", str(bad), *common])
    assert "no training will take" in caplog.text and "fractions of the image" in caplog.text


def test_doctor_knows_what_finetune_and_evaluate_stop_at(scenes, tmp_path, run, tiny_config, error_of, capsys):
    crowds = changed(scenes, tmp_path / "crowds.json", annotations={"iscrowd": 1})
    with pytest.raises(SystemExit):
        main(["doctor", str(scenes), "--labels", str(crowds)])
    (fatal,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FATAL: ")]
    words = ["--config", tiny_config, "--images", scenes, "--labels", crowds]
    assert error_of("finetune", *words, "--out", tmp_path / "none") == f"error: {fatal.removeprefix('FATAL: ')}"
    assert error_of("evaluate", *words[2:], "--checkpoint", run) == f"error: {fatal.removeprefix('FATAL: ')}"


def test_doctor_compares_classes_with_those_of_a_detector(scenes, tmp_path, run, tiny_config, error_of, capsys):
    truth = scenes / "instances.json"
    main(
        [
            "finetune",
            *map(str, ("--config", tiny_config, "--images", scenes, "--labels", truth, "--out", tmp_path / "ft")),
        ]
    )
    other = changed(scenes, tmp_path / "other.json", annotations={"category_id": 1})
    content = json.loads(other.read_text())
    other.write_text(json.dumps(content | {"categories": [{"id": 1, "name": "thing"}]}))
    for labels, checkpoint in ((truth, tmp_path / "ft"), (truth, run)):  # pseudo-classes have recall
        main(["doctor", str(scenes), "--labels", str(labels), "--checkpoint", str(checkpoint)])
        assert "nothing here would stop a run" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["doctor", str(scenes), "--labels", str(other), "--checkpoint", str(tmp_path / "ft")])
    (fatal,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FATAL: ")]
    said = error_of("evaluate", "--images", scenes, "--labels", other, "--checkpoint", tmp_path / "ft")
    assert said == f"error: {fatal.removeprefix('FATAL: ')}" and "no category in common" in said


def test_convert_reads_one_tools_labels_and_writes_anothers(scenes, tmp_path, capsys):
    out = tmp_path / "yolo"
    main(
        ["convert", str(scenes / "instances.json"), str(out), "--to", "yolo", "--link-images", "--images", str(scenes)]
    )
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"read    {scenes / 'instances.json'} (coco): 12 images, ")
    assert said[1].startswith(f"written {out} (yolo): 12 images, ") and said[1].endswith("read back and equal")
    main(["convert", str(out), str(tmp_path / "back.json"), "--from=yolo"])
    assert "(yolo): 12 images" in capsys.readouterr().out
    before, after = (json.loads(path.read_text()) for path in (scenes / "instances.json", tmp_path / "back.json"))
    assert len(before["annotations"]) == len(after["annotations"])
    assert {one["name"] for one in before["categories"]} == {one["name"] for one in after["categories"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--to=csv", "--from", "yolov9"],
            "--from: expected one of simdetr, coco, yolo, voc, label-studio, cvat, csv, got 'yolov9'",
        ),
        (["--to", "xml"], "--to: expected one of simdetr, coco, yolo, voc, label-studio, cvat, csv, got 'xml'"),
        ([], "does not say its format; say it with --to"),
    ],
)
def test_convert_says_what_it_knows(scenes, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(scenes / "instances.json"), str(tmp_path / "out"), *options])
    assert stop.value.code == 1 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

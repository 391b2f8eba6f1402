"""What a worker does with a run's folder."""

from __future__ import annotations

import json

import pytest

from simdetr.app.jobs import PART, LoadedOnce, carry_out, on_device, training_options
from simdetr.app.run_files import RunFiles, write_image_list
from simdetr.app.run_parameters import DetectParameters, TrainParameters
from simdetr.data.label_files import read_labels


@pytest.fixture
def detection(scenes, small_detector, tmp_path):
    files = RunFiles(tmp_path)
    images = sorted((scenes / "images").iterdir())
    write_image_list(images * 1, files.images)
    parameters = DetectParameters(min_score=0.0, max_boxes=3).model_dump()
    job = {"kind": "detect", "parameters": parameters, "model": str(small_detector), "device": "cpu", "config": []}
    files.job.write_text(json.dumps(job))
    return files


def test_detections_are_kept_part_by_part_and_not_made_twice(detection, monkeypatch):
    monkeypatch.setattr("simdetr.app.jobs.PART", 5)
    assert PART == 64
    once = LoadedOnce()
    assert carry_out(detection, once)["message"] == "looked at 12 images"
    parts = sorted(detection.parts.iterdir())
    assert [len(read_labels(part)) for part in parts] == [4, 5, 3]
    assert all((labels.scores >= 0).all() and len(labels.boxes_xyxy) <= 15 for labels in map(read_labels, parts))
    assert [row["done"] for row in detection.told()] == [4, 9, 12]
    stamps = [part.stat().st_mtime_ns for part in parts[:2]]
    parts[2].unlink()
    carry_out(detection, once)
    assert [part.stat().st_mtime_ns for part in parts[:2]] == stamps and parts[2].is_file()


def test_a_detector_is_loaded_once_until_its_file_changes(small_detector):
    once = LoadedOnce()
    first = once.get(small_detector)
    assert once.get(small_detector) is first
    once.drop()
    assert once.get(small_detector) is not first


def test_a_training_takes_the_device_that_was_chosen():
    assert on_device("cpu") == ["--trainer.accelerator=cpu"]
    assert on_device("cuda:1") == ["--trainer.accelerator=gpu", "--trainer.devices=[1]"]
    assert on_device("cuda") == []


def test_options_of_a_training_are_the_persons_over_the_apps(tmp_path):
    asked = TrainParameters(
        max_steps=100, rotation=15, lr=0.001, colour="none", options=["--model.lr=0.5"]
    ).model_dump()
    job = {"parameters": asked, "config": [], "device": "cpu", "validated": True}
    options = training_options(RunFiles(tmp_path), job, images=16)
    assert {"--data.rotation=15.0", "--data.noise=0.0"} <= set(options)
    assert options[-1] == "--model.lr=0.5" and options.index("--model.lr=0.001") < len(options) - 1
    assert {"--trainer.max_steps=100", "--data.colour=none", "--data.flip=true"} <= set(options)
    assert "--trainer.check_val_every_n_epoch=5" in options  # of fifty epochs
    own = training_options(RunFiles(tmp_path), job | {"config": ["mine.yaml"], "validated": False}, images=16)
    assert not any(option.startswith(("--data.colour", "--trainer.check_val")) for option in own)

"""Detectors of other libraries in the pipeline, which does not know which it has: only the YAML changes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from torchvision.ops import box_iou

from simdetr import pipeline
from simdetr.data import Category, open_images, read_labels, write_coco
from simdetr.detectors.predictions import best_per_query
from simdetr.training.relabel import InferenceSettings, detect

OTHERS = (
    *("deformable_detr", "conditional_detr", "detr", "rt_detr_v2", "d_fine", "lw_detr", "rf_detr"),
    *("faster_rcnn", "fcos", "retinanet"),
)
CATEGORIES = tuple(Category(number, f"class {number}") for number in range(3))
SETTINGS = InferenceSettings(short_side=64, max_side=80, iou_threshold=0.55, max_boxes=5, batch_size=4)


@pytest.mark.parametrize("name", OTHERS)
def test_relabelled_filtered_and_written(name, make_other, scenes, tmp_path):
    """Every image gets boxes, none above the overlap, and a COCO file that says the same."""
    labels = detect(make_other(name), open_images(scenes), CATEGORIES, SETTINGS, reading=best_per_query, stage=1)
    assert len(labels) == 12
    for row in range(12):
        image = labels.image(row)
        assert 0 < len(image.scores) <= 5 and (np.diff(image.scores) <= 0).all()
        overlaps = box_iou(*[torch.from_numpy(image.boxes_xyxy)] * 2).fill_diagonal_(0)
        assert not (overlaps > 0.55).any()
        assert (image.boxes_xyxy >= 0).all() and (image.boxes_xyxy <= [80, 64, 80, 64]).all()
    write_coco(labels, tmp_path / "labels.json")
    again = read_labels(tmp_path / "labels.json")
    assert again.image_ids == labels.image_ids and again.categories == CATEGORIES
    np.testing.assert_allclose(again.boxes_xyxy, labels.boxes_xyxy, atol=1e-3)
    assert np.array_equal(again.classes, labels.classes)
    np.testing.assert_allclose(again.scores, labels.scores, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["rt_detr_v2", "lw_detr", "rf_detr", pytest.param("faster_rcnn", marks=pytest.mark.slow)]
)
def test_the_whole_method(name, config_of_other, tiny_config, scenes, own_scenes, tmp_path):
    """Pretraining, relabelling, a second stage, fine-tuning and evaluation."""
    detector = config_of_other(name)
    del detector["init_args"]["num_classes"]  # flows from the labels
    content = yaml.safe_load(tiny_config.read_text())
    content["model"]["detector"] = detector
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(content), encoding="utf-8")

    run = pipeline.pretrain(scenes, tmp_path / "run", [config], options=["--self_training.stages=2"])
    for stage in (1, 2):
        labels = read_labels(run.labels(stage))
        assert (labels.stage, labels.num_classes, len(labels)) == (stage, 3, 12)
        assert 0 < max(np.diff(labels.offsets)) <= 5
    stored = json.loads((run.detector(2) / "config.json").read_text())
    assert stored["class_path"].rpartition(".")[2] == detector["class_path"].rpartition(".")[2]
    assert stored["init_args"]["num_classes"] == 3

    truth = own_scenes / "instances.json"
    tuned = pipeline.finetune(own_scenes, truth, tmp_path / "tuned", [config], init=run.path)
    assert {"AP", "AR@100"} <= pipeline.evaluate(own_scenes, truth, tuned).keys()
    names = {category["name"] for category in json.loads(truth.read_text())["categories"]}
    assert {category.name for category in pipeline.predict(own_scenes, tuned).categories} == names

from __future__ import annotations

import types

import pytest
import torch

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.labels import Labels
from simdetr.detectors.predictions import Findings
from simdetr.evaluation.coco_metric import coco_metrics
from simdetr.training.detection_task import CocoValidation

CATEGORIES = (Category("a", "a"), Category(5, "b"))
TRUTH = Labels.from_images(
    [
        ImageLabels.build("0.jpg", (40, 40), [[0, 0, 10, 10], [20, 20, 40, 40]], [0, 1]),
        ImageLabels.build("1.jpg", (40, 40), [[5, 5, 25, 25]], [1]),
        ImageLabels.build("2.jpg", (40, 40), [], []),
    ],
    CATEGORIES,
)


class Module:
    def __init__(self):
        self.logged = {}

    def log(self, name, value, **_):
        self.logged[name] = value


def found(row, boxes, labels, scores):
    target = {"orig_size": torch.tensor([40, 40]), "image_index": torch.tensor(row)}
    detections = {
        "boxes_xyxy": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": torch.tensor(scores),
        "queries": torch.arange(len(scores)),
    }
    return target, Findings(detections, detections)


def validate(batches, **options):
    trainer = types.SimpleNamespace(
        sanity_checking=False, world_size=1, datamodule=types.SimpleNamespace(val_labels=TRUTH, categories=CATEGORIES)
    )
    callback, module = CocoValidation(**options), Module()
    callback.on_validation_epoch_start(trainer, module)
    for index, batch in enumerate(batches):
        targets, outputs = [pair[0] for pair in batch], [pair[1] for pair in batch]
        content = types.SimpleNamespace(targets=targets) if batch else None
        callback.on_validation_batch_end(trainer, module, outputs, content, index)
    callback.on_validation_epoch_end(trainer, module)
    return module.logged


PERFECT = [
    [found(0, [[0, 0, 10, 10], [20, 20, 40, 40]], [0, 1], [0.9, 0.8]), found(2, [], [], [])],
    [],  # a rank that has run out of images
    [found(1, [[5, 5, 25, 25]], [1], [0.7])],
]


def test_perfect_detections():
    scores = validate(PERFECT)
    assert scores["val/AP"] == scores["val/AP50"] == 1


def test_classes_count_unless_recall_is_asked_for():
    wrong = [[found(1, [[5, 5, 25, 25]], [0], [0.7])]]
    assert validate(wrong)["val/AP"] == 0
    assert validate(wrong, class_agnostic=True)["val/AR@100"] == pytest.approx(1 / 3)


def test_equals_the_metric_on_the_same_boxes():
    scores = validate([[found(0, [[0, 0, 10, 12]], [0], [0.4])]])
    row = ImageLabels.build("0.jpg", (40, 40), [[0, 0, 10, 12]], [0], [0.4])
    expected = coco_metrics(TRUTH, Labels.from_images([row], CATEGORIES))
    assert scores == pytest.approx({f"val/{name}": value for name, value in expected.items()}, nan_ok=True)


def test_no_detections_at_all():
    assert validate([[]])["val/AP"] == 0

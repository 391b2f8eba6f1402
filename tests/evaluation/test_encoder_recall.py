"""Recall of a miner that finds everything, half of everything, and nothing."""

from __future__ import annotations

import numpy as np
import pytest

from simdetr.encoder_training import probe as encoder_recall
from simdetr.encoder_training.probe import load_encoder_recall
from simdetr.mining import ColourTextureEncoder, MiningConfig
from simdetr.mining.regions import Regions
from simdetr.training.datamodule import read_training_labels

CONFIG = MiningConfig(image_size=96)  # the scenes have 64 x 80 pixels


def regions(boxes: np.ndarray, scores: np.ndarray) -> Regions:
    number = len(boxes)
    return Regions(
        boxes_xyxy=boxes.astype(np.float32),
        features=np.zeros((number, 0), np.float32),
        area=np.ones(number, np.float32),
        stride=np.zeros(number, np.int16),
        k=np.zeros(number, np.int16),
        cluster=np.zeros(number, np.int16),
        score=scores.astype(np.float32),
    )


def miner(truth, keep):
    """A miner that gives the true boxes, in pixels of the shrunk images, for which ``keep`` holds."""

    def mine(images, encoder, config, device):
        assert config is CONFIG and all(max(image.shape[1:]) == 96 for image in images)
        found = []
        for row, image in enumerate(images):
            own = truth.image(row)
            scale = np.array([image.shape[2] / own.size_hw[1], image.shape[1] / own.size_hw[0]] * 2)
            chosen = [number for number in range(len(own.boxes_xyxy)) if keep(number)]
            found.append(regions(own.boxes_xyxy[chosen] * scale, np.ones(len(chosen))))
        return found

    return mine


def test_finds_everything_or_nothing(scenes, monkeypatch):
    recall = load_encoder_recall(scenes / "instances.json", None, 5, CONFIG)
    assert len(recall.images) == len(recall.truth) == 5
    encoder = ColourTextureEncoder()
    monkeypatch.setattr(encoder_recall, "mine_batch", miner(recall.truth, lambda number: True))
    assert recall(encoder) == pytest.approx({"recall50@25": 1, "AR@25": 1, "boxes": len(recall.truth.boxes_xyxy) / 5})
    monkeypatch.setattr(encoder_recall, "mine_batch", miner(recall.truth, lambda number: number == 0))
    assert recall(encoder)["recall50@25"] == pytest.approx(5 / len(recall.truth.boxes_xyxy))
    monkeypatch.setattr(encoder_recall, "mine_batch", miner(recall.truth, lambda number: False))
    assert recall(encoder) == {"recall50@25": 0, "AR@25": 0, "boxes": 0}


def test_the_best_scored_boxes_count(scenes, monkeypatch):
    recall = load_encoder_recall(scenes / "instances.json", scenes, 2, CONFIG)
    first = miner(recall.truth, lambda number: number == 0)

    def with_thirty_poor_ones(images, encoder, config, device):
        poor = np.tile(np.array([[0, 0, 1, 1.0]]), (30, 1))
        rows = [found.boxes_xyxy for found in first(images, encoder, config, device)]
        return [regions(np.concatenate((poor, row)), np.array([0.1] * 30 + [2.0] * len(row))) for row in rows]

    monkeypatch.setattr(encoder_recall, "mine_batch", with_thirty_poor_ones)
    assert recall(ColourTextureEncoder())["recall50@25"] == pytest.approx(2 / len(recall.truth.boxes_xyxy))


def test_a_real_encoder_finds_something(scenes):
    found = load_encoder_recall(scenes / "instances.json", None, 6, CONFIG)(ColourTextureEncoder())
    assert 0 < found["AR@25"] < found["recall50@25"] <= 1 and found["boxes"] <= 25


def test_labels_of_other_images_are_refused(scenes, own_scenes, tmp_path):
    labels = read_training_labels(scenes / "instances.json")
    for image_id in labels.image_ids[:3]:
        (own_scenes / image_id).unlink()
    present = load_encoder_recall(scenes / "instances.json", own_scenes, 12, CONFIG)
    assert present.truth.image_ids == labels.image_ids[3:6]
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.png").write_bytes((scenes / labels.image_ids[0]).read_bytes())
    with pytest.raises(ValueError, match=r"truth: none of its 12 images is in .*ids like 'x.png'.*give the folder"):
        load_encoder_recall(scenes / "instances.json", other, 3, CONFIG)

"""The probe's numbers against matrices of known rank, its warning, and its file."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from simdetr.data.images import open_images, read_image
from simdetr.data.label_files import read_labels
from simdetr.encoder_training import probe as encoder_recall
from simdetr.encoder_training.probe import (
    STRENGTHS,
    classed_images,
    effective_rank,
    feature_spread,
    linear_probe,
    load_encoder_recall,
    object_images,
    probe_images,
    read_rows,
    warn_of_collapse,
    wilson_interval,
    write_row,
)
from simdetr.mining import ColourTextureEncoder, MiningConfig
from simdetr.mining.batch import encode, load_image
from simdetr.mining.encoders import TimmEncoder
from simdetr.mining.regions import Regions


class Constant(torch.nn.Module):
    """Sees the same everywhere."""

    strides, region_dim, fingerprint = (16, 32), 4, "constant"

    def forward(self, images):
        return {
            stride: torch.ones(len(images), 4, images.shape[2] // stride, images.shape[3] // stride)
            for stride in (16, 32)
        }


def test_effective_rank_of_known_matrices():
    axes = torch.eye(5)
    assert effective_rank(torch.cat((axes, -axes))) == pytest.approx(5)
    assert effective_rank(torch.outer(torch.arange(6.0), torch.tensor([1.0, 2, -3]))) == pytest.approx(1)
    assert effective_rank(torch.ones(6, 4)) == 0
    two = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]])  # singular values in the ratio 3 : 1
    assert effective_rank(two) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert effective_rank(two + 100) == pytest.approx(effective_rank(two), rel=1e-4)


def test_spread_is_one_for_even_directions_and_zero_for_a_collapsed_encoder():
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 255, (3, 64, 64), generator=generator, dtype=torch.uint8) for _ in range(6)]
    collapsed = feature_spread(Constant(), images)
    assert collapsed == {"spread": 0.0, "rank": 0.0, "cell_rank": 0.0}
    untrained = feature_spread(TimmEncoder("test_resnet", random_weights=True), images)
    assert 0 < untrained["spread"] < 1 and 1 < untrained["rank"] <= 5 < untrained["cell_rank"]

    class Even(Constant):
        """Each image looks along its own axis."""

        calls = 0

        def forward(self, images):
            direction = torch.eye(3).repeat(2, 1)[self.calls] * (1 if self.calls < 3 else -1)
            self.calls += 1
            return {stride: direction.view(1, 3, 1, 1).expand(1, 3, 2, 2) for stride in (16, 32)}

    even = feature_spread(Even(), images)
    assert even["spread"] == pytest.approx(math.sqrt(6 / 5))  # the standard deviation of six values divides by five
    assert even["rank"] == pytest.approx(3, rel=1e-4)


def test_collapse_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_collapse({"step": 10.0, "spread": 0.3, "rank": 6.0})
        warn_of_collapse({"step": 0.0, "spread": 0.0, "rank": 0.0})
        assert not caplog.records
        warn_of_collapse({"step": 20.0, "spread": 0.001, "rank": 6.0})
        warn_of_collapse({"step": 30.0, "spread": 0.3, "rank": 1.1})
    assert ["collapses: at step 20" in caplog.messages[0], "rank 1.1" in caplog.messages[1]] == [True, True]


def test_rows_of_later_steps_go_when_a_run_resumes(tmp_path):
    path = tmp_path / "probe.csv"
    for step in (0, 5, 10):
        write_row(path, {"step": float(step), "spread": step / 10})
    write_row(path, {"step": 5.0, "spread": 0.7, "AR@25": 0.5})
    assert read_rows(path) == [{"step": 0.0, "spread": 0.0}, {"step": 5.0, "spread": 0.7, "AR@25": 0.5}]
    assert read_rows(tmp_path / "none.csv") == []


def test_probe_images_are_evenly_spaced_and_readable(own_scenes):
    source = open_images(own_scenes)
    source.path_of(source.ids[1]).write_bytes(b"")
    images = probe_images(source, 3, 64)
    assert len(images) == 2 and all(max(image.shape[1:]) == 64 for image in images)
    with pytest.raises(ValueError, match="images: expected at least two readable ones, got 1 of 2 tried"):
        probe_images(source, 2, 64)


# ----------------------------------------------------------------------------------------------------------------------
# Recall of a miner that finds everything, half of everything, and nothing.


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
    labels = read_labels(scenes / "instances.json")
    for image_id in labels.image_ids[:3]:
        (own_scenes / image_id).unlink()
    present = load_encoder_recall(scenes / "instances.json", own_scenes, 12, CONFIG)
    assert present.truth.image_ids == labels.image_ids[3:6]
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.png").write_bytes((scenes / labels.image_ids[0]).read_bytes())
    with pytest.raises(ValueError, match=r"truth: none of its 12 images is in .*ids like 'x.png'.*give the folder"):
        load_encoder_recall(scenes / "instances.json", other, 3, CONFIG)


# ----------------------------------------------------------------------------------------------------------------------
# The linear probe.


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """24 images, 8 each of stripes across, stripes down and a plain colour, in a folder per class; noise in all."""
    folder, rng = tmp_path_factory.mktemp("kinds"), np.random.default_rng(0)
    for kind in ("across", "down", "plain"):
        (folder / kind).mkdir()
        for number in range(8):
            pixels = rng.integers(0, 60, (64, 64, 3)) + rng.integers(40, 140, 3)
            period = 4 + number % 3
            stripes = 80 * (np.arange(64) // period % 2)
            pixels += {"across": stripes[:, None, None], "down": stripes[None, :, None], "plain": 0}[kind]
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / kind / f"{number}.png")
    return folder


def test_the_linear_probe_is_scikit_learn_by_hand(kinds):
    encoder = TimmEncoder("test_resnet", random_weights=True)
    images = classed_images(kinds, None)
    assert images.names == ("across", "down", "plain") and len(images) == 24
    train, val = images.at(np.arange(0, 24, 2)), images.at(np.arange(1, 24, 2))
    found = linear_probe(encoder, train, val, image_size=64, seed=3)

    def features(part):
        maps = [encode(load_image(images.source.record(name), 64).pixels[None], encoder)[32] for name in part.image_ids]
        return torch.cat(maps).mean(dim=(2, 3)).numpy()

    x, y = features(train).astype(np.float64), train.classes
    mean, std = x.mean(axis=0), x.std(axis=0)
    std[std == 0] = 1
    parts = StratifiedKFold(4, shuffle=True, random_state=3)  # four images of each class
    scores = {}
    for strength in STRENGTHS:
        right = []
        for own, other in parts.split(x, y):
            m, s = x[own].mean(axis=0), x[own].std(axis=0)
            s[s == 0] = 1
            classifier = LogisticRegression(C=strength, max_iter=5000).fit((x[own] - m) / s, y[own])
            right.append(classifier.score((x[other] - m) / s, y[other]))
        scores[strength] = np.mean(right)
    best = max(STRENGTHS, key=lambda strength: (round(scores[strength], 9), -strength))
    classifier = LogisticRegression(C=best, max_iter=5000).fit((x - mean) / std, y)
    assert found.strength == best
    assert found.accuracy == classifier.score((features(val) - mean) / std, val.classes)
    assert (found.classes, found.train_images, found.val_images) == (3, 12, 12)
    assert found.feature_dim == encoder.region_dim and found.chance == pytest.approx(1 / 3)
    assert found.low < found.accuracy <= found.high


def test_wilson_interval():
    assert wilson_interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert wilson_interval(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-3)
    assert wilson_interval(0.0, 20)[0] == 0


def test_an_image_is_of_the_class_that_most_of_its_boxes_have(tmp_path, caplog):
    for name in "abcd":
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    rows = [("a.png", 1), ("a.png", 2), ("a.png", 2), ("b.png", 1), ("c.png", 1), ("c.png", 2)]  # d has none
    content = {
        "images": [{"id": i, "file_name": f"{name}.png", "width": 64, "height": 64} for i, name in enumerate("abcd")],
        "annotations": [
            {
                "id": i + 1,
                "image_id": "abcd".index(name[0]),
                "category_id": c,
                "bbox": [i, 0, 9, 9],
                "area": 81,
                "iscrowd": 0,
            }
            for i, (name, c) in enumerate(rows)
        ],
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
    }
    (tmp_path / "labels.json").write_text(json.dumps(content))
    with caplog.at_level("INFO"):
        found = classed_images(tmp_path, tmp_path / "labels.json")
    assert [(name, found.names[c]) for name, c in zip(found.image_ids, found.classes, strict=True)] == [
        ("a.png", "two"),
        ("b.png", "one"),
    ]
    assert "left out: 1 images with several classes, none of most boxes, and 1 without any" in caplog.text


def test_objects_are_cut_out_as_images_of_their_class(tmp_path):
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[8:24, 16:40] = (200, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    boxes = [[16, 8, 24, 16], [0, 30, 10, 10], [60, 10, 20, 20], [5.1, 5.1, 0.2, 9], [0, 0, 64, 48]]
    rows = [
        {"id": n, "image_id": 1, "category_id": 1 + n % 2, "bbox": box, "area": 1, "iscrowd": int(n == 5)}
        for n, box in enumerate(boxes, start=1)
    ]
    kinds = [{"id": 1, "name": "one/half"}, {"id": 2, "name": "two"}]
    content = {"images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}], "annotations": rows}
    (tmp_path / "labels.json").write_text(json.dumps(content | {"categories": kinds}))
    found = object_images(tmp_path, tmp_path / "labels.json", tmp_path / "objects")
    assert [found.names[c] for c in found.classes] == ["two", "one/half", "two"]  # neither the thin one nor the group
    crops = [read_image(found.source.record(name)) for name in found.image_ids]
    assert [tuple(crop.shape[1:]) for crop in crops] == [(16, 24), (10, 10), (20, 4)]  # one reaches over the edge
    assert crops[0].flatten(1).unique(dim=1).flatten().tolist() == [200, 0, 0]
    assert len(object_images(tmp_path, tmp_path / "labels.json", tmp_path / "few", at_most=1)) == 1


def test_rare_and_foreign_classes_are_counted(kinds, caplog):
    encoder, images = ColourTextureEncoder(), classed_images(kinds, None)
    rare = images.at(np.array([*range(6), *range(8, 14), 16]))  # one plain image
    found = linear_probe(encoder, rare, images.at(np.array([6, 7, 14, 15, 20])), image_size=64)
    assert (found.classes, found.val_images) == (2, 4)
    assert "1 classes with fewer than 2 images to train on, and 1 images to predict of classes" in caplog.text
    with pytest.raises(ValueError, match="expected two classes or more"):
        linear_probe(encoder, images.at(np.arange(8)), images.at(np.arange(8, 16)), image_size=64)
    with pytest.raises(ValueError, match=r"1 images are trained on as well, such as 'across/0\.png'"):
        linear_probe(encoder, images, images.at(np.array([0])), image_size=64)
    with pytest.raises(ValueError, match="val_fraction: expected a part between 0 and 1, got 1"):
        linear_probe(encoder, images, val_fraction=1.0, image_size=64)

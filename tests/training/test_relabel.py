from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from simdetr.boxes import normalise, pairwise_iou
from simdetr.data import masks
from simdetr.data.annotations import LINEAGE_COLUMNS, Category
from simdetr.data.images import open_images
from simdetr.data.label_files import read_labels
from simdetr.detectors.mask_vectors import encode_crops
from simdetr.detectors.predictions import best_per_query
from simdetr.exchange.weights import LoadedDetector
from simdetr.training import relabel as module
from simdetr.training.relabel import InferenceSettings, detect, detect_array, relabel

CATEGORIES = tuple(Category(i, str(i)) for i in range(3))
SETTINGS = InferenceSettings(short_side=64, max_side=80, iou_threshold=0.55, batch_size=2)


def outputs_of(boxes, scores):
    return {"pred_logits": scores.logit()[None, :, None], "pred_boxes": normalise(boxes, (120, 120))[None]}


@pytest.mark.parametrize("seed", range(5))
def test_overlap_filter_keeps_the_most_confident(seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(60, 2, generator=generator) * 50
    boxes = torch.cat((corners, corners + 1 + torch.rand(60, 2, generator=generator) * 60), dim=1)
    scores = torch.rand(60, generator=generator)
    kept = best_per_query(outputs_of(boxes, scores), [(120, 120)], iou_threshold=0.55)[0]["queries"]
    overlaps = pairwise_iou(boxes, boxes)
    among_kept = overlaps[kept][:, kept].fill_diagonal_(0)
    assert not (among_kept > 0.55).any()
    assert 1 < len(kept) < 60
    assert torch.equal(scores[kept], scores[kept].sort(descending=True).values)
    for gone in set(range(60)) - set(kept.tolist()):  # each went for a more confident one that stayed
        assert any(overlaps[gone, k] > 0.55 and scores[k] > scores[gone] for k in kept.tolist())


def loaded(detector):
    return LoadedDetector(detector, CATEGORIES, {})


def test_other_rules_of_keeping():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 20, 30], [30, 30, 40, 40], [50, 50, 60, 60]])
    outputs = outputs_of(boxes, torch.tensor([0.1, 0.9, 0.5, 0.3]))
    found = best_per_query(outputs, [(120, 120)], iou_threshold=0.55)[0]
    assert found["queries"].tolist() == [2, 3, 0]  # the second has no area; no threshold
    assert best_per_query(outputs, [(120, 120)], 1, min_score=0.3)[0]["queries"].tolist() == [2]
    assert best_per_query(outputs, [(120, 120)], min_score=0.6)[0]["queries"].tolist() == []


def test_relabelling_keeps_one_class_of_a_query_and_predictions_all(scenes, tmp_path):
    source = open_images(scenes)
    labels = relabel(loaded(Draws()), source, SETTINGS, tmp_path / "one.parquet", stage=1)
    assert labels.image(0).classes.tolist() == [1, 0]  # of logits (0, 2) and (1, -1)
    found = detect(Draws(), source, CATEGORIES, SETTINGS)
    assert found.image(0).classes.tolist() == [1, 0, 0, 1]
    masked = detect(Draws(), source, CATEGORIES, replace(SETTINGS, masks=True)).image(0)
    first, second, again, last = masked.masks
    assert first == again and second == last and first != second  # best first: queries 0, 1, 0, 1


def test_relabelling_resumes_part_by_part(make_detector, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART_SIZE", 5)
    source, detector = open_images(scenes), make_detector(3)
    whole = relabel(loaded(detector), source, SETTINGS, tmp_path / "whole.parquet", stage=1)
    assert (len(whole), whole.stage, whole.categories) == (12, 1, CATEGORIES)
    assert whole.lineage is None  # nothing before it
    before = replace(whole.select(whole.image_ids[:9]), stage=0)

    seen = []
    detect = module.detect

    def dying(detector, part, *args, **kwargs):
        if len(seen) == 2:
            seen.append(None)
            raise KeyboardInterrupt
        seen.append(part.ids[0])
        return detect(detector, part, *args, **kwargs)

    monkeypatch.setattr(module, "detect", dying)
    arguments = (loaded(detector), source, SETTINGS, tmp_path / "killed.parquet")
    with pytest.raises(KeyboardInterrupt):
        relabel(*arguments, stage=1, before=before)
    assert not (tmp_path / "killed.parquet").exists()
    relabel(*arguments, stage=1, before=before)
    assert seen == [source.ids[0], source.ids[5], None, source.ids[10]]  # no part twice
    killed = read_labels(tmp_path / "killed.parquet")
    assert killed.image_ids == whole.image_ids
    for name in ("offsets", "boxes_xyxy", "classes", "scores"):
        assert np.array_equal(getattr(killed, name), getattr(whole, name))
    assert killed.lineage.born.tolist() == [0] * before.offsets[-1] + [1] * (whole.offsets[-1] - before.offsets[-1])
    monkeypatch.setattr(module, "detect", detect)
    at_once = relabel(loaded(detector), source, SETTINGS, tmp_path / "again.parquet", stage=1, before=before)
    for name in LINEAGE_COLUMNS:
        assert np.array_equal(getattr(killed.lineage, name), getattr(at_once.lineage, name))
    assert not list(tmp_path.glob("*.parts"))


def test_a_part_without_a_readable_image(make_detector, own_scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART_SIZE", 1)
    source = open_images(own_scenes)
    source.path_of(source.ids[0]).write_bytes(b"")
    out = tmp_path / "labels.parquet"
    labels = relabel(loaded(make_detector(3)), source, SETTINGS, out, stage=2, max_unreadable=0.5)
    assert labels.image_ids == tuple(source.ids[1:])
    assert "labels" not in (tmp_path / "quarantine.csv").read_text()
    assert source.ids[0] in (tmp_path / "quarantine.csv").read_text()


class Draws(nn.Module):
    """Finds the same two objects in every image: an L that fills its box's left and bottom, and a disc."""

    def __init__(self, with_vectors=True):
        super().__init__()
        self.with_vectors = with_vectors
        self.boxes = torch.tensor([[0.3, 0.4, 0.4, 0.5], [0.8, 0.6, 0.5, 0.4]])  # the second leaves the image
        side = torch.arange(128) + 0.5
        y, x = torch.meshgrid(side, side, indexing="ij")
        self.crops = torch.stack([(x < 64) | (y > 96), (x - 64) ** 2 + (y - 64) ** 2 < 64**2])

    def forward(self, images, mask):
        outputs = {"pred_boxes": self.boxes, "pred_logits": torch.tensor([[0.0, 2.0], [1.0, -1.0]])}
        if self.with_vectors:
            outputs["pred_vectors"] = encode_crops(self.crops)
        return {name: value.expand(len(images), *value.shape) for name, value in outputs.items()}


def test_masks_are_drawn_where_the_boxes_are(scenes, tmp_path):
    source = open_images(scenes)
    settings = replace(SETTINGS, masks=True)
    labels = relabel(loaded(Draws()), source, settings, tmp_path / "masks.parquet", stage=0)
    again = read_labels(tmp_path / "masks.parquet")
    assert again.masks.tolist() == labels.masks.tolist() and len(labels.masks) == 24
    for row in range(2):
        image = labels.image(row)
        height, width = image.size_hw
        drawn = masks.decode(image.masks, image.size_hw).astype(bool)
        y, x = np.indices((height, width)) + 0.5
        left, top, across, down = 0.1 * width, 0.15 * height, 0.4 * width, 0.5 * height
        inside = (x > left) & (x < left + across) & (y > top) & (y < top + down)
        shape = inside & ((x < left + across / 2) | (y > top + 0.75 * down))
        disc = ((x - 0.8 * width) / (0.25 * width)) ** 2 + ((y - 0.6 * height) / (0.2 * height)) ** 2 < 1
        for found, expected in zip(drawn, (shape, disc), strict=True):  # best first
            assert (found & expected).sum() / (found | expected).sum() > 0.95
    pixels = torch.zeros(3, 50, 70, dtype=torch.uint8)
    assert masks.decode(detect_array(Draws(), pixels, CATEGORIES, settings).masks, (50, 70)).any(axis=(1, 2)).all()
    assert detect_array(Draws(), pixels, CATEGORIES, SETTINGS).masks is None


def test_no_masks_from_a_detector_that_draws_none(scenes, tmp_path):
    with pytest.raises(ValueError, match="masks: this detector draws no masks"):
        relabel(
            loaded(Draws(False)),
            open_images(scenes),
            replace(SETTINGS, masks=True),
            tmp_path / "l.parquet",
            stage=0,
        )


class Landmarks(nn.Module):
    """Four landmarks: two of class 0 close together, one of class 1 near them, one that is none."""

    def forward(self, images, mask):
        points = torch.tensor([[0.50, 0.50], [0.51, 0.50], [0.50, 0.51], [0.9, 0.9]]).expand(len(images), -1, -1)
        logits = torch.full((len(images), 4, 2), -torch.inf)
        for query, (label, logit) in enumerate([(0, 2.0), (0, 1.0), (1, 0.0)]):
            logits[:, query, label] = logit
        boxes = torch.cat([points, torch.zeros_like(points)], dim=2)
        return {"pred_logits": logits, "pred_boxes": boxes, "pred_points": points}


def test_landmarks_of_queries_stay_where_they_are_and_need_no_box():
    settings = InferenceSettings(short_side=50, max_side=100)
    pixels = torch.zeros(3, 50, 100, dtype=torch.uint8)
    found = detect_array(Landmarks(), pixels, CATEGORIES, settings)
    high, low = torch.sigmoid(torch.tensor([2.0, 1.0])).tolist()
    assert found.classes.tolist() == [0, 0, 1]
    np.testing.assert_allclose(found.points, [[50, 25], [51, 25], [50, 25.5]], atol=1e-4)
    np.testing.assert_allclose(found.scores, [high, low, 0.5], atol=1e-6)
    np.testing.assert_allclose(found.boxes_xyxy[0], [50, 25, 50, 25], atol=1e-4)
    near = detect_array(Landmarks(), pixels, CATEGORIES, replace(settings, point_radius=0.03))
    assert near.classes.tolist() == [0, 1]
    np.testing.assert_allclose(near.points, [[50, 25], [50, 25.5]], atol=1e-4)
    best = detect_array(Landmarks(), pixels, CATEGORIES, replace(settings, max_boxes=1, score_threshold=0.6))
    assert best.classes.tolist() == [0] and best.points.shape == (1, 2)


def test_a_heads_own_classes_take_the_place_of_the_detectors():
    class Own(Landmarks):
        def forward(self, images, mask):
            outputs = super().forward(images, mask)
            return outputs | {"point_logits": outputs["pred_logits"].flip(2)}

    found = detect_array(Own(), torch.zeros(3, 50, 100, dtype=torch.uint8), CATEGORIES, InferenceSettings(50, 100))
    assert found.classes.tolist() == [1, 1, 0]


def test_workers_change_nothing_and_half_precision_little(make_detector, scenes):
    source, detector = open_images(scenes), make_detector(3)
    plain = detect(detector, source, CATEGORIES, SETTINGS)
    by_workers = detect(detector, source, CATEGORIES, replace(SETTINGS, num_workers=2))
    assert by_workers.image_ids == plain.image_ids
    np.testing.assert_array_equal(by_workers.boxes_xyxy, plain.boxes_xyxy)
    seen = []
    handle = detector.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    half = detect(detector, source, CATEGORIES, replace(SETTINGS, precision="bf16"))
    handle.remove()
    assert all(seen) and seen
    assert len(half.boxes_xyxy) > 0
    best = [plain.image(i).scores.max() - half.image(i).scores.max() for i in range(len(plain))]
    assert 0 < np.abs(best).max() < 0.02

"""Views of images, and what a detector that is known exactly says of boxes in them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.images import open_images
from simdetr.data.labels import Labels
from simdetr.exchange.weights import LoadedDetector
from simdetr.labelling.consensus import VIEWS, View, consensus

CATEGORIES = (Category(1, "bolt"), Category(2, "nut"))
SETTINGS = {"short_side": 64, "max_side": 96, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
SCORE = 0.8


class BrightSpot(nn.Module):
    """Finds the one white rectangle of each image exactly, as the first class."""

    def forward(self, images, mask):
        boxes = []
        for image, outside in zip(images, mask, strict=True):
            height, width = int((~outside).any(1).sum()), int((~outside).any(0).sum())
            ys, xs = torch.nonzero(image.amin(0)[:height, :width] > 0.9, as_tuple=True)
            x0, y0, x1, y1 = (float(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
            boxes.append([(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height])
        logits = torch.full((len(images), 1, 2), -9.0)
        logits[..., 0] = torch.logit(torch.tensor(SCORE))
        return {"pred_boxes": torch.tensor(boxes)[:, None], "pred_logits": logits}


class Scripted(nn.Module):
    """Says at each call what it was given: rows of (box xyxy in pixels of 64 × 64, class, score), undone by hand."""

    def __init__(self, *calls):
        super().__init__()
        self.calls = list(calls)

    def forward(self, images, mask):
        rows = self.calls.pop(0)
        boxes, logits = torch.zeros(1, len(rows), 4), torch.full((1, len(rows), 2), -20.0)
        for query, (box, category, score) in enumerate(rows):
            x0, y0, x1, y1 = box
            boxes[0, query] = torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]) / 64
            logits[0, query, category] = torch.logit(torch.tensor(score))
        return {"pred_boxes": boxes, "pred_logits": logits}


def loaded(detector, **settings):
    return LoadedDetector(detector, CATEGORIES, {**SETTINGS, **settings})


def folder_with(path, **boxes):
    """Black images with a white rectangle each, 64 × 80 or, for names that end with ``b``, 64 × 64."""
    path.mkdir()
    rows = []
    for name, (x0, y0, x1, y1) in boxes.items():
        pixels = np.zeros((64, 64 if name.endswith("b") else 80, 3), np.uint8)
        pixels[y0:y1, x0:x1] = 255
        Image.fromarray(pixels).save(path / f"{name}.png")
        rows.append(ImageLabels.build(f"{name}.png", pixels.shape[:2], [[x0, y0, x1, y1]], [0], [SCORE]))
    return open_images(path), Labels.from_images(rows, CATEGORIES)


def test_an_exact_detector_finds_every_box_again_where_it_was(tmp_path):
    """In batches of images of two sizes, whose mirror images lie within their own borders."""
    source, labels = folder_with(tmp_path / "i", a=(10, 20, 42, 50), b=(30, 8, 58, 40), cb=(6, 6, 30, 44))
    found = consensus(loaded(BrightSpot()), source, labels)
    np.testing.assert_allclose(found.boxes_xyxy, labels.boxes_xyxy, atol=0.01)
    assert found.seen_again.tolist() == [3, 3, 3]
    np.testing.assert_allclose(found.shift_iou, 1, atol=1e-3)


@pytest.mark.parametrize("view", [View(False, 0), *VIEWS, View(True, 3)])
def test_boxes_of_a_view_lie_where_the_images_own_do(view):
    images = torch.zeros(2, 3, 40, 60)
    images[0, :, 10:20, 15:35] = 1
    images[1, :, 5:12, 4:30] = 1
    mask = torch.zeros(2, 40, 60, dtype=torch.bool)
    mask[1, 30:], mask[1, :, 50:] = True, True
    sizes = [(40, 60), (30, 50)]
    shown = view.shown(images, sizes)
    assert torch.equal(shown[1, :, 30:], images[1, :, 30:]) and torch.equal(shown[1, :, :, 50:], images[1, :, :, 50:])
    own, seen = (BrightSpot()(each, mask)["pred_boxes"] for each in (images, shown))
    torch.testing.assert_close(view.undone(seen, sizes), own)
    assert view == View(False, 0) or not torch.equal(seen, own)


def test_the_mean_is_by_score_and_by_hand(tmp_path):
    """Views without a change: .8 · 10 + .4 · 12 + .4 · 14 over 1.6 is 11.5."""
    source, labels = folder_with(tmp_path / "i", b=(10, 10, 40, 40))
    detector = Scripted([((12, 10, 40, 40), 0, 0.4)], [((14, 10, 40, 40), 0, 0.4)])
    found = consensus(loaded(detector), source, labels, views=[View(False, 0)] * 2)
    np.testing.assert_allclose(found.boxes_xyxy, [[11.5, 10, 40, 40]], atol=1e-3)
    np.testing.assert_allclose(found.shift_iou, [28.5 / 30], atol=1e-4)
    assert found.seen_again.tolist() == [0]  # half of the score is not above half of it


def test_what_counts_is_of_the_class_overlaps_and_is_sure(tmp_path):
    """Not another class, too little overlap (20 of 30 columns, .667, do, 19 do not), or the worse of two."""
    source, labels = folder_with(tmp_path / "i", b=(10, 10, 40, 40))
    detector = Scripted(
        [((10, 10, 40, 40), 1, 0.9)],
        [((10, 10, 29, 40), 0, 0.9)],
        [((10, 10, 30, 40), 0, 0.41)],
        [((10, 10, 39, 40), 0, 0.9), ((10, 10, 40, 40), 0, 0.1)],
    )
    found = consensus(loaded(detector), source, labels, views=[View(False, 0)] * 4)
    assert found.seen_again.tolist() == [2]
    right = (0.8 * 40 + 0.41 * 30 + 0.9 * 39) / (0.8 + 0.41 + 0.9)
    np.testing.assert_allclose(found.boxes_xyxy, [[10, 10, right, 40]], atol=1e-3)


def test_nothing_to_look_at_and_classes_by_name(tmp_path):
    source, labels = folder_with(tmp_path / "i", a=(10, 20, 42, 50))
    nothing = consensus(loaded(BrightSpot()), source, labels.rows(np.zeros(0, np.int64)))
    assert nothing.boxes_xyxy.shape == (0, 4) and not len(nothing.seen_again)
    turned = replace(labels, categories=CATEGORIES[::-1], classes=labels.classes + 1)
    assert consensus(loaded(BrightSpot()), source, turned).seen_again.tolist() == [3]
    other = replace(labels, categories=(Category(1, "screw"),))
    with pytest.raises(LabelError, match="boxes of screw have no class among bolt, nut; name them alike"):
        consensus(loaded(BrightSpot()), source, other)

"""What speaks against pretraining is seen in the mined boxes: blank images, one class, boxes blind to the image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from simdetr.data.images import open_images
from simdetr.data.label_files import read_labels
from simdetr.evaluation.early_warning import MiningFigures, figures_in_words, mining_figures, warnings_of
from simdetr.mining import ColourTextureEncoder
from simdetr.mining.batch import MiningConfig
from simdetr.mining.miner import mine
from simdetr.mining.pseudo_labels import ClusteringConfig, make_pseudo_labels

HEALTHY = MiningFigures(
    1000, 20.0, 0.01, 128, 100.0, labelled_images=300, objects=900, label_classes=7, recall50=0.4, chance50=0.05
)


def test_healthy_figures_warn_of_nothing():
    assert warnings_of(HEALTHY) == []
    assert "proposals cover 40% of 900 labelled objects" in figures_in_words(HEALTHY)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"empty_share": 0.6}, "60% of the images have no proposal: they are blank"),
        ({"boxes_per_image": 0.4}, "0.4 proposals per image"),
        ({"effective_classes": 1.4}, "128 pseudo-classes are as uneven as 1.4 equal ones"),
        ({"recall50": 0.04}, "proposals cover 4% of the 900 objects"),
        ({"recall50": 0.3, "chance50": 0.29}, "those of another image 29%"),
        ({"label_classes": 1}, "your labels have a single class"),
        ({"images": 50}, "only 50 images"),
    ],
)
def test_each_warning_fires_alone(change, said):
    (warning,) = warnings_of(replace(HEALTHY, **change))
    assert said in warning


def test_a_class_unaware_run_is_not_warned_of_its_one_class():
    assert warnings_of(replace(HEALTHY, classes=1, effective_classes=1.0)) == []


def test_boxes_on_the_objects_beat_those_of_another_image(make_labels):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 500, (30, 2))
    truth = make_labels({f"{i:02d}": [(x, y, x + 60, y + 60, 0)] for i, (x, y) in enumerate(corners)})
    figures = mining_figures(truth, truth)
    assert figures.recall50 == 1.0 and figures.chance50 < 0.2
    same = make_labels({f"{i:02d}": [(100, 100, 160, 160, 0)] for i in range(30)})
    blind = mining_figures(same, same)
    assert blind.chance50 == blind.recall50 == 1.0
    assert any("know little of what is on an image" in warning for warning in warnings_of(blind))


def test_entropy_counts_equal_classes(make_labels):
    even = make_labels({"a": [(0, 0, 9, 9, c) for c in range(4)]}, (1, 2, 3, 4))
    assert mining_figures(even).effective_classes == pytest.approx(4)
    assert mining_figures(make_labels({"a": [(0, 0, 9, 9, 2)] * 4}, (1, 2, 3, 4))).effective_classes == pytest.approx(1)


def test_blank_images_fire_on_what_was_really_mined(scenes, tmp_path):
    """Four scenes among twelve images of one grey, which have no proposals."""
    for number in range(12):
        Image.new("RGB", (80, 64), (128, 128, 128)).save(tmp_path / f"blank{number:02d}.png")
    for path in sorted((scenes / "images").iterdir())[:4]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    store = mine(open_images(tmp_path), ColourTextureEncoder(), MiningConfig(image_size=64), tmp_path / "store", "cpu")
    labels = make_pseudo_labels(store, ClusteringConfig(num_classes=1))
    figures = mining_figures(labels, None)
    assert figures.empty_share == 0.75
    assert any("75% of the images have no proposal" in warning for warning in warnings_of(figures))


def test_a_set_with_a_single_class_is_told(scenes):
    truth = read_labels(scenes / "instances.json")
    assert any("single class" in warning for warning in warnings_of(mining_figures(truth, truth.class_agnostic())))
    assert not any("single class" in warning for warning in warnings_of(mining_figures(truth, truth)))

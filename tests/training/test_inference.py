"""Maps of a set of images: which class, whose map, and the same numbers as scored by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.coco import write_coco
from simdetr.data.images import open_images
from simdetr.data.label_files import read_labels
from simdetr.data.labels import Labels
from simdetr.evaluation.localisation_metric import LocalisationMetric, centre_gaussian_map
from simdetr.exchange.weights import checkpoint_config, save_detector
from simdetr.heads import HeadedBackbone, LocalisationHead
from simdetr.reports.prediction_samples import write_heat_maps
from simdetr.training.inference import evaluate, localisation_head, localisation_scores, localise, predict
from simdetr.training.relabel import InferenceSettings

SETTINGS = InferenceSettings(short_side=64, max_side=96, batch_size=2)
CATEGORIES = (Category(1, "a"), Category(2, "b"), Category(7, "c"))


@pytest.fixture
def folder(tmp_path):
    """Three images of different shapes, one of them not readable."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for name, (height, width) in {"a.png": (64, 80), "b.jpg": (90, 60), "d.png": (70, 70)}.items():
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    (tmp_path / "images" / "c.png").write_bytes(b"no image")
    return tmp_path / "images"


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return HeadedBackbone(
        3,
        lambda sizes: LocalisationHead(sizes, map_size=40),
        "test_resnet",
        frozen_batch_norm=False,
        freeze_stem=False,
    ).eval()


@pytest.fixture
def truth():
    rows = [
        ImageLabels.build("a.png", (64, 80), [[5, 5, 40, 40], [50, 5, 70, 60]], [1, 2]),
        ImageLabels.build("b.jpg", (90, 60), [[10, 20, 50, 80]], [0]),
        ImageLabels.build("d.png", (70, 70), np.zeros((0, 4)), []),
    ]
    return Labels.from_images(rows, CATEGORIES)


def test_maps_come_image_by_image_without_the_unreadable(detector, folder):
    found = list(localise(detector, open_images(folder), SETTINGS))
    assert [(one.image_id, one.size_hw) for one in found] == [
        ("a.png", (64, 80)),
        ("b.jpg", (90, 60)),
        ("d.png", (70, 70)),
    ]
    for one in found:
        assert one.score_map.shape == (40, 40) and one.score_map.min() == 0 and one.score_map.max() == 1


def test_the_wanted_class_decides_the_class_activation_map(detector, folder):
    def maps(wanted):
        found = localise(detector, open_images(folder), SETTINGS, wanted=wanted, map_source="cam")
        return [one.score_map for one in found]

    first, second = maps(lambda name: 0), maps(lambda name: 1)
    assert not np.allclose(first[0], second[0])
    mixed = maps(lambda name: 0 if name == "a.png" else 1)
    np.testing.assert_array_equal(mixed[0], first[0])
    np.testing.assert_array_equal(mixed[1], second[1])
    assert detector.head.map_source == "first_attention", "the choice holds for the call alone"


def test_scores_are_those_of_the_metric(detector, folder, truth):
    scores = localisation_scores(detector, open_images(folder).subset(["a.png", "b.jpg", "d.png"]), truth, SETTINGS)
    own, centre = LocalisationMetric(step=0.01), LocalisationMetric(step=0.01)
    for one in localise(detector, open_images(folder).subset(["a.png", "b.jpg"]), SETTINGS):
        image = truth.of(one.image_id)
        boxes = image.boxes_xyxy[:1]  # those of the first box's class
        own.update(one.score_map, boxes, image.size_hw, class_correct=one.predicted_class in image.classes)
        centre.update(centre_gaussian_map(), boxes, image.size_hw)
    assert scores["MaxBoxAccV2"] == own.compute()["MaxBoxAccV2"]
    assert scores["Top-1 Loc"] == own.compute()["Top-1 Loc"]
    assert scores["centre MaxBoxAcc"] == centre.compute()["MaxBoxAcc"]
    assert "images" not in scores and "CAM MaxBoxAccV2" in scores


def test_heat_maps_are_drawn_for_every_readable_image(detector, folder, truth, tmp_path):
    out = tmp_path / "maps"
    assert write_heat_maps(detector, open_images(folder), SETTINGS, out, truth) == 3
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.jpg", "d.png"]
    write_heat_maps(detector, open_images(folder), SETTINGS, tmp_path / "without")
    with Image.open(out / "a.png") as boxed, Image.open(tmp_path / "without" / "a.png") as plain:
        reds = [np.asarray(picture).astype(int) for picture in (boxed, plain)]
        red = [((pixels[..., 0] > 200) & (pixels[..., 1:].max(axis=2) < 60)).sum() for pixels in reds]
    assert red[0] > red[1] + 50, "human boxes are red"


def test_other_detectors_have_no_maps(detector, folder):
    detector.head = torch.nn.Identity()  # a head of another kind
    assert localisation_head(detector) is None
    with pytest.raises(ValueError, match=r"expected one with a simdetr\.heads\.LocalisationHead"):
        next(localise(detector, open_images(folder), SETTINGS))


@pytest.fixture
def trained(make_detector, scenes, tmp_path):
    """Saves an untrained detector that knows some classes and gives its folder."""

    def make(categories):
        network = make_detector(len(categories))
        listed = [{"id": category.id, "name": category.name} for category in categories]
        sizes = {"short_side": 64, "max_side": 96}
        config = {**checkpoint_config(network, None), "categories": listed, "image_settings": sizes}
        save_detector(network, config, tmp_path / "detector")
        return tmp_path / "detector"

    return make


def changed(scenes, path, **changes):
    """The scenes' labels with another category for all, or other entries, as changes say."""
    content = json.loads((scenes / "instances.json").read_text())
    path.write_text(json.dumps(content | {name: change(content[name]) for name, change in changes.items()}))
    return path


def test_evaluation_matches_classes_by_name(trained, scenes, tmp_path, caplog):
    categories = read_labels(scenes / "instances.json").categories
    folder = trained(categories)
    own = predict(scenes, folder, max_boxes=3, device="cpu")  # what it finds is the truth
    write_coco(own, tmp_path / "own.json")
    before = evaluate(scenes, tmp_path / "own.json", folder, device="cpu")
    assert before["AP"] > 0.5
    renumbered = [replace(category, id=f"id {place}") for place, category in enumerate(categories)][::-1]
    write_coco(own.with_categories(renumbered), tmp_path / "texts.json")
    assert evaluate(scenes, tmp_path / "texts.json", folder, device="cpu") == pytest.approx(before, nan_ok=True)
    assert not caplog.records


def test_evaluation_says_what_it_drops_and_what_the_detector_does_not_know(trained, scenes, tmp_path, caplog):
    truth = read_labels(scenes / "instances.json")
    folder = trained(truth.categories[:1])
    path = changed(
        scenes, tmp_path / "half.json", annotations=lambda entries: [*entries[1:], entries[0] | {"category_id": 99}]
    )
    evaluate(scenes, path, folder, device="cpu")
    assert "1 × unknown category, dropped" in caplog.text
    unknown = truth.categories[1].name
    assert f"does not have count as missed: {unknown!r} (" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"category_id": 99}, "there is no usable box in it .* unknown category, dropped"),
        ({"iscrowd": 1}, "is a crowd"),
        ({"bbox": [0.1, 0.1, 0.4, 0.4]}, "looks like fractions"),
    ],
)
def test_evaluation_stops_where_no_truth_is_left(trained, scenes, tmp_path, changes, message):
    folder = trained(read_labels(scenes / "instances.json").categories)
    path = changed(scenes, tmp_path / "bad.json", annotations=lambda entries: [entry | changes for entry in entries])
    with pytest.raises(LabelError, match=message):
        evaluate(scenes, path, folder, device="cpu")


def test_other_classes_stop_an_evaluation_and_pseudo_classes_have_no_ap(trained, scenes, caplog):
    with pytest.raises(LabelError, match=r"instances.json and .*detector have no category in common: .*'tin', .*'jar'"):
        evaluate(scenes, scenes / "instances.json", trained([Category(91, "tin"), Category(92, "jar")]), device="cpu")
    folder = trained([Category(1, "cluster 0000 of ab"), Category(2, "cluster 0001 of ab")])  # ids as in the file
    scores = evaluate(scenes, scenes / "instances.json", folder, device="cpu")
    assert "AP" not in scores and "AR@100" in scores and "pseudo-classes" in caplog.text

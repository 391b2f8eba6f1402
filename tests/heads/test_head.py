"""The contract of heads: what may be built on what, and what is said of bad input."""

from __future__ import annotations

import pytest
import torch

from simdetr.data.class_paths import class_of
from simdetr.detectors import DeformableDETR
from simdetr.detectors.detector import FeatureSizes, Level, QueryDetector
from simdetr.heads import HeadedBackbone, HeadedDetector
from simdetr.heads.head import (
    Head,
    HeadLosses,
    check_finite,
    check_images,
    check_needs,
    check_targets,
    described,
    factory,
    prefixed,
)

SIZES = FeatureSizes(3, (8, 16), (8, 16))


def test_a_head_of_queries_needs_a_decoder(parts):
    with pytest.raises(ValueError, match=r"MeanHead reads the queries of a decoder, but a backbone alone has none"):
        check_needs(parts.MeanHead(SIZES, reads="queries"), SIZES)
    check_needs(parts.MeanHead(SIZES), SIZES)
    check_needs(parts.MeanHead(FeatureSizes(3, (8,), (8,), 4, 2), reads="queries"), FeatureSizes(3, (8,), (8,), 4, 2))


def test_not_finite_input_is_named_with_its_place():
    values = torch.zeros(2, 3)
    check_finite("features", values)
    values[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"features: expected finite values, got nan at index \(1, 2\)"):
        check_finite("features", values)
    values[0, 1] = torch.inf
    with pytest.raises(ValueError, match=r"got inf at index \(0, 1\)"):
        check_finite("features", values)


@pytest.mark.parametrize(("label", "said"), [(3, "got 3"), (-1, "got -1")])
def test_labels_outside_the_classes_are_named(label, said):
    targets = [{"labels": torch.tensor([0])}, {"labels": torch.tensor([1, label])}]
    with pytest.raises(ValueError, match=f"labels of image 1 of the batch: expected 0 to 2, {said}"):
        check_targets(targets, 2, 3)
    check_targets(targets, 2, 4) if label == 3 else None
    with pytest.raises(ValueError, match=r"expected one per image \(3\), got 2"):
        check_targets(targets, 3, 9)


def test_terms_and_diagnostics_get_the_heads_name():
    losses = HeadLosses(torch.tensor(1.0), {"loss_class": torch.tensor(2.0)}, {"rate": torch.tensor(0.5)})
    assert {name: float(value) for name, value in prefixed("landmarks", losses).items()} == {
        "landmarks_loss_class": 2.0,
        "landmarks_rate": 0.5,
    }


def test_a_head_that_is_no_neck_passes_features_on(parts):
    level = Level(torch.ones(1, 2, 3, 3), 8, torch.zeros(1, 3, 3, dtype=torch.bool))
    features, noted = super(parts.MeanHead, parts.MeanHead(SIZES)).pass_level(0, level)
    assert features is level.features and noted is None


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 4, 8, 8), (2, 3, 0, 8), (0, 3, 8, 8)])
def test_what_are_no_images_is_said_with_its_shape(shape):
    with pytest.raises(ValueError, match=r"images: expected \[B, 3, H, W\] with no side 0, got \[") as error:
        check_images(torch.zeros(shape), None, torch.nn.Linear(1, 1))
    assert str(list(shape)) in str(error.value)


def test_images_are_of_the_detectors_device_and_type():
    weights, images = torch.nn.Linear(1, 1), torch.zeros(1, 3, 8, 8)
    check_images(images, torch.zeros(1, 8, 8, dtype=torch.bool), weights)
    with pytest.raises(ValueError, match=r"images: expected on the detector's device cpu, got meta; move it there"):
        check_images(images.to("meta"), None, weights)
    with pytest.raises(ValueError, match=r"mask: expected on the detector's device cpu, got meta"):
        check_images(images, torch.zeros(1, 8, 8, dtype=torch.bool, device="meta"), weights)
    with pytest.raises(ValueError, match=r"images: expected the detector's type torch.float32, got torch.float64"):
        check_images(images.double(), None, weights)
    with torch.autocast("cpu", torch.bfloat16):
        check_images(images.bfloat16(), None, weights)


@pytest.mark.parametrize("kind", ["detector", "backbone"])
def test_headed_networks_look_at_their_input(kind, parts):
    if kind == "detector":
        model = HeadedDetector(3, lambda sizes: parts.MeanHead(sizes, "queries"), parts.DETECTORS["detr"])
    else:
        model = HeadedBackbone(3, parts.MeanHead, "test_resnet")
    with pytest.raises(ValueError, match=r"images: expected \[B, 3, H, W\]"):
        model.eval()(torch.zeros(1, 1, 64, 64))
    with pytest.raises(ValueError, match=r"images: expected the detector's type"):
        model.eval()(torch.zeros(1, 3, 64, 64, dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------------------------
# Descriptions of parts: from a part and back, and nothing but parts of simdetr.


def test_a_description_builds_the_same_again():
    arguments = {"backbone": "test_resnet", "hidden_dim": 16, "num_heads": 2, "num_queries": 5}
    detector = DeformableDETR(4, **arguments)
    description = described(detector)
    assert description["class_path"] == "simdetr.detectors.deformable_detr.DeformableDETR"
    assert description["init_args"] == detector.init_args
    del description["init_args"]["num_classes"]
    assert "num_classes" in detector.init_args, "the description is a copy"
    again = factory(description, QueryDetector)(7)
    assert again.init_args == {**detector.init_args, "num_classes": 7}


def test_a_function_stays_itself():
    assert factory(len, Head)("abc") == 3


@pytest.mark.parametrize("class_path", ["os.system", "simdetr.boxes.clip", "simdetr.heads.Nothing", "torch.nn.Linear"])
def test_nothing_else_is_built(class_path):
    with pytest.raises(ValueError, match=rf"class_path: expected a Head of simdetr, got '{class_path}'"):
        class_of(class_path, Head)

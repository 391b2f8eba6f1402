"""What transformers computes with our folders, and what we compute with its own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from simdetr.data.annotations import Category
from simdetr.data.images import read_image
from simdetr.detectors import DETReg, TorchvisionDetector, TransformersDetector
from simdetr.exchange.convert import model_type_of, read_transformers_folder, write_transformers_folder
from simdetr.exchange.weights import (
    CONFIG_NAME,
    PREPROCESSOR_NAME,
    WEIGHTS_NAME,
    LoadedDetector,
    load_detector,
    read_checkpoint,
)
from simdetr.training.relabel import InferenceSettings, detect_array

transformers = pytest.importorskip("transformers", reason="transformers is the reference here")

CATEGORIES = tuple(Category(3 * number, f"thing {number}") for number in range(7))
IMAGES = {"short_side": 64, "max_side": 90, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.2]}


def test_transformers_gives_equal_outputs_and_comes_back_equal(variant, padded_batch, tmp_path, equal_states):
    folder = tmp_path / "ours"
    said = write_transformers_folder(LoadedDetector(variant, CATEGORIES, IMAGES), folder)
    assert said == f"deformable_detr with 7 classes in {folder}"
    theirs, info = transformers.AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert theirs.config.id2label == {number: f"thing {number}" for number in range(7)}
    assert theirs.config.label2id["thing 4"] == 4
    images, mask = padded_batch
    with torch.no_grad():
        expected = variant(images, mask)
        found = theirs.eval()(pixel_values=images, pixel_mask=(~mask).long())
    assert expected["pred_logits"].std() > 0.1 and expected["pred_boxes"].std() > 0.03, "it must mean something"
    torch.testing.assert_close(found.logits, expected["pred_logits"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.pred_boxes, expected["pred_boxes"], rtol=1e-4, atol=1e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    back = load_detector(tmp_path / "theirs")
    assert equal_states(back.detector.state_dict(), variant.state_dict())
    assert back.categories[6] == Category(6, "thing 6")
    in_memory = tmp_path / "memory"
    in_memory.mkdir()
    save_file({name: value.clone() for name, value in theirs.state_dict().items()}, in_memory / WEIGHTS_NAME)
    theirs.config.save_pretrained(in_memory)
    assert equal_states(load_detector(in_memory).detector.state_dict(), variant.state_dict())


def test_learning_goes_on_in_transformers_with_losses_of_all_layers(make_plain, padded_batch, tmp_path):
    write_transformers_folder(LoadedDetector(make_plain(), CATEGORIES, IMAGES), tmp_path)
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path)
    images, mask = padded_batch
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2
    losses = theirs(pixel_values=images, pixel_mask=(~mask).long(), labels=labels).loss_dict
    assert {"loss_ce_0", "loss_bbox_0", "loss_giou_0"} <= losses.keys()


def test_transformers_finds_the_same_objects_in_an_image_file(make_plain, tmp_path):
    """Their image processor, detector and post-processing against ours."""
    detector = make_plain()
    write_transformers_folder(LoadedDetector(detector, CATEGORIES, IMAGES), tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (11, 15, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((150, 110)).save(tmp_path / "image.png")

    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    model = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    inputs = processor(images=Image.open(tmp_path / "image.png"), return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    theirs = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(110, 150)])[0]

    settings = InferenceSettings.of(IMAGES)
    ours = detect_array(detector, read_image(tmp_path / "image.png"), CATEGORIES, settings).image(0)
    assert tuple(inputs["pixel_values"].shape[2:]) == (64, 87)
    assert theirs["labels"][0] == ours.classes[0]
    torch.testing.assert_close(theirs["scores"][0], torch.tensor(ours.scores[0]), rtol=0, atol=0.01)
    torch.testing.assert_close(theirs["boxes"][0], torch.tensor(ours.boxes_xyxy[0]), rtol=0, atol=0.5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"backbone": "convnext_atto"}, "backbone='convnext_atto': expected a ResNet"),
        ({"backbone": "efficientnet_b0"}, "backbone='efficientnet_b0': expected a ResNet"),
        ({"hidden_dim": 48, "num_heads": 2}, "hidden_dim=48: expected a multiple of 32"),
        ({"exclude_invalid_proposals": True}, "exclude_invalid_proposals=True: expected False"),
    ],
)
def test_what_transformers_cannot_compute_is_refused(changes, named, make_plain, tmp_path):
    with pytest.raises(ValueError, match=named):
        write_transformers_folder(LoadedDetector(make_plain(**changes), CATEGORIES, IMAGES), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_batch_norm_that_learns_is_frozen_there(make_plain, padded_batch, tmp_path):
    detector = make_plain(frozen_batch_norm=False)
    write_transformers_folder(LoadedDetector(detector, CATEGORIES, IMAGES), tmp_path)
    theirs, info = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    images, mask = padded_batch
    with torch.no_grad():
        found = theirs.eval()(pixel_values=images, pixel_mask=(~mask).long()).pred_boxes
        torch.testing.assert_close(found, detector(images, mask)["pred_boxes"], rtol=1e-4, atol=1e-5)


def test_detreg_is_a_deformable_detr_there(padded_batch, tmp_path):
    settings = {
        "backbone": "resnet18",
        "hidden_dim": 64,
        "num_heads": 4,
        "num_encoder_layers": 1,
        "num_decoder_layers": 2,
    }
    detector = DETReg(7, **settings).eval()
    write_transformers_folder(LoadedDetector(detector, CATEGORIES, IMAGES), tmp_path)
    theirs, info = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    images, mask = padded_batch
    with torch.no_grad():
        found = theirs.eval()(pixel_values=images, pixel_mask=(~mask).long()).logits
        torch.testing.assert_close(found, detector(images, mask)["pred_logits"], rtol=1e-4, atol=1e-4)


def test_detectors_without_counterpart_say_where_they_can_go(tmp_path):
    detector = TorchvisionDetector(3, "retinanet_resnet50_fpn", backbone="resnet18")
    with pytest.raises(ValueError, match=r"has no TorchvisionDetector.*Export to safetensors"):
        write_transformers_folder(LoadedDetector(detector, CATEGORIES[:3], IMAGES), tmp_path)


RT_DETR = {
    "model_type": "rt_detr_v2",
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_layers": 2,
    "num_queries": 10,
    "num_denoising": 0,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_in_channels": [16, 32, 64],
    "feat_strides": [8, 16, 32],
    "decoder_in_channels": [32, 32, 32],
    "backbone_config": {
        "model_type": "rt_detr_resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 32, 64],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    },
}


def test_detectors_of_transformers_write_and_read_themselves(tmp_path, equal_states):
    detector = TransformersDetector(3, RT_DETR).eval()
    said = write_transformers_folder(LoadedDetector(detector, CATEGORIES[:3], IMAGES), tmp_path)
    assert "without preprocessor_config.json" in said and not (tmp_path / PREPROCESSOR_NAME).exists()
    assert model_type_of(tmp_path) == "rt_detr_v2" and model_type_of(tmp_path / "nothing") is None
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert theirs.config.id2label == {0: "thing 0", 1: "thing 1", 2: "thing 2"}
    assert equal_states(theirs.state_dict(), detector.model.state_dict())
    back = read_transformers_folder(tmp_path)
    assert equal_states(back.detector.state_dict(), detector.state_dict())
    assert back.categories == tuple(Category(number, f"thing {number}") for number in range(3))
    with pytest.raises(ValueError, match=r"transformers' 'rt_detr_v2'.*`simdetr import`"):
        read_checkpoint(tmp_path)


def test_pickled_weights_of_transformers_are_not_read(tmp_path):
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"model_type": "rt_detr_v2"}))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors.*not read"):
        read_transformers_folder(tmp_path)

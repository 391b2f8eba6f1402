"""Settings of Deformable DETR there and back, in the forms that versions 4 and 5 of transformers write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simdetr.data.annotations import Category
from simdetr.detectors import DeformableDETR
from simdetr.exchange.formats import (
    config_from_transformers,
    config_to_transformers,
    images_from_transformers,
    images_to_transformers,
    label_names,
)

OURS = {
    "num_classes": 3,
    "backbone": "resnet18",
    "hidden_dim": 64,
    "num_heads": 4,
    "num_encoder_layers": 2,
    "num_decoder_layers": 3,
    "ffn_dim": 128,
    "dropout": 0.2,
    "num_queries": 20,
    "num_feature_levels": 3,
    "num_points": 2,
    "with_box_refine": True,
    "two_stage": True,
    "dilation": True,
    "position_encoding": "learned",
}
TENSORS = {"class_embed.0.bias": torch.zeros(3)}
FILE = Path("folder/model.safetensors")


def test_settings_there_and_back():
    config = config_to_transformers(OURS, (Category(7, "cat"), Category(9, "dog"), Category(11, "cow")))
    assert config["id2label"] == {"0": "cat", "1": "dog", "2": "cow"}
    back = config_from_transformers(config, {}, TENSORS, FILE)
    assert back["init_args"] == OURS
    assert back["categories"] == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}, {"id": 2, "name": "cow"}]
    with torch.device("meta"):
        assert DeformableDETR(**back["init_args"]).num_classes == 3


def test_transformers_itself_understands_them():
    transformers = pytest.importorskip("transformers")
    config = transformers.DeformableDetrConfig(**config_to_transformers(OURS, ()))
    assert config.backbone_config.backbone == "resnet18" and config.backbone_config.output_stride == 16
    assert config.two_stage_num_proposals == 20 and config.auxiliary_loss and config.class_cost == 2
    written_by_version_5 = config.to_dict()
    assert "backbone" not in written_by_version_5
    assert config_from_transformers(written_by_version_5, {}, TENSORS, FILE)["init_args"] == OURS


def test_version_4_leaves_defaults_out():
    """The published base detector on the Hub: little more than its name and its classes."""
    config = {"model_type": "deformable_detr", "id2label": {"0": "N/A", "1": "person"}, "num_queries": 300}
    back = config_from_transformers(config, {}, {"model.decoder.class_embed.0.bias": torch.zeros(91)}, FILE)
    with torch.device("meta"):
        detector = DeformableDETR(**back["init_args"])
        assert detector.init_args == DeformableDETR(91).init_args
    assert back["categories"][1:3] == [{"id": 1, "name": "person"}, {"id": 2, "name": "class 2"}]
    assert back["image_settings"]["short_side"] == 800


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "d_fine"}, r"holds transformers' 'd_fine', expected 'deformable_detr'.*`simdetr import`"),
        ({"encoder_ffn_dim": 64}, r"'encoder_ffn_dim': 64, 'decoder_ffn_dim': 128.*must be equal"),
        ({"use_timm_backbone": False, "backbone_config": {"model_type": "resnet"}}, r"transformers' own \('resnet'\)"),
    ],
)
def test_what_is_no_deformable_detr_of_ours_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        config_from_transformers(config_to_transformers(OURS, ()) | changes, {}, TENSORS, FILE)


def test_equal_names_stay_different_classes():
    categories = (Category(1, "bolt"), Category(2, "nut"), Category(8, "bolt"))
    assert label_names(categories, 3) == ["bolt (1)", "nut", "bolt (8)"]
    assert label_names((), 2) == ["class 0", "class 1"]


def test_image_settings():
    ours = {"short_side": 480, "max_side": 640, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.2]}
    assert images_from_transformers(images_to_transformers(ours)) == ours
    assert images_from_transformers({"size": 600, "max_size": 900})["max_side"] == 900
    squashed = images_from_transformers({"size": {"height": 512, "width": 640}, "do_normalize": False})
    assert squashed == {"short_side": 512, "max_side": 640, "mean": [0.0] * 3, "std": [1.0] * 3}

"""A detector's backbone as an encoder: the maps of timm's network with the same weights, and of every family."""

from __future__ import annotations

import pytest
import torch

from simdetr.data.images import open_images
from simdetr.detectors import DeformableDETR, TransformersDetector, ViDT
from simdetr.exchange.weights import checkpoint_config, save_detector
from simdetr.mining import Encoder, MiningConfig, TimmEncoder, mine
from simdetr.training.detector_encoder import DetectorEncoder
from simdetr.training.recipe_choice import encoder_options
from tests.conftest import OTHERS, TINY_DETECTOR


def saved(detector, folder):
    save_detector(detector, checkpoint_config(detector, None), folder)
    return folder


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def test_it_is_timms_network_with_the_same_weights(images, shake, tmp_path):
    detector = shake(DeformableDETR(3, **TINY_DETECTOR))
    torch.save(detector.backbone.body.state_dict(), tmp_path / "body.pth")
    expected = TimmEncoder("test_resnet", weights=tmp_path / "body.pth")
    found = DetectorEncoder(saved(detector, tmp_path / "detector"))
    assert isinstance(found, Encoder) and (found.strides, found.region_dim) == ((16, 32), expected.region_dim)
    for size in ((64, 96), (50, 70)):
        for stride, level in found(images[..., : size[0], : size[1]]).items():
            torch.testing.assert_close(level, expected(images[..., : size[0], : size[1]])[stride])
    assert not found.train().body.training and not any(p.requires_grad for p in found.parameters())


@pytest.mark.parametrize("name", [*OTHERS, "vidt", "vit"])
def test_the_backbone_of_every_family_mines(name, make_other, images, tmp_path):
    if name == "vidt":
        detector = ViDT(3, num_queries=5, backbone="swin_pico", pretrained_backbone=False)
    elif name == "vit":
        detector = DeformableDETR(3, **TINY_DETECTOR | {"backbone": "test_vit", "num_feature_levels": 3})
    else:
        detector = make_other(name)
    encoder = DetectorEncoder(saved(detector, tmp_path))
    maps = encoder(images)
    assert {stride: level.shape[-2:] for stride, level in maps.items()} == {16: (4, 6), 32: (2, 3)}
    assert maps[32].shape[1] == encoder.region_dim and maps[32].std() > 0
    torch.testing.assert_close(encoder(images[1:])[32], maps[32][1:], rtol=1e-4, atol=1e-4)


def test_other_weights_are_another_encoder(tmp_path, shake):
    detector = DeformableDETR(3, **TINY_DETECTOR)
    first = DetectorEncoder(saved(detector, tmp_path / "a")).fingerprint
    assert DetectorEncoder(saved(detector, tmp_path / "b")).fingerprint == first
    assert DetectorEncoder(saved(shake(detector), tmp_path / "c")).fingerprint != first


def test_a_detector_is_a_word_for_an_encoder(scenes, tmp_path):
    folder = saved(DeformableDETR(3, **TINY_DETECTOR), tmp_path / "run" / "stage1" / "detector")
    (option,) = encoder_options(str(tmp_path / "run"))
    assert "DetectorEncoder" in option and str(tmp_path / "run") in option
    store = mine(open_images(scenes), DetectorEncoder(folder), MiningConfig(image_size=64), tmp_path / "store")
    assert store.manifest.encoder.startswith("detector:")


def test_a_backbone_without_maps_is_named(tmp_path):
    pytest.importorskip("transformers", reason="an optional dependency")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = {"model_type": "yolos", "image_size": [64, 64], "num_detection_tokens": 5, **sizes}
    detector = TransformersDetector(3, {**config, "use_mid_position_embeddings": False})
    with pytest.raises(ValueError, match=r"backbone of TransformersDetector .* gives no feature maps"):
        DetectorEncoder(saved(detector, tmp_path))

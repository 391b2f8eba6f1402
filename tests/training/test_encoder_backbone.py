"""A learning backbone gives the maps that mining will see, and its weights go back under timm's names."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from simdetr.encoder_training.objectives import LearningEncoder, timm_weights
from simdetr.mining.encoders import TimmEncoder

MODELS = ("test_resnet", "test_convnext", "test_vit", "test_efficientnet")


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_those_of_timms_plain_model_and_give_the_same_maps(model, tmp_path):
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    encoder = LearningEncoder(model, seed=3)
    encoder(images)  # moves the statistics of batch norms away from their start
    weights = timm_weights(encoder)
    left_over = timm.create_model(model, num_classes=0).load_state_dict(weights, strict=False).unexpected_keys
    assert left_over == []
    save_file(weights, tmp_path / "weights.safetensors")
    frozen = TimmEncoder(model, weights=tmp_path / "weights.safetensors", seed=4)
    expected = encoder.eval()(images)
    for stride, level in frozen(images).items():
        torch.testing.assert_close(level, expected[stride])  # mining takes images one by one
        assert level.shape[1] == encoder.channels[stride]


def test_learns_and_follows_the_images():
    encoder = LearningEncoder("test_resnet")
    assert encoder.training and encoder.net.training
    encoder(torch.rand(2, 3, 64, 64))[32].square().mean().backward()
    assert all(p.grad is not None for name, p in encoder.named_parameters())
    assert not encoder.eval().net.training


def test_starts_from_given_weights(tmp_path):
    weights = timm_weights(LearningEncoder("test_resnet", seed=1))
    save_file(weights, tmp_path / "w.safetensors")
    started = timm_weights(LearningEncoder("test_resnet", weights=str(tmp_path / "w.safetensors"), seed=2))
    assert all(torch.equal(started[name], weights[name]) for name in weights)


def test_keeping_weights_draws_no_random_numbers():
    encoder = LearningEncoder("test_resnet")
    before = torch.get_rng_state()
    timm_weights(encoder)
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_model_names_the_nearest():
    with pytest.raises(
        ValueError, match=r"model: expected the name of a timm model, got 'resnet19'; did you mean resn"
    ):
        LearningEncoder("resnet19")
    with pytest.raises(ValueError, match="list_models"):
        LearningEncoder("0000000")

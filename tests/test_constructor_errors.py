"""Errors of constructors in a config reach the user as they were raised."""

from __future__ import annotations

import pytest
import torch

from simdetr.data.pretrained_weights import PretrainedWeightsError
from simdetr.recipe import Recipe


@pytest.fixture
def recipe(tiny_config, scenes):
    return lambda *options: Recipe((str(tiny_config),), (f"--data.images={scenes}", *options))


def test_constructors_are_heard_alone(recipe, tmp_path):
    """Without what the parser thinks of the other types that an option might have had."""
    torch.save({"net.weight": torch.zeros(2)}, tmp_path / "other.pth")
    encoder = "--encoder.class_path=simdetr.mining.TimmEncoder"
    weights = (encoder, "--encoder.init_args.model=resnet18", f"--encoder.init_args.weights={tmp_path / 'other.pth'}")
    with pytest.raises(PretrainedWeightsError, match=r"^weights: only 0 of the model's 60"):
        recipe(*weights).sections()
    with pytest.raises(ValueError, match=r"^cell_px: expected 1, 2, 4, 8 or 16, got -1$"):
        recipe("--mining.level_sets.cell_px=-1").sections()
    with pytest.raises(ValueError, match=r"^weights: resnet50 would look at images with random weights"):
        recipe(encoder).sections()
    assert recipe(encoder, "--encoder.init_args.random_weights=true").sections().encoder.region_dim == 2048

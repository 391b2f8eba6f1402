"""A folder of a training is an encoder; what is no such folder is refused with the fix."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from simdetr.data.pretrained_weights import PretrainedWeightsError
from simdetr.mining import Encoder, FittedEncoder, TimmEncoder

RECORD = {"model": "test_resnet", "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 0.125], "steps": 7}


@pytest.fixture
def trained() -> TimmEncoder:
    return TimmEncoder("test_resnet", random_weights=True, seed=5)


@pytest.fixture
def folder(tmp_path, trained):
    save_file(trained.net.state_dict(), tmp_path / "encoder.safetensors")
    (tmp_path / "encoder.json").write_text(json.dumps(RECORD))
    return tmp_path


def test_gives_the_maps_of_its_weights_with_the_recorded_normalisation(folder, trained):
    images = torch.rand(1, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    encoder = FittedEncoder(folder)
    assert isinstance(encoder, Encoder) and encoder.record == RECORD
    mean, std = (torch.tensor(RECORD[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    as_before = ((images - mean) / std) * trained.std + trained.mean  # what the other normalisation makes the same
    for stride, level in encoder(images).items():
        assert torch.allclose(level, trained(as_before)[stride], atol=1e-5)
    assert encoder.fingerprint != TimmEncoder("test_resnet", weights=folder / "encoder.safetensors").fingerprint
    assert encoder.fingerprint == FittedEncoder(str(folder)).fingerprint


def test_unfinished_folder_is_refused(folder):
    (folder / "encoder.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"expected encoder.safetensors and encoder.json in .*same command again"
    ):
        FittedEncoder(folder)


def test_damaged_record_is_refused(folder):
    (folder / "encoder.json").write_text('{"model": "test_resnet"}')
    with pytest.raises(ValueError, match=r"folder: .*encoder.json is no record of `simdetr encoder fit` \('mean'\)"):
        FittedEncoder(folder)
    (folder / "encoder.json").write_text("{")
    with pytest.raises(ValueError, match="is no record"):
        FittedEncoder(folder)


def test_damaged_weights_are_refused(folder):
    (folder / "encoder.safetensors").write_bytes(b"cut short")
    with pytest.raises(PretrainedWeightsError, match="not a readable safetensors file"):
        FittedEncoder(folder)

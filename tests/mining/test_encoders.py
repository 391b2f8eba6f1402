"""Maps of every family of backbones, frozen, and the encoder of a finished training."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional

from simdetr.data.pretrained_weights import PretrainedWeightsError
from simdetr.mining import FittedEncoder
from simdetr.mining.encoders import Encoder, TimmEncoder


def images(height=96, width=128, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "name",
    ["resnet18", "test_convnext", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224", "test_vit"],
)
def test_every_family_gives_two_levels_for_any_size(name):
    encoder = TimmEncoder(name, random_weights=True)
    assert isinstance(encoder, Encoder) and encoder.strides == (16, 32)
    for height, width in ((96, 128), (70, 101)):
        maps = encoder(images(height, width))
        assert list(maps) == [16, 32]
        for stride, level in maps.items():
            assert level.shape[0] == 2 and level.shape[2:] == (-(-height // stride), -(-width // stride))
            assert torch.isfinite(level).all() and not level.requires_grad
        assert maps[32].shape[1] == encoder.region_dim


@pytest.mark.parametrize("patch", [8, 14, 32])
def test_a_vit_of_any_patch_size_is_brought_to_both_strides(patch, monkeypatch):
    name = {8: "vit_small_patch8_224", 14: "vit_small_patch14_dinov2", 32: "vit_small_patch32_224"}[patch]
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **kw: create(*args, depth=3, embed_dim=24, num_heads=2, **kw)
    )
    encoder = TimmEncoder(name, random_weights=True)
    maps = encoder(images(64, 96))
    assert [tuple(level.shape) for level in maps.values()] == [(2, 24, 4, 6), (2, 24, 2, 3)]


def test_maps_are_timms_features_of_normalised_images():
    encoder = TimmEncoder("resnet18", random_weights=True, seed=3)
    reference = timm.create_model("resnet18", features_only=True).eval()
    reference.load_state_dict(encoder.net.state_dict())
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        levels = reference((images() - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    maps = encoder(images())
    torch.testing.assert_close(maps[16], levels[-2])
    torch.testing.assert_close(maps[32], levels[-1])


def test_a_vits_second_level_is_the_average_and_its_normalisation_is_its_own():
    encoder = TimmEncoder("vit_tiny_patch16_224", random_weights=True)
    maps = encoder(images(64, 96))
    torch.testing.assert_close(maps[32], functional.avg_pool2d(maps[16], 2))
    assert encoder.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    channels = maps[16].mean(dim=1)  # of a fresh layer norm: zero mean and unit deviation over channels
    torch.testing.assert_close(channels, torch.zeros_like(channels), atol=1e-5, rtol=0)


def test_a_swin_shifts_windows_at_its_last_stage():
    encoder = TimmEncoder("swin_tiny_patch4_window7_224", random_weights=True)
    assert encoder.net.model.layers[3].blocks[1].shift_size == (3, 3)


def test_frozen_whatever_is_asked():
    encoder = TimmEncoder("resnet18", random_weights=True).train()
    before = encoder(images())
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert torch.equal(encoder(images())[32], before[32])


def test_fingerprint_follows_the_weights(tmp_path):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, same, other = (TimmEncoder("resnet18", random_weights=True, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert first.fingerprint == same.fingerprint != other.fingerprint
    torch.save({"state_dict": {f"module.{k}": v for k, v in first.net.state_dict().items()}}, tmp_path / "w.pth")
    loaded = TimmEncoder("resnet18", weights=tmp_path / "w.pth", seed=5)
    assert loaded.fingerprint == first.fingerprint
    torch.testing.assert_close(loaded(images())[32], first(images())[32])


def test_misuse_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected one of them, got both"):
        TimmEncoder("resnet18", weights="x.pth", pretrained=True)
    create = timm.create_model
    with monkeypatch.context() as patch:
        patch.setattr(timm, "create_model", lambda *args, **kw: create(*args, out_indices=(0, 1, 2), **kw))
        with pytest.raises(ValueError, match=r"expected maps at strides \(16, 32\), resnet18 has \[2, 4, 8\]"):
            TimmEncoder("resnet18", random_weights=True)
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(PretrainedWeightsError, match="only 0 of"):
        TimmEncoder("resnet18", weights=tmp_path / "w.pth")


# ----------------------------------------------------------------------------------------------------------------------
# A folder of a training is an encoder; what is no such folder is refused with the fix.


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

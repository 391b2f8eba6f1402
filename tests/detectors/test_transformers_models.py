"""Configs: everything a user may get wrong, and what is read off models."""

import builtins
import json
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="an optional dependency")

from simdetr.detectors.transformers_adapter import (
    backbone_names,
    boxes_are_of,
    build_model,
    import_transformers,
    resolve_config,
    sides_multiple,
)

SMALL = {
    "backbone": "test_resnet",
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 5,
}
NARROW = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
RT_DETR = {
    "backbone_config": {"model_type": "timm_backbone", "backbone": "test_resnet", "out_indices": [2, 3, 4]},
    "encoder_hidden_dim": 32,
    "decoder_in_channels": [32, 32, 32],
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_layers": 2,
    "num_queries": 5,
    **NARROW,
}
YOLOS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": [64, 96],
    "num_detection_tokens": 5,
    "use_mid_position_embeddings": False,
}
# family: settings, backbone, body, what boxes are of, multiple of sides
FAMILIES = {
    "deformable_detr": ({**SMALL, **NARROW}, "model.backbone", "model.backbone.model", "valid", 1),
    "conditional_detr": ({**SMALL, **NARROW}, "model.backbone", "model.backbone.model", "valid", 1),
    "detr": ({**SMALL, **NARROW}, "model.backbone", "model.backbone.model", "valid", 1),
    "dab-detr": (
        {**SMALL, "hidden_size": 32},
        "model.backbone",
        "model.backbone.conv_encoder.model._backbone",
        "valid",
        1,
    ),
    "rt_detr": (RT_DETR, "model.backbone", "model.backbone.model._backbone", "canvas", 32),
    "rt_detr_v2": (RT_DETR, "model.backbone", "model.backbone.model._backbone", "canvas", 32),
    "d_fine": (RT_DETR, "model.backbone", "model.backbone.model._backbone", "canvas", 32),
    "yolos": (YOLOS, "vit", "vit", "canvas", 16),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """Name, resolved settings, model and what it should be found to be."""
    given, *expected = FAMILIES[request.param]
    settings = resolve_config({"model_type": request.param, **given})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return request.param, settings, build_model(settings, 4, None), expected


def test_what_is_read_off_a_model(family):
    _, settings, model, (backbone, body, boxes_of, multiple) = family
    assert backbone_names(model) == (backbone, body)
    assert boxes_are_of(model, "auto") == boxes_of
    assert boxes_are_of(model, "canvas") == "canvas"
    assert sides_multiple(settings) == multiple
    assert model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.num_labels == 4


def test_boxes_are_of_the_valid_image_where_a_model_looks_at_the_mask(family):
    """The list of families that do not look is checked by what models do."""
    name, _, model, (*_, boxes_of, _) = family
    if name == "yolos":
        with pytest.raises(ValueError, match="boxes_of: yolos takes no mask of padding"):
            boxes_are_of(model, "valid")
        return
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 64, 96, dtype=torch.long)
    mask[:, :, 48:] = 0
    model.eval()
    with torch.no_grad():
        logits, masked = (model(images, pixel_mask=m).logits for m in (torch.ones_like(mask), mask))
    model.train()
    assert torch.equal(logits, masked) == (boxes_of == "canvas")


def test_resolved_settings_are_plain_complete_and_final(family):
    name, settings, model, _ = family
    assert json.loads(json.dumps(settings)) == settings
    assert settings["model_type"] == name and settings.keys() > FAMILIES[name][0].keys() - {"backbone"}
    assert not {"id2label", "num_labels", "transformers_version"} & settings.keys()
    assert resolve_config(settings) == settings
    again = build_model(settings, 4, None).state_dict()
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in again.items()
    }


def test_a_folder_holds_a_config_and_weights(family, tmp_path):
    name, settings, model, _ = family
    model.config.num_querys = 3  # stored configs carry all kinds of things
    model.save_pretrained(tmp_path)
    del model.config.num_querys
    stored = resolve_config(str(tmp_path))
    assert {**stored, "backbone_config": None} == {**settings, "backbone_config": None}  # a built one says more
    other = build_model(settings, 2, str(tmp_path))  # 2 classes where the folder has 4
    assert other.training
    kept, new = set(), set()
    own = other.state_dict()
    for key, value in model.state_dict().items():
        (kept if own[key].shape == value.shape and torch.equal(own[key], value) else new).add(key)
    assert len(kept) > 5 * len(new) > 0
    assert all(own[key].shape != value.shape for key, value in model.state_dict().items() if key in new)
    with pytest.raises(ValueError, match=f"pretrained: '{tmp_path / 'none'}': no {name} could be built"):
        build_model(settings, 2, str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"config: model_type must be one of conditional_detr, d_fine, .*; got None\."),
        ({"model_type": "bert"}, r"config: model_type must be one of .*; got 'bert'\."),
        ({"model_type": "detr", "num_querys": 3}, r"config: detr has no setting num_querys; it has .*num_queries"),
        ({"model_type": "rt_detr_v2", "num_queries": "many"}, r"config: rt_detr_v2 refuses its settings"),
        (
            {"model_type": "deformable_detr", "two_stage": True},
            r"deformable_detr refuses its settings .*with_box_refine must be True",
        ),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        resolve_config(config)


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config: '.*' is neither a folder with a config\.json of transformers nor"):
        resolve_config(str(tmp_path))


def test_parts_that_do_not_fit():
    settings = resolve_config({"model_type": "deformable_detr", **SMALL, **NARROW})
    with pytest.raises(ValueError, match=r"config: no deformable_detr could be built \(.*\)\. Sizes such as"):
        build_model({**settings, "decoder_layers": 1}, 4, None)


def test_without_transformers(monkeypatch):
    real = builtins.__import__

    def fail(name, *arguments, **more):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ImportError, match=r"pip install simdetr\[transformers\]"):
        import_transformers()

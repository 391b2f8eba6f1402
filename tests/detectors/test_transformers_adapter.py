"""Detectors of transformers against transformers itself, and against our own Deformable DETR with the same weights."""

from __future__ import annotations

import builtins
import copy
import json
import shutil
import sys

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from simdetr.data.pretrained_weights import load_into
from simdetr.detectors import TransformersDetector
from simdetr.detectors.detector import softmax_log_odds
from simdetr.detectors.losses import DetectionLoss
from simdetr.detectors.transformers_adapter import (
    backbone_names,
    boxes_are_of,
    build_model,
    import_transformers,
    resolve_config,
    sides_multiple,
)
from simdetr.exchange.parameter_names import plain_heads, to_transformers
from simdetr.exchange.weights import checkpoint_config, load_detector, load_weights, save_detector
from tests.conftest import OTHERS

pytest.importorskip("transformers", reason="an optional dependency")

FAMILIES = ("deformable_detr", "conditional_detr", "detr", "rt_detr_v2", "d_fine", "lw_detr", "rf_detr")
GROUPED = ("lw_detr", "rf_detr")  # three groups of ten queries
OURS_AS_CONFIG = {  # the fixture make_detector's
    "model_type": "deformable_detr",
    "backbone": "resnet18",
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_queries": 20,
    "two_stage_num_proposals": 20,
    "num_feature_levels": 4,
    "auxiliary_loss": True,
    "dropout": 0.0,
    "class_cost": 2,
}


@pytest.fixture(params=["base", "two_stage"])
def pair(request, make_deformable, shake):
    """Our Deformable DETR and transformers' behind the adapter, with the same random weights."""
    ours = shake(make_deformable(request.param, dropout=0.0))
    two_stage = request.param == "two_stage"
    config = {**OURS_AS_CONFIG, "with_box_refine": two_stage, "two_stage": two_stage}
    theirs = TransformersDetector(7, config, loss="simdetr").eval()
    if two_stage:  # transformers ties all heads when it builds a model from nothing
        model = theirs.model
        for name in ("bbox_embed", "class_embed"):
            heads = nn.ModuleList(copy.deepcopy(head) for head in getattr(model, name))
            setattr(model, name, heads)
            setattr(model.model.decoder, name, heads)
    theirs.model.load_state_dict(to_transformers(plain_heads(ours.state_dict()), "memory"), strict=True)
    return ours, theirs


def close(found, expected):
    torch.testing.assert_close(found["pred_logits"], expected["pred_logits"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["pred_boxes"], expected["pred_boxes"], rtol=1e-4, atol=1e-5)


def test_deformable_detr_is_ours(pair, batch):
    """Predictions on a padded batch, those of earlier layers and the encoder's, and the loss that is ours."""
    ours, theirs = pair
    images, mask, targets = batch
    with torch.no_grad():
        found, expected = theirs(images, mask), ours(images, mask)
        close(found, expected)
        assert found.keys() == {"pred_logits", "pred_boxes"} and found["pred_boxes"].std() > 0.05
        ours.train(), theirs.train()
        found, expected = theirs(images, mask), ours(images, mask)
        assert found.keys() == expected.keys() and len(found["aux_outputs"]) == 2
        for layer, reference in zip(found["aux_outputs"], expected["aux_outputs"], strict=True):
            close(layer, reference)
    losses, reference = theirs.losses(images, mask, targets), ours.losses(images, mask, targets)
    assert losses.keys() == reference.keys()
    for name in losses:
        # the encoder's head of transformers has a row for every class, which add to its loss that they are absent
        more = 2e-3 if "enc_outputs" in expected and name in ("loss", "loss_ce_enc") else 1e-4
        torch.testing.assert_close(losses[name], reference[name], rtol=more, atol=1e-4)
    assert ("loss_ce_enc" in losses) == ("enc_outputs" in expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_own_loss_is_the_familys(name, detectors, batch):
    """Total and terms as transformers gives them for images without padding."""
    detector = copy.deepcopy(detectors(name)).train()
    images = batch[0][:, :, :96, :96]
    targets = batch[2]
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        found = detector.losses(images, torch.zeros(2, 96, 96, dtype=torch.bool), targets)
        torch.manual_seed(1)
        detector.model.loss_function = detector.own_loss
        expected = detector.model(pixel_values=images, labels=labels)
    assert found.keys() == {"loss", *expected.loss_dict}
    for term, value in {**expected.loss_dict, "loss": expected.loss}.items():
        torch.testing.assert_close(found[term], value, rtol=1e-5, atol=1e-6)
    assert name not in ("rt_detr_v2", "d_fine") or {"loss_vfl", "loss_vfl_dn_0"} <= found.keys()


@pytest.mark.parametrize("name", ["rt_detr_v2", "d_fine"])
def test_boxes_of_a_canvas(name, detectors, batch):
    """In pixels, boxes are the same on the padded canvas that the model knows and on the image that we know."""
    detector = copy.deepcopy(detectors(name))
    images, mask, targets = batch  # 120 x 136, the second one 90 x 100; the model wants 128 x 160
    padded = torch.zeros(2, 3, 128, 160)
    padded[:, :, :120, :136] = images
    canvas = torch.tensor([160.0, 128.0, 160.0, 128.0])
    valid = torch.tensor([[136.0, 120.0, 136.0, 120.0], [100.0, 90.0, 100.0, 90.0]])
    with torch.no_grad():
        found = detector(images, mask)
        raw = detector.model(pixel_values=padded)
        torch.testing.assert_close(found["pred_boxes"] * valid[:, None], raw.pred_boxes * canvas)
        torch.testing.assert_close(found["pred_logits"], raw.logits)
    given = []

    def record(logits, labels, *rest, **more):
        given.extend(labels)
        return logits.sum(), {}, None

    detector.own_loss = record
    detector.train().losses(images, mask, targets)
    for label, target, size in zip(given, targets, valid, strict=True):
        torch.testing.assert_close(label["boxes"] * canvas, target["boxes"] * size)
        assert torch.equal(label["class_labels"], target["labels"])


@pytest.mark.parametrize("name", ["rt_detr_v2", "d_fine"])
def test_earlier_layers_of_models_that_put_images_first(name, detectors, batch):
    """Two images and two layers (D-FINE: three): the order cannot be told from shapes."""
    detector = copy.deepcopy(detectors(name)).train()
    images, mask = batch[0][:, :, :96, :96], torch.zeros(2, 96, 96, dtype=torch.bool)
    with torch.no_grad():
        found = detector(images, mask)
        raw = detector.model(pixel_values=images)
    layers = [*found["aux_outputs"], found]
    assert len(layers) == {"rt_detr_v2": 2, "d_fine": 3}[name]
    for index, layer in enumerate(layers):
        torch.testing.assert_close(layer["pred_logits"], raw.intermediate_logits[:, index])
    torch.testing.assert_close(found["enc_outputs"]["pred_boxes"], raw.enc_topk_bboxes)


@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_queries(name, detectors, batch):
    """The first group is what the model detects by, in training as in inference; the others are for the losses."""
    detector = copy.deepcopy(detectors(name))
    images = torch.zeros(2, 3, 144, 144)
    images[:, :, :120, :136] = batch[0]  # to multiples of two windows of patches, and square
    mask = torch.ones(2, 144, 144, dtype=torch.bool)
    mask[:, :120, :136] = batch[1]
    with torch.no_grad():
        raw = detector.model(pixel_values=images, pixel_mask=(~mask).long())
        found = detector(images, mask)
        close(found, {"pred_logits": raw.logits, "pred_boxes": raw.pred_boxes})
        for module in detector.modules():  # batch norm of the projector tells the modes apart too
            module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)
        trained = detector(images, mask)
        everything = detector.model(pixel_values=images, pixel_mask=(~mask).long())
    assert everything.logits.shape[1] == 30 and trained["pred_logits"].shape[1] == 10
    close(trained, found)
    assert len(trained["aux_outputs"]) == 1
    close(trained["enc_outputs"], {"pred_logits": raw.enc_outputs_class, "pred_boxes": raw.enc_outputs_coord_logits})


@pytest.mark.parametrize("name", GROUPED)
def test_our_loss_matches_every_group_for_itself(name, make_other, batch):
    detector = make_other(name, num_classes=7, loss="simdetr").train()
    images, mask, targets = batch
    found = detector.losses(images, mask, targets)
    outputs, criterion, alone = detector._detect(images, mask), DetectionLoss(class_aware_encoder=True), []
    for first in (0, 10, 20):
        own = slice(first, first + 10)
        layers = [outputs, *outputs["aux_outputs"], outputs["enc_outputs"]]
        last, aux, enc = ({key: layer[key][:, own] for key in ("pred_logits", "pred_boxes")} for layer in layers)
        alone.append(criterion({**last, "aux_outputs": [aux], "enc_outputs": enc}, targets))
    for term in ("loss", "loss_ce", "loss_giou_0", "loss_bbox_enc"):
        torch.testing.assert_close(found[term], torch.stack([losses[term] for losses in alone]).mean())
    assert alone[0]["loss"] != alone[1]["loss"]


@pytest.mark.parametrize("name", GROUPED)
def test_a_sure_network_of_half_precision_has_a_finite_loss(name, detectors, batch):
    """The loss of the family has the logarithm of one minus a probability, which bfloat16 rounds to zero from 6 on."""
    detector = copy.deepcopy(detectors(name)).train()
    with torch.no_grad():
        detector.model.class_embed.bias[:] = 9.0
    with torch.autocast("cpu", torch.bfloat16):
        loss = detector.losses(*batch)["loss"]
    assert torch.isfinite(loss) and loss.dtype == torch.float32


def test_where_an_object_is_does_not_depend_on_the_shape_of_the_image(make_other):
    """Windows of RF-DETR on a canvas that is not square would put the object elsewhere; LW-DETR's do not."""
    for name in GROUPED:
        detector = make_other(name, num_classes=7).eval()
        body = detector.get_submodule(detector.body_name)
        seen = []
        body.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.feature_maps[-1]))
        for layer in body.encoder.layer:
            nn.init.zeros_(layer.gamma_1 if name == "lw_detr" else layer.layer_scale1.lambda1)  # no attention
        plain, marked = torch.zeros(1, 3, 64, 96), torch.zeros(1, 3, 64, 96)
        marked[:, :, 16:24, 40:48] = 1.0
        with torch.no_grad():
            detector(plain), detector(marked)
        assert (seen[0] - seen[1]).abs().sum(1)[0].gt(1e-4).nonzero().tolist() == [[2, 5]], name


@pytest.mark.parametrize("prefix", ["", "teacher.backbone."])
def test_weights_of_dinov2_are_the_backbone_of_rf_detr(prefix, shake):
    """The maps are those of timm's ViT with the same weights, at the size of the learned positions and resampled."""
    vit = VisionTransformer(
        img_size=64, patch_size=8, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2, init_values=1.0, num_classes=0
    )
    shake(vit).eval()
    given = {f"{prefix}{name}": value for name, value in vit.state_dict().items()} | {"head.weight": torch.zeros(3, 32)}
    for size in (64, 48):
        settings = copy.deepcopy(OTHERS["rf_detr"][1]["config"])
        settings["backbone_config"] |= {"num_windows": 1, "image_size": size}
        body = TransformersDetector(2, settings).eval().model.model.backbone.backbone
        report = load_into(body, given)
        assert report.missing == ("embeddings.mask_token",) and not report.mismatched
        if size == 64:
            image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                expected = vit.forward_features(image)[:, 1:].transpose(1, 2).reshape(1, 32, 8, 8)
                torch.testing.assert_close(body(image).feature_maps[-1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["conditional_detr", "rt_detr_v2"])
def test_our_loss_on_their_layers(name, make_other, batch):
    detector = make_other(name, num_classes=7, loss="simdetr").train()
    losses = detector.losses(*batch)
    assert {"loss_ce", "loss_giou_0"} <= losses.keys() and ("loss_ce_enc" in losses) == (name == "rt_detr_v2")
    criterion = DetectionLoss(class_aware_encoder=True)
    again = criterion(detector(*batch[:2]), batch[2])  # what a task with a criterion computes
    torch.testing.assert_close(losses["loss"], again["loss"])
    losses["loss"].backward()
    assert all(p.grad is not None for p in detector.parameters() if p.requires_grad)


def test_our_loss_is_not_for_a_softmax(make_other, batch):
    with pytest.raises(ValueError, match="loss: classes of detr compete in a softmax"):
        make_other("detr", num_classes=7, loss="simdetr").losses(*batch)


def test_softmax_classes_become_classes_on_their_own(detectors, batch):
    logits = 30 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    logits[0, 1] = 200.0  # a probability of 1
    assert torch.isfinite(softmax_log_odds(logits)).all()
    torch.testing.assert_close(softmax_log_odds(logits).sigmoid(), logits.softmax(dim=-1)[:, :-1])
    detector = detectors("detr")
    with torch.no_grad():
        raw = detector.model(pixel_values=batch[0], pixel_mask=(~batch[1]).long()).logits
        found = detector(*batch[:2])["pred_logits"]
    assert raw.shape[-1] == 8
    torch.testing.assert_close(found.sigmoid(), raw.softmax(dim=-1)[..., :-1])


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_serve_other_classes(name, detectors, make_other, tmp_path):
    save_detector(detectors(name), checkpoint_config(detectors(name), None), tmp_path)
    other = make_other(name, num_classes=2, seed=1)
    report = load_weights(other, tmp_path)
    assert report.replaced and not report.missing and not report.unexpected
    assert all(any(part in key for part in ("class", "score")) for key in report.replaced)


def test_from_a_folder_of_transformers(detectors, batch, tmp_path):
    """Config and weights of a folder; afterwards the detector needs it no more."""
    source = detectors("rt_detr_v2")
    source.model.save_pretrained(tmp_path / "theirs")
    detector = TransformersDetector(7, str(tmp_path / "theirs"), pretrained=str(tmp_path / "theirs"))
    assert detector.training and detector.init_args["pretrained"] == str(tmp_path / "theirs")
    save_detector(detector, checkpoint_config(detector, None), tmp_path / "ours")
    shutil.rmtree(tmp_path / "theirs")
    again = load_detector(tmp_path / "ours").detector
    with torch.no_grad():
        close(again(*batch[:2]), source(*batch[:2]))


def test_images_smaller_than_the_queries_need(make_other, config_of_other):
    config = {**config_of_other("rt_detr_v2")["init_args"]["config"], "num_queries": 300}
    with pytest.raises(ValueError, match="images of 64 x 96 px have fewer cells than"):
        make_other("rt_detr_v2", config=config).eval()(torch.zeros(1, 3, 64, 80))


def test_other_multiples_and_bad_numbers(make_other):
    detector = make_other("conditional_detr", pad_multiple=32).eval()
    image = torch.randn(1, 3, 60, 70, generator=torch.Generator().manual_seed(0))
    padded, mask = torch.zeros(1, 3, 64, 96), torch.ones(1, 64, 96, dtype=torch.bool)
    padded[:, :, :60, :70], mask[:, :60, :70] = image, False
    with torch.no_grad():
        assert torch.equal(detector(image)["pred_boxes"], detector(padded, mask)["pred_boxes"])
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        TransformersDetector(0, {"model_type": "detr"})


# ----------------------------------------------------------------------------------------------------------------------
# Configs: everything a user may get wrong, and what is read off models.


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
CONFIGS = {
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
    "lw_detr": (
        OTHERS["lw_detr"][1]["config"],
        "model.backbone.backbone",
        "model.backbone.backbone",
        "valid",
        16,
    ),
    "rf_detr": (
        OTHERS["rf_detr"][1]["config"],
        "model.backbone.backbone",
        "model.backbone.backbone",
        "valid",
        16,
    ),
    "yolos": (YOLOS, "vit", "vit", "canvas", 16),
}


@pytest.fixture(scope="module", params=CONFIGS)
def family(request):
    """Name, resolved settings, model and what it should be found to be."""
    given, *expected = CONFIGS[request.param]
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
    assert settings["model_type"] == name and settings.keys() > CONFIGS[name][0].keys() - {"backbone"}
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
    assert kept and new
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

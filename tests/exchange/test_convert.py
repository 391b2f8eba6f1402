"""Detectors that go out and come back are equal bit by bit (specification T8); foreign ones come in whole."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from simdetr.data.annotations import Category
from simdetr.data.images import read_image
from simdetr.detectors import DeformableDETR, DETReg, TorchvisionDetector, TransformersDetector, ViDT
from simdetr.exchange.convert import (
    export_official,
    export_safetensors,
    export_transformers,
    import_checkpoint,
    model_type_of,
    name_classes,
    read_transformers_folder,
    write_transformers_folder,
)
from simdetr.exchange.weights import (
    CONFIG_NAME,
    PREPROCESSOR_NAME,
    WEIGHTS_NAME,
    LoadedDetector,
    checkpoint_config,
    load_detector,
    load_weights,
    read_checkpoint,
    save_detector,
)
from simdetr.training.relabel import InferenceSettings, detect_array

CATEGORIES = tuple(Category(3 * number, f"thing {number}") for number in range(7))
IMAGES = {"short_side": 64, "max_side": 90, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.2]}


@pytest.fixture
def saved(variant, tmp_path):
    """A detector and its folder."""
    folder = tmp_path / "detector"
    save_detector(variant, checkpoint_config(variant, LoadedDetector(variant, CATEGORIES, IMAGES)), folder)
    return variant, folder


@pytest.fixture
def make_vidt():
    """A small ViDT+, with changes."""
    small = {"num_classes": 5, "backbone": "swin_pico", "hidden_dim": 32, "num_heads": 2, "num_decoder_layers": 2,
             "ffn_dim": 32, "num_queries": 9}  # fmt: skip
    return lambda **changes: ViDT(**(small | changes)).eval()


@pytest.fixture
def up_detr(make_plain):
    """State dict of an UP-DETR: torch's transformer layers have the original's names."""
    model = nn.ModuleDict(
        {
            "transformer": nn.ModuleDict(
                {
                    "encoder": nn.ModuleDict(
                        {"layers": nn.ModuleList(nn.TransformerEncoderLayer(64, 4, 256) for _ in range(6))}
                    ),
                    "decoder": nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 4, 256), 6, nn.LayerNorm(64)),
                }
            ),
            "input_proj": nn.Conv2d(512, 64, 1),
            "query_embed": nn.Embedding(10, 64),
            "class_embed": nn.Linear(64, 3),
            "bbox_embed": nn.ModuleList([nn.Linear(64, 4)]),
            "patch2query": nn.Linear(512, 64),
            "feature_align": nn.ModuleList([nn.Linear(64, 512)]),
        }
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    body = {f"backbone.0.body.{k}": v.clone() for k, v in make_plain().backbone.body.state_dict().items()}
    return {**model.state_dict(), **body}


def test_official_names_and_back(saved, tmp_path, equal_states):
    detector, folder = saved
    export_official(folder, tmp_path / "official.pth")
    content = torch.load(tmp_path / "official.pth", weights_only=True)
    assert any(name.startswith("backbone.0.body.") for name in content["model"])
    whole = load_detector(tmp_path / "official.pth")  # the entry that the original ignores tells everything
    assert equal_states(whole.detector.state_dict(), detector.state_dict())
    assert whole.detector.init_args == detector.init_args
    assert (whole.categories, whole.image_settings) == (
        load_detector(folder).categories,
        load_detector(folder).image_settings,
    )

    torch.save({"model": content["model"]}, tmp_path / "original.pth")
    told = {"num_heads": 4, "dilation": detector.init_args["dilation"], "num_queries": 20}
    import_checkpoint(tmp_path / "original.pth", tmp_path / "back", told)
    back = load_detector(tmp_path / "back")
    assert equal_states(back.detector.state_dict(), detector.state_dict())
    assert {**back.detector.init_args, "freeze_stem": True} == detector.init_args
    assert back.image_settings["short_side"] == 800 and back.categories[5] == Category(5, "class 5")


def test_transformers_folder_and_back(saved, tmp_path, equal_states):
    detector, folder = saved
    export_transformers(folder, tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "back")
    back = load_detector(tmp_path / "back")
    assert equal_states(back.detector.state_dict(), detector.state_dict())
    assert back.detector.init_args == detector.init_args
    assert [category.name for category in back.categories] == [category.name for category in CATEGORIES]
    assert back.image_settings == IMAGES


def test_safetensors_and_back(saved, tmp_path, equal_states):
    detector, folder = saved
    lightning = {f"detector.{name}": value for name, value in detector.state_dict().items()}
    config = json.loads((folder / "config.json").read_text())
    torch.save({"state_dict": lightning, "simdetr": config}, tmp_path / "last.ckpt")
    export_safetensors(tmp_path / "last.ckpt", tmp_path / "out")
    back = load_detector(tmp_path / "out")
    assert equal_states(back.detector.state_dict(), detector.state_dict())
    assert (back.categories, back.image_settings) == (CATEGORIES, IMAGES)


@pytest.mark.parametrize("changes", [{}, {"with_box_refine": True, "two_stage": True}], ids=["base", "two-stage"])
def test_objectness_goes_out_as_a_part_of_the_class_heads(changes, make_plain, padded_batch, tmp_path):
    """With equal outputs, as a detector that has none, whose encoder's head has a row per class."""
    detector = make_plain(objectness=True, **changes)
    save_detector(
        detector, checkpoint_config(detector, LoadedDetector(detector, CATEGORIES, IMAGES)), tmp_path / "ours"
    )
    export_official(tmp_path / "ours", tmp_path / "official.pth")
    export_transformers(tmp_path / "ours", tmp_path / "hf")
    original = torch.load(tmp_path / "official.pth", weights_only=True)["model"]
    assert {len(value) for name, value in original.items() if "class_embed" in name} == {7}
    assert not any("object_embed" in name for name in original)
    for path in (tmp_path / "official.pth", tmp_path / "hf"):
        back = load_detector(path)
        assert back.detector.init_args == detector.init_args | {"objectness": False}
        assert [category.name for category in back.categories] == [category.name for category in CATEGORIES]
        with torch.no_grad():
            found, expected = back.detector(*padded_batch), detector(*padded_batch)
        for name in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


def test_vidt_under_the_names_of_the_original_and_back(make_vidt, tmp_path, equal_states):
    detector = make_vidt()
    save_detector(detector, checkpoint_config(detector, None), tmp_path / "ours")
    export_official(tmp_path / "ours", tmp_path / "vidt.pth")
    content = {"model": torch.load(tmp_path / "vidt.pth", weights_only=True)["model"]}  # as the original writes it
    content["model"] |= {  # what the original stores and never reads
        "backbone.norm2.weight": torch.zeros(64),
        "backbone.layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49),
        "backbone.layers.1.downsample.expansion.weight": torch.zeros(2),
        "transformer.level_embed": torch.zeros(4, 32),
        "fusion.multi_scaler.refinenet_3.smoothing.weight": torch.zeros(2),
    }
    torch.save(content | {"args": argparse.Namespace(nheads=2, det_token_num=9)}, tmp_path / "vidt.pth")
    said = import_checkpoint(tmp_path / "vidt.pth", tmp_path / "back")
    assert said == f"ViDT with 5 classes in {tmp_path / 'back'} (model.safetensors, config.json)"
    back = load_detector(tmp_path / "back").detector
    assert isinstance(back, ViDT)
    assert equal_states(back.state_dict(), detector.state_dict())
    report = load_weights(make_vidt(num_classes=3), tmp_path / "vidt.pth")
    assert report.source == "ViDT" and report.missing == report.unexpected == []
    assert all("class_embed" in name or "token_embed" in name for name in report.replaced)


def test_options_of_the_original_tell_what_tensors_do_not(make_plain, tmp_path, caplog):
    detector = make_plain(with_box_refine=True, two_stage=True, num_queries=12)
    save_detector(detector, checkpoint_config(detector, None), tmp_path / "ours")
    export_official(tmp_path / "ours", tmp_path / "ours.pth")
    content = {"model": torch.load(tmp_path / "ours.pth", weights_only=True)["model"]}  # as the original writes it
    torch.save(content, tmp_path / "bare.pth")
    options = argparse.Namespace(nheads=4, num_queries=12, dilation=False, lr=1e-4)
    torch.save(content | {"args": options, "epoch": 49, "optimizer": {"state": {}}}, tmp_path / "official.pth")
    with caplog.at_level("INFO"):
        assert load_detector(tmp_path / "official.pth").detector.init_args["num_queries"] == 12
    assert not any("assumed" in line for line in caplog.messages)
    with pytest.raises(ValueError, match=r"--detector\.num_heads"):
        load_detector(tmp_path / "bare.pth")
    with caplog.at_level("INFO"):
        import_checkpoint(tmp_path / "bare.pth", tmp_path / "out", {"num_heads": 4})
    assert any("assumed" in line and "dilation=False, num_queries=300" in line for line in caplog.messages)


@pytest.fixture
def detreg(make_plain, tmp_path):
    """A DETReg checkpoint and the detector in it: 91 classes, of which it knows objects only, and embeddings."""
    detector = make_plain(num_classes=91)
    save_detector(detector, checkpoint_config(detector, None), tmp_path / "source")
    export_official(tmp_path / "source", tmp_path / "detreg.pth")
    content = {"model": torch.load(tmp_path / "detreg.pth", weights_only=True)["model"]}  # as the original writes it
    for layer, (rows, columns) in enumerate(((64, 64), (512, 64))):
        content["model"][f"feature_embed.layers.{layer}.weight"] = torch.zeros(rows, columns)
        content["model"][f"feature_embed.layers.{layer}.bias"] = torch.zeros(rows)
    torch.save(content | {"args": argparse.Namespace(nheads=4, dilation=False)}, tmp_path / "detreg.pth")
    return detector, tmp_path / "detreg.pth"


def test_detreg_gives_all_but_its_heads(detreg, make_plain):
    source, path = detreg
    detector = make_plain(num_classes=3)
    fresh = {name: value.clone() for name, value in detector.state_dict().items()}
    report = load_weights(detector, path)
    heads = {f"class_embed.{layer}.{part}" for layer in range(3) for part in ("weight", "bias")}
    embeddings = {f"feature_embed.layers.{layer}.{part}" for layer in range(2) for part in ("weight", "bias")}
    assert (report.source, set(report.replaced), set(report.unexpected)) == ("DETReg", heads, embeddings)
    assert report.missing == []
    for name, value in detector.state_dict().items():
        assert torch.equal(value, fresh[name] if name in heads else source.state_dict()[name]), name


def test_detreg_becomes_a_detector_folder(detreg, tmp_path, equal_states, caplog):
    source, path = detreg
    with caplog.at_level("INFO"):
        import_checkpoint(path, tmp_path / "out")
    assert any("(DETReg)" in line and "4 unexpected (feature_embed" in line for line in caplog.messages)
    back = load_detector(tmp_path / "out").detector
    assert type(back) is DeformableDETR and equal_states(back.state_dict(), source.state_dict())


def test_our_own_detreg_has_the_names_of_the_original(tmp_path, make_plain, equal_states):
    small = {"backbone": "resnet18", "hidden_dim": 64, "num_heads": 4, "num_encoder_layers": 2, "num_decoder_layers": 3,
             "ffn_dim": 128, "num_queries": 20}  # fmt: skip
    pretrained = DETReg(1, **small)
    save_detector(pretrained, checkpoint_config(pretrained, None), tmp_path / "ours")
    export_official(tmp_path / "ours", tmp_path / "detreg.pth")
    back = DETReg(1, **small)
    report = load_weights(back, tmp_path / "detreg.pth")
    assert report.source == "DETReg" and report.replaced == report.missing == report.unexpected == []
    assert equal_states(back.state_dict(), pretrained.state_dict())
    detector = make_plain()
    for path in (tmp_path / "ours", tmp_path / "detreg.pth"):
        report = load_weights(detector, path)
        assert {name.split(".")[0] for name in report.replaced} == {"class_embed"} and report.missing == []
        assert {name.split(".")[0] for name in report.unexpected} == {"feature_embed"}


def test_up_detr_gives_its_backbone_and_what_fits_of_its_transformer(up_detr, make_plain, tmp_path):
    detector = make_plain()
    fresh = {name: value.clone() for name, value in detector.state_dict().items()}
    torch.save({"model": up_detr, "args": argparse.Namespace(nheads=4)}, tmp_path / "up-detr.pth")
    report = load_weights(detector, tmp_path / "up-detr.pth")
    state = detector.state_dict()
    body = [name for name in state if name.startswith("backbone.body.")]
    assert report.source == "UP-DETR" and set(body) <= set(report.kept)
    assert all(torch.equal(state[name], up_detr[name.replace("backbone.", "backbone.0.", 1)]) for name in body)
    # the perceptrons of the original DETR are twice as wide
    wide = {f"linear{number}.{part}" for number in (1, 2) for part in ("weight", "bias")} - {"linear2.bias"}
    assert {".".join(name.split(".")[-2:]) for name in report.replaced} == wide
    decoder = "transformer.decoder.layers.2."
    assert torch.equal(state[f"{decoder}self_attn.in_proj_weight"], up_detr[f"{decoder}self_attn.in_proj_weight"])
    assert torch.equal(state[f"{decoder}norm2.weight"], up_detr[f"{decoder}norm1.weight"])
    assert torch.equal(state["query_embed.weight"], fresh["query_embed.weight"])
    heads = {"class_embed.weight", "bbox_embed.0.weight", "patch2query.weight", "feature_align.0.bias"}
    assert heads <= set(report.unexpected)
    assert not any(name.startswith("backbone") for name in report.unexpected)
    assert all(torch.equal(state[name], fresh[name]) for name in report.missing + report.replaced)


def test_up_detr_needs_its_own_backbone_and_a_config(up_detr, make_plain, tmp_path):
    torch.save({"model": up_detr}, tmp_path / "up-detr.pth")
    with pytest.raises(ValueError, match="expected all tensors of its backbone, but"):
        load_weights(make_plain(backbone="resnet34"), tmp_path / "up-detr.pth")
    with pytest.raises(ValueError, match=r"\(UP-DETR\) do not tell the detector.*--init of `simdetr finetune`"):
        import_checkpoint(tmp_path / "up-detr.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_detector_of_another_kind_is_refused(make_vidt, make_plain, tmp_path):
    detector = make_vidt()
    save_detector(detector, checkpoint_config(detector, None), tmp_path / "vidt")
    with pytest.raises(ValueError, match=r"expected 50% of its tensors, but .* tensors of DeformableDETR"):
        load_weights(make_plain(), tmp_path / "vidt")
    with pytest.raises(ValueError, match=r"does not fit its own config"):
        export_official(tmp_path / "vidt", tmp_path / "vidt.pth")
        import_checkpoint(tmp_path / "vidt.pth", tmp_path / "out", {"num_heads": 2, "ffn_dim": 512})


def test_nothing_is_overwritten_by_what_is_made_of_it(make_plain, tmp_path):
    save_detector(make_plain(), checkpoint_config(make_plain(), None), tmp_path)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        for write in (export_safetensors, export_transformers, import_checkpoint):
            with pytest.raises(ValueError, match="holds the checkpoint itself"):
                write(source, tmp_path)


def test_names_of_classes():
    coco = [Category(1, "person"), Category(3, "car")]
    assert name_classes(coco, 2) == tuple(coco)
    by_id = (Category(0, "unused 0"), coco[0], Category(2, "unused 2"), coco[1], Category(4, "unused 4"))
    assert name_classes(coco, 5) == by_id
    with pytest.raises(ValueError, match="expected 1 categories, or fewer"):
        name_classes(coco, 1)
    with pytest.raises(ValueError, match=r"ids such as \['a'\]"):
        name_classes([Category("a", "a")], 3)


def test_only_detectors_with_an_original_have_its_names(tmp_path):
    detector = TorchvisionDetector(2, "retinanet_resnet50_fpn", backbone="resnet18")
    save_detector(detector, checkpoint_config(detector, None), tmp_path / "ours")
    with pytest.raises(ValueError, match=r"TorchvisionDetector has no original.*Export to safetensors"):
        export_official(tmp_path / "ours", tmp_path / "out.pth")


# ----------------------------------------------------------------------------------------------------------------------
# What transformers computes with our folders, and what we compute with its own.


transformers = pytest.importorskip("transformers", reason="transformers is the reference here")


def test_transformers_gives_equal_outputs_and_comes_back_equal(variant, padded_batch, tmp_path, equal_states):
    folder = tmp_path / "ours"
    said = write_transformers_folder(LoadedDetector(variant, CATEGORIES, IMAGES), folder)
    assert said == f"deformable_detr with 7 classes in {folder}"
    theirs, info = transformers.AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert theirs.config.id2label == {number: f"thing {number}" for number in range(7)}
    assert theirs.config.label2id["thing 4"] == 4
    images, mask = padded_batch
    with torch.no_grad():
        expected = variant(images, mask)
        found = theirs.eval()(pixel_values=images, pixel_mask=(~mask).long())
    assert expected["pred_logits"].std() > 0.1 and expected["pred_boxes"].std() > 0.03, "it must mean something"
    torch.testing.assert_close(found.logits, expected["pred_logits"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.pred_boxes, expected["pred_boxes"], rtol=1e-4, atol=1e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    back = load_detector(tmp_path / "theirs")
    assert equal_states(back.detector.state_dict(), variant.state_dict())
    assert back.categories[6] == Category(6, "thing 6")
    in_memory = tmp_path / "memory"
    in_memory.mkdir()
    save_file({name: value.clone() for name, value in theirs.state_dict().items()}, in_memory / WEIGHTS_NAME)
    theirs.config.save_pretrained(in_memory)
    assert equal_states(load_detector(in_memory).detector.state_dict(), variant.state_dict())


def test_learning_goes_on_in_transformers_with_losses_of_all_layers(make_plain, padded_batch, tmp_path):
    write_transformers_folder(LoadedDetector(make_plain(), CATEGORIES, IMAGES), tmp_path)
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path)
    images, mask = padded_batch
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2
    losses = theirs(pixel_values=images, pixel_mask=(~mask).long(), labels=labels).loss_dict
    assert {"loss_ce_0", "loss_bbox_0", "loss_giou_0"} <= losses.keys()


def test_transformers_finds_the_same_objects_in_an_image_file(make_plain, tmp_path):
    """Their image processor, detector and post-processing against ours."""
    detector = make_plain()
    write_transformers_folder(LoadedDetector(detector, CATEGORIES, IMAGES), tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (11, 15, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((150, 110)).save(tmp_path / "image.png")

    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    model = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    inputs = processor(images=Image.open(tmp_path / "image.png"), return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    theirs = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(110, 150)])[0]

    settings = InferenceSettings.of(IMAGES)
    ours = detect_array(detector, read_image(tmp_path / "image.png"), CATEGORIES, settings).image(0)
    assert tuple(inputs["pixel_values"].shape[2:]) == (64, 87)
    assert theirs["labels"][0] == ours.classes[0]
    torch.testing.assert_close(theirs["scores"][0], torch.tensor(ours.scores[0]), rtol=0, atol=0.01)
    torch.testing.assert_close(theirs["boxes"][0], torch.tensor(ours.boxes_xyxy[0]), rtol=0, atol=0.5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"backbone": "convnext_atto"}, "backbone='convnext_atto': expected a ResNet"),
        ({"backbone": "efficientnet_b0"}, "backbone='efficientnet_b0': expected a ResNet"),
        ({"hidden_dim": 48, "num_heads": 2}, "hidden_dim=48: expected a multiple of 32"),
        ({"exclude_invalid_proposals": True}, "exclude_invalid_proposals=True: expected False"),
    ],
)
def test_what_transformers_cannot_compute_is_refused(changes, named, make_plain, tmp_path):
    with pytest.raises(ValueError, match=named):
        write_transformers_folder(LoadedDetector(make_plain(**changes), CATEGORIES, IMAGES), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_batch_norm_that_learns_is_frozen_there(make_plain, padded_batch, tmp_path):
    detector = make_plain(frozen_batch_norm=False)
    write_transformers_folder(LoadedDetector(detector, CATEGORIES, IMAGES), tmp_path)
    theirs, info = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    images, mask = padded_batch
    with torch.no_grad():
        found = theirs.eval()(pixel_values=images, pixel_mask=(~mask).long()).pred_boxes
        torch.testing.assert_close(found, detector(images, mask)["pred_boxes"], rtol=1e-4, atol=1e-5)


def test_detreg_is_a_deformable_detr_there(padded_batch, tmp_path):
    settings = {
        "backbone": "resnet18",
        "hidden_dim": 64,
        "num_heads": 4,
        "num_encoder_layers": 1,
        "num_decoder_layers": 2,
    }
    detector = DETReg(7, **settings).eval()
    write_transformers_folder(LoadedDetector(detector, CATEGORIES, IMAGES), tmp_path)
    theirs, info = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    images, mask = padded_batch
    with torch.no_grad():
        found = theirs.eval()(pixel_values=images, pixel_mask=(~mask).long()).logits
        torch.testing.assert_close(found, detector(images, mask)["pred_logits"], rtol=1e-4, atol=1e-4)


def test_detectors_without_counterpart_say_where_they_can_go(tmp_path):
    detector = TorchvisionDetector(3, "retinanet_resnet50_fpn", backbone="resnet18")
    with pytest.raises(ValueError, match=r"has no TorchvisionDetector.*Export to safetensors"):
        write_transformers_folder(LoadedDetector(detector, CATEGORIES[:3], IMAGES), tmp_path)


RT_DETR = {
    "model_type": "rt_detr_v2",
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_layers": 2,
    "num_queries": 10,
    "num_denoising": 0,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_in_channels": [16, 32, 64],
    "feat_strides": [8, 16, 32],
    "decoder_in_channels": [32, 32, 32],
    "backbone_config": {
        "model_type": "rt_detr_resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 32, 64],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    },
}


def test_detectors_of_transformers_write_and_read_themselves(tmp_path, equal_states):
    detector = TransformersDetector(3, RT_DETR).eval()
    said = write_transformers_folder(LoadedDetector(detector, CATEGORIES[:3], IMAGES), tmp_path)
    assert "without preprocessor_config.json" in said and not (tmp_path / PREPROCESSOR_NAME).exists()
    assert model_type_of(tmp_path) == "rt_detr_v2" and model_type_of(tmp_path / "nothing") is None
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert theirs.config.id2label == {0: "thing 0", 1: "thing 1", 2: "thing 2"}
    assert equal_states(theirs.state_dict(), detector.model.state_dict())
    back = read_transformers_folder(tmp_path)
    assert equal_states(back.detector.state_dict(), detector.state_dict())
    assert back.categories == tuple(Category(number, f"thing {number}") for number in range(3))
    with pytest.raises(ValueError, match=r"transformers' 'rt_detr_v2'.*`simdetr import`"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["lw_detr", "rf_detr"])
def test_detectors_with_groups_of_queries_come_back(name, make_other, equal_states, tmp_path):
    """All groups, though one detects: pretraining goes on with all of them."""
    detector = make_other(name).eval()
    write_transformers_folder(LoadedDetector(detector, CATEGORIES[:3], IMAGES), tmp_path)
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = theirs(image), detector(image)
    assert torch.equal(found["pred_logits"], expected.logits) and torch.equal(found["pred_boxes"], expected.pred_boxes)
    again = read_transformers_folder(tmp_path).detector
    assert equal_states(again.state_dict(), detector.state_dict()) and again.num_groups == 3


def test_pickled_weights_of_transformers_are_not_read(tmp_path):
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"model_type": "rt_detr_v2"}))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors.*not read"):
        read_transformers_folder(tmp_path)

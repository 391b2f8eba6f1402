"""Import and export on the command line: another project's file, and what every other command does with it."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from simdetr.commands.export import detector_arguments
from simdetr.commands.main import main
from simdetr.data.label_files import read_labels
from simdetr.detectors import DeformableDETR
from simdetr.exchange.parameter_names import to_official
from simdetr.exchange.weights import load_detector

SMALL = {
    "backbone": "resnet18",
    "hidden_dim": 32,
    "num_heads": 2,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "ffn_dim": 32,
    "num_queries": 8,
    "num_feature_levels": 1,
}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A checkpoint as the original's code writes it, of the eight classes numbered as in the scenes' labels."""
    path = tmp_path_factory.mktemp("official") / "checkpoint.pth"
    options = argparse.Namespace(nheads=2, num_queries=8, dilation=False)
    detector = DeformableDETR(9, **SMALL)
    for name, value in detector.named_buffers():
        if name.endswith("running_mean"):  # the backbone has learned something
            value += 0.1
    torch.save({"model": to_official(detector.state_dict()), "args": options, "epoch": 49}, path)
    return path


@pytest.fixture(scope="module")
def imported(official, scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported")
    labels = scenes / "instances.json"
    main(f"import {official} --out {out} --labels {labels} --short_side 64 --max-side 80".split())
    return out


def run(line: str, **places: object) -> None:
    main(line.format(**places).split())


def test_import_names_classes_and_serves_prediction(imported, scenes, tmp_path):
    truth = read_labels(scenes / "instances.json")
    categories = load_detector(imported).categories
    assert {category.id: category.name for category in truth.categories}.items() <= {
        category.id: category.name for category in categories
    }.items()
    assert len(categories) == 9
    assert load_detector(imported).image_settings["max_side"] == 80
    out = tmp_path / "found.json"
    run("predict --images {scenes} --checkpoint {at} --out {out} --min_score 0 --max_boxes 2", scenes=scenes,
        at=imported, out=out)  # fmt: skip
    assert 0 < len(json.loads(out.read_text())["annotations"]) <= 24


@pytest.mark.parametrize("form", ["file", "folder of transformers"])
def test_files_of_others_serve_without_import(form, official, imported, scenes, tiny_config, tmp_path):
    checkpoint = official
    if form != "file":
        run("export transformers --checkpoint {at} --out {out}", at=imported, out=tmp_path / "hf")
        checkpoint = tmp_path / "hf"
    found, tuned = tmp_path / "found.parquet", tmp_path / "tuned"
    image = sorted(scenes.rglob("*.jpg"))[0]
    run("predict --images {image} --checkpoint {at} --out {out}", image=image, at=checkpoint, out=found)
    assert len(read_labels(found)) == 1
    run(
        "finetune --images {scenes} --labels {scenes}/instances.json --out {out} --config {config} --init {at}",
        scenes=scenes,
        at=checkpoint,
        out=tuned,
        config=tiny_config,
    )
    arguments = load_detector(tuned / "detector").detector.init_args
    assert (arguments["hidden_dim"], arguments["num_queries"], arguments["backbone"]) == (32, 8, "resnet18")


def test_exports_of_one_detector(imported, tmp_path, capsys):
    run("export safetensors --checkpoint {at} --out {out}", at=imported, out=tmp_path / "ours")
    run("export official --checkpoint {at} --out {out}", at=imported, out=tmp_path / "again.pth")
    run("export transformers --checkpoint {at} --out {out}", at=imported, out=tmp_path / "hf")
    said = capsys.readouterr().out.replace("\n", "")
    assert "DeformableDETR with 9 classes" in said and "under the original's names" in said
    state = load_detector(imported).detector.state_dict()
    again = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    assert all(torch.equal(again[name], value) for name, value in to_official(state).items())
    assert all(torch.equal(v, state[k]) for k, v in load_detector(tmp_path / "ours").detector.state_dict().items())
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }


def test_onnx_gets_its_arguments(imported, tmp_path, monkeypatch, capsys):
    seen = {}

    def export_onnx(checkpoint, out, **options):
        seen.update(options, checkpoint=checkpoint, out=out)
        return "equal to 1e-6"

    monkeypatch.setattr("simdetr.exchange.onnx.export_onnx", export_onnx)
    out = tmp_path / "model.onnx"
    main(["export", "onnx", "--checkpoint", str(imported), "--out", str(out), "--verify", "--image-size", "[64, 80]"])
    assert seen == {"checkpoint": imported, "out": out, "verify": True, "image_size": (64, 80), "opset": None}
    assert "equal to 1e-6" in capsys.readouterr().out


def test_help_says_what_goes_where(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "boxes for other tools: labels",
        "AutoModelForObjectDetection.from_pretrained",
        "under the names of the original code",
        "COCO JSON",
        "onnxruntime",
        "safetensors and JSON",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("import {tmp}/none.pth --out {tmp}/o", "does not exist"),
        ("import {official} --out {tmp}/o --detector.num_haeds 2", "num_haeds"),
        ("import {official} --out {tmp}/o --model.lr 2", "--model.lr: expected --detector.NAME"),
        ("import {imported} --out {imported}", "holds the checkpoint itself"),
        ("export transformers --checkpoint {tmp} --out {tmp}/o", "holds none"),
        ("export official --checkpoint {imported} --out {tmp}", "expected a file name"),
    ],
)
def test_users_mistakes_are_one_line(arguments, said, official, imported, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run(arguments, official=official, imported=imported, tmp=tmp_path)
    assert caught.value.code == 1
    line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(line) == 1 and said in line[0]


def test_values_of_dotted_options_are_yaml():
    options = ("--detector.dilation=true", "--detector.backbone=resnet50.tv_in1k", "--detector.num_heads=4")
    assert detector_arguments(options) == {"dilation": True, "backbone": "resnet50.tv_in1k", "num_heads": 4}

"""Heads under the commands, from a configuration to files: fit, predict, evaluate, finetune from a pretrained run."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from simdetr.commands import main as cli
from simdetr.data.label_files import read_labels
from simdetr.exchange.weights import checkpoint_config, load_detector, save_detector

SMALLEST = {
    "data": {"batch_size": 4, "short_sides": [64], "max_side": 80, "crop": False, "colour": "none"},
    "trainer": {"max_steps": 2, "max_epochs": -1, "accelerator": "cpu", "enable_progress_bar": False},
}
UNFROZEN = {"backbone": "test_resnet", "frozen_batch_norm": False, "freeze_stem": False}


@pytest.fixture
def write(tmp_path):
    """Write a config of a headed detector and return its path."""

    def config(class_path: str, init_args: dict, **data) -> Path:
        model = {"detector": {"class_path": f"simdetr.heads.{class_path}", "init_args": init_args}}
        content = {**SMALLEST, "model": model, "data": {**SMALLEST["data"], **data}}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return config


@pytest.fixture
def landmarks(write, make_detector):
    """A landmark head on the smallest detector, with the lower right corners of the scenes' objects."""
    inner = {name: value for name, value in make_detector().init_args.items() if name != "num_classes"}
    return write(
        "HeadedDetector",
        {
            # the detector's own classes: after two steps the head's would say background everywhere
            "head": {"class_path": "simdetr.heads.LandmarkHead", "init_args": {"class_weight": "sigmoid"}},
            "detector": {"class_path": "simdetr.detectors.DeformableDETR", "init_args": inner},
        },
        reference_points={"default": "bottom_right"},
    )


@pytest.fixture
def localisation(write):
    """A localisation head on the smallest backbone."""
    head = {"class_path": "simdetr.heads.LocalisationHead", "init_args": {"class_loss": "bce", "map_size": 32}}
    return write("HeadedBackbone", {**UNFROZEN, "head": head}, image_level=True)


def fit(config: Path, scenes: Path, out: Path, *options: str) -> None:
    inputs = [f"--data.images={scenes}", f"--data.labels={scenes / 'instances.json'}"]
    cli.main(["fit", f"--config={config}", *inputs, f"--trainer.default_root_dir={out}", *options])


def report_of(run: Path, scenes: Path) -> str:
    cli.main(["report", f"--run={run}", f"--images={scenes}", f"--truth={scenes / 'instances.json'}"])
    return (run / "report" / "index.html").read_text(encoding="utf-8")


def test_landmarks_from_config_to_pictures(landmarks, scenes, tmp_path, capsys):
    run, labels = tmp_path / "run", scenes / "instances.json"
    validation = (f"--data.val_images={scenes}", f"--data.val_labels={labels}")
    fit(landmarks, scenes, run, *validation, "--trainer.log_every_n_steps=1", "--trainer.val_check_interval=1")
    with next((run / "logs").glob("*/metrics.csv")).open() as file:
        columns = {name for row in csv.DictReader(file) for name, value in row.items() if value}
    assert {"train/landmark_loss_class", "train/landmark_reversal_rate", "train/loss_bbox", "val/point_AP"} <= columns
    out = tmp_path / "found.json"
    command = ["predict", f"--images={scenes}", f"--checkpoint={run}", f"--out={out}", "--min_score=0"]
    cli.main([*command, "--max_boxes=3", f"--pictures={tmp_path / 'drawn'}"])
    content = json.loads(out.read_text())
    assert content["annotations"] and all(len(row["keypoints"]) == 3 for row in content["annotations"])
    assert content["categories"][0]["keypoints"] == ["reference point"]
    found = read_labels(out)
    assert found.points is not None and len(found.points) == len(found.boxes_xyxy)
    assert len(list((tmp_path / "drawn").rglob("*.*"))) == len(found)
    capsys.readouterr()
    cli.main(["evaluate", f"--images={scenes}", f"--labels={labels}", f"--checkpoint={run}"])
    shown = capsys.readouterr().out
    assert "point_AP" in shown and "point_error_px" in shown and "AR@100" in shown
    page = report_of(run, scenes)
    assert "point_AP@2" in page and "predicted: best" in page and "labelled by people" in page
    assert len(read_labels(run / "predictions" / "labels.parquet")) == len(found)
    stored = load_detector(run / "detector")
    assert stored.reference_points == {"default": "bottom_right"}
    assert stored.detector.init_args["head"]["init_args"]["mode"] == "eq4"


def test_landmarks_start_from_a_pretrained_run(landmarks, scenes, make_detector, tmp_path, capsys):
    torch.manual_seed(3)
    plain = make_detector(9)
    save_detector(plain, checkpoint_config(plain, None), tmp_path / "pretrained" / "detector")
    inputs = [f"--images={scenes}", f"--labels={scenes / 'instances.json'}", f"--init={tmp_path / 'pretrained'}"]
    options = ["--model.lr=0", "--model.backbone_lr=0", f"--out={tmp_path / 'run'}"]
    cli.main(["finetune", f"--config={landmarks}", *inputs, *options])
    tuned = load_detector(tmp_path / "run" / "detector").detector
    assert tuned.init_args["head"]["class_path"].endswith("LandmarkHead")
    before, after = plain.state_dict(), tuned.core.state_dict()
    kept = [name for name in before if not name.startswith("class_embed") and "running" not in name]
    kept = [name for name in kept if "num_batches" not in name]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)


def test_localisation_from_classes_of_images_to_heat_maps(localisation, scenes, tmp_path, capsys):
    truth, run = read_labels(scenes / "instances.json"), tmp_path / "run"
    table = tmp_path / "classes.csv"
    rows = [(i, truth.categories[c].name) for i in truth.image_ids for c in sorted(set(truth.of(i).classes.tolist()))]
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "label"), *rows])
    validation = (f"--data.val_images={scenes}", f"--data.val_labels={scenes / 'instances.json'}")
    fit(localisation, scenes, run, f"--data.labels={table}", *validation)
    page = report_of(run, scenes)
    assert "what the head looks at" in page and "CAM MaxBoxAccV2" in page
    out, maps = tmp_path / "found.parquet", tmp_path / "maps"
    command = ["predict", f"--images={scenes}", f"--checkpoint={run}", f"--out={out}", "--min_score=0"]
    cli.main([*command, f"--heat_maps={maps}"])
    found = read_labels(out)
    assert len(found) == len(truth) and max(found.offsets[1:] - found.offsets[:-1]) == 1
    pictures = sorted(maps.rglob("*.*"))
    assert len(pictures) == len(truth)
    with Image.open(pictures[0]) as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100
    capsys.readouterr()
    scores = tmp_path / "scores.json"
    command = ["evaluate", f"--images={scenes}", f"--labels={scenes / 'instances.json'}", f"--checkpoint={run}"]
    cli.main([*command, f"--out={scores}"])
    numbers = json.loads(scores.read_text())
    assert {"MaxBoxAcc", "MaxBoxAccV2", "CAM MaxBoxAccV2", "centre MaxBoxAccV2", "Top-1 Loc"} <= set(numbers)
    assert "MaxBoxAccV2" in capsys.readouterr().out


def test_localisation_starts_from_the_backbone_of_a_run(localisation, scenes, make_detector, tmp_path):
    torch.manual_seed(3)
    plain = make_detector(9, num_feature_levels=3, frozen_batch_norm=False)
    save_detector(plain, checkpoint_config(plain, None), tmp_path / "pretrained" / "detector")
    options = (f"--model.init_weights={tmp_path / 'pretrained'}", "--model.lr=0", "--model.backbone_lr=0")
    fit(localisation, scenes, tmp_path / "run", *options)
    tuned = load_detector(tmp_path / "run" / "detector").detector
    for name, value in plain.backbone.body.named_parameters():
        assert torch.equal(tuned.backbone.body.get_parameter(name), value)


FOR_LABELLING = {
    "location": {"class_path": "simdetr.heads.LocationPrior", "init_args": {"levels": [0], "use": "rank"}},
    "pyramid": {
        "class_path": "simdetr.heads.SpatialPyramidNeck",
        "init_args": {"pools": [3, 5], "taps": ["in", "pool_5"]},
    },
    "domain": {"class_path": "simdetr.heads.DomainAdversary", "init_args": {"image_hidden": 16, "object_hidden": 16}},
}
FOR_LABELLING["stack"] = {"class_path": "simdetr.heads.HeadStack", "init_args": {"heads": list(FOR_LABELLING.values())}}
"""The parts of the labelling document's trainer, and all of them at once."""


@pytest.mark.parametrize("kind", FOR_LABELLING)
def test_parts_of_the_labelling_document_are_finetuned(kind, write, scenes, make_detector, tmp_path):
    """From a pretrained run to labels, with unlabelled images where a part learns from them."""
    torch.manual_seed(3)
    plain = make_detector(9)
    save_detector(plain, checkpoint_config(plain, None), tmp_path / "pretrained" / "detector")
    inner = {name: value for name, value in make_detector().init_args.items() if name != "num_classes"}
    detector = {"class_path": "simdetr.detectors.DeformableDETR", "init_args": inner}
    config = write("HeadedDetector", {"head": FOR_LABELLING[kind], "detector": detector})
    inputs = [f"--images={scenes}", f"--labels={scenes / 'instances.json'}", f"--init={tmp_path / 'pretrained'}"]
    pool = [f"--data.unlabelled={scenes}", "--data.label_fraction=0.5"] if kind in ("domain", "stack") else []
    logs, run = ["--trainer.log_every_n_steps=1"], tmp_path / "run"
    cli.main(["finetune", f"--config={config}", *inputs, *pool, *logs, f"--out={run}"])
    with next(run.rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    terms = {
        "location": {"location_objectness", "location_map_norm"},
        "pyramid": set(),
        "domain": {"domain_image", "domain_object", "domain_image_accuracy", "domain_object_accuracy", "domain_scale"},
        "stack": {"heads_location_objectness", "heads_domain_image"},
    }[kind]
    assert {f"train/{name}" for name in (*terms, "loss_ce")} <= {name for name, value in rows[0].items() if value}
    if kind == "domain":  # two steps: at none and at half of the training
        scales = [float(row["train/domain_scale"]) for row in rows if row["train/domain_scale"]]
        assert scales == pytest.approx([0.0, 0.0986614], abs=1e-6)
    stored = json.loads((run / "detector" / "config.json").read_text())
    assert stored["init_args"]["head"]["class_path"] == f"simdetr.heads.{_module_of(kind)}"
    tuned = load_detector(run / "detector").detector
    if kind == "domain":
        assert type(tuned) is type(plain)
    elif kind == "location":
        assert float(tuned.head.prior_map.abs().max()) > 0
    assert not [name for name in tuned.state_dict() if "discriminator" in name]
    out = tmp_path / "found.json"
    cli.main(["predict", f"--images={scenes}", f"--checkpoint={run}", f"--out={out}", "--min_score=0", "--max_boxes=5"])
    assert json.loads(out.read_text())["annotations"]
    again = tmp_path / "again"
    config = write("HeadedDetector", {"head": FOR_LABELLING[kind], "detector": detector})
    inputs[-1] = f"--init={run}"
    cli.main(["finetune", f"--config={config}", *inputs, *pool, f"--out={again}"])
    assert json.loads((again / "detector" / "config.json").read_text())["init_args"] == stored["init_args"]


def _module_of(kind: str) -> str:
    """Where the head of a kind is, as class paths have it."""
    return {
        "location": "location_prior.LocationPrior",
        "pyramid": "spatial_pyramid.SpatialPyramidNeck",
        "domain": "gradient_reversal.DomainAdversary",
        "stack": "stack.HeadStack",
    }[kind]


def test_unlabelled_images_need_a_head_for_them(landmarks, scenes, tmp_path, capsys):
    with pytest.raises(SystemExit):
        fit(landmarks, scenes, tmp_path / "run", f"--data.unlabelled={scenes}", "--data.label_fraction=0.5")
    assert "HeadedDetector would learn that there is nothing on images that nobody" in capsys.readouterr().err


def test_heat_maps_need_a_localisation_head(scenes, make_detector, tmp_path, capsys):
    detector = make_detector(3)
    config = checkpoint_config(detector, None)
    config["categories"] = [{"id": number, "name": str(number)} for number in range(3)]
    config["image_settings"] = {"short_side": 64, "max_side": 80}
    save_detector(detector, config, tmp_path / "plain")
    command = ["predict", f"--images={scenes}", f"--checkpoint={tmp_path / 'plain'}", f"--out={tmp_path / 'f.json'}"]
    with pytest.raises(SystemExit):
        cli.main([*command, f"--heat_maps={tmp_path / 'maps'}"])
    assert "has no simdetr.heads.LocalisationHead, so there are no score maps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("head.init_args.mode", "eq8", "eq8"),
        ("head.init_args.moode", "eq4", "moode"),
        ("head.class_path", "torch.nn.Linear", "Linear"),
    ],
)
def test_wrong_options_of_a_head_are_named(key, value, said, landmarks, scenes, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        fit(landmarks, scenes, tmp_path / "run", f"--model.detector.init_args.{key}={value}")
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["landmarks", "localisation"])
def test_two_processes_train_a_head(kind, request, scenes, tmp_path, begin):
    """One command alone, of which Lightning makes two processes, and two that torchrun would start."""
    words = ["fit", f"--config={request.getfixturevalue(kind)}", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    words += [f"--data.images={scenes}", f"--data.labels={scenes / 'instances.json'}", "--data.batch_size=2"]
    words += ["--trainer.devices=2", "--trainer.strategy=ddp"]
    if kind == "landmarks":
        command = [sys.executable, "-W", "ignore", "-m", "simdetr", *words]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert result.returncode == 0, result.stderr[-2000:]
    else:
        for rank, process in enumerate(begin(words, tmp_path / "said", ranks=2)):
            process.join(300)
            assert process.exitcode == 0, (tmp_path / f"said-{rank}.err").read_text()[-2000:]
    trained = load_detector(tmp_path / "run" / "detector").detector
    assert all(torch.isfinite(parameter).all() for parameter in trained.parameters())

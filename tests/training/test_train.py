"""Resuming: a killed training ends with the weights of one that was never interrupted, bit by bit."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from simdetr.data.annotations import LabelError
from simdetr.training.detection_task import DetectionTask
from simdetr.training.run_folder import BEST
from simdetr.training.train import train

# three batches of two images per epoch, two optimiser steps of them; dropout, mosaic and colour are on
HARD = (
    "--trainer.accumulate_grad_batches=2",
    "--trainer.log_every_n_steps=1",
    "--model.schedule=cosine",
    "--model.warmup_steps=2",
    "--data.label_fraction=0.5",
)
EPOCHS = ("--trainer.max_steps=-1", "--trainer.max_epochs=3")
EVERY = "--self_training.checkpoint_every_steps="
EMA = {
    "trainer": {
        "callbacks": [{"class_path": "pytorch_lightning.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}}]
    }
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "detector" / "model.safetensors")


def largest_difference(a: Path, b: Path) -> float:
    mine, other = weights(a), weights(b)
    assert mine.keys() == other.keys()
    return max(float((mine[name].float() - other[name].float()).abs().max()) for name in mine)


@pytest.fixture
def validation(scenes):
    return (f"--data.val_images={scenes}", f"--data.val_labels={scenes / 'instances.json'}")


@pytest.mark.parametrize("case", ["epochs", "steps", "validation", "ema", "workers"])
def test_every_resume_point_leads_to_the_same_weights(case, recipe, tmp_path, resume_points, validation):
    options = {
        "epochs": EPOCHS,
        "steps": ("--trainer.max_steps=5",),  # ends within the third epoch
        "validation": (*EPOCHS, *validation),
        "ema": EPOCHS,
        "workers": (*EPOCHS, "--data.num_workers=2"),
    }[case]
    made = recipe(*HARD, *options)
    if case == "ema":
        (tmp_path / "ema.yaml").write_text(yaml.safe_dump(EMA))
        made = type(made)((*made.configs, str(tmp_path / "ema.yaml")), made.options)
    whole = tmp_path / "whole"
    whole_cli = made.training(whole, EVERY + "1")
    train(whole_cli, whole)
    steps = whole_cli.trainer.global_step
    copies = list(resume_points)
    assert len(copies) == steps == (5 if case == "steps" else 6)
    assert not (whole / "checkpoints").exists()
    expected = tmp_path / "expected"
    whole.rename(expected)

    # in the middle and at the end of an epoch, in a later epoch, and at the very end; where else it could matter
    chosen = {"ema": (0, -1), "validation": (1, -1), "workers": (0, 1)}.get(case, (0, 1, 2, -1))
    for copy in [copies[place] for place in chosen]:
        copy.rename(whole)
        resumed = made.training(whole, EVERY + "100")
        train(resumed, whole)
        assert resumed.trainer.global_step == steps
        assert largest_difference(expected, whole) == 0, copy.name
        shutil.rmtree(whole)


def test_ema_keeps_the_averaged_detector(recipe, tmp_path):
    (tmp_path / "ema.yaml").write_text(yaml.safe_dump(EMA))
    plain = recipe("--trainer.max_steps=2", "--data.label_fraction=0.5", "--model.schedule=constant")
    averaged = type(plain)((*plain.configs, str(tmp_path / "ema.yaml")), plain.options)
    for name, made in (("plain", plain), ("averaged", averaged)):
        train(made.training(tmp_path / name), tmp_path / name)
    one_step = recipe("--trainer.max_steps=1", "--data.label_fraction=0.5", "--model.schedule=constant")
    train(one_step.training(tmp_path / "one"), tmp_path / "one")
    after_one, after_two = weights(tmp_path / "one"), weights(tmp_path / "plain")
    name = "input_proj.0.0.weight"
    expected = 0.5 * (after_one[name] + after_two[name])  # the average starts as the first step's weights
    assert torch.allclose(weights(tmp_path / "averaged")[name], expected, atol=1e-7)
    assert not torch.equal(after_one[name], after_two[name])


def test_killed_process_resumes_and_keeps_its_log(recipe, tmp_path, run_until_killed):
    made = recipe(*HARD, "--trainer.max_steps=-1", "--trainer.max_epochs=4")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(made.training(whole), whole)

    script = """
import sys, torch; torch.set_num_threads(1)
from itertools import count
from pathlib import Path
from simdetr.recipe import Recipe
from simdetr.training.detection_task import DetectionTask
from simdetr.training.train import train

step, batches = DetectionTask.training_step, count(1)
# the third step, of two batches each, is saved; one more batch is lost and done again
DetectionTask.training_step = lambda *a: die() if next(batches) == 8 else step(*a)
out = Path(sys.argv[1])
train(Recipe((sys.argv[2],), tuple(sys.argv[3:])).training(out), out)
"""
    run_until_killed(script, killed, *made.configs, *made.options, EVERY + "3")
    assert (killed / "checkpoints" / "resume.ckpt").is_file()
    assert not (killed / "detector").exists()

    train(made.training(killed, EVERY + "3"), killed)
    assert largest_difference(whole, killed) == 0
    rows = {}
    for version in (0, 1):  # the killed process's log and the resumed one's, side by side
        with (killed / "logs" / f"version_{version}" / "metrics.csv").open() as file:
            rows |= {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]}
    with (whole / "logs" / "version_0" / "metrics.csv").open() as file:
        expected = {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]}
    assert rows == expected


def test_a_second_call_of_a_finished_training_only_reads(recipe, tmp_path):
    made = recipe()
    train(made.training(tmp_path), tmp_path)
    assert sorted(path.name for path in (tmp_path / "detector").iterdir()) == ["config.json", "model.safetensors"]
    assert not list(tmp_path.rglob("*.tmp*"))


def test_best_validated_weights_are_kept(recipe, tmp_path, validation, monkeypatch):
    scores = iter([0.2, 0.9, 0.1])
    monkeypatch.setattr("simdetr.training.detection_task.coco_metrics", lambda *a: {"AP": next(scores)})
    options = ("--data.label_fraction=0.34", "--model.schedule=constant")
    three = recipe(*options, *validation, "--trainer.max_steps=-1", "--trainer.max_epochs=3")
    train(three.training(tmp_path / "three"), tmp_path / "three")
    two = recipe(*options, "--trainer.max_steps=-1", "--trainer.max_epochs=2")
    train(two.training(tmp_path / "two"), tmp_path / "two")
    assert largest_difference(tmp_path / "three", tmp_path / "two") == 0


def test_validation_without_objects_is_refused_before_the_first_step(recipe, scenes, tmp_path):
    objectless = tmp_path / "objectless.json"
    objectless.write_text(json.dumps(json.loads((scenes / "instances.json").read_text()) | {"annotations": []}))
    with pytest.raises(LabelError, match=r"objectless\.json: there is no usable box in it"):
        recipe(f"--data.val_images={scenes}", f"--data.val_labels={objectless}").training(tmp_path / "out")


def test_a_validation_that_never_scores_keeps_the_last_weights(recipe, tmp_path, validation, caplog, monkeypatch):
    monkeypatch.setattr("simdetr.training.detection_task.coco_metrics", lambda *a: {"AP": math.nan})
    options = ("--data.label_fraction=0.34", "--trainer.max_steps=-1", "--trainer.max_epochs=2")
    train(recipe(*options).training(tmp_path / "without"), tmp_path / "without")
    train(recipe(*options, *validation).training(tmp_path / "with"), tmp_path / "with")
    assert "no validation had an AP: the last weights are kept" in caplog.text
    assert largest_difference(tmp_path / "without", tmp_path / "with") == 0


def test_best_weights_without_a_point_to_resume_from_are_not_kept(recipe, tmp_path):
    """As a training leaves them that was killed after its first validation."""
    train(recipe().training(tmp_path / "clean"), tmp_path / "clean")
    train(recipe("--model.lr=0.5").training(tmp_path / "other"), tmp_path / "other")
    stale = {f"detector.{name}": value for name, value in weights(tmp_path / "other").items()}
    (tmp_path / "used" / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": stale}, tmp_path / "used" / "checkpoints" / BEST)
    train(recipe().training(tmp_path / "used"), tmp_path / "used")
    assert largest_difference(tmp_path / "clean", tmp_path / "used") == 0


@pytest.mark.parametrize(
    ("length", "points"),
    [
        (("--trainer.max_steps=25",), [10, 20]),
        (("--trainer.max_steps=-1", "--trainer.max_epochs=4"), [10, 20]),  # of six steps each
        (("--trainer.max_steps=130",), [13, 26, 39, 52, 65, 78, 91, 104, 117, 130]),
        (("--trainer.max_steps=25", EVERY + "12"), [12, 24]),
    ],
)
def test_short_trainings_have_points_to_resume_from(length, points, recipe, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        "pytorch_lightning.Trainer.save_checkpoint", lambda trainer, path: saved.append(trainer.global_step)
    )
    monkeypatch.setattr(DetectionTask, "training_step", lambda task, *a: next(task.parameters()).sum() * 0)
    train(recipe(*length).training(tmp_path), tmp_path)
    assert saved == points


def test_what_stops_a_training_tells_the_step(recipe, tmp_path, monkeypatch):
    def stopping(task, *arguments):
        if task.global_step == 2:
            sys.exit(143)
        return next(task.parameters()).sum() * 0

    monkeypatch.setattr(DetectionTask, "training_step", stopping)
    with pytest.raises(SystemExit) as stopped:
        train(recipe("--trainer.max_steps=5").training(tmp_path), tmp_path)
    assert stopped.value.__notes__ == ["at step 2"]


def test_a_signal_in_the_last_step_does_not_get_lost(recipe, tmp_path):
    training = recipe().training(tmp_path)
    fitted = training.trainer.fit

    def late(*arguments, **options):
        fitted(*arguments, **options)
        training.trainer._signal_connector.received_sigterm = True

    training.trainer.fit = late
    with pytest.raises(SystemExit) as stopped:
        train(training, tmp_path)
    assert stopped.value.code == 143

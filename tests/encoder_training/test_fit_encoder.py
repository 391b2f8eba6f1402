"""Fitting an encoder: exact resume, what is written, and what is refused."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from simdetr.data.images import open_images, read_image
from simdetr.data.quarantine import TooManyUnreadableError
from simdetr.encoder_training.fit_encoder import EncoderFitConfig, fit_encoder, read_settings
from simdetr.encoder_training.objectives import LearningEncoder, timm_weights
from simdetr.encoder_training.probe import read_rows
from simdetr.mining import FittedEncoder, MiningConfig, TimmEncoder, mine_batch
from simdetr.training import training_bar
from simdetr.training.detection_task import NonFiniteLossError
from simdetr.training.run_folder import RunMismatchError

# three batches of four images per epoch
TINY = EncoderFitConfig(
    model="resnet18",
    objective="vicregl",
    objective_args={"hidden_dim": 16, "output_dim": 16, "local_dim": 8},
    image_size=64,
    batch_size=4,
    max_steps=4,
    num_workers=0,
    warmup=0.4,
    probe_every_steps=3,
    probe_images=3,
)
DINO = replace(
    TINY,
    model="test_resnet",
    objective="dino",
    objective_args={"hidden_dim": 16, "bottleneck_dim": 8, "output_dim": 8, "momentum": 0.5},
    views={"n_local_views": 1},
    max_steps=None,
    epochs=2,
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "encoder.safetensors")


def equal(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("config", [TINY, DINO], ids=["steps", "teacher"])
def test_every_resume_point_leads_to_the_same_weights(config, scenes, tmp_path, resume_points):
    often = replace(config, model="test_resnet", checkpoint_every_steps=1)
    whole = fit_encoder(scenes, tmp_path / "whole", often, device="cpu")
    copies = list(resume_points)
    assert len(copies) == (4 if config is TINY else 6)
    rarely = replace(often, checkpoint_every_steps=100, num_workers=2 if config is TINY else 0)
    for copy in (copies[0], copies[2], copies[-1]):  # in an epoch, at its end, at the very end
        assert equal(fit_encoder(scenes, copy, rarely, device="cpu"), whole), copy.name
    assert read_rows(copies[0] / "probe.csv")[-1].items() >= {"step": float(len(copies))}.items()
    start = timm_weights(LearningEncoder("test_resnet", seed=0))
    assert not torch.equal(weights(whole)["conv1.0.weight"], start["conv1.0.weight"])


def test_killed_process_resumes(scenes, tmp_path, run_until_killed):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    config = replace(DINO, checkpoint_every_steps=2)
    fit_encoder(scenes, whole, config, device="cpu")
    script = f"""
import sys, torch; torch.set_num_threads(1)
from itertools import count
from simdetr.encoder_training import fit_encoder as encoder_fit

step, batches = encoder_fit.EncoderTask.training_step, count(1)
# the second step is saved; the third is lost and done again
encoder_fit.EncoderTask.training_step = lambda *a: die() if next(batches) == 4 else step(*a)
config = encoder_fit.EncoderFitConfig(
    **{config.settled()!r}, num_workers=0, probe_every_steps=3, probe_images=3, checkpoint_every_steps=2
)
encoder_fit.fit_encoder(sys.argv[1], sys.argv[2], config, device="cpu")
"""
    run_until_killed(script, scenes, killed)
    assert (killed / "checkpoints" / "resume.ckpt").is_file()
    assert not (killed / "encoder.json").exists()
    assert equal(fit_encoder(scenes, killed, config, device="cpu"), whole)
    assert [row["step"] for row in read_rows(killed / "probe.csv")] == [0, 3, 6]


def test_result_loads_mines_and_tells_how_it_was_made(scenes, tmp_path, caplog):
    source = open_images(scenes)
    calls: list[str] = []

    def recall(encoder, device):
        calls.append(str(device))
        assert not encoder.training
        return {"AR@25": 0.25}

    with caplog.at_level(logging.INFO):
        out = fit_encoder(source, tmp_path / "out", TINY, device="cpu", recall=recall)
    assert calls == ["cpu"] * 3
    assert not (out / "checkpoints").exists() and not list(out.rglob("*.tmp*"))
    record = json.loads((out / "encoder.json").read_text())
    assert (record["model"], record["steps"], record["images"]) == ("resnet18", 4, 12)
    assert record["images_fingerprint"] == source.fingerprint()
    assert (record["mean"], record["settings"]["objective"]) == ([0.485, 0.456, 0.406], "vicregl")
    assert record["versions"].keys() == {"simdetr", "lightly", "timm", "torch"}
    assert [(row["step"], row["AR@25"]) for row in record["probe"]] == [(0, 0.25), (3, 0.25), (4, 0.25)]
    assert record["probe"] == read_rows(out / "probe.csv")
    fitted, by_hand = FittedEncoder(out), TimmEncoder("resnet18", weights=out / "encoder.safetensors")
    assert fitted.fingerprint == by_hand.fingerprint != TimmEncoder("resnet18", random_weights=True).fingerprint
    regions = mine_batch([read_image(source[0])], fitted, MiningConfig(image_size=64))
    assert len(regions) == 1 and len(regions[0]) > 0


def test_a_finished_folder_is_only_read_and_other_settings_are_refused(scenes, tmp_path):
    one = replace(DINO, epochs=50, max_steps=1)
    out = fit_encoder(scenes, tmp_path, one, device="cpu")
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert fit_encoder(scenes, tmp_path, replace(one, num_workers=3, probe_images=5), device="cpu") == out
    assert stamps == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(RunMismatchError, match=r"encoder_fit.lr is 0.001 there, 0.5 asked"):
        fit_encoder(scenes, tmp_path, replace(one, lr=0.5), device="cpu")


def test_learning_lowers_the_loss_and_spreads_the_features(scenes, tmp_path):
    config = replace(TINY, model="test_resnet", objective="vicreg", max_steps=40, probe_every_steps=10, lr=1e-2)
    config = replace(config, objective_args={"hidden_dim": 32, "output_dim": 32}, batch_size=12)
    first, *rows = read_rows(fit_encoder(scenes, tmp_path, config, device="cpu") / "probe.csv")
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert rows[-1]["spread"] > first["spread"]


def test_unreadable_images_are_put_aside(own_scenes, tmp_path, caplog):
    source = open_images(own_scenes)
    source.path_of(source.ids[1]).write_bytes(b"")
    with pytest.raises(TooManyUnreadableError, match=r"allow more with --mining\.max_unreadable"):
        fit_encoder(own_scenes, tmp_path / "out", replace(DINO, max_steps=2), device="cpu")
    allowing = replace(DINO, max_steps=2, mining=MiningConfig(max_unreadable=0.5))
    fit_encoder(own_scenes, tmp_path / "out", allowing, device="cpu")
    assert source.ids[1] in (tmp_path / "out" / "quarantine.csv").read_text()
    assert "1 of 6 images are unreadable" in caplog.text


def test_divergence_stops_with_the_way_out(scenes, tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"NaN or infinite at step \d+. Lower lr \(now 1e\+30\)"):
        fit_encoder(scenes, tmp_path, replace(TINY, model="test_resnet", lr=1e30, warmup=0.0), device="cpu")
    assert not (tmp_path / "encoder.json").exists()


@pytest.mark.parametrize("lr", [1e-3, 1e30], ids=["ends", "diverges"])
def test_bar_counts_steps_and_is_closed(lr, scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_bar, "Console", lambda stderr: Console(stderr=True, force_terminal=True, width=100))
    closed = []
    stop = training_bar.Progress.stop
    monkeypatch.setattr(training_bar.Progress, "stop", lambda bar: (closed.append(bar), stop(bar)))
    with pytest.raises(NonFiniteLossError) if lr > 1 else nullcontext():
        fit_encoder(scenes, tmp_path, replace(DINO, warmup=0.0, lr=lr), device="cpu")
    last = [line for line in capsys.readouterr().err.splitlines() if "training" in line][-1]
    assert len(closed) == 1 and "/6" in last
    assert lr > 1 or ("6/6" in last and "loss " in last)


def test_bad_input_is_named(scenes, own_scenes, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        fit_encoder(tmp_path / "empty", tmp_path / "out", TINY)
    source = open_images(scenes)
    with pytest.raises(ValueError, match="batch_size: expected at most the number of images, got 4 for 1"):
        fit_encoder(source.subset(source.ids[:1]), tmp_path / "out", TINY)
    with pytest.raises(ValueError, match="model: expected the name of a timm model"):
        fit_encoder(scenes, tmp_path / "out", replace(TINY, model="resnet_of_mine"))
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Settings come from YAML and options, and bad ones are named.


def test_options_go_over_files_and_later_files_over_earlier_ones(tmp_path):
    (tmp_path / "a.yaml").write_text("objective: dino\nobjective_args: {hidden_dim: 8, output_dim: 4}\nbatch_size: 8\n")
    (tmp_path / "b.yaml").write_text("batch_size: 16\nmining: {image_size: 224}\n")
    options = ("--batch_size=32", "--objective_args.output_dim=6", "--views.cj_strength=0.25")
    read = read_settings([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")], options)
    assert (read.objective, read.batch_size, read.mining.image_size) == ("dino", 32, 224)
    assert read.objective_args == {"hidden_dim": 8, "output_dim": 6}
    assert read.views == {"cj_strength": 0.25}
    assert read_settings() == EncoderFitConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batchsize=8"], "config: .*batchsize"),
        (["--lr=fast"], r"config: (.|\n)*lr(.|\n)*fast"),
        (["--batch_size=1"], "batch_size: expected at least 2, got 1; the losses compare"),
        (["--image_size=100"], "image_size: expected a multiple of 32, got 100; try 96"),
        (["--image_size=0"], "image_size: expected at least 32, got 0"),
        (["--max_steps=0"], "max_steps: expected at least 1, got 0"),
        (["--warmup=1"], "warmup, lr: expected 0 <= warmup < 1 and lr > 0, got 1.0"),
        (["--precision=fp8"], "precision"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        read_settings([], options)


def test_what_changes_no_weight_is_free():
    first = EncoderFitConfig(num_workers=0, probe_every_steps=3)
    assert first.settled() == EncoderFitConfig().settled()
    assert first.settled() != EncoderFitConfig(lr=1.0).settled()

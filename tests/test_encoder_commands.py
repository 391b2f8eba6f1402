"""`simdetr encoder fit` from the command line: what it prints and writes, and its errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from simdetr.commands.main import main
from simdetr.mining import FittedEncoder

CONFIG = Path(__file__).parents[1] / "configs" / "encoder" / "resnet18.yaml"
SMALL = ("--model", "test_resnet", "--image_size", "64", "--batch_size", "4", "--max_steps", "1", "--num_workers", "0")
SMALL += ("--precision", "32-true", "--probe_images", "3", "--device", "cpu", "--mining.image_size", "64")
SMALL += ("--objective_args.hidden_dim", "16", "--objective_args.output_dim=16", "--objective_args.local_dim=8")


def fit(*arguments: object) -> None:
    main(["encoder", "fit", *map(str, arguments)])


def fails(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        fit(*arguments)
    assert caught.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    return lines[0]


def test_recipe_shrunk_by_options_fits_probes_and_says_where(scenes, tmp_path, capsys):
    truth = scenes / "instances.json"
    fit("--config", CONFIG, *SMALL, "--images", scenes, "--out", tmp_path / "e", "--truth", truth)
    printed = capsys.readouterr().out
    assert "AR@25" in printed and "spread" in printed and f"encoder: {tmp_path / 'e'}" in printed
    record = json.loads((tmp_path / "e" / "encoder.json").read_text())
    settings = record["settings"]
    assert (settings["model"], settings["batch_size"], settings["weight_decay"]) == ("test_resnet", 4, 1e-4)
    assert settings["objective_args"]["crop_scale"] == [0.2, 1.0] and settings["objective_args"]["hidden_dim"] == 16
    assert [row["step"] for row in record["probe"]] == [0, 1]
    assert FittedEncoder(tmp_path / "e").record == record


def test_epochs_on_the_command_line_replace_the_steps_of_a_config(scenes, tmp_path):
    (tmp_path / "steps.yaml").write_text("max_steps: 50\nobjective: vicreg\n")
    options = [word for word in SMALL if "local_dim" not in word]
    steps = options.index("--max_steps")
    del options[steps : steps + 2]
    config = tmp_path / "steps.yaml"
    fit("--config", config, *options, "--epochs", 1, "--images", scenes, "--out", tmp_path / "e")
    assert json.loads((tmp_path / "e" / "encoder.json").read_text())["steps"] == 3


def test_bad_input_is_one_line(scenes, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    some = next((scenes / "images").iterdir())
    (tmp_path / "one" / some.name).write_bytes(some.read_bytes())
    out = ("--out", tmp_path / "e")
    assert "holds no images" in fails(capsys, *SMALL, "--images", tmp_path / "empty", *out)
    assert "number of images, got 4 for 1 in" in fails(capsys, *SMALL, "--images", tmp_path / "one", *out)
    assert "did you mean" in fails(capsys, *SMALL, "--model", "resnet19", "--images", scenes, *out)
    assert "batch_size: expected at least 2, got 1" in fails(
        capsys, *SMALL, "--batch_size", 1, "--images", scenes, *out
    )
    assert "objective: expected vicreg, dino" in fails(capsys, *SMALL, "--objective", "moco", "--images", scenes, *out)
    assert "does not exist" in fails(capsys, *SMALL, "--images", tmp_path / "nowhere", *out)
    assert not (tmp_path / "e").exists()


def test_missing_lightly_says_what_to_install(scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightly", None)  # as if it were not installed
    message = fails(capsys, *SMALL, "--images", scenes, "--out", tmp_path / "e")
    assert "pip install 'simdetr[ssl]'" in message


def test_help_shows_types_and_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["encoder", "fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Images per step [64]." in text and "bf16-mixed" in text and "--truth" in text

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from pytorch_lightning.utilities.exceptions import SIGTERMException

from simdetr.commands import main as cli
from simdetr.commands.main import COMMANDS, fold_options, main, one_line
from simdetr.data.label_files import read_labels


def names(commands, prefix=()):
    for name, command in commands.items():
        yield from names(command, (*prefix, name)) if isinstance(command, dict) else [(*prefix, name)]


@pytest.mark.parametrize("command", [(), *names(COMMANDS), ("fit",), ("validate",), ("test",)], ids=" ".join)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_help_imports_nothing_heavy_and_import_is_quiet():
    heavy = "[name for name in ('torch', 'pytorch_lightning') if name in sys.modules]"
    code = f"import sys, simdetr, simdetr.commands.main; simdetr.commands.main.command_parser([]); print({heavy})"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_options_and_configs_are_folded():
    words = ["pretrain", "--config", "a", "--config=b", "--images", "x", "--model.lr", "1e-4", "--data.mosaic=0"]
    assert fold_options(words) == [
        "pretrain",
        "--images",
        "x",
        '--config=["a", "b"]',
        '--options=["--model.lr=1e-4", "--data.mosaic=0"]',
    ]
    with pytest.raises(ValueError, match=r"--model\.lr: expected a value"):
        fold_options(["pretrain", "--model.lr"])


@pytest.mark.parametrize(("words", "said"), [([], "true"), (["true"], "true"), (["false"], "false")])
def test_a_switch_takes_the_word_that_the_help_shows(words, said):
    assert fold_options(["label", "--no-browser", *words, "--port", "0"]) == [
        "label",
        f"--no_browser={said}",
        "--port",
        "0",
    ]


def test_export_writes_labels_of_a_stage(run, scenes, tmp_path, capsys):
    for stage in (0, 1):
        out = tmp_path / f"stage{stage}.json"
        main(["export", "labels", "--run", str(run), "--stage", str(stage), "--out", str(out)])
        content = json.loads(out.read_text())
        source = json.loads((scenes / "instances.json").read_text())
        assert {row["file_name"] for row in content["images"]} == {row["file_name"] for row in source["images"]}
        assert {row["category_id"] for row in content["annotations"]} <= {row["id"] for row in content["categories"]}
        assert all(0 < row["score"] <= 1 for row in content["annotations"])
        labels = read_labels(run / f"stage{stage}" / "labels.parquet")
        assert len(content["annotations"]) == len(labels.boxes_xyxy)
    assert "boxes on 12 images" in capsys.readouterr().out


@pytest.mark.dist
def test_cluster_says_every_iteration_and_shares_work_under_torchrun(run, tmp_path, capsys):
    options = ["--num_classes", "5", "--seed", "2", "--max_iterations", "4", "--device", "cpu"]
    for name in ("one", "two"):
        shutil.copytree(run / "proposals", tmp_path / name / "proposals")
    main(["cluster", "--run", str(tmp_path / "one"), *options])
    assert "5 pseudo-classes" in capsys.readouterr().out
    command = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "--", "simdetr", "cluster"]
    arguments = [sys.executable, "-m", *command, "--run", str(tmp_path / "two"), *options]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.count("5 pseudo-classes") == 1 and done.stderr.count("iteration 0 of at most 4") == 1
    one, two = (read_labels(tmp_path / name / "stage0" / "labels.parquet") for name in ("one", "two"))
    assert (one.classes == two.classes).all() and one.image_ids == two.image_ids
    records = [json.loads((tmp_path / name / "stage0" / "clustering.json").read_text()) for name in ("one", "two")]
    assert records[0]["sizes"] == records[1]["sizes"]


def test_too_few_regions_are_one_clear_line(scenes, tiny_config, tmp_path, error_of):
    line = error_of("pretrain", "--images", scenes, "--out", tmp_path, "--config", tiny_config,
        "--clustering.num_classes", 5000,
    )  # fmt: skip
    assert "5000" in line.replace(",", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("pretrain --images {tmp}/missing --out {tmp}/o --config {config}", "does not exist"),
        ("pretrain --images {scenes} --out {tmp}/o --config {config} --model.lrr 1", "lrr"),
        ("pretrain --images {scenes} --out {tmp}/o --config {tmp}/none.yaml", "none.yaml"),
        ("predict --images {scenes} --checkpoint {tmp}/none --out {tmp}/o.json", "does not exist"),
        ("predict --images {scenes} --checkpoint {run} --out {run}/config.yaml/o.json", "cannot be written to"),
        ("predict --images {scenes} --checkpoint {run} --out {run}", "expected a file name"),
        ("predict --images {scenes} --checkpoint {run} --out {tmp}/o.json --masks", "draws no masks"),
        ("export labels --run {run} --stage 7 --out {tmp}/o.json", "has no labels of stage 7"),
        ("evaluate --images {scenes} --labels {tmp}/none.json --checkpoint {run}", "none.json"),
        ("pretrain --images {scenes} --out {run} --config {config} --model.lr 9", "model.lr is 0.001 there, 9"),
        ("pretrain --images {scenes} --out {tmp}/o --config {config} --model.lr", "expected a value"),
        ("quickstart --images {scenes}", "give --labels"),
    ],
)
def test_users_mistakes_are_one_line(arguments, said, run, scenes, tiny_config, tmp_path, error_of):
    words = arguments.format(tmp=tmp_path, scenes=scenes, run=run, config=tiny_config).split()
    assert said in error_of(*words)


def test_debug_shows_where_it_happened(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(
            ["predict", "--images", str(tmp_path / "no"), "--checkpoint", "x", "--out", str(tmp_path / "o"), "--debug"]
        )


def test_wrong_arguments_exit_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["predict", "--imagse", "x"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("words", "usage", "said"),
    [
        (["convert"], "convert [--from FROM]", "the following arguments are required: PATH, OUT"),
        (["convert", "report"], "convert [--from FROM]", "the following arguments are required: OUT"),
        (["split", "--labels", "x"], "split --labels", "the following arguments are required: --out, --protocol"),
        (["export", "labels", "--run=x"], "labels --run", "the following arguments are required: --stage, --out"),
        (["convert", "a", "b", "--voc-corners", "1"], "convert [--from", "--voc_corners: expected one of voc, zero, s"),
    ],
)
def test_wrong_arguments_are_named_as_they_are_typed_under_the_usage_of_their_command(words, usage, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and usage in error.splitlines()[0] and said in error.splitlines()[-1]


def test_errors_of_loader_processes_are_one_line():
    message = (
        "Caught TooManyUnreadableError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in y\nsimdetr.data.quarantine.TooManyUnreadableError: 2 of 6 images: a\n'
    )
    assert one_line(RuntimeError(message)) == "2 of 6 images: a"
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_commands_have_homes():
    assert {"quickstart", "doctor", "mine", "cluster", "pretrain", "relabel", "finetune", "evaluate", "compare",
            "predict", "export", "report"} <= set(cli.COMMANDS)  # fmt: skip


@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt, 130), (SIGTERMException, 143), (SystemExit(3), 3)])
def test_a_stopped_command_says_that_it_goes_on(stop, status, monkeypatch, capsys):
    def interrupted(arguments):
        raise stop

    monkeypatch.setattr(cli, "run", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "photos"])
    assert stopped.value.code == status
    assert ("the same command goes on" in capsys.readouterr().err) == (status != 3)


def test_ctrl_c_in_a_training_is_no_error_of_its_own(monkeypatch, capsys):
    """Lightning turns it into an exit with status 1."""

    def interrupted(arguments):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr(cli, "run", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["finetune"])
    assert stopped.value.code == 130
    assert "stopped by SIGINT; the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["mine", "finetune", "pretrain"])
def test_sigterm_ends_a_command_with_a_line_and_its_status(command, scenes, tiny_config, tmp_path, wait_for):
    words = [command, "--images", scenes, "--out", tmp_path, "--config", tiny_config]
    begun = tmp_path / "logs" / "version_0" / "metrics.csv"
    if command == "finetune":
        words += ["--labels", scenes / "instances.json", "--trainer.max_steps=100000", "--trainer.log_every_n_steps=1"]
    else:
        begun = tmp_path / "proposals" / "manifest.json"
        words += ["--mining.image_size=1024"]
    ran = [sys.executable, "-m", "simdetr", *map(str, words)]
    process = subprocess.Popen(ran, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: begun.is_file() and begun.stat().st_size > 0, process)
        process.terminate()
        said = process.communicate(timeout=300)[1]
    finally:
        process.kill()
    assert process.returncode == 143, said
    where = " at step [0-9]+" if command == "finetune" else ""
    assert re.search(f"stopped by SIGTERM{where}; the same command goes on", said)
    assert "Traceback" not in said

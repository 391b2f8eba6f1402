from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import import_module
from inspect import signature

import pytest
from pytorch_lightning.utilities.exceptions import SIGTERMException

import simdetr
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


# ----------------------------------------------------------------------------------------------------------------------
# What a command imports, which is most of the time that a short one takes.

IMPORTED = """
import contextlib, io, sys
from simdetr.commands.main import main
for words in {commands}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(words)
    print(*words, *(name for name in {libraries} if name in sys.modules), sep="|")
"""
HEAVY = ("torch", "torchvision", "timm", "transformers", "pytorch_lightning", "sklearn", "scipy.optimize", "matplotlib",
         "faiss", "pandas", "fastapi", "sqlmodel", "onnx")  # fmt: skip
SLOW_TO_IMPORT = ("pytorch_lightning", "transformers", "sklearn", "scipy.optimize", "matplotlib", "faiss")
"""Libraries that other commands need, of those that take more than a moment; pandas comes with Parquet."""


@pytest.fixture
def imports_of():
    """Runs commands one after another in one fresh process, and tells which of some libraries each has met."""

    def run(commands, libraries):
        code = IMPORTED.format(commands=[[str(word) for word in words] for words in commands], libraries=libraries)
        result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
        assert "Error" not in result.stderr
        rows = [line.split("|") for line in result.stdout.splitlines()]
        return [row[len(words) :] for row, words in zip(rows, commands, strict=True)]

    return run


def test_no_help_of_a_command_imports_anything_heavy(imports_of):
    """Without ``fit``, ``validate`` and ``test``, which are Lightning's."""
    commands = [["--help"], *([*command, "--help"] for command in names(COMMANDS))]
    assert imports_of(commands, HEAVY) == [[]] * len(commands)


def test_a_mistyped_option_is_told_before_torch_is_there(imports_of):
    words = ["predict", "--images", "x", "--checkpoint", "y", "--out", "z", "--min-scroe", "0.5"]
    (met,) = imports_of([words], HEAVY)
    assert met == []


def test_labels_are_converted_and_drawn_without_torch(scenes, tmp_path, imports_of):
    labels = scenes / "instances.json"
    commands = [
        ["convert", labels, tmp_path / "labels.csv"],
        ["split", "--labels", labels, "--out", tmp_path / "few", "--protocol", "shots", "--amounts", "[1]"],
    ]
    assert imports_of(commands, HEAVY) == [[], []]
    assert (tmp_path / "labels.csv").is_file() and any((tmp_path / "few").iterdir())


def test_detectors_work_without_what_only_training_and_reports_need(run, scenes, tmp_path, imports_of):
    common = ["--images", scenes, "--checkpoint", run]
    commands = [
        ["predict", *common, "--out", tmp_path / "found.json"],
        ["evaluate", *common, "--labels", scenes / "instances.json", "--out", tmp_path / "scores.json"],
        ["relabel", *common, "--out", tmp_path / "labels.parquet"],
    ]
    assert imports_of(commands, SLOW_TO_IMPORT) == [[], [], []]
    assert all((tmp_path / name).is_file() for name in ("found.json", "scores.json", "labels.parquet"))


@pytest.mark.parametrize(
    ("command", "work"),
    [
        ("pretrain", "pipeline.pretrain"),
        ("finetune", "pipeline.finetune"),
        ("compare", "pipeline.compare"),
        ("report", "pipeline.report"),
        ("rivals", "reports.rival_recall.mine_rivals"),
    ],
)
def test_a_command_has_the_arguments_and_defaults_of_its_work(command, work):
    module, _, name = work.rpartition(".")
    own = signature(cli.function_of(COMMANDS[command])).parameters
    works = signature(getattr(import_module(f"simdetr.{module}"), name)).parameters
    assert {key: value.default for key, value in own.items()} == {key: value.default for key, value in works.items()}


def test_no_command_is_named_as_a_public_function():
    """jsonargparse would import that one to compare the two, and torch with it."""
    assert not {cli.function_of(home).__name__ for home in _homes(COMMANDS)} & set(simdetr.__all__)


def _homes(commands):
    for command in commands.values():
        yield from _homes(command) if isinstance(command, dict) else [command]


# ----------------------------------------------------------------------------------------------------------------------


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


COMPARE = ("compare", "--images=a", "--labels=b", "--init=c", "--out=d")


@pytest.mark.parametrize(
    ("words", "usage", "said"),
    [
        (["convert"], "convert [--from FROM]", "the following arguments are required: PATH, OUT"),
        (["convert", "report"], "convert [--from FROM]", "the following arguments are required: OUT"),
        (["split", "--labels", "x"], "split --labels", "the following arguments are required: --out, --protocol"),
        (["export", "labels", "--run=x"], "labels --run", "the following arguments are required: --stage, --out"),
        ([*COMPARE, "--seeds=0,1"], "compare [--images", "--seeds: expected a list in brackets, such as '[0,1]', got"),
        ([*COMPARE, "--fractions=0.1"], "compare [--images", "expected a list in brackets, such as '[0.1]', got 0.1"),
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
def test_sigterm_ends_a_command_with_a_line_and_its_status(command, scenes, tiny_config, tmp_path, begin, wait_for):
    words = [command, "--images", scenes, "--out", tmp_path, "--config", tiny_config]
    begun = tmp_path / "logs" / "version_0" / "metrics.csv"
    if command == "finetune":
        words += ["--labels", scenes / "instances.json", "--trainer.max_steps=100000", "--trainer.log_every_n_steps=1"]
    else:
        begun = tmp_path / "proposals" / "manifest.json"
        words += ["--mining.image_size=1024"]
    (process,) = begin(words, tmp_path / "said")
    try:
        wait_for(lambda: (begun.is_file() and begun.stat().st_size > 0) or process.exitcode is not None)
        process.terminate()
        process.join(300)
    finally:
        process.kill()
    said = (tmp_path / "said-0.err").read_text()
    assert process.exitcode == 143, said
    where = " at step [0-9]+" if command == "finetune" else ""
    assert re.search(f"stopped by SIGTERM{where}; the same command goes on", said)
    assert "Traceback" not in said

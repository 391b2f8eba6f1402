"""kill -9 at random moments of a command's work: it ends with what it makes when nobody disturbs it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from simdetr.data.coco import write_coco
from simdetr.data.label_files import read_labels

ALONE = ("-m", "simdetr")
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "simdetr")
Process = subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def config(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trainings of some seconds, over several epochs, with a checkpoint every few steps."""
    content = yaml.safe_load(tiny_config.read_text())
    content["trainer"]["max_steps"] = 24
    content["self_training"] |= {"stages": 2, "checkpoint_every_steps": 3}
    path = tmp_path_factory.mktemp("config") / "killed.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def pretrain(config: Path, scenes: Path) -> tuple[str, ...]:
    """The words of a pretraining without ``--out``."""
    return ("pretrain", "--images", str(scenes), "--config", str(config), "--mining.shard_size=3")


@pytest.fixture(scope="module")
def whole(pretrain: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """That pretraining."""
    return Undisturbed(pretrain, tmp_path_factory.mktemp("whole") / "run")


class Undisturbed:
    """A command that runs to its end, and the seconds from its first file to then."""

    def __init__(self, words: tuple[str, ...], out: Path, launcher: tuple[str, ...] = ALONE) -> None:
        self.out, process = out, start(words, out, launcher)
        until_there(out, process)
        began = time.monotonic()
        ended_well(process)
        self.seconds = time.monotonic() - began


def start(words: tuple[str, ...], out: Path, launcher: tuple[str, ...] = ALONE) -> Process:
    command = [sys.executable, *launcher, *words, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def until_there(path: Path, process: Process) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.02)


def ended_well(process: Process) -> None:
    said = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 0, said


def the_process(process: Process) -> psutil.Process:
    return psutil.Process(process.pid)


def a_rank(process: Process, rng: random.Random) -> psutil.Process:
    """One of those that torchrun has started."""
    return rng.choice(sorted(psutil.Process(process.pid).children(), key=lambda child: child.pid))


def kill_again_and_again(
    words: tuple[str, ...],
    undisturbed: Undisturbed,
    out: Path,
    *,
    kills: int,
    seed: int,
    launcher: tuple[str, ...] = ALONE,
) -> int:
    """Start the command, kill it at a random moment of its work, and so on; at last let it end. How often it died."""
    rng, died = random.Random(seed), 0
    while True:
        process = start(words, out, launcher)
        until_there(out, process)
        try:
            process.wait(rng.uniform(0.05, 0.6) * undisturbed.seconds if died < kills else 300)
        except subprocess.TimeoutExpired:
            (the_process(process) if launcher is ALONE else a_rank(process, rng)).kill()
            process.communicate(timeout=300)
            died += 1
            continue
        ended_well(process)
        return died


def results(out: Path) -> Iterator[tuple[str, object]]:
    """Every file of labels and of weights below a folder, by what it holds."""
    for path in sorted(out.rglob("*")):
        if path.name in ("labels.parquet", "labels.json", "training.parquet"):
            yield str(path.relative_to(out)), read_labels(path).fingerprint()
        elif path.name == "model.safetensors":
            yield str(path.relative_to(out)), load_file(path)


def assert_equal_results(out: Path, expected: Path) -> None:
    found, wanted = dict(results(out)), dict(results(expected))
    assert found.keys() == wanted.keys() and wanted
    for name, value in wanted.items():
        if isinstance(value, dict):
            assert all(torch.equal(value[key], found[name][key]) for key in value), name
        else:
            assert found[name] == value, name
    assert not [path for path in out.rglob("*") if ".tmp" in path.name]


@pytest.mark.slow
def test_pretraining(pretrain, whole, tmp_path):
    assert kill_again_and_again(pretrain, whole, tmp_path / "run", kills=3, seed=1) >= 2
    assert_equal_results(tmp_path / "run", whole.out)


@pytest.mark.slow
@pytest.mark.parametrize("validated", [False, True])
def test_finetuning(validated, config, scenes, tmp_path):
    truth = scenes / "instances.json"
    words = ("finetune", "--images", str(scenes), "--labels", str(truth), "--config", str(config))
    words += ("--trainer.max_steps=60",)
    if validated:
        words += ("--val_images", str(scenes), "--val_labels", str(truth))
    undisturbed = Undisturbed(words, tmp_path / "whole")
    assert kill_again_and_again(words, undisturbed, tmp_path / "run", kills=2, seed=2) >= 1
    assert_equal_results(tmp_path / "run", undisturbed.out)


@pytest.mark.slow
def test_comparison_has_every_row_once(config, scenes, whole, tmp_path):
    truth = str(scenes / "instances.json")
    words = ("compare", "--images", str(scenes), "--labels", truth, "--val_images", str(scenes), "--val_labels", truth)
    words += ("--init", str(whole.out), "--config", str(config), "--fractions=[0.5]", "--seeds=[0,1]")
    undisturbed = Undisturbed(words, tmp_path / "whole")
    assert kill_again_and_again(words, undisturbed, tmp_path / "run", kills=3, seed=3) >= 2
    rows, expected = (json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("run", "whole"))
    for row in (*rows, *expected):
        assert row.pop("seconds") > 0
    assert rows == expected and len(rows) == 4
    assert (tmp_path / "run" / "report" / "index.html").is_file()


@pytest.mark.slow
def test_labelling_from_few_boxes(config, scenes, whole, tmp_path):
    truth = read_labels(scenes / "instances.json")
    write_coco(truth.select(truth.image_ids[:5]), tmp_path / "shots.json")
    words = ("autolabel", "--images", str(scenes), "--shots", str(tmp_path / "shots.json"), "--init", str(whole.out))
    words += ("--config", str(config), "--score_rule", "per_class_top", "--background_shots", "0")
    undisturbed = Undisturbed(words, tmp_path / "whole")
    assert kill_again_and_again(words, undisturbed, tmp_path / "run", kills=2, seed=4) >= 1
    assert_equal_results(tmp_path / "run", undisturbed.out)


@pytest.mark.slow
@pytest.mark.dist
def test_one_of_two_ranks(pretrain, tmp_path):
    words = (*pretrain, "--trainer.devices=2", "--trainer.strategy=ddp", "--self_training.stages=1")
    undisturbed = Undisturbed(words, tmp_path / "whole", TWO_RANKS)
    assert kill_again_and_again(words, undisturbed, tmp_path / "run", kills=1, seed=5, launcher=TWO_RANKS) >= 1
    assert_equal_results(tmp_path / "run", undisturbed.out)


@pytest.mark.slow
@pytest.mark.dist
def test_other_hardware_finishes(pretrain, whole, wait_for, tmp_path):
    """Two ranks with loader processes, killed in the training, then one process without any."""
    out, resume = tmp_path / "run", tmp_path / "run" / "stage1" / "checkpoints" / "resume.ckpt"
    process = start(
        (*pretrain, "--trainer.devices=2", "--trainer.strategy=ddp", "--data.num_workers=1"), out, TWO_RANKS
    )
    try:
        wait_for(resume.is_file, process)
        a_rank(process, random.Random(6)).kill()
        process.communicate(timeout=300)
    finally:
        process.kill()
    ended_well(start((*pretrain, "--data.num_workers=0", "--inference.batch_size=3"), out))
    assert dict(results(out)).keys() == dict(results(whole.out)).keys()
    assert (
        read_labels(out / "stage0" / "labels.parquet").fingerprint()
        == read_labels(whole.out / "stage0" / "labels.parquet").fingerprint()
    )

"""kill -9 at random moments of a command's work: it ends with what it makes when nobody disturbs it."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from simdetr.data.coco import write_coco
from simdetr.data.label_files import read_labels


class Command:
    """``simdetr`` with these words in a process, or in two ``ranks`` as torchrun would start them, killed or not."""

    def __init__(
        self, begin: Callable[..., list[BaseProcess]], words: tuple[str, ...], out: Path, *, ranks: bool
    ) -> None:
        self._said = out.with_name(f"{out.name}-said")
        self.processes = begin((*words, "--out", out), self._said, 2 if ranks else 1)

    @property
    def status(self) -> int | None:
        """What it ended with; None while it runs."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def wait(self, seconds: float = 300) -> bool:
        """Whether it ends within so many seconds."""
        end = time.monotonic() + seconds
        while self.status is None and time.monotonic() < end:
            time.sleep(0.01)
        return self.status is not None

    def ended_well(self) -> None:
        assert self.wait() and self.status == 0, [
            Path(f"{self._said}-{rank}.err").read_text() for rank in range(len(self.processes))
        ]

    def until_there(self, path: Path) -> None:
        while not path.exists() and self.status is None:
            time.sleep(0.02)

    def kill(self, rng: random.Random) -> None:
        """Kill its process, or one of its ranks: the launcher then ends the other."""
        killed = rng.choice(self.processes)
        killed.kill()
        killed.join()
        for process in self.processes:
            process.terminate()


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
def whole(
    begin: Callable[..., list[BaseProcess]], pretrain: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Undisturbed:
    """That pretraining."""
    return Undisturbed(begin, pretrain, tmp_path_factory.mktemp("whole") / "run")


class Undisturbed:
    """A command that runs to its end, and the seconds from its first file to then."""

    def __init__(
        self, begin: Callable[..., list[BaseProcess]], words: tuple[str, ...], out: Path, *, ranks: bool = False
    ) -> None:
        self.begin, self.out, command = begin, out, Command(begin, words, out, ranks=ranks)
        command.until_there(out)
        began = time.monotonic()
        command.ended_well()
        self.seconds = time.monotonic() - began


def kill_again_and_again(
    words: tuple[str, ...], undisturbed: Undisturbed, out: Path, *, kills: int, seed: int, ranks: bool = False
) -> int:
    """Start the command, kill it at a random moment of its work, and so on; at last let it end. How often it died."""
    rng, died = random.Random(seed), 0
    while True:
        command = Command(undisturbed.begin, words, out, ranks=ranks)
        command.until_there(out)
        if command.wait(rng.uniform(0.05, 0.6) * undisturbed.seconds if died < kills else 300):
            command.ended_well()
            return died
        command.kill(rng)
        assert command.wait() and command.status != 0
        died += 1


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
def test_finetuning(validated, begin, config, scenes, tmp_path):
    truth = scenes / "instances.json"
    words = ("finetune", "--images", str(scenes), "--labels", str(truth), "--config", str(config))
    words += ("--trainer.max_steps=60",)
    if validated:
        words += ("--val_images", str(scenes), "--val_labels", str(truth))
    undisturbed = Undisturbed(begin, words, tmp_path / "whole")
    assert kill_again_and_again(words, undisturbed, tmp_path / "run", kills=2, seed=2) >= 1
    assert_equal_results(tmp_path / "run", undisturbed.out)


@pytest.mark.slow
def test_comparison_has_every_row_once(begin, config, scenes, whole, tmp_path):
    truth = str(scenes / "instances.json")
    words = ("compare", "--images", str(scenes), "--labels", truth, "--val_images", str(scenes), "--val_labels", truth)
    words += ("--init", str(whole.out), "--config", str(config), "--fractions=[0.5]", "--seeds=[0,1]")
    out, alone = tmp_path / "run", (*words, "--workers", "1")
    undisturbed = Undisturbed(begin, alone, tmp_path / "whole")
    side_by_side = Command(begin, (*words, "--workers", "2"), out, ranks=False)
    side_by_side.until_there(out / "0.5-seed0-random")  # the first training of its two processes
    side_by_side.kill(random.Random(3))
    assert side_by_side.wait() and side_by_side.status != 0
    assert kill_again_and_again(alone, undisturbed, out, kills=2, seed=3) >= 1
    rows, expected = (json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("run", "whole"))
    for row in (*rows, *expected):
        assert row.pop("seconds") > 0
    assert rows == expected and len(rows) == 4
    assert (tmp_path / "run" / "report" / "index.html").is_file()


@pytest.mark.slow
def test_labelling_from_few_boxes(begin, config, scenes, whole, tmp_path):
    truth = read_labels(scenes / "instances.json")
    write_coco(truth.select(truth.image_ids[:5]), tmp_path / "shots.json")
    words = ("autolabel", "--images", str(scenes), "--shots", str(tmp_path / "shots.json"), "--init", str(whole.out))
    words += ("--config", str(config), "--score_rule", "per_class_top", "--background_shots", "0")
    undisturbed = Undisturbed(begin, words, tmp_path / "whole")
    assert kill_again_and_again(words, undisturbed, tmp_path / "run", kills=2, seed=4) >= 1
    assert_equal_results(tmp_path / "run", undisturbed.out)


@pytest.mark.slow
@pytest.mark.dist
def test_one_of_two_ranks(begin, pretrain, tmp_path):
    words = (*pretrain, "--trainer.devices=2", "--trainer.strategy=ddp", "--self_training.stages=1")
    undisturbed = Undisturbed(begin, words, tmp_path / "whole", ranks=True)
    assert kill_again_and_again(words, undisturbed, tmp_path / "run", kills=1, seed=5, ranks=True) >= 1
    assert_equal_results(tmp_path / "run", undisturbed.out)


@pytest.mark.slow
@pytest.mark.dist
def test_other_hardware_finishes(begin, pretrain, whole, tmp_path):
    """Two ranks with loader processes, killed in the training, then one process without any."""
    out, resume = tmp_path / "run", tmp_path / "run" / "stage1" / "checkpoints" / "resume.ckpt"
    words = (*pretrain, "--trainer.devices=2", "--trainer.strategy=ddp", "--data.num_workers=1")
    ranks = Command(begin, words, out, ranks=True)
    ranks.until_there(resume)
    assert ranks.status is None
    ranks.kill(random.Random(6))
    assert ranks.wait()
    Command(begin, (*pretrain, "--data.num_workers=0", "--inference.batch_size=3"), out, ranks=False).ended_well()
    assert dict(results(out)).keys() == dict(results(whole.out)).keys()
    assert (
        read_labels(out / "stage0" / "labels.parquet").fingerprint()
        == read_labels(whole.out / "stage0" / "labels.parquet").fingerprint()
    )

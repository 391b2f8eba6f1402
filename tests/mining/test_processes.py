"""Mining in several processes from the command line: the same store, whatever dies; clear words where it stops."""

import os
import signal
import sys
from pathlib import Path

import pytest

from simdetr import pipeline
from simdetr.data.scenes import render_scenes
from simdetr.mining.store import ProposalStore, StoreError
from simdetr.recipe import MiningJob

OPTIONS = ("--mining.image_size=64", "--mining.shard_size=4", "--mining.batch_size=2")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Forty scenes, ten shards."""
    folder = tmp_path_factory.mktemp("many")
    render_scenes(folder, 40, (64, 80), seed=4)
    return folder / "images"


@pytest.fixture(scope="module")
def whole(many, tmp_path_factory):
    """What one process mines without interruption."""
    return pipeline.mine_proposals(many, tmp_path_factory.mktemp("whole"), options=OPTIONS).folder


class Mining:
    """The command, begun, in one process or two ranks."""

    def __init__(self, begin, images, out, *words, ranks=1):
        self.said = out.with_name("said")
        words = ("mine", "--images", images, "--out", out, *words, *OPTIONS)
        self.process, *self.others = begin(words, self.said, ranks)

    def ended(self, rank=0):
        """Its status, what it printed and its errors, when it has ended."""
        process = (self.process, *self.others)[rank]
        process.join(600)
        return process.exitcode, *(Path(f"{self.said}-{rank}{ending}").read_text() for ending in (".out", ".err"))

    def comes_to(self, condition):
        """Whether a condition holds that may come true while it runs, or it has ended."""
        return condition() or self.process.exitcode is not None


def children_of(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"mining.processes" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_without_a_config_the_defaults_are_used(whole):
    manifest = ProposalStore(whole).manifest
    assert manifest.config["image_size"] == 64
    assert manifest.encoder.startswith(("colour-texture", "timm:tf_efficientnet_lite0"))  # where its wheel is installed
    assert manifest.num_shards == 10


def test_numbers_of_processes_that_make_no_sense(many, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="num_ranks: expected at least 1, got 0"):
        pipeline.mine_proposals(many, tmp_path, num_ranks=0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="has started the processes already; leave num_ranks out"):
        pipeline.mine_proposals(many, tmp_path, num_ranks=2)


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert MiningJob("images", "out").own_device == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert MiningJob("images", "out").own_device == "cuda:1"
    assert MiningJob("images", "out", device="cuda").own_device == "cuda:1"
    assert MiningJob("images", "out", device="cuda:3").own_device == "cuda:3"
    assert MiningJob("images", "out", device="cpu").own_device == "cpu"


def test_settings_are_checked_before_processes_start(many, tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process started"))
    with pytest.raises(ValueError, match="image_size must be a multiple of 32, got 65"):
        pipeline.mine_proposals(many, tmp_path, options=["--mining.image_size=65"], num_ranks=2)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        pipeline.mine_proposals(tmp_path / "nowhere", tmp_path, num_ranks=2)


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_mine_what_one_does(many, whole, tmp_path, begin, assert_same_store):
    status, printed, errors = Mining(begin, many, tmp_path / "out", "--num-ranks", "2").ended()
    assert status == 0, errors
    assert "proposals on 40 images in" in printed
    assert_same_store(tmp_path / "out" / "proposals", whole)


@pytest.mark.dist
@pytest.mark.slow
def test_an_error_of_a_process_is_told_and_one_process_goes_on(many, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for index, path in enumerate(sorted(many.iterdir())):
        (images / path.name).write_bytes(b"" if index in (1, 2, 30) else path.read_bytes())
    with pytest.raises(StoreError) as error:
        pipeline.mine_proposals(images, tmp_path / "out", options=OPTIONS, num_ranks=2)
    assert "of 10 shards are mined: process" in str(error.value)
    assert "3 of 40 images are unreadable" in str(error.value)
    allowed = [*OPTIONS, "--mining.max_unreadable=0.1"]
    store = pipeline.mine_proposals(images, tmp_path / "out", options=allowed)
    assert (len(store), len(store.unreadable())) == (37, 3)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_killed_processes_and_a_killed_command_end_in_the_same_store(
    many, whole, tmp_path, begin, wait_for, assert_same_store
):
    out = tmp_path / "out"
    command = Mining(begin, many, out, "--num-ranks", "2")
    wait_for(lambda: command.comes_to(lambda: len(list(out.glob("proposals/shard-*.parquet"))) >= 1))
    children = children_of(command.process.pid)
    command.process.kill()  # the children see that their stdin closes
    command.process.join()
    wait_for(lambda: not any(Path(f"/proc/{child}/cmdline").exists() for child in children))
    begun = len(list(out.glob("proposals/shard-*.parquet")))
    assert (len(children), begun < 10) == (2, True)

    command = Mining(begin, many, out, "--num-ranks", "2")
    wait_for(lambda: command.comes_to(lambda: len(list(out.glob("proposals/shard-*.parquet"))) > begun))
    os.kill(children_of(command.process.pid)[1], signal.SIGKILL)
    status, _, errors = command.ended()
    said = " ".join(errors.split())
    if status == 0:  # the other came to what the killed one had begun
        assert "process 1 was killed by SIGKILL; the others did its work" in said
    else:
        assert "of 10 shards are mined: process 1 was killed by SIGKILL. Run the same command to go on" in said

    status, _, errors = Mining(begin, many, out).ended()
    assert status == 0 and "WARNING" not in errors and "ERROR" not in errors, errors
    assert_same_store(out / "proposals", whole)


@pytest.mark.dist
@pytest.mark.slow
def test_ranks_of_a_launcher_share_the_shards(many, whole, tmp_path, begin, assert_same_store):
    """torchrun and srun tell their processes rank and number in the environment, and nothing more is asked."""
    mining = Mining(begin, many, tmp_path / "out", ranks=2)
    for status, printed, errors in [mining.ended(rank) for rank in range(2)]:
        assert status == 0, errors
        assert "proposals on 40 images in" in printed
    assert_same_store(tmp_path / "out" / "proposals", whole)

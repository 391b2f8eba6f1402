"""What may go wrong while a set is mined, and what must not change the result: batches, processes, kills, bad files."""

import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simdetr.data.images import open_images
from simdetr.data.quarantine import TooManyUnreadableError
from simdetr.mining.batch import MiningConfig
from simdetr.mining.colour_texture import ColourTextureEncoder
from simdetr.mining.miner import Rank, mine
from simdetr.mining.store import ProposalStore, StoreError

CONFIG = MiningConfig(image_size=128, shard_size=2, batch_size=3)
WORKER = """
import sys, time
sys.path.insert(0, {tests!r})
from conftest import CellColours
from simdetr.data.images import open_images
from simdetr.mining.batch import MiningConfig
from simdetr.mining.miner import mine
from simdetr.mining.store import ProposalStore

class Slow(CellColours):
    def __call__(self, images):
        time.sleep({delay})
        return super().__call__(images)

write_shard = ProposalStore.write_shard
def told(self, shard, *rest):
    write_shard(self, shard, *rest)
    print(shard, flush=True)

ProposalStore.write_shard = told
config = MiningConfig(image_size=128, shard_size=2, batch_size=3, seed={seed}, max_unreadable=0.1)
mine(open_images({images!r}), Slow(), config, {out!r})
"""


@contextmanager
def workers(count, images, out, *, delay=0.3, seeds=(0, 0), ranks=False):
    """Processes that mine at the same time and print the number of each shard that they write."""
    running = []
    for index in range(count):
        script = WORKER.format(
            tests=str(Path(__file__).parent), images=str(images), out=str(out), delay=delay, seed=seeds[index]
        )
        rank = {"RANK": str(index), "WORLD_SIZE": str(count)} if ranks else {}
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", script],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | rank,
            )
        )
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def shards_there(out):
    return len(list(Path(out).glob("shard-*.parquet")))


@pytest.mark.parametrize("batch_size", [8, 32])
def test_boxes_do_not_depend_on_the_batch(image_folder, tmp_path, batch_size):
    encoder, config = ColourTextureEncoder(), MiningConfig(image_size=128, shard_size=100, batch_size=1)
    source = open_images(image_folder)
    one = mine(source, encoder, config, tmp_path / "one")
    many = mine(source, encoder, replace(config, batch_size=batch_size), tmp_path / "many")
    for a, b in zip(one.iter_rows(), many.iter_rows(), strict=True):
        assert len(a.regions) == len(b.regions) > 0
        np.testing.assert_allclose(a.regions.boxes_xyxy, b.regions.boxes_xyxy, atol=1e-3)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_boxes_do_not_depend_on_the_process(image_folder, encoder, tmp_path, order, assert_same_store):
    """Whoever comes first does his share and takes the rest; here each finds what the one before left undone."""
    source = open_images(image_folder)
    whole = mine(source, encoder, CONFIG, tmp_path / "whole")
    out = tmp_path / "shared"
    mine(source, encoder, CONFIG, out)
    for index in order:
        for shard in (index, 6 - index):
            (out / f"shard-{shard:05d}.parquet").unlink(missing_ok=True)
        mine(source, encoder, CONFIG, out, rank=Rank(index, 3))
    assert_same_store(out, whole.folder)


DEGENERATE = {
    "black.png": np.zeros((64, 64, 3), np.uint8),
    "constant.png": np.full((48, 96, 3), (200, 30, 30), np.uint8),
    "dot.png": np.full((1, 1, 3), 7, np.uint8),
    "line.png": np.tile(np.arange(2000, dtype=np.int64)[None, :, None] // 8, (1, 1, 3)).astype(np.uint8),
    "column.png": np.zeros((2000, 1, 3), np.uint8),
}


def test_degenerate_images_have_a_defined_result(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, pixels in DEGENERATE.items():
        Image.fromarray(pixels).save(folder / name)
    source, encoder, config = open_images(folder), ColourTextureEncoder(), MiningConfig(image_size=128)
    store = mine(source, encoder, config, tmp_path / "one")
    again = mine(source, encoder, replace(config, batch_size=1), tmp_path / "two")
    rows = list(store.iter_rows())
    assert [row.image_id for row in rows] == sorted(DEGENERATE)
    for row, repeated in zip(rows, again.iter_rows(), strict=True):
        assert (row.height, row.width) == DEGENERATE[row.image_id].shape[:2]
        boxes = row.regions.boxes_xyxy
        assert np.isfinite(boxes).all() and np.isfinite(row.regions.features).all()
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= [row.width, row.height]).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        np.testing.assert_allclose(boxes, repeated.regions.boxes_xyxy, atol=1e-3)


@pytest.mark.dist
def test_processes_on_one_output_share_it(image_folder, encoder, tmp_path, assert_same_store):
    """As with the same command started twice by mistake: nothing is mined twice, both return the whole."""
    whole = mine(open_images(image_folder), encoder, CONFIG, tmp_path / "whole")
    out = tmp_path / "shared"
    with workers(2, image_folder, out) as running:
        told = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    written = [sorted(map(int, printed.split())) for printed, _ in told]
    assert sorted(written[0] + written[1]) == list(range(7))
    assert_same_store(out, whole.folder)


@pytest.mark.dist
def test_work_of_a_killed_rank_is_done_by_the_other(image_folder, encoder, tmp_path, wait_for, assert_same_store):
    whole = mine(open_images(image_folder), encoder, CONFIG, tmp_path / "whole")
    out = tmp_path / "shared"
    with workers(2, image_folder, out, delay=0.6, ranks=True) as running:
        wait_for(lambda: shards_there(out) >= 2, *running)
        running[1].kill()
        printed, errors = running[0].communicate(timeout=300)
    assert running[0].returncode == 0, errors
    assert len(printed.split()) >= 3
    assert_same_store(out, whole.folder)


@pytest.mark.dist
def test_killed_ranks_resume_to_the_same_store(image_folder, encoder, tmp_path, wait_for, assert_same_store):
    (image_folder / "05.png").write_bytes(b"")
    config = replace(CONFIG, max_unreadable=0.1)
    whole = mine(open_images(image_folder), encoder, config, tmp_path / "whole")
    out = tmp_path / "shared"
    with workers(2, image_folder, out, delay=0.6, ranks=True) as running:
        wait_for(lambda: shards_there(out) >= 1, *running)
    assert 1 <= shards_there(out) < 7
    assert_same_store(mine(open_images(image_folder), encoder, config, out).folder, whole.folder)


@pytest.mark.dist
def test_of_two_with_other_settings_one_refuses(image_folder, tmp_path):
    out = tmp_path / "shared"
    with workers(2, image_folder, out, delay=0, seeds=(1, 2)) as running:
        errors = [process.communicate(timeout=300)[1] for process in running]
    assert sorted(process.returncode for process in running) == [0, 1]
    (refused,) = [text for process, text in zip(running, errors, strict=True) if process.returncode]
    assert "holds proposals of another run: config.seed is" in refused
    assert ProposalStore(out).missing_shards() == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False, stderr=subprocess.DEVNULL
    ).returncode:
        pytest.skip("a small file system needs the right to mount one")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_stops_with_nothing_half_written_and_goes_on_when_there_is_room(
    image_folder, encoder, tmp_path, small_disk, monkeypatch, assert_same_store
):
    source = open_images(image_folder)
    whole = mine(source, encoder, CONFIG, tmp_path / "whole")
    out, ballast = small_disk / "out", small_disk / "ballast"
    free = type("Usage", (), {"free": 1 << 30})  # past the check before the work
    monkeypatch.setattr("simdetr.mining.miner.shutil.disk_usage", lambda _: free)
    out.mkdir()
    one_shard = whole.shard_path(0).stat().st_size
    left = 4 * one_shard  # with the manifest: room for two or three shards of seven
    with ballast.open("wb") as file:
        file.write(b"x" * (os.statvfs(out).f_bavail * os.statvfs(out).f_frsize - left))
    with pytest.raises(StoreError, match=r"No space left on device.* of 7 shards are safe; make room"):
        mine(source, encoder, CONFIG, out)
    there = ProposalStore(out).written()
    assert 1 <= len(there) < 7
    assert all(ProposalStore(out).is_sound(shard) for shard in there)
    assert not list(out.glob(".*.tmp"))
    ballast.unlink()
    assert_same_store(mine(source, encoder, CONFIG, out).folder, whole.folder)


def test_bad_files_among_a_thousand(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(1000):
        height, width = rng.integers(32, 65, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{index:04d}.png")
    (folder / "0003.png").write_bytes(b"")
    (folder / "0500.png").write_bytes((folder / "0500.png").read_bytes()[:300])
    (folder / "0997.png").write_text("no image")
    Image.new("L", (10_000, 6_000), 90).save(folder / "0501.jpg")
    source, encoder = open_images(folder), ColourTextureEncoder()
    config = MiningConfig(image_size=32, clusters={32: [1], 16: [2]}, shard_size=256, batch_size=64)
    store = mine(source, encoder, config, tmp_path / "out")
    assert store.unreadable().keys() == {"0003.png", "0500.png", "0997.png"}
    listed = (tmp_path / "out" / "quarantine.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in listed] == ["image_id", "0003.png", "0500.png", "0997.png"]
    rows = {row.image_id: row for row in store.iter_rows(["boxes_xyxy"])}
    assert rows.keys() == set(source.ids) - store.unreadable().keys()
    assert (rows["0501.jpg"].height, rows["0501.jpg"].width) == (6_000, 10_000)
    with pytest.raises(TooManyUnreadableError, match=r"3 of 1001 images are unreadable.*last: 0997\.png"):
        mine(source, encoder, replace(config, max_unreadable=0.002), tmp_path / "out")


def test_unreadable_images_of_all_ranks_count(image_folder, encoder, tmp_path):
    """Each of three ranks finds one of 14, which alone would be allowed."""
    for index in (0, 2, 4):
        (image_folder / f"{index:02d}.png").write_bytes(b"")
    source, config, out = open_images(image_folder), replace(CONFIG, max_unreadable=0.2), tmp_path / "out"
    with pytest.raises(TooManyUnreadableError, match="3 of 14 images are unreadable"):
        mine(source, encoder, config, out)
    assert ProposalStore(out).written() == [0, 1]
    assert [line.partition(",")[0] for line in (out / "quarantine.csv").read_text().splitlines()[1:]] == [
        "00.png",
        "02.png",
        "04.png",
    ]
    for _ in range(2):  # the same command says the same
        with pytest.raises(TooManyUnreadableError, match="3 of 14 images are unreadable"):
            mine(source, encoder, config, out, rank=Rank(1, 2))


def test_store_on_another_storage_is_that_of_the_disk(image_folder, encoder, tmp_path):
    (image_folder / "05.png").write_bytes(b"")
    source, config = open_images(image_folder), replace(CONFIG, max_unreadable=0.1)
    here = mine(source, encoder, config, tmp_path / "here")
    there = mine(source, encoder, config, f"memory://{tmp_path.name}/there")
    there.shard_path(3).unlink()
    there = mine(source, encoder, config, f"memory://{tmp_path.name}/there", rank=Rank(1, 2))
    assert sorted(path.name for path in there.folder.iterdir()) == sorted(path.name for path in here.folder.iterdir())
    for shard in here.written():
        with there.shard_path(shard).open("rb") as stream:
            assert pq.read_table(stream) == pq.read_table(here.shard_path(shard))
    assert (there.folder / "quarantine.csv").read_bytes() == (here.folder / "quarantine.csv").read_bytes()


def test_ranks_share_a_storage_without_locks(image_folder, encoder, tmp_path):
    """The share of a rank that is not there is waited for, not taken: whoever has no lock must not guess."""
    from simdetr.mining.miner import ShardClaims, begin, mine_free_shards

    source, url = open_images(image_folder), f"memory://{tmp_path.name}/there"
    store = begin(source, encoder, CONFIG, url)
    with ShardClaims(store, Rank(0, 2)) as claims:
        assert mine_free_shards(claims, source, encoder, CONFIG) == 4
    assert store.written() == [0, 2, 4, 6]
    assert mine(source, encoder, CONFIG, url, rank=Rank(1, 2)).missing_shards() == []

"""Mining to a store: resume after a kill, unreadable images, refusals."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from upath import UPath

from simdetr.data.images import ImageSource, open_images, read_image
from simdetr.data.quarantine import TooManyUnreadableError
from simdetr.mining import miner
from simdetr.mining import miner as shard_mining
from simdetr.mining.batch import MiningConfig, mine_batch
from simdetr.mining.miner import Rank, ShardClaims, mine, tidy
from simdetr.mining.regions import Regions
from simdetr.mining.store import Manifest, ProposalRow, ProposalStore, StoreError

CONFIG = MiningConfig(image_size=128, shard_size=4, batch_size=3)


def contents(store):
    """Every column of every shard file."""
    return [pq.read_table(path) for path in sorted(store.folder.glob("shard-*.parquet"))]


def test_rows_are_those_of_the_batch_computation(image_folder, encoder, tmp_path):
    source = open_images(image_folder)
    store = mine(source, encoder, CONFIG, tmp_path / "out")
    rows = list(store.iter_rows())
    assert [row.image_id for row in rows] == list(source.ids)
    pixels = [read_image(record.path) for record in source]
    for row, image, expected in zip(rows, pixels, mine_batch(pixels, encoder, CONFIG), strict=True):
        assert (row.height, row.width) == image.shape[-2:]
        np.testing.assert_allclose(row.regions.boxes_xyxy, expected.boxes_xyxy, atol=1e-3)
        np.testing.assert_allclose(row.regions.features, expected.features, atol=1e-3)


@pytest.mark.parametrize("workers", [0, 3])
def test_workers_do_not_matter(image_folder, encoder, tmp_path, workers):
    source = open_images(image_folder)
    one = mine(source, encoder, replace(CONFIG, num_workers=1), tmp_path / "one")
    other = mine(source, encoder, replace(CONFIG, num_workers=workers), tmp_path / "other")
    assert contents(one) == contents(other)


def test_same_call_again_does_nothing(image_folder, encoder, tmp_path, monkeypatch):
    source = open_images(image_folder)
    store = mine(source, encoder, CONFIG, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    monkeypatch.setattr(shard_mining, "mine_pixels", lambda *_: pytest.fail("nothing is left to encode"))
    mine(source, encoder, CONFIG, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in store.folder.iterdir()} == before


def test_damaged_shard_is_redone_and_no_other(image_folder, encoder, tmp_path):
    source = open_images(image_folder)
    store = mine(source, encoder, CONFIG, tmp_path / "out")
    expected = contents(store)
    times = {path.name: path.stat().st_mtime_ns for path in store.folder.glob("*.parquet")}
    path = store.shard_path(1)
    path.write_bytes(path.read_bytes()[:-100])
    assert contents(mine(source, encoder, CONFIG, tmp_path / "out")) == expected
    changed = [p.name for p in store.folder.glob("*.parquet") if p.stat().st_mtime_ns != times[p.name]]
    assert changed == ["shard-00001.parquet"]


KILLED_RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import CellColours
from simdetr.data.images import open_images
from simdetr.mining.batch import MiningConfig
from simdetr.mining.miner import mine

class Deadly(CellColours):
    def __call__(self, images):
        if Path({last!r}).exists():
            die()
        return super().__call__(images)

config = MiningConfig(image_size=128, shard_size=4, batch_size=3, max_unreadable=0.5)
mine(open_images({images!r}), Deadly(), config, Path({out!r}))
"""


@pytest.mark.parametrize("last", ["manifest.json", "shard-00001.parquet"])
def test_killed_run_ends_like_an_uninterrupted_one(image_folder, encoder, tmp_path, last, run_until_killed):
    (image_folder / "02.png").write_bytes(b"no image")
    config = replace(CONFIG, max_unreadable=0.5)
    source = open_images(image_folder)
    whole = mine(source, encoder, config, tmp_path / "whole")
    out = tmp_path / "killed"
    tests = str(Path(__file__).parent)
    run_until_killed(KILLED_RUN.format(tests=tests, images=str(image_folder), out=str(out), last=str(out / last)))
    assert (out / last).exists()
    assert not (out / "shard-00003.parquet").exists()
    (out / ".shard-00002.parquet.1.tmp").write_bytes(b"half")  # what a kill within a write leaves
    resumed = mine(source, encoder, config, out)
    assert contents(resumed) == contents(whole)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.folder.iterdir())
    assert (out / "quarantine.csv").read_text() == (whole.folder / "quarantine.csv").read_text()


def test_unreadable_images_are_listed_and_have_no_row(image_folder, encoder, tmp_path, caplog):
    (image_folder / "05.png").write_bytes((image_folder / "05.png").read_bytes()[:200])
    (image_folder / "06.png").write_text("no image")
    source = open_images(image_folder)
    store = mine(source, encoder, replace(CONFIG, max_unreadable=0.2), tmp_path / "out")
    assert len(store) == 12
    assert {"05.png", "06.png"}.isdisjoint(row.image_id for row in store.iter_rows())
    assert list(store.unreadable()) == ["05.png", "06.png"]
    assert "06.png" in (tmp_path / "out" / "quarantine.csv").read_text()
    assert "2 of 14 images are unreadable" in caplog.text


def test_too_many_unreadable_images_stop_the_run(image_folder, encoder, tmp_path):
    (image_folder / "00.png").write_text("no image")
    with pytest.raises(TooManyUnreadableError, match="1 of 14 images are unreadable"):
        mine(open_images(image_folder), encoder, CONFIG, tmp_path / "out")


def test_shard_of_unreadable_images_only(image_folder, encoder, tmp_path):
    for index in range(4):
        (image_folder / f"{index:02d}.png").write_text("no image")
    store = mine(open_images(image_folder), encoder, replace(CONFIG, max_unreadable=0.5), tmp_path / "out")
    assert len(store) == 10
    assert store.missing_shards() == []


def test_other_settings_images_or_weights_are_refused(image_folder, encoder, tmp_path):
    source = open_images(image_folder)
    mine(source, encoder, CONFIG, tmp_path / "out")
    with pytest.raises(StoreError, match=r"config\.seed is 0 there and 1 now"):
        mine(source, encoder, replace(CONFIG, seed=1), tmp_path / "out")
    with pytest.raises(StoreError, match="num_images is 14 there and 13 now; source is"):
        mine(source.subset(source.ids[1:]), encoder, CONFIG, tmp_path / "out")
    encoder.fingerprint = "other weights"
    with pytest.raises(StoreError, match="encoder is 'cell-colours' there and 'other weights' now"):
        mine(source, encoder, CONFIG, tmp_path / "out")


def test_batch_size_may_change_between_resumes(image_folder, encoder, tmp_path):
    source = open_images(image_folder)
    store = mine(source, encoder, CONFIG, tmp_path / "out")
    store.shard_path(2).unlink()
    mine(source, encoder, replace(CONFIG, batch_size=1), tmp_path / "out")
    assert len(store) == 14


def test_no_images(encoder, tmp_path):
    with pytest.raises(ValueError, match="source: expected at least one image, got none"):
        mine(ImageSource(tmp_path, ()), encoder, CONFIG, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_full_disk_is_seen_before_work_starts(image_folder, encoder, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(miner.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(shard_mining, "mine_pixels", lambda *_: pytest.fail("work started"))
    with pytest.raises(StoreError, match="0 MB free, a shard may take"):
        mine(open_images(image_folder), encoder, CONFIG, tmp_path / "out")


def test_progress_shows_only_when_asked(image_folder, encoder, tmp_path, capsys):
    source = open_images(image_folder)
    mine(source, encoder, CONFIG, tmp_path / "silent")
    assert capsys.readouterr() == ("", "")
    mine(source, encoder, CONFIG, tmp_path / "shown", progress=True)
    shown = capsys.readouterr().err
    assert "14/14" in shown
    assert "images/s" in shown


# ----------------------------------------------------------------------------------------------------------------------
# Claims on shards: every missing one once, none twice at the same time, those of the dead again.


MANIFEST = Manifest(config={}, encoder="e", source="s", num_images=20, shard_size=2, region_dim=3)


@pytest.fixture
def store(tmp_path):
    return ProposalStore.create(tmp_path / "store", MANIFEST)


def write(store, shard):
    """A shard with a row of one region and an unreadable image."""
    first, second = store.manifest.images_of(shard)
    one = np.ones(1, np.int16)
    regions = Regions(
        boxes_xyxy=np.array([[0, 0, 9, 9]], np.float32),
        features=np.ones((1, 3), np.float32),
        area=np.ones(1, np.float32),
        stride=one,
        k=one,
        cluster=one,
        score=np.ones(1, np.float32),
    )
    store.write_shard(shard, [ProposalRow(str(first), 10, 10, regions)], {str(second): "empty file"})


def test_own_share_comes_first_and_then_all_others(store):
    with ShardClaims(store, Rank(1, 3)) as claims:
        assert list(claims.free()) == [1, 4, 7, 0, 2, 3, 5, 6, 8, 9]
        assert claims.taken == set(range(10))


def test_two_processes_share_what_is_missing(store):
    write(store, 4)
    with ShardClaims(store, Rank(0, 2)) as one, ShardClaims(store, Rank(1, 2)) as other:
        first, second = one.free(), other.free()
        found = [next(first), next(second), next(first), next(second)]
        assert found == [0, 1, 2, 3]
        assert [*first] == [6, 8, 5, 7, 9]
        assert [*second] == []
        one.release(7)  # given back without its file
        write(store, 8)
        one.release(8)
        assert [*other.free()] == [7]


def test_a_shard_that_another_wrote_meanwhile_is_passed_over(store):
    with ShardClaims(store, Rank()) as claims:
        free = claims.free()
        assert next(free) == 0
        for shard in range(1, 9):
            write(store, shard)
        assert [*free] == [9]


def test_what_is_held_is_given_back_at_the_end(store):
    with ShardClaims(store, Rank()) as claims:
        assert len([*claims.free()]) == 10
        with ShardClaims(store, Rank()) as late:
            assert [*late.free()] == []
    with ShardClaims(store, Rank()) as claims:
        assert len([*claims.free()]) == 10


@pytest.mark.dist
def test_the_lock_of_a_killed_process_is_free(store):
    code = f"""
import time
from simdetr.mining.miner import Rank, ShardClaims
from simdetr.mining.store import ProposalStore
claims = ShardClaims(ProposalStore({str(store.folder)!r}), Rank())
print([*claims.free()], flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == str([*range(10)])
        with ShardClaims(store, Rank()) as claims:
            assert [*claims.free()] == []
            process.kill()
            process.wait()
            assert [*claims.free()] == [*range(10)]


def test_without_locks_a_process_takes_its_share_only(tmp_path):
    store = ProposalStore.create(UPath(f"memory://{tmp_path.name}"), MANIFEST)
    write(store, 4)
    with ShardClaims(store, Rank(1, 3)) as claims:
        assert [*claims.free()] == [1, 7]
    assert ProposalStore(store.folder).written() == [4]


def test_damaged_shards_are_removed_by_whom_they_belong_to(store):
    for shard in range(10):
        write(store, shard)
    features = pq.read_metadata(store.shard_path(3)).row_group(0).column(4)
    content = bytearray(store.shard_path(3).read_bytes())
    content[features.data_page_offset + features.total_compressed_size - 1] ^= 1  # only a checksum tells
    store.shard_path(3).write_bytes(content)
    store.shard_path(6).write_bytes(store.shard_path(6).read_bytes()[:-20])
    assert store.missing_shards() == [3, 6]
    with ShardClaims(store, Rank(0, 2)) as claims:
        assert [*claims.free()] == [6]
    with ShardClaims(store, Rank(1, 2)) as claims:
        assert [*claims.free()] == [3, 6]


def test_tidying_removes_locks_and_halves_but_no_results(store):
    for shard in range(10):
        write(store, shard)
    (store.folder / ".shard-00001.lock").touch()
    (store.folder / ".shard-00002.parquet.123.tmp").write_bytes(b"half")
    (store.folder / "quarantine.csv").touch()
    tidy(store)
    names = {path.name for path in store.folder.iterdir()}
    assert names == {"manifest.json", "quarantine.csv", *(f"shard-{shard:05d}.parquet" for shard in range(10))}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Rank()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Rank(3, 8)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "mine"}, Rank(2, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}, Rank()),
        ({"WORLD_SIZE": "2"}, Rank()),
    ],
)
def test_rank_of_the_environment(environment, expected):
    assert Rank.from_environment(environment) == expected


def test_impossible_rank():
    with pytest.raises(ValueError, match="expected 0 <= index < count, got 2 of 2; check RANK and WORLD_SIZE"):
        Rank(2, 2)


def test_a_folder_that_cannot_be_locked_is_told(store, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("simdetr.mining.miner.FileLock.acquire", full)
    with ShardClaims(store, Rank()) as claims, pytest.raises(StoreError, match=r"cannot lock .* No space left"):
        next(claims.free())

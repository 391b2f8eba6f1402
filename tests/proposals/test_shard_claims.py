"""Claims on shards: every missing one once, none twice at the same time, those of the dead again."""

import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from upath import UPath

from simdetr.mining.miner import Rank, ShardClaims, tidy
from simdetr.mining.regions import Regions
from simdetr.mining.store import Manifest, ProposalRow, ProposalStore, StoreError

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

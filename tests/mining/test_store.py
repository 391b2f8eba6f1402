"""The store: what goes in comes out, damage is found, foreign runs are refused, failed writes leave nothing."""

import json
import resource
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from simdetr.mining.regions import Regions
from simdetr.mining.store import Manifest, ProposalRow, ProposalStore, StoreError

MANIFEST = Manifest(
    config={"seed": 0, "clusters": {32: [2, 4]}}, encoder="e", source="s", num_images=7, shard_size=3, region_dim=4
)


def row(index, count):
    rng = np.random.default_rng(index)
    corner = rng.uniform(0, 50, (count, 2))
    regions = Regions(
        boxes_xyxy=np.hstack([corner, corner + rng.uniform(1, 50, (count, 2))]).astype(np.float32),
        features=rng.normal(size=(count, 4)).astype(np.float16).astype(np.float32),
        area=rng.uniform(1, 99, count).astype(np.float32),
        stride=rng.choice([16, 32], count).astype(np.int16),
        k=rng.choice([2, 4], count).astype(np.int16),
        cluster=rng.choice([0, 1], count).astype(np.int16),
        score=rng.uniform(0, 1, count).astype(np.float32),
    )
    return ProposalRow(f"dir/{index}.jpg", 100 + index, 200 + index, regions)


@pytest.fixture
def rows():
    return [row(index, count) for index, count in enumerate([3, 0, 2, 0, 0, 5, 1])]


@pytest.fixture
def store(tmp_path, rows):
    store = ProposalStore.create(tmp_path / "store", MANIFEST)
    store.write_shard(0, rows[:3])
    store.write_shard(1, rows[3:5], unreadable={"dir/bad.jpg": "empty file"})
    store.write_shard(2, rows[6:])
    return store


def assert_same(found, expected):
    assert (found.image_id, found.height, found.width) == (expected.image_id, expected.height, expected.width)
    for name in ("boxes_xyxy", "features", "area", "stride", "k"):
        there, wanted = getattr(found.regions, name), getattr(expected.regions, name)
        assert there.dtype == wanted.dtype
        np.testing.assert_array_equal(there, wanted)


def test_rows_come_back(store, rows):
    found = list(ProposalStore(store.folder).iter_rows())
    for there, wanted in zip(found, [*rows[:5], rows[6]], strict=True):
        assert_same(there, wanted)
    assert len(store) == 6
    assert store.unreadable() == {"dir/bad.jpg": "empty file"}
    assert store.missing_shards() == []


def test_shards_come_back_by_column(store, rows):
    first, second, _ = store.iter_shards()
    assert first.offsets.tolist() == [0, 3, 3, 5]
    assert second.offsets.tolist() == [0, 0, 0]
    assert first.features.shape == (5, 4)
    assert first.features.dtype == np.float16
    assert first.sizes_hw.tolist() == [[100, 200], [101, 201], [102, 202]]
    np.testing.assert_array_equal(first.boxes_xyxy[3:], rows[2].regions.boxes_xyxy)


def test_features_can_be_left_unread(store):
    assert [len(r.regions) for r in store.iter_rows(["boxes_xyxy"])] == [3, 0, 2, 0, 0, 1]
    assert all(shard.features.shape[1] == 0 for shard in store.iter_shards(["boxes_xyxy", "area"]))
    with pytest.raises(StoreError, match="got colour"):
        next(store.iter_shards(["colour"]))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda p: p.unlink(), lambda p: p.write_bytes(b"")])
def test_damaged_shard_is_missing_and_can_be_written_again(store, rows, damage):
    damage(store.shard_path(0))
    assert store.missing_shards() == [0]
    store.write_shard(0, rows[:3])
    assert store.missing_shards() == []
    assert_same(next(store.iter_rows()), rows[0])


def test_reading_a_damaged_shard_says_what_to_do(store):
    truncate(store.shard_path(0))
    with pytest.raises(StoreError, match=r"shard-00000\.parquet is damaged .* run the mining command again"):
        list(store.iter_rows())


def test_shard_in_the_wrong_place_or_with_lost_rows_is_missing(store, rows):
    store.shard_path(1).write_bytes(store.shard_path(0).read_bytes())
    store.write_shard(2, [])
    assert store.missing_shards() == [1, 2]


def test_parquet_of_someone_else_is_missing(store):
    pd.DataFrame({"a": [1, 2, 3]}).to_parquet(store.shard_path(0))
    assert store.missing_shards() == [0]


def test_equal_manifest_continues(store):
    assert ProposalStore.create(store.folder, MANIFEST).missing_shards() == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": {"seed": 1, "clusters": {32: [2, 4]}}}, "config.seed is 0 there and 1 now"),
        ({"config": {"seed": 0, "clusters": {32: [2]}}}, r"config.clusters.32 is \[2, 4\] there and \[2\] now"),
        ({"source": "t"}, "source is 's' there and 't' now"),
        ({"encoder": "f", "num_images": 8}, "encoder is 'e' there and 'f' now; num_images is 7 there and 8 now"),
    ],
)
def test_other_manifest_is_refused_with_its_differences(store, change, words):
    with pytest.raises(StoreError, match=words) as error:
        ProposalStore.create(store.folder, replace(MANIFEST, **change))
    assert "Mine into a new folder" in str(error.value)


def test_no_store(tmp_path):
    with pytest.raises(StoreError, match="holds no proposals"):
        ProposalStore(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="is not a manifest"):
        ProposalStore(tmp_path)


def test_shards_without_manifest_are_not_adopted(store):
    (store.folder / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"holds shards without manifest\.json"):
        ProposalStore.create(store.folder, MANIFEST)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write to .*; choose another output folder"):
        ProposalStore.create(tmp_path / "file" / "store", MANIFEST)


def test_failed_write_leaves_the_old_shard_and_nothing_else(store, rows):
    before = {path.name: path.read_bytes() for path in store.folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # as on a full disk, some bytes fit and then no more
    try:
        with pytest.raises(StoreError, match="3 of 3 shards are safe; make room"):
            store.write_shard(0, rows[:1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in store.folder.iterdir()} == before


def test_features_beyond_half_precision_are_refused(store, rows):
    huge = replace(rows[0], regions=replace(rows[0].regions, features=np.full((3, 4), 1e5, np.float32)))
    with pytest.raises(ValueError, match="within fp16"):
        store.write_shard(0, [huge])


def test_manifest_is_plain_json(store):
    assert json.loads((store.folder / "manifest.json").read_text())["num_images"] == 7


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_another_storage_holds_the_same(store, rows, tmp_path, scheme):
    url = f"{scheme}://{tmp_path}/far"
    far = ProposalStore.create(url, MANIFEST)
    assert far.missing_shards() == [0, 1, 2]
    far.write_shard(0, rows[:3])
    far.write_shard(1, rows[3:5], unreadable={"dir/bad.jpg": "empty file"})
    with pytest.raises(StoreError, match="source is 's' there and 't' now"):
        ProposalStore.create(url, replace(MANIFEST, source="t"))
    again = ProposalStore(url)
    again.write_shard(2, rows[6:])
    assert far.written() == [0, 1, 2]
    assert far.missing_shards() == []
    assert (len(far), far.unreadable()) == (len(store), store.unreadable())
    for there, here in zip(far.iter_rows(), store.iter_rows(), strict=True):
        assert_same(there, here)
    assert [shard.features.shape[1] for shard in far.iter_shards(["boxes_xyxy"])] == [0, 0, 0]
    far.shard_path(1).write_bytes(far.shard_path(1).read_bytes()[:-9])
    assert far.missing_shards() == [1]
    with pytest.raises(StoreError, match=r"shard-00001\.parquet is damaged"):
        list(far.iter_rows())
    for shard in range(3):
        assert far.is_sound(shard, whole=False) == (shard != 1)
    with pytest.raises(StoreError, match="holds no proposals"):
        ProposalStore(f"{url}/elsewhere")


def test_a_copy_holds_the_same_and_keeps_it(store, rows, tmp_path):
    store.copy_to(tmp_path / "copy")
    copy = ProposalStore(tmp_path / "copy")
    assert copy.fingerprint() == store.fingerprint() and not copy.missing_shards()
    store.write_shard(0, rows[:1], unreadable={"dir/1.jpg": "gone", "dir/2.jpg": "gone"})  # in place of the old file
    assert copy.fingerprint() != store.fingerprint()
    assert [row.image_id for row in copy.iter_rows()][:3] == [row.image_id for row in rows[:3]]

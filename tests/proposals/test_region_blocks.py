import numpy as np
import pytest
import torch

from simdetr.mining import pseudo_labels as region_blocks
from simdetr.mining.pseudo_labels import RegionBlocks, count_regions, own_shards
from simdetr.mining.regions import Regions
from simdetr.mining.store import Manifest, ProposalRow, ProposalStore

REGIONS = [5, 0, 7, 9, 3, 0, 8, 6, 4]


@pytest.fixture
def store(tmp_path):
    """Nine images in three shards; a region's feature tells its image and its place there."""
    store = ProposalStore.create(tmp_path / "proposals", Manifest({}, "encoder", "source", len(REGIONS), 4, 2))
    rows = []
    for image, count in enumerate(REGIONS):
        features = np.stack([np.full(count, image), np.arange(count)], axis=1).astype(np.float32)
        boxes = np.tile(np.array([0, 0, 8, 8], np.float32), (count, 1))
        ones, few = np.ones(count, np.float32), np.ones(count, np.int16)
        regions = Regions(boxes, features, area=ones, stride=few, k=few, cluster=few, score=ones)
        rows.append(ProposalRow(f"{image}.jpg", 40, 60, regions))
    for shard in range(3):
        store.write_shard(shard, rows[4 * shard : 4 * shard + 4])
    return store


@pytest.mark.parametrize("in_memory", [False, True])
def test_blocks_are_the_shards_again_and_again(store, in_memory):
    blocks = RegionBlocks(store, in_memory=in_memory)
    first, second = list(blocks), list(blocks)
    assert [len(block) for block in first] == [21, 17, 4] and first[0].dtype == torch.float16
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    expected = [(image, place) for image, count in enumerate(REGIONS) for place in range(count)]
    assert torch.cat(first).int().tolist() == [list(pair) for pair in expected]
    assert count_regions(store) == 42
    first[0] += 1  # blocks are tensors like any other


def test_ranks_share_the_shards(store, monkeypatch):
    monkeypatch.setattr(region_blocks, "world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(region_blocks, "rank", lambda rank=rank: rank)
        shares.append(own_shards(store))
    assert shares == [[0, 2], [1]]


def test_a_rank_without_shards_has_one_empty_block(store, monkeypatch):
    monkeypatch.setattr(region_blocks, "own_shards", lambda store: [])
    assert [tuple(block.shape) for block in RegionBlocks(store)] == [(0, 2)]


def test_a_missing_shard_is_left_out(store):
    store.shard_path(1).unlink()
    assert [len(block) for block in RegionBlocks(store)] == [21, 4] and count_regions(store) == 25

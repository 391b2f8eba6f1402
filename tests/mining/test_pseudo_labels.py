"""Labels of planted stores, and the blocks that they are clustered from."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from simdetr.mining import pseudo_labels
from simdetr.mining import store as stores
from simdetr.mining.certainty import certainty
from simdetr.mining.clustering_config import ClusteringConfig
from simdetr.mining.pseudo_labels import (
    RegionBlocks,
    cluster_regions,
    count_regions,
    make_pseudo_labels,
    own_shards,
)
from simdetr.mining.regions import Regions
from simdetr.mining.store import Manifest, ProposalRow, ProposalStore, StoreError, read_table

KINDS, DIMS = 4, 6


def make_store(folder, regions_per_image, shard_size=4, seed=0, best_score=1.0):
    """Regions of four kinds: the feature points along an axis, with noise; the box's left edge tells the kind."""
    rng = np.random.default_rng(seed)
    manifest = Manifest({}, "encoder", "source", len(regions_per_image), shard_size, DIMS)
    store = ProposalStore.create(folder, manifest)
    rows = []
    for index, count in enumerate(regions_per_image):
        kind = rng.integers(KINDS, size=count)
        features = np.eye(DIMS, dtype=np.float32)[kind] * rng.uniform(0.5, 5, (count, 1))
        features += 0.02 * rng.standard_normal(features.shape)
        boxes = np.stack([kind, kind * 0, kind + 10 + index, kind * 0 + 5], axis=1)
        regions = Regions(
            boxes_xyxy=boxes.astype(np.float32).reshape(-1, 4),
            features=features.astype(np.float32).reshape(-1, DIMS),
            area=rng.uniform(10, 20, count).astype(np.float32),
            stride=np.where(kind % 2, 16, 32).astype(np.int16),
            k=np.full(count, 8 + index, np.int16),
            cluster=kind.astype(np.int16),
            score=np.linspace(best_score, 1, count, dtype=np.float32),
        )
        rows.append(ProposalRow(f"{index}.jpg", 40, 60 + index, regions))
    for shard in range(manifest.num_shards):
        store.write_shard(shard, rows[shard * shard_size : (shard + 1) * shard_size])
    return store, rows


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "proposals", [5, 0, 7, 9, 3, 0, 8, 6, 4])


def test_classes_are_the_planted_kinds_and_columns_are_as_mined(store):
    store, rows = store
    labels = make_pseudo_labels(store, ClusteringConfig(KINDS))
    assert labels.stage == 0 and labels.num_classes == KINDS
    assert labels.image_ids == tuple(row.image_id for row in rows)
    assert [category.id for category in labels.categories] == [1, 2, 3, 4]
    pairs = set()
    for index, row in enumerate(rows):
        own = labels.image(index)
        assert tuple(own.size_hw) == (row.height, row.width)
        np.testing.assert_array_equal(own.boxes_xyxy, row.regions.boxes_xyxy)
        np.testing.assert_array_equal(own.areas, row.regions.area)
        assert (own.scores == 1).all() and not own.crowd.any()
        for name in ("stride", "k", "cluster"):
            np.testing.assert_array_equal(getattr(own.lineage, name), getattr(row.regions, name))
        assert not own.lineage.born.any() and own.lineage.born_row.tolist() == list(range(len(own)))
        pairs |= set(zip(own.boxes_xyxy[:, 0].tolist(), own.classes.tolist(), strict=True))
    assert len(pairs) == KINDS  # each kind one class, each class one kind


def test_scores_are_how_likely_each_box_is_an_object(tmp_path):
    store, rows = make_store(tmp_path / "proposals", [5, 0, 7], best_score=4)
    labels = make_pseudo_labels(store, ClusteringConfig(1))
    mined = np.concatenate([row.regions.score for row in rows])
    np.testing.assert_array_equal(
        labels.scores, certainty(mined, labels.boxes_xyxy, labels.sizes_hw, np.array([0, 5, 5, 12]))
    )
    assert labels.scores.max() <= 1 and (np.diff(labels.scores[:5]) < 0).all()
    store, _ = make_store(tmp_path / "the document's filters", [5, 0, 7], best_score=1)
    assert set(make_pseudo_labels(store, ClusteringConfig(1)).scores) == {1}


def test_spherical_or_not(store):
    """Rows of one kind lie along an axis, near and far: distances cut across the kinds, directions do not."""
    store, _ = store
    pairs = {}
    for spherical in (True, False):
        labels = make_pseudo_labels(store, ClusteringConfig(KINDS, spherical=spherical))
        pairs[spherical] = len(set(zip(labels.boxes_xyxy[:, 0].tolist(), labels.classes.tolist(), strict=True)))
    assert pairs[True] == KINDS < pairs[False]


def test_streaming_and_faiss_find_the_same_classes(store, monkeypatch):
    store, _ = store
    whole = make_pseudo_labels(store, ClusteringConfig(KINDS, seed=1))
    with monkeypatch.context() as patch:
        patch.setattr("simdetr.mining.pseudo_labels._KEEP_IN_MEMORY_BYTES", 0)
        streamed = make_pseudo_labels(store, ClusteringConfig(KINDS, seed=1))
    np.testing.assert_array_equal(whole.classes, streamed.classes)
    faiss = make_pseudo_labels(store, ClusteringConfig(KINDS, seed=1, backend="faiss"))
    assert len(set(zip(whole.classes.tolist(), faiss.classes.tolist(), strict=True))) == KINDS


@pytest.fixture
def columns_read(monkeypatch):
    """(shard, columns) of every reading."""
    asked = []

    def read(path, columns):
        asked.append((path.stem, tuple(columns)))
        return read_table(path, columns)

    monkeypatch.setattr("simdetr.mining.store.read_table", read)
    return asked


def test_one_class_reads_no_features(store, columns_read):
    labels = make_pseudo_labels(store[0], ClusteringConfig(1))
    assert labels.num_classes == 1 and not labels.classes.any() and len(labels.boxes_xyxy) == 42
    assert columns_read and not any("features" in columns for _, columns in columns_read)


@pytest.mark.parametrize("in_memory", [True, False])
def test_features_are_read_once_in_memory_and_once_per_pass_otherwise(store, columns_read, monkeypatch, in_memory):
    monkeypatch.setattr("simdetr.mining.pseudo_labels._KEEP_IN_MEMORY_BYTES", 10**6 if in_memory else 0)
    clustering = cluster_regions(store[0], ClusteringConfig(KINDS))
    times = Counter(shard for shard, columns in columns_read if columns == ("features",))
    passes = 1 if in_memory else clustering.iterations + 2
    assert times == {f"shard-0000{shard}": passes for shard in range(3)}


def test_the_clustering_is_kept_beside_the_labels(store, tmp_path):
    store, _ = store
    labels = make_pseudo_labels(store, ClusteringConfig(KINDS, seed=1), folder=tmp_path / "stage0")
    record = json.loads((tmp_path / "stage0" / "clustering.json").read_text())
    assert record["settings"] == {
        "num_classes": KINDS, "seed": 1, "spherical": True, "backend": "torch", "max_iterations": 50,
    }  # fmt: skip
    assert record["sizes"] == np.bincount(labels.classes, minlength=KINDS).tolist()
    with safe_open(tmp_path / "stage0" / "clustering.safetensors", framework="np") as file:
        centroids = file.get_tensor("centroids")
    features = np.concatenate([shard.features for shard in store.iter_shards(["features"])]).astype(np.float32)
    assert ((features @ centroids.T).argmax(axis=1) == labels.classes).all()
    make_pseudo_labels(store, ClusteringConfig(1), folder=tmp_path / "stage0")
    assert not list((tmp_path / "stage0").iterdir())  # nothing speaks of classes that are no more


def test_the_same_call_goes_on_and_one_of_another_store_begins_anew(store, tmp_path, caplog):
    store, _ = store
    first = make_pseudo_labels(store, ClusteringConfig(KINDS), folder=tmp_path)
    with caplog.at_level(logging.INFO, logger="simdetr"):
        again = make_pseudo_labels(store, ClusteringConfig(KINDS), folder=tmp_path)
    assert "going on after iteration" in caplog.text and "iteration 0 of" not in caplog.text
    np.testing.assert_array_equal(first.classes, again.classes)
    other, _ = make_store(tmp_path / "other", [5, 0, 7, 9, 3, 0, 8, 6, 5])
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="simdetr"):
        make_pseudo_labels(other, ClusteringConfig(KINDS), folder=tmp_path)
    assert "of other regions or settings" in caplog.text
    assert re.search(
        r"iteration 0 of at most 50: inertia 0\.\d+ per region, 0 empty, [\d.]+ s, at most \d+ s left", caplog.text
    )


def test_a_damaged_shard_is_named(store):
    store, _ = store
    path = store.shard_path(1)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(StoreError, match=r"shard-00001.parquet is damaged .* run the mining command again"):
        make_pseudo_labels(store, ClusteringConfig(KINDS))


def test_fewer_regions_than_classes_names_both_numbers_and_the_fix(store):
    with pytest.raises(ValueError, match=r"got 2048 classes for 42 mined regions.*lower num_classes to 42 or less"):
        make_pseudo_labels(store[0], ClusteringConfig())
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        make_pseudo_labels(store[0], ClusteringConfig(0))


@pytest.mark.parametrize("num_classes", [1, 5])
def test_no_proposals_is_an_error(tmp_path, num_classes):
    store, _ = make_store(tmp_path / "empty", [0, 0, 0])
    with pytest.raises(ValueError, match="got none in 3 images; loosen the filters"):
        make_pseudo_labels(store, ClusteringConfig(num_classes))


def _label(rank, address, folder, out):
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    store = ProposalStore(folder)
    shards = []
    original = stores.read_table
    stores.read_table = lambda path, columns: (shards.append((path.stem, *columns)), original(path, columns))[1]
    labels = make_pseudo_labels(store, ClusteringConfig(KINDS, seed=1), folder=out)
    own = {"shard-00001"} if rank else {"shard-00000", "shard-00002"}
    assert {shard for shard, *columns in shards if "features" in columns} == own
    np.savez(out / f"{rank}.npz", classes=labels.classes, boxes=labels.boxes_xyxy)
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_ranks_end_with_the_labels_of_one(in_two_processes, store, tmp_path):
    store, _ = store
    in_two_processes(_label, tmp_path / "rendezvous", store.folder, tmp_path)
    alone = make_pseudo_labels(store, ClusteringConfig(KINDS, seed=1))
    for rank in range(2):
        found = np.load(tmp_path / f"{rank}.npz")
        np.testing.assert_array_equal(found["classes"], alone.classes)
        np.testing.assert_array_equal(found["boxes"], alone.boxes_xyxy)
    assert json.loads((tmp_path / "clustering.json").read_text())["regions"] == 42


def test_classes_of_two_clusterings_have_other_names(tmp_path):
    store, _ = make_store(tmp_path / "proposals", [9, 8])
    one, same, other = (make_pseudo_labels(store, ClusteringConfig(KINDS, seed=seed)).categories for seed in (0, 0, 1))
    assert one == same and len({category.name for category in (*one, *other)}) == 2 * KINDS


# ----------------------------------------------------------------------------------------------------------------------
# Blocks of a store's features.


REGIONS = [5, 0, 7, 9, 3, 0, 8, 6, 4]


@pytest.fixture
def blocks_store(tmp_path):
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
def test_blocks_are_the_shards_again_and_again(blocks_store, in_memory):
    blocks = RegionBlocks(blocks_store, in_memory=in_memory)
    first, second = list(blocks), list(blocks)
    assert [len(block) for block in first] == [21, 17, 4] and first[0].dtype == torch.float16
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    expected = [(image, place) for image, count in enumerate(REGIONS) for place in range(count)]
    assert torch.cat(first).int().tolist() == [list(pair) for pair in expected]
    assert count_regions(blocks_store) == 42
    first[0] += 1  # blocks are tensors like any other


def test_ranks_share_the_shards(blocks_store, monkeypatch):
    monkeypatch.setattr(pseudo_labels, "world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(pseudo_labels, "rank", lambda rank=rank: rank)
        shares.append(own_shards(blocks_store))
    assert shares == [[0, 2], [1]]


def test_a_rank_without_shards_has_one_empty_block(blocks_store, monkeypatch):
    monkeypatch.setattr(pseudo_labels, "own_shards", lambda blocks_store: [])
    assert [tuple(block.shape) for block in RegionBlocks(blocks_store)] == [(0, 2)]


def test_a_missing_shard_is_left_out(blocks_store):
    blocks_store.shard_path(1).unlink()
    assert [len(block) for block in RegionBlocks(blocks_store)] == [21, 4] and count_regions(blocks_store) == 25

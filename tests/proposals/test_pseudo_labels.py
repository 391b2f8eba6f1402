import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from simdetr.proposals.pseudo_labels import RegionBlocks, cluster_regions, count_regions, make_pseudo_labels
from simdetr.proposals.regions import Regions
from simdetr.proposals.store import Manifest, ProposalRow, ProposalStore

KINDS, DIMS = 4, 6


def make_store(folder, regions_per_image, shard_size=4, seed=0):
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
            stride=np.full(count, 16, np.int16),
            k=np.full(count, 8, np.int16),
            cluster=kind.astype(np.int16),
            score=np.ones(count, np.float32),
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
    labels = make_pseudo_labels(store, KINDS)
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
        pairs |= set(zip(own.boxes_xyxy[:, 0].tolist(), own.classes.tolist(), strict=True))
    assert len(pairs) == KINDS  # each kind one class, each class one kind


def test_streaming_and_faiss_find_the_same_classes(store, monkeypatch):
    store, _ = store
    whole = make_pseudo_labels(store, KINDS, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr("simdetr.proposals.pseudo_labels._KEEP_IN_MEMORY_BYTES", 0)
        streamed = make_pseudo_labels(store, KINDS, seed=1)
    np.testing.assert_array_equal(whole.classes, streamed.classes)
    faiss = make_pseudo_labels(store, KINDS, seed=1, backend="faiss")
    assert len(set(zip(whole.classes.tolist(), faiss.classes.tolist(), strict=True))) == KINDS


def test_blocks_can_be_gone_through_again(store):
    store, rows = store
    blocks = RegionBlocks(store)
    first, second = list(blocks), list(blocks)
    assert [len(block) for block in first] == [len(block) for block in second] == [21, 17, 4]
    np.testing.assert_allclose(first[0][:5].numpy(), rows[0].regions.features, rtol=1e-3, atol=1e-3)
    assert count_regions(store) == 42


def test_one_class_reads_no_features(store, monkeypatch):
    store, _ = store
    asked = []
    read = ProposalStore.iter_shards
    monkeypatch.setattr(
        ProposalStore, "iter_shards", lambda self, columns=None: (asked.append(columns), read(self, columns))[1]
    )
    labels = make_pseudo_labels(store, 1)
    assert labels.num_classes == 1 and not labels.classes.any() and len(labels.boxes_xyxy) == 42
    assert not any("features" in columns for columns in asked)


def test_fewer_regions_than_classes_names_both_numbers_and_the_fix(store):
    with pytest.raises(ValueError, match=r"got 2048 classes for 42 mined regions.*lower num_classes to 42 or less"):
        make_pseudo_labels(store[0])
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        make_pseudo_labels(store[0], 0)


@pytest.mark.parametrize("num_classes", [1, 5])
def test_no_proposals_is_an_error(tmp_path, num_classes):
    store, _ = make_store(tmp_path / "empty", [0, 0, 0])
    with pytest.raises(ValueError, match="got none in 3 images; loosen the filters"):
        make_pseudo_labels(store, num_classes)


def _label(rank, address, folder, out):
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    store = ProposalStore(folder)
    np.savez(out / f"{rank}.npz", classes=make_pseudo_labels(store, KINDS, seed=1).classes)
    assert int(cluster_regions(store, KINDS).counts.sum()) == 42
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_ranks_end_with_the_labels_of_one(store, tmp_path):
    store, _ = store
    mp.spawn(_label, args=(tmp_path / "rendezvous", store.folder, tmp_path), nprocs=2)
    alone = make_pseudo_labels(store, KINDS, seed=1).classes
    for rank in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / f"{rank}.npz")["classes"], alone)

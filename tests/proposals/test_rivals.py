"""Rivals to a store: the rows of the method itself, resume, refusals, unreadable images."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from simdetr.data.images import open_images
from simdetr.data.quarantine import TooManyUnreadableError
from simdetr.mining import rivals
from simdetr.mining.batch import MiningConfig, encode, load_image
from simdetr.mining.pseudo_labels import ClusteringConfig, make_pseudo_labels
from simdetr.mining.rivals import baseline, mine_rival
from simdetr.mining.store import ProposalStore, StoreError

CONFIG = MiningConfig(image_size=128, shard_size=4, seed=5)


def contents(store):
    return [pq.read_table(path) for path in sorted(store.folder.glob("shard-*.parquet"))]


@pytest.mark.parametrize("method", ["lost", "mask_cut", "random"])
def test_rows_are_those_of_the_method(method, image_folder, encoder, tmp_path):
    source = open_images(image_folder)
    store = mine_rival(method, source, encoder, CONFIG, tmp_path / method, max_boxes=7)
    rows = list(store.iter_rows())
    assert [row.image_id for row in rows] == list(source.ids)
    for row, record in zip(rows, source, strict=True):
        image = load_image(record, 128)
        maps = encode(image.pixels[None], encoder)
        expected = baseline(method)([image.pixels], maps, [image.size_hw], 7, 5)[0]
        np.testing.assert_array_equal(row.regions.boxes_xyxy, expected.boxes_xyxy)
        np.testing.assert_array_equal(row.regions.score, expected.score)
        np.testing.assert_allclose(row.regions.features, expected.features, atol=1e-3)  # fp16


def test_store_serves_the_rest_of_the_pipeline(image_folder, encoder, tmp_path):
    store = mine_rival("random", open_images(image_folder), encoder, CONFIG, tmp_path, max_boxes=5)
    labels = make_pseudo_labels(store, ClusteringConfig(num_classes=4))
    assert (len(labels), len(labels.classes), labels.num_classes) == (14, 70, 4)


def test_interrupted_run_ends_like_a_whole_one(image_folder, encoder, tmp_path, monkeypatch):
    source = open_images(image_folder)
    whole = mine_rival("random", source, encoder, CONFIG, tmp_path / "whole")
    real, calls = rivals.encode, []

    def stops(pixels, given):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return real(pixels, given)

    monkeypatch.setattr(rivals, "encode", stops)
    with pytest.raises(KeyboardInterrupt):
        mine_rival("random", source, encoder, CONFIG, tmp_path / "two")
    assert ProposalStore(tmp_path / "two").missing_shards() == [2, 3]
    monkeypatch.setattr(rivals, "encode", real)
    first = (tmp_path / "two/shard-00000.parquet").stat().st_mtime_ns
    assert contents(mine_rival("random", source, encoder, CONFIG, tmp_path / "two")) == contents(whole)
    assert (tmp_path / "two/shard-00000.parquet").stat().st_mtime_ns == first
    monkeypatch.setattr(rivals, "encode", lambda *_: pytest.fail("nothing is left to encode"))
    mine_rival("random", source, encoder, CONFIG, tmp_path / "two")


def test_methods_are_never_mixed(image_folder, encoder, tmp_path):
    source = open_images(image_folder)
    mine_rival("random", source, encoder, CONFIG, tmp_path, max_boxes=3)
    with pytest.raises(StoreError, match=r"config\.method is 'random' there and 'lost' now"):
        mine_rival("lost", source, encoder, CONFIG, tmp_path, max_boxes=3)
    with pytest.raises(StoreError, match=r"config\.max_boxes is 3 there and 4 now"):
        mine_rival("random", source, encoder, CONFIG, tmp_path, max_boxes=4)


def test_unreadable_images_have_no_row(image_folder, encoder, tmp_path):
    (image_folder / "05.png").write_text("no image")
    source = open_images(image_folder)
    store = mine_rival("random", source, encoder, replace(CONFIG, max_unreadable=0.1), tmp_path / "out", max_boxes=2)
    assert len(store) == 13
    assert "05.png" not in {row.image_id for row in store.iter_rows()}
    assert "05.png" in (tmp_path / "out/quarantine.csv").read_text()
    with pytest.raises(TooManyUnreadableError):
        mine_rival("random", source, encoder, replace(CONFIG, max_unreadable=0.01), tmp_path / "strict", max_boxes=2)


def test_bad_arguments_are_named(image_folder, encoder, tmp_path):
    source = open_images(image_folder)
    with pytest.raises(ValueError, match="got 'none'"):
        mine_rival("none", source, encoder, CONFIG, tmp_path / "a")
    with pytest.raises(ValueError, match="source: expected at least one image"):
        mine_rival("lost", source.subset([]), encoder, CONFIG, tmp_path / "a")
    assert not (tmp_path / "a").exists()

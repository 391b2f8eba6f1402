"""A preview against the full run that it speaks of: same boxes, same bytes, same recall; and odd sets of images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from simdetr.data.annotations import Category
from simdetr.data.coco import read_coco
from simdetr.data.images import open_images
from simdetr.data.labels import Labels
from simdetr.data.scenes import render_scenes
from simdetr.evaluation.recall import proposal_recall
from simdetr.mining.batch import MiningConfig
from simdetr.mining.colour_texture import ColourTextureEncoder
from simdetr.mining.level_sets import LevelSets
from simdetr.mining.miner import mine
from simdetr.mining.preview import choose_images, preview_mining
from simdetr.mining.store import best_first

CONFIG = MiningConfig(image_size=64, batch_size=8, level_sets=LevelSets(max_boxes=5))
PLAIN = replace(CONFIG, level_sets=None)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    path = render_scenes(tmp_path_factory.mktemp("many"), 110, (64, 80), seed=8)
    return open_images(path), read_coco(path)[0]


@pytest.fixture(scope="module")
def encoder():
    return ColourTextureEncoder()


@pytest.fixture(scope="module", params=[CONFIG, PLAIN], ids=["level sets", "filters"])
def whole(request, many, encoder, tmp_path_factory):
    """A full run and a preview of it: 50 of 110 images, 40 to a shard."""
    config = replace(request.param, shard_size=40)
    store = mine(many[0], encoder, config, tmp_path_factory.mktemp("store"))
    return store, preview_mining(many[0], encoder, config, 50, truth=many[1])


def test_boxes_are_those_of_the_full_run(whole):
    store, preview = whole
    stored = {row.image_id: row for row in store.iter_rows()}
    assert len(preview.rows) == preview.previewed == preview.time.images == 50
    assert [row.image_id for row in preview.rows] == [i for i in stored if i in {r.image_id for r in preview.rows}]
    for row in preview.rows:
        there = stored[row.image_id]
        assert (row.height, row.width) == (there.height, there.width)
        np.testing.assert_allclose(row.regions.boxes_xyxy, there.regions.boxes_xyxy, atol=1e-3)
        np.testing.assert_allclose(row.regions.score, there.regions.score, rtol=1e-4)


def test_bytes_are_those_of_the_full_run(whole):
    store, preview = whole
    written = sum(store.shard_path(shard).stat().st_size for shard in store.written())
    assert preview.stored_bytes / 50 * 110 + 3 * preview.shard_bytes == pytest.approx(written, rel=0.04)


def test_bytes_of_a_previewed_whole_are_exact(many, encoder, tmp_path):
    source = many[0].subset(many[0].ids[:7])
    config = replace(CONFIG, shard_size=3)
    store = mine(source, encoder, config, tmp_path)
    preview = preview_mining(source, encoder, config, 50)
    written = sum(store.shard_path(shard).stat().st_size for shard in store.written())
    assert preview.previewed == 7
    assert preview.stored_bytes + 3 * preview.shard_bytes == pytest.approx(written, rel=2e-3)


def test_recall_is_that_of_the_stored_boxes(whole, many):
    store, preview = whole
    ids = [row.image_id for row in preview.rows]
    stored = [best_first(row) for row in store.iter_rows() if row.image_id in set(ids)]
    truth = many[1].select(ids)
    expected = proposal_recall(truth, Labels.from_images(stored, (Category(1, "object"),)))
    recall = preview.recall
    assert (recall.images, recall.objects) == (50, len(truth.boxes_xyxy))
    kept = 5 if recall.ranked else 25
    same = [name for name in expected if int(name.split("@")[1].rstrip("sml")) <= kept]
    assert len(same) >= 8
    for name in same:
        assert recall.scores[name] == pytest.approx(expected[name], abs=1e-6, nan_ok=True)


def test_ranked_boxes_are_mined_up_to_a_hundred_for_recall_only(whole):
    preview = whole[1]
    levels = preview.config.level_sets
    if levels is None:
        assert not preview.recall.ranked and preview.recall.max_boxes <= 25
        return
    assert preview.recall.ranked and preview.recall.max_boxes > 5
    assert max(len(row.regions) for row in preview.rows) == levels.max_boxes == 5
    assert preview.recall.scores["recall50@100"] > preview.recall.scores["recall50@10"]


def test_images_are_evenly_spaced_and_those_with_boxes_come_first(many):
    source, truth = many
    assert choose_images(source, 5) == [11, 33, 55, 77, 99]
    assert choose_images(source, 1) == [55]
    assert choose_images(source, 500) == list(range(110))
    few = truth.select(source.ids[10:14])
    assert choose_images(source, 2, few) == [11, 13]
    chosen = choose_images(source, 8, few)
    assert len(chosen) == 8 and chosen == sorted(set(chosen)) and {10, 11, 12, 13} < set(chosen)
    assert max(chosen) > 90 and min(chosen) < 20


def test_listed_images_without_boxes_are_no_truth(many, make_labels):
    """A COCO file often lists all images and has boxes for a few; a crowd is no object."""
    source, _ = many
    boxes = {image_id: [] for image_id in source.ids}
    boxes[source.ids[70]] = [(1, 1, 9, 9, 0)]
    assert choose_images(source, 1, make_labels(boxes)) == [70]
    boxes[source.ids[20]] = [(1, 1, 9, 9, 0)]
    assert choose_images(source, 1, make_labels(boxes, crowd=[True, False])) == [70]


def test_truth_of_other_images_and_senseless_counts_are_refused(many, encoder):
    source, truth = many
    foreign = replace(truth, image_ids=tuple(f"x/{i}" for i in range(len(truth))))
    with pytest.raises(ValueError, match="truth: none of its 110 images"):
        preview_mining(source, encoder, CONFIG, 3, truth=foreign)
    with pytest.raises(ValueError, match="truth: none of its 0 images"):
        preview_mining(source, encoder, CONFIG, 3, truth=truth.select([]))
    with pytest.raises(ValueError, match="preview: expected at least 1 image, got 0"):
        preview_mining(source, encoder, CONFIG, 0)
    with pytest.raises(ValueError, match="source: expected at least one image"):
        preview_mining(source.subset([]), encoder, CONFIG, 3)


def test_unreadable_images_and_copies_are_counted(own_scenes, encoder):
    source = open_images(own_scenes)
    source.path_of(source.ids[1]).write_bytes(b"no image")
    source.path_of(source.ids[2]).write_bytes(b"")
    source.path_of(source.ids[5]).write_bytes(source.path_of(source.ids[3]).read_bytes())
    truth = read_coco(own_scenes / "instances.json")[0]
    preview = preview_mining(source, encoder, CONFIG, 50, truth=truth)
    assert preview.previewed == 6 and len(preview.rows) == preview.time.images == 4
    assert preview.unreadable == {source.ids[1]: "no image, or of an unknown format", source.ids[2]: "empty file"}
    assert preview.copies == [(source.ids[5], source.ids[3])]
    assert preview.recall.images == 4  # the others were not mined: no fault of the miner
    for position in (0, 3, 4, 5):
        source.path_of(source.ids[position]).write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 6 previewed images can be read.*empty file.*doctor"):
        preview_mining(source, encoder, CONFIG, 50)


def test_one_image_of_one_colour(tmp_path, encoder):
    Image.new("RGB", (40, 30), (9, 9, 9)).save(tmp_path / "flat.png")
    preview = preview_mining(open_images(tmp_path), encoder, PLAIN, 50)
    assert preview.previewed == 1 and preview.recall is None and preview.truth is None
    assert preview.stored_bytes >= 0 and preview.shard_bytes > 0 and preview.held_bytes >= 0


def test_memory_is_what_the_system_says(many, encoder):
    preview = preview_mining(many[0], encoder, CONFIG, 1)
    assert preview.device_peak_bytes is None
    assert preview.peak_bytes is None or 50e6 < preview.peak_bytes < 1e12

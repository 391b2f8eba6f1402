"""A preview against the full run that it speaks of: same boxes, same bytes, same recall; and odd sets of images."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from simdetr.data.annotations import Category
from simdetr.data.coco import read_coco
from simdetr.data.images import open_images
from simdetr.data.labels import Labels
from simdetr.data.scenes import render_scenes
from simdetr.evaluation.recall import proposal_recall
from simdetr.mining import preview as mining_time
from simdetr.mining.batch import MiningConfig
from simdetr.mining.colour_texture import ColourTextureEncoder
from simdetr.mining.level_sets import LevelSets
from simdetr.mining.miner import mine
from simdetr.mining.preview import (
    ASPECT_EDGES,
    SIZE_EDGES,
    BoxStatistics,
    Machine,
    MiningTime,
    choose_images,
    full_run,
    mine_timed,
    preview_mining,
    preview_record,
    warm_up,
)
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


def test_memory_is_what_the_system_says(many, encoder):
    resource = pytest.importorskip("resource", reason="Unix only")
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    preview = preview_mining(many[0], encoder, CONFIG, 1)
    assert before <= preview.peak_bytes <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    assert preview.device_peak_bytes is None


# ----------------------------------------------------------------------------------------------------------------------
# The stopwatches: slow decoding and slow encoding are seen where they are, and the rows are those of the loop.


TIMED = MiningConfig(image_size=64, batch_size=4)
LATE_S = 0.05


class Slow(ColourTextureEncoder):
    def forward(self, images):
        time.sleep(LATE_S)
        return super().forward(images)


def test_parts_add_up():
    taken = MiningTime(images=10, total=5.0, decoding=3.0, waiting=1.0, encoder=1.5, cpu=7.5, batches=4)
    assert (taken.images_per_s, taken.clustering, taken.busy_cores) == (2, 2.5, 1.5)


def test_the_encoder_is_timed(scenes):
    rows, unreadable, taken = mine_timed(open_images(scenes), range(10), Slow(), TIMED, "cpu")
    assert (len(rows), unreadable, taken.images, taken.batches) == (10, {}, 10, 3)
    assert taken.encoder >= 3 * LATE_S
    assert taken.encoder + taken.waiting <= taken.total
    assert taken.clustering == pytest.approx(taken.total - taken.encoder - taken.waiting)


def test_slow_decoding_is_waited_for(scenes, monkeypatch):
    from simdetr.mining import batch as image_loading

    read = image_loading.read_image
    monkeypatch.setattr(image_loading, "read_image", lambda record: (time.sleep(LATE_S), read(record))[1])
    _, _, taken = mine_timed(open_images(scenes), range(8), ColourTextureEncoder(), TIMED, "cpu")
    assert taken.decoding >= 8 * LATE_S
    assert taken.waiting >= LATE_S  # for the first one at least, nothing else can be done


def test_a_warm_up_is_one_readable_image_on_a_processor_and_a_batch_elsewhere(own_scenes, monkeypatch):
    seen = []
    monkeypatch.setattr(mining_time, "mine_rows", lambda images, *_: seen.append([i.image_id for i in images]))
    source = open_images(own_scenes)
    source.path_of(source.ids[0]).write_bytes(b"")
    encoder = ColourTextureEncoder()
    warm_up(source, range(3), encoder, TIMED, "cpu")
    warm_up(source, range(3), encoder, TIMED, "cuda")
    assert seen == [[source.ids[1]], [source.ids[1]] * 3]


def test_computing_elsewhere_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    timed = mining_time._TimedEncoder(ColourTextureEncoder(), "cuda:1")
    timed(torch.zeros(1, 3, 32, 32))
    assert waited == ["cuda:1", "cuda:1"]
    assert timed.calls == 1


# ----------------------------------------------------------------------------------------------------------------------
# What preview.json holds: extrapolations that follow from their numbers, warnings, valid JSON.


TAKEN = MiningTime(images=4, total=2.0, decoding=1.0, waiting=0.2, encoder=0.8, cpu=3.0, batches=2)


@pytest.fixture(scope="module")
def preview(scenes):
    """Four of twelve scenes, with times, bytes and memory that are easy to multiply."""
    source, truth = open_images(scenes), read_coco(scenes / "instances.json")[0]
    found = preview_mining(source, ColourTextureEncoder(), MiningConfig(image_size=64, shard_size=5), 4, truth=truth)
    return replace(
        found, time=TAKEN, stored_bytes=4000, shard_bytes=300, held_bytes=1000, peak_bytes=10**9, device_peak_bytes=None
    )


def test_a_full_run_is_a_straight_line(preview):
    run = full_run(preview, Machine(cores=8))
    assert (run["images"], run["seconds"], run["seconds_of_ranks"]) == (12, 6.0, 6.0)
    assert (run["shards"], run["disk_bytes"]) == (3, 12 * 1000 + 3 * 300)
    assert run["memory_bytes"] == 10**9 + 2 * 5 * 1000


@pytest.mark.parametrize(
    ("device", "machine", "num_ranks", "speedup"),
    [
        ("cpu", Machine(8), 3, 3),
        ("cpu", Machine(3), 4, 2),  # one process keeps 1.5 cores busy
        ("cpu", Machine(1), 4, 1),
        ("cuda", Machine(8, 2), 4, 2),
        ("cuda:0", Machine(8, 8), 4, 4),
    ],
)
def test_ranks_are_as_many_as_the_machine_can_feed(preview, device, machine, num_ranks, speedup):
    run = full_run(replace(preview, device=device), machine, num_ranks)
    assert run["speedup"] == pytest.approx(speedup)
    assert run["seconds_of_ranks"] == pytest.approx(6 / speedup)
    assert any(f"{num_ranks} processes" in line and "not measured" in line for line in run["assumptions"])


def test_unreadable_images_take_time_but_no_room(preview):
    half = replace(preview, rows=preview.rows[:2], unreadable={"a": "empty file", "b": "empty file"}, stored_bytes=2000)
    assert full_run(half, Machine(1))["disk_bytes"] == 12 * 500 + 3 * 300


def test_record_is_json_and_says_what_was_measured(preview):
    record = preview_record(preview, Machine(2), 2)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["speed"]["ms_per_image"] == pytest.approx(
        {"waiting_for_images": 50, "encoder": 200, "clustering_and_boxes": 250, "decoding_beside_it": 250}
    )
    assert (record["speed"]["images_per_s"], record["speed"]["images_per_batch"]) == (2, 2)
    assert record["boxes"]["boxes"] == sum(len(row.regions) for row in preview.rows)
    truth = preview.truth
    sizes = [tuple(size) for size in truth.sizes_hw.tolist()]
    boxes = [truth.image(row).boxes_xyxy for row in range(len(truth))]
    assert record["truth"] == BoxStatistics.of(boxes, sizes).summary()
    assert record["recall"]["scores"]["AR@100l"] is None  # no object of a 64 x 80 px scene is above 96² px²
    assert record["recall"]["scores"]["AR@10"] == preview.recall.scores["AR@10"]
    assert record["images"]["ids"] == [row.image_id for row in preview.rows]


def test_crowds_are_no_true_objects(preview):
    crowded = replace(preview, truth=replace(preview.truth, crowd=~preview.truth.crowd))
    assert preview_record(crowded, Machine(1))["truth"]["boxes"] == 0


def test_memory_may_be_unknown_and_truth_absent(preview):
    record = preview_record(replace(preview, peak_bytes=None, truth=None, recall=None), Machine(1))
    assert record["full_run"]["memory_bytes"] is None
    assert record["truth"] is None and record["recall"] is None


def test_warnings(preview):
    assert preview_record(preview, Machine(1))["warnings"] == _many_boxes_warning(preview)
    none = replace(preview.rows[0].regions, **{n: v[:0] for n, v in vars(preview.rows[0].regions).items()})
    bad = replace(
        preview,
        rows=[replace(preview.rows[0], regions=none), *preview.rows[1:]],
        unreadable={"a": "empty file"},
        recall=replace(preview.recall, ranked=False, max_boxes=25),
    )
    said = preview_record(bad, Machine(1))["warnings"]
    assert [text.split(":")[0] for text in said] == [
        "1 of 5 previewed images are unreadable, more than mining.max_unreadable allows (5%)",
        "1 of 4 images have no box",
        "these settings do not rank the boxes",
        "no image has more than 25 boxes",
    ]


def _many_boxes_warning(preview):
    few = preview.recall.max_boxes < 100
    return [f"no image has more than {preview.recall.max_boxes} boxes: AR@100 is the recall of all of them"] * few


# ----------------------------------------------------------------------------------------------------------------------
# Boxes whose size, aspect, copies and border contacts are known by hand.


def boxes(*rows):
    return np.array(rows, np.float32).reshape(-1, 4)


@pytest.fixture
def statistics():
    return BoxStatistics.of(
        [
            boxes((10, 10, 60, 30), (10, 10, 60, 31), (20, 40, 40, 90)),  # the first two: IoU 20 / 21
            boxes(),
            boxes((0, 5, 10, 15), (100, 50, 200, 100), (1, 1, 199, 99)),
        ],
        [(100, 100), (50, 50), (100, 200)],
    )


def test_values_are_those_of_the_boxes(statistics):
    assert statistics.per_image.tolist() == [3, 0, 3]
    assert statistics.size == pytest.approx(np.sqrt([0.1, 0.105, 0.1, 0.005, 0.25, 198 * 98 / 20000]))
    assert statistics.aspect == pytest.approx([2.5, 50 / 21, 0.4, 1, 2, 198 / 98])
    assert statistics.copied.tolist() == [True, True, False, False, False, False]
    assert statistics.at_border.tolist() == [False, False, False, True, True, False]


def test_summary_counts_every_box_once(statistics):
    summary = statistics.summary()
    assert summary["boxes"] == 6
    assert summary["per_image"] == {"min": 0, "median": 3.0, "max": 3, "images": [1, 0, 0, 2]}
    assert (summary["copied"], summary["at_border"]) == pytest.approx((2 / 6, 2 / 6))
    for name in ("size", "aspect"):
        values = getattr(statistics, name)
        assert sum(summary[name]["counts"]) == 6
        assert summary[name]["median"] == pytest.approx(np.median(values))
        counts, edges = summary[name]["counts"], summary[name]["edges"]
        assert counts[np.searchsorted(edges, values[-1], side="right") - 1] >= 1
    assert json.loads(json.dumps(summary)) == summary


def test_bins_hold_every_box_there_can_be():
    assert (SIZE_EDGES[0], SIZE_EDGES[-1]) == (0, 1)
    square = np.searchsorted(ASPECT_EDGES, 1)
    assert np.sqrt(ASPECT_EDGES[square - 1] * ASPECT_EDGES[square]) == pytest.approx(1)
    line = BoxStatistics.of([boxes((0, 0, 1000, 1), (0, 0, 1, 1000))], [(1000, 1000)])
    counts = line.summary()["aspect"]["counts"]
    assert (counts[0], counts[-1], sum(counts)) == (1, 1, 2)


def test_no_boxes_and_no_images():
    for empty in (BoxStatistics.of([], []), BoxStatistics.of([boxes()], [(5, 5)])):
        summary = empty.summary()
        assert (summary["boxes"], summary["copied"], summary["at_border"]) == (0, 0, 0)
        assert summary["size"]["median"] is None and sum(summary["size"]["counts"]) == 0

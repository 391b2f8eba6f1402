"""What preview.json holds: extrapolations that follow from their numbers, warnings, valid JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from simdetr.data.coco import read_coco
from simdetr.data.images import open_images
from simdetr.mining.batch import MiningConfig
from simdetr.mining.colour_texture import ColourTextureEncoder
from simdetr.mining.preview import BoxStatistics, Machine, MiningTime, full_run, preview_mining, preview_record

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

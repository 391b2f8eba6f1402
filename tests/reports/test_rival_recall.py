"""Ours beside rivals: which images count, the order of boxes, pictures, the printed table."""

import numpy as np
import pytest

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.coco import read_coco
from simdetr.data.images import open_images
from simdetr.data.labels import Labels
from simdetr.data.scenes import render_scenes
from simdetr.evaluation.recall import proposal_recall
from simdetr.mining.regions import Regions
from simdetr.mining.store import Manifest, ProposalRow, ProposalStore
from simdetr.reports import rival_recall
from simdetr.reports.rival_recall import rival_labels, rival_rows, rival_samples, rival_table


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    path = render_scenes(tmp_path_factory.mktemp("scenes"), 6, size=(96, 96), seed=5)
    return open_images(path), read_coco(path)[0]


def write_store(folder, source, boxes_of, scores_of=lambda boxes: np.ones(len(boxes)), images=None):
    """A store of one shard with the given boxes per image id."""
    ids = list(source.ids) if images is None else images
    store = ProposalStore.create(folder, Manifest({}, "none", "none", len(ids), 100, 2))
    rows = []
    for image_id in ids:
        boxes = np.asarray(boxes_of(image_id), np.float32).reshape(-1, 4)
        zeros = np.zeros(len(boxes), np.int16)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        scores = np.asarray(scores_of(boxes), np.float32)
        features = np.zeros((len(boxes), 2), np.float32)
        rows.append(ProposalRow(image_id, 96, 96, Regions(boxes, features, area, zeros, zeros, zeros, scores)))
    store.write_shard(0, rows)


@pytest.fixture
def run(tmp_path, scenes):
    """Ours finds everything; LOST one object per image, with the best score last; random a corner."""
    source, truth = scenes
    write_store(tmp_path / "proposals", source, lambda i: truth.of(i).boxes_xyxy)
    write_store(
        tmp_path / "rivals/lost",
        source,
        lambda i: [[90, 90, 95, 95], truth.of(i).boxes_xyxy[0]],
        lambda boxes: 10 * np.arange(len(boxes)),
    )
    write_store(tmp_path / "rivals/random", source, lambda i: [[0, 0, 1, 1]] * 30)
    return tmp_path


def test_rows_are_the_recall_of_every_store(run, scenes):
    source, truth = scenes
    rows = rival_rows(rival_labels(run, source.ids), truth)
    assert [row["stage"] for row in rows] == ["ours", "LOST", "random boxes"]
    assert [row["images"] for row in rows] == [6, 6, 6]
    assert rows[0]["AR@100"] == pytest.approx(1)
    assert rows[0]["boxes_per_image"] == pytest.approx(len(truth.classes) / 6)
    assert (rows[1]["boxes_per_image"], rows[2]["boxes_per_image"]) == (2, 30)
    # the second box of LOST has the better score and is an object: one of each image's at AR@1
    found = [ImageLabels.build(i, (96, 96), truth.of(i).boxes_xyxy[:1], [0]) for i in truth.image_ids]
    expected = proposal_recall(truth, Labels.from_images(found, (Category(1, "object"),)), (1,))
    assert rows[1]["AR@1"] == pytest.approx(expected["AR@1"]) == pytest.approx(6 / len(truth.classes))
    assert rows[2]["AR@100"] == 0
    assert {"AR@25s", "AR@30", "recall50@25"} <= rows[0].keys()


def test_without_truth_there_are_only_counts(run, scenes):
    rows = rival_rows(rival_labels(run, scenes[0].ids), None)
    assert [set(row) for row in rows] == [{"stage", "images", "boxes_per_image"}] * 3
    assert "AR" not in rival_table(rows)


def test_only_images_of_all_stores_count(run, scenes):
    source, truth = scenes
    write_store(run / "rivals/token_cut", source, lambda i: [], images=list(source.ids[1:4]))
    labels = rival_labels(run, ["unknown.jpg", *source.ids[:3]])
    assert list(labels) == ["ours", "lost", "token_cut", "random"]
    assert all(boxes.image_ids == tuple(source.ids[1:3]) for boxes in labels.values())
    rows = rival_rows(labels, truth)
    assert [row["images"] for row in rows] == [2] * 4
    assert rows[2]["boxes_per_image"] == rows[2]["AR@100"] == 0


def test_no_shared_images_give_rows_without_recall(run, scenes):
    rows = rival_rows(rival_labels(run, ["unknown.jpg"]), scenes[1])
    assert [(row["images"], row["boxes_per_image"]) for row in rows] == [(0, 0)] * 3


def test_many_images_are_judged_in_part(run, scenes, monkeypatch):
    monkeypatch.setattr(rival_recall, "MAX_IMAGES", 3)
    ids = scenes[0].ids
    assert rival_labels(run, ids)["ours"].image_ids == (ids[1], ids[3], ids[5])


def test_runs_without_rivals_have_none(tmp_path, scenes):
    source, truth = scenes
    write_store(tmp_path / "proposals", source, lambda i: truth.of(i).boxes_xyxy)
    labels = rival_labels(tmp_path, source.ids)
    assert labels == {} and rival_rows(labels, truth) == []
    assert rival_samples(labels, source, 3, np.random.default_rng(0)) == []


def test_rivals_alone_are_compared_too(tmp_path, scenes):
    write_store(tmp_path / "rivals/lost", scenes[0], lambda i: [[0, 0, 5, 5]])
    assert list(rival_labels(tmp_path, scenes[0].ids)) == ["lost"]


def test_samples_show_every_method_side_by_side(run, scenes):
    source, _ = scenes
    labels = rival_labels(run, source.ids)
    samples = rival_samples(labels, source, 2, np.random.default_rng(1))
    assert len({sample.image_id for sample in samples}) == 2
    for sample in samples:
        count = len(labels["ours"].of(sample.image_id))
        assert [caption for caption, _ in sample.pictures] == [
            f"ours: {count} box{'' if count == 1 else 'es'}",
            "LOST: 2 boxes",
            "random boxes: best 25 of 30 boxes",
        ]
        assert len({picture.size for _, picture in sample.pictures}) == 1
        ours, other = (np.asarray(picture) for _, picture in sample.pictures[:2])
        assert (ours != other).any()


def test_unreadable_and_foreign_images_are_passed_over(run, scenes, tmp_path):
    labels = rival_labels(run, scenes[0].ids)
    few = scenes[0].subset(scenes[0].ids[:2])
    samples = rival_samples(labels, few, 5, np.random.default_rng(0))
    assert {sample.image_id for sample in samples} == set(few.ids)


def test_table_fits_a_terminal():
    row = {"stage": "Selective Search", "images": 60, "boxes_per_image": 100.0}
    row |= dict.fromkeys(("AR@1", "AR@10", "AR@25", "AR@30", "AR@100", "recall50@25"), 0.1234)
    row |= {"AR@25s": float("nan"), "AR@25m": 1.0, "AR@25l": 1.0}
    lines = rival_table([row, row | {"stage": "ours"}]).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) < 80
    assert lines[1].split() == "Selective Search 100.0 12.3 12.3 12.3 12.3 12.3 12.3 – 100.0 100.0".split()
    assert lines[0].split()[:4] == ["method", "boxes", "AR@1", "AR@10"]

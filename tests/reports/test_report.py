"""A run's folder to what its report shows; where boxes come from."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from simdetr.data.annotations import Lineage
from simdetr.data.coco import read_coco
from simdetr.data.images import open_images
from simdetr.data.label_files import write_labels
from simdetr.data.scenes import render_scenes
from simdetr.evaluation.recall import proposal_recall
from simdetr.mining.kmeans import clustering_record, fit_kmeans
from simdetr.mining.regions import Regions
from simdetr.mining.store import Manifest, ProposalRow, ProposalStore
from simdetr.reports import report as run_folder
from simdetr.reports.page import StepRow, render_report
from simdetr.reports.report import birth_colour, birth_colours, births, collect_run, origin_rows
from simdetr.training.fusion import inherit


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    path = render_scenes(tmp_path_factory.mktemp("scenes"), 12, size=(96, 96), seed=5)
    return open_images(path), read_coco(path)[0]


@pytest.fixture
def run(tmp_path, scenes):
    """A run of two stages: half of the boxes mined, all of them relabelled."""
    _, truth = scenes
    for stage in (0, 1):
        labels = replace(truth, stage=stage)
        if stage == 0:
            keep = np.arange(len(labels.classes)) % 2 == 0
            counts = np.add.reduceat(np.append(keep, False), labels.offsets[:-1]) * (np.diff(labels.offsets) > 0)
            columns = {
                name: getattr(labels, name)[keep] for name in ("boxes_xyxy", "classes", "scores", "areas", "crowd")
            }
            labels = replace(labels, offsets=np.concatenate([[0], np.cumsum(counts)]), **columns)
            labels = mined = replace(labels, lineage=Lineage.first_seen(0, labels.offsets))
        write_labels(inherit(labels, mined) if stage else labels, tmp_path / f"stage{stage}/labels.parquet")
    steps = [
        {"name": "mine", "seconds": 12.5, "count": 1200, "what": "proposals"},
        {"name": "fit-stage1", "seconds": 1.0},
        {"name": "relabel-stage1", "seconds": 2.0, "count": 7, "what": "boxes", "note": "all images"},
        {"name": "fit-stage1", "seconds": 30.0, "count": 5, "what": "epochs"},
    ]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"name": "fit-st')
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    clustering = clustering_record(fit_kmeans(torch.eye(30), 3), {"num_classes": 3})
    (tmp_path / "stage0/clustering.json").write_text(json.dumps(clustering))
    for name in ("stage10", "stage1/logs/version_0", "stage2"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "metrics.csv").write_text("epoch,step,train/loss\n0,1,2.0\n0,2,1.0\n")
    (tmp_path / "comparison.json").write_text(
        json.dumps([{"initialisation": "scratch", "label_budget": "1 %", "seed": 0, "AP": 0.1}])
    )
    return tmp_path


def test_everything_of_a_run_is_collected(run, scenes):
    source, truth = scenes
    data = collect_run(run, source, truth, num_samples=4, num_montages=3, command="simdetr pretrain")
    assert data.missing == {}
    assert data.title.endswith(f"“{run.name}”") and data.command == "simdetr pretrain"
    assert data.steps == [
        StepRow("Mine proposals", "1,200 proposals", 12.5),
        StepRow("Train stage 1", "5 epochs", 30.0),  # run again: the last record counts; the torn line is passed over
        StepRow("Relabel by stage 1", "7 boxes", 2.0, "all images"),
    ]
    assert [curve.name for curve in data.curves] == ["stage 1", "stage 2", "stage 10"]
    assert data.comparison is not None and data.config == "seed: 3\n"
    assert len(data.montages) == 3
    assert data.clustering is not None and data.clustering["regions"] == 30
    assert render_report(data).count("Not shown") == 0


def test_a_box_has_the_colour_of_the_stage_that_found_it_first(run, scenes):
    source, truth = scenes
    data = collect_run(run, source, truth, num_samples=12)
    assert [row["stage"] for row in data.origins] == ["mined", "stage 1"]
    assert 0.4 < data.origins[1]["shares"]["mined"] < 0.7 and data.origins[1]["mined_left"] == data.origins[0]["boxes"]
    assert [title for title, _ in data.births] == ["mined", "stage 1", "labelled by people"]
    shown = np.zeros((3, 3), int)  # pixels by picture and colour
    for sample in data.samples:
        for column, (_, picture) in enumerate(sample.pictures):
            for row, (_, colour) in enumerate(data.births):
                shown[column, row] += (np.asarray(picture) == colour).all(axis=2).sum()
    assert (shown.clip(max=1) == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]).all()


def test_older_labels_are_drawn_by_class_and_their_origin_is_named_missing(run, scenes):
    source, truth = scenes
    for stage in (0, 1):
        path = run / f"stage{stage}/labels.parquet"
        write_labels(replace(run_folder.read_labels(path), lineage=None), path)
    data = collect_run(run, source, truth, num_samples=4)
    assert data.births == data.origins == [] and "older versions" in data.missing["origins"]
    for sample in data.samples:
        relabelled, people = (np.asarray(picture) for _, picture in sample.pictures[1:])
        assert (relabelled == people).all()  # same boxes, same classes: same picture


def test_samples_show_every_stage_of_one_image(run, scenes):
    source, truth = scenes
    data = collect_run(run, source, truth, num_samples=4, seed=1)
    assert len({sample.image_id for sample in data.samples}) == 4
    for sample in data.samples:
        captions = [caption.split(":")[0] for caption, _ in sample.pictures]
        assert captions == ["mined", "stage 1", "labelled by people"]
        count = len(truth.of(sample.image_id))
        assert sample.pictures[1][0] == f"stage 1: {count} box{'' if count == 1 else 'es'}"
    again = collect_run(run, source, truth, num_samples=4, seed=1)
    assert [s.image_id for s in again.samples] == [s.image_id for s in data.samples]
    other = collect_run(run, source, truth, num_samples=4, seed=2)
    assert [s.image_id for s in other.samples] != [s.image_id for s in data.samples]


def test_recall_is_measured_on_shared_images(run, scenes):
    source, truth = scenes
    shared = truth.image_ids[3:9]
    data = collect_run(run, source, truth.select(shared))
    mined, relabelled = data.recall
    assert (mined["stage"], mined["images"], relabelled["stage"]) == ("mined", 6, "stage 1")
    assert relabelled["AR@100"] == pytest.approx(1.0)
    stage0 = run_folder.read_labels(run / "stage0/labels.parquet").select(shared)
    assert mined["AR@100"] == pytest.approx(proposal_recall(truth.select(shared), stage0)["AR@100"])
    assert 0 < mined["AR@100"] < 1
    assert mined["boxes_per_image"] == pytest.approx(len(stage0.classes) / 6)


def test_recall_of_many_images_is_measured_on_a_part(run, scenes, monkeypatch):
    source, truth = scenes
    monkeypatch.setattr(run_folder, "MAX_RECALL_IMAGES", 5)
    assert [row["images"] for row in collect_run(run, source, truth).recall] == [5, 5]


def test_foreign_truth_is_named(run, scenes, make_labels):
    source, _ = scenes
    data = collect_run(run, source, make_labels({"elsewhere.jpg": [(0, 0, 9, 9, 0)]}))
    assert data.recall == []
    assert "covers none of the run's images" in data.missing["recall"] and "elsewhere.jpg" in data.missing["recall"]
    assert [len(sample.pictures) for sample in data.samples] == [2] * 6


def test_rivals_are_shown_beside_ours(run, scenes):
    source, truth = scenes
    assert collect_run(run, source, truth).rivals == []
    manifest = Manifest({}, "none", source.fingerprint(), len(source), 100, 1)
    none = np.zeros((0, 4), np.float32), np.zeros((0, 1), np.float32), np.zeros(0, np.float32)
    empty = Regions(*none, *[np.zeros(0, np.int16)] * 3, np.zeros(0, np.float32))
    for folder in (run / "proposals", run / "rivals/lost"):
        store = ProposalStore.create(folder, manifest)
        store.write_shard(0, [ProposalRow(image_id, 96, 96, empty) for image_id in source.ids])
    data = collect_run(run, source, truth, num_samples=2)
    assert [(row["stage"], row["AR@25"]) for row in data.rivals] == [("ours", 0), ("LOST", 0)]
    assert [len(sample.pictures) for sample in data.rival_samples] == [2, 2]
    assert [s.image_id for s in data.samples] == [s.image_id for s in collect_run(run, source, truth).samples[:2]]
    assert "AR@25" not in collect_run(run, source).rivals[0]


def test_missing_images_are_named(run, scenes, tmp_path):
    source, truth = scenes
    (tmp_path / "nothing").mkdir()
    data = collect_run(run, replace(source, root=tmp_path / "nothing"), truth)
    assert data.samples == [] and data.montages == []
    assert "could be read" in data.missing["samples"] and "can be read" in data.missing["montages"]
    assert len(data.recall) == 2  # needs no pixels


def test_images_that_went_are_left_out_and_other_folders_are_refused(run, scenes):
    source, truth = scenes
    data = collect_run(run, replace(source, ids=source.ids[1:]), truth)
    assert data.samples and data.montages
    with pytest.raises(ValueError, match=rf"images: expected the images of .*such as {source.ids[0]}, got 1 others"):
        collect_run(run, replace(source, ids=("elsewhere.png",)), truth)


def test_a_fresh_folder_says_what_is_not_there_yet(tmp_path, scenes):
    data = collect_run(tmp_path, scenes[0], None)
    assert set(data.missing) == {
        "steps", "samples", "origins", "montages", "clustering", "recall", "curves", "comparison",
    }  # fmt: skip
    assert render_report(data).count("Not shown") == 9
    with pytest.raises(FileNotFoundError, match="run: expected the folder of a run"):
        collect_run(tmp_path / "absent", scenes[0], None)


def test_broken_files_are_named(run, scenes):
    source, truth = scenes
    (run / "steps.jsonl").write_text('{"name": "mine"\n{"name": "cluster"}\n')
    with pytest.raises(ValueError, match=r"steps.jsonl, line 1: expected one JSON object per line"):
        collect_run(run, source, truth)
    (run / "steps.jsonl").unlink()
    (run / "comparison.json").write_text('{"AP": 1}')
    with pytest.raises(ValueError, match=r"comparison.json: expected a list of objects"):
        collect_run(run, source, truth)


BOX = (0, 0, 9, 9, 0)


@pytest.fixture
def stages(make_labels):
    """Six mined boxes on two images; stage 2 keeps three of them, one twice, and has three finds of its detectors."""
    mined = make_labels({"a": [BOX] * 4, "b": [BOX] * 2})
    later = make_labels({"a": [BOX] * 3, "b": [BOX] * 4})
    first = Lineage(
        born=[0] * 6,
        born_row=[0, 1, 2, 3, 0, 1],
        stride=[16, 32, 32, 32, 32, 16],
        k=[8, 8, 2, 2, 2, 16],
        cluster=[0] * 6,
    )
    last = Lineage(
        born=[0, 0, 1, 0, 2, 0, 2],
        born_row=[2, 2, 0, 0, 1, 1, 2],
        stride=[32, 32, 0, 32, 0, 16, 0],
        k=[2, 2, 0, 2, 0, 16, 0],
        cluster=[0, 0, -1, 0, -1, 0, -1],
    )
    return {0: replace(mined, stage=0, lineage=first), 2: replace(later, stage=2, lineage=last)}


def test_shares_of_every_stage(stages):
    assert origin_rows(stages) == [
        {
            "stage": "mined", "boxes": 6, "mined_left": 6, "mined": 6,
            "shares": {
                "stride 32, K 2": 3 / 6, "stride 32, K 8": 1 / 6, "stride 16, K 8": 1 / 6, "stride 16, K 16": 1 / 6,
            },
        },
        {
            "stage": "stage 2", "boxes": 7, "mined_left": 3, "mined": 6,
            "shares": {"stride 32, K 2": 3 / 7, "stride 16, K 16": 1 / 7, "stage 1": 1 / 7, "stage 2": 2 / 7},
        },
    ]  # fmt: skip
    assert list(origin_rows(stages)[0]["shares"]) == [  # coarsest first
        "stride 32, K 2", "stride 32, K 8", "stride 16, K 8", "stride 16, K 16",
    ]  # fmt: skip


def test_stages_without_lineage_or_boxes(stages, make_labels):
    old = replace(stages[0], lineage=None)
    assert origin_rows({0: old}) == []
    assert [row["stage"] for row in origin_rows({0: old, 2: stages[2]})] == ["stage 2"]
    assert origin_rows({2: stages[2]})[0]["mined"] is None
    mined = replace(old, lineage=Lineage.first_seen(0, old.offsets))
    assert origin_rows({0: mined})[0]["shares"] == {"mined": 1}
    empty = make_labels({"a": []})
    rows = origin_rows({0: replace(empty, stage=0, lineage=Lineage.first_seen(0, empty.offsets))})
    assert rows == [{"stage": "mined", "boxes": 0, "mined_left": 0, "mined": 0, "shares": {}}]


def test_legend_names_what_is_drawn(stages):
    shown = births(stages, truth=True)
    assert [title for title, _ in shown] == ["mined", "stage 1", "stage 2", "labelled by people"]
    assert len({colour for _, colour in shown}) == 4
    assert births({0: stages[0]}, truth=False) == [("mined", birth_colour(0))]
    boxes = stages[2].image(1)
    assert birth_colours(boxes, np.array([1, 0])) == [birth_colour(2), birth_colour(0)]
    assert birth_colours(replace(boxes, lineage=None), np.array([0])) == [birth_colour(-1)]

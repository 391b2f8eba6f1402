"""Few labels become many on drawn scenes: every stage, its resume, what people made, and what cannot be done."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.coco import write_coco
from simdetr.data.images import open_images
from simdetr.data.label_files import read_labels
from simdetr.data.labels import Labels
from simdetr.labelling import autolabel as module
from simdetr.labelling.autolabel import (
    AutolabelRun,
    AutolabelSettings,
    NothingToLearnError,
    autolabel,
    encoder_for,
)
from simdetr.labelling.candidates import read_candidates
from simdetr.labelling.consensus import Consensus
from simdetr.labelling.shots import LabellingInputs, renamed
from simdetr.training.run_folder import RunMismatchError

SETTINGS = AutolabelSettings(
    score_rule="per_class_top",
    per_shot=1,
    encoder="colour-texture",
    corrector="cascade",
    corrector_steps=2,
    ignore_above=0.0,
    background_shots=0,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, scenes, shots, pretrained, tiny_config):
    truth = scenes / "instances.json"
    out = tmp_path_factory.mktemp("auto") / "run"
    return autolabel(scenes, shots, out, [tiny_config], init=pretrained, truth=truth, settings=SETTINGS)


@pytest.fixture
def again(finished, tmp_path, scenes, shots, pretrained, tiny_config):
    """Runs a copy of the finished one once more."""
    copy = tmp_path / "copy"
    shutil.copytree(finished.path, copy)

    def run(settings=SETTINGS, **changes):
        arguments = {"images": scenes, "shots": shots, "out": copy, "config": [tiny_config], "init": pretrained}
        return autolabel(**arguments | {"truth": scenes / "instances.json"} | changes, settings=settings)

    return run


def written(folder):
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }


def test_results_and_counts_are_there(finished, scenes, shots):
    rows = json.loads(finished.stages.read_text())
    assert [row["stage"] for row in rows] == ["source", "verify", "correct"]
    found = read_candidates(finished.candidates("correct"))
    assert rows[-1]["counts"] == found.counts() and sum(rows[0]["counts"].values()) == len(found.reason)
    kept = [row["counts"]["kept"] for row in rows]
    assert kept[0] >= kept[1] >= kept[2] > 0
    objects = len(read_labels(scenes / "instances.json").boxes_xyxy)
    assert all(row["quality"]["objects"] == objects for row in rows)
    assert (finished.detector / "model.safetensors").is_file()
    labels, given = read_labels(finished.labels), read_labels(shots)
    assert not labels.crowd.any() and len(labels.boxes_xyxy) == kept[2] + len(given.boxes_xyxy)
    for image_id in given.image_ids:  # a person's boxes come first, and as they were
        np.testing.assert_array_equal(
            labels.of(image_id).boxes_xyxy[: len(given.of(image_id))], given.of(image_id).boxes_xyxy
        )


def test_what_is_rejected_on_labelled_images_is_ignored_in_training(finished):
    training = read_labels(finished.training_labels)
    found = read_candidates(finished.candidates("correct"))
    assert training.crowd.any()
    kept = found.evidence["corrected_xyxy"][found.kept]
    objects = training.boxes_xyxy[~training.crowd]
    assert all((np.abs(objects - box).max(axis=1) < 1e-4).any() for box in kept)


def test_nothing_is_done_twice(again):
    run = again()
    before = written(run.path)
    again()
    assert {n: t for n, t in written(run.path).items() if t != before.get(n)}.keys() <= {
        "stages.json", "labels.json", "training.parquet", "retrained.json", "report/index.html", ".leader.lock"
    }  # fmt: skip


def test_another_threshold_needs_no_encoder(again, monkeypatch):
    def encode(self, crops):
        raise AssertionError("the encoder was asked again")

    monkeypatch.setattr(module.CropEncoder, "forward", encode)
    run = again(replace(SETTINGS, score_rule="agreement", agreement=0.0, min_margin=0.0, corrector="none"))
    rows = json.loads(run.stages.read_text())
    assert rows[0]["counts"]["kept"] > 0


def test_what_the_views_say_moves_boxes_and_rejects(again, monkeypatch):
    """Of three candidates the second is not seen again; boxes of the others become what the views say."""

    def scripted(loaded, source, labels, **options):
        seen = np.resize(np.array([3, 0, 1]), len(labels.boxes_xyxy))
        return Consensus(labels.boxes_xyxy + np.float32(1), seen, np.full(len(seen), 0.9, np.float32))

    monkeypatch.setattr(module, "consensus", scripted)
    run = again(replace(SETTINGS, corrector="views"))
    found = read_candidates(run.candidates("correct"))
    verified = read_candidates(run.candidates("verify")).kept
    assert found.evidence["seen_again"][verified].tolist() == np.resize([3, 0, 1], len(verified)).tolist()
    assert (np.delete(found.evidence["seen_again"], verified) == -1).all()
    assert found.counts()["not_seen_again"] == (np.resize([3, 0, 1], len(verified)) == 0).sum() > 0
    moved = found.evidence["corrected_xyxy"] - found.labels.boxes_xyxy
    assert (moved[verified] == 1).all() and not np.delete(moved, verified, axis=0).any()


def test_a_killed_stage_is_made_again_and_the_others_are_not(again, finished):
    copy = again().path
    (copy / "verify.json").unlink()  # as if killed before its mark was written
    before = written(copy)
    run = again()
    after = written(copy)
    assert after["source.parquet"] == before["source.parquet"] and after["verify.parquet"] != before["verify.parquet"]
    assert read_candidates(run.candidates("verify")).counts() == read_candidates(finished.candidates("verify")).counts()


def test_other_shots_need_another_folder(again, shots, tmp_path):
    fewer = read_labels(shots)
    write_coco(fewer.select(fewer.image_ids[:4]), tmp_path / "fewer.json")
    with pytest.raises(RunMismatchError, match=r"autolabel\.shots"):
        again(shots=tmp_path / "fewer.json")


def test_people_have_the_last_word(again, scenes, tmp_path):
    truth = read_labels(scenes / "instances.json")
    own = truth.select(truth.image_ids[6:8])
    own = own.rows(np.arange(1, len(own.boxes_xyxy)))  # a person may think less of an object than the truth does
    write_coco(own, tmp_path / "people.json")
    run = again(people=tmp_path / "people.json")
    labels, found = read_labels(run.training_labels), read_candidates(run.candidates("correct"))
    for image_id in own.image_ids:
        np.testing.assert_array_equal(labels.of(image_id).boxes_xyxy, own.of(image_id).boxes_xyxy)
        rows = slice(*found.labels.offsets[found.labels.row_of(image_id) :][:2].tolist())
        assert set(found.reason[rows]) <= {"person"}


def test_exemplars_may_lie_elsewhere(tmp_path, scenes, shots):
    few = read_labels(shots)
    folder = tmp_path / "exemplars"
    folder.mkdir()
    for image_id in few.image_ids:
        shutil.copyfile(scenes / image_id, folder / f"own_{Path(image_id).name}")
    elsewhere = renamed(few, {image_id: f"own_{Path(image_id).name}" for image_id in few.image_ids})
    write_coco(elsewhere, folder / "shots.json")
    for place in (None, folder):
        inputs = LabellingInputs.read(scenes, folder / "shots.json", place)
        assert inputs.pool == tuple(open_images(scenes).ids)
        assert all(inputs.images.path_of(image_id).is_file() for image_id in inputs.shots.image_ids)
        assert set(inputs.shots.image_ids).isdisjoint(inputs.pool)
    with pytest.raises(LabelError, match=r"shots: 5 of 5 images are not in .* --shot_images"):
        LabellingInputs.read(scenes, folder / "shots.json", scenes)
    # the same files under another folder's name are the same images
    inputs = LabellingInputs.read(scenes, shots, scenes)
    assert set(inputs.shots.image_ids) <= set(inputs.pool) and len(inputs.images) == len(inputs.pool)


def test_no_candidate_is_an_error_that_loses_nothing(again):
    with pytest.raises(NothingToLearnError, match=r"none of .* detections was kept"):
        again(replace(SETTINGS, score_rule="absolute", min_score=1.0))
    assert again().detector.is_dir()


def test_no_detection_at_all_gives_labels_and_a_report_and_no_training(again, shots, tmp_path, monkeypatch):
    real = module.predict
    monkeypatch.setattr(module, "predict", lambda *a, **k: real(*a, **k).rows(np.zeros(0, np.int64)))
    monkeypatch.setattr(module, "retrain", lambda *_: pytest.fail("trained on nothing new"))
    run = AutolabelRun(tmp_path / "copy")
    for path in (*run.path.glob("*.json"), run.report):
        path.unlink()
    with pytest.raises(NothingToLearnError, match="none of 0 detections was kept"):
        again()
    np.testing.assert_array_equal(read_labels(run.labels).boxes_xyxy, read_labels(shots).boxes_xyxy)
    assert "The detector found nothing" in run.report.read_text(encoding="utf-8")
    assert json.loads(run.stages.read_text())[-1]["counts"] == {}


def test_a_class_that_swallows_others_is_warned_of(again, caplog):
    again(replace(SETTINGS, max_ratio=0.5))
    assert "far more labels than of the other classes, a sign of a collapse: {" in caplog.text


def test_a_pool_of_one_image(scenes, shots, pretrained, tiny_config, tmp_path):
    source = open_images(scenes)
    (only,) = set(source.ids[-1:]) - set(read_labels(shots).image_ids)
    settings = replace(SETTINGS, score_rule="agreement", agreement=0.0, corrector="views", seen_again=0)
    run = autolabel(source.subset([only]), shots, tmp_path / "run", [tiny_config], init=pretrained, shot_images=scenes,
                    settings=settings)  # fmt: skip
    found = read_candidates(run.candidates("correct"))
    assert {found.labels.image_ids[found.labels.owners[row]] for row in found.kept} == {only}
    assert only in read_labels(run.labels) and run.detector.is_dir()


def test_a_class_that_no_image_of_the_pool_holds(scenes, pretrained, tiny_config, tmp_path, monkeypatch, caplog):
    """Half of the objects are taken for a class whose one exemplar looks like none of them."""
    truth = read_labels(scenes / "instances.json")
    folder, few = tmp_path / "exemplars", truth.select(truth.image_ids[:3])
    for image_id in few.image_ids:
        (folder / image_id).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(scenes / image_id, folder / image_id)
    board = np.indices((64, 80)).sum(axis=0) // 2 % 2
    Image.fromarray(np.where(board[..., None], (0, 255, 0), (255, 0, 255)).astype(np.uint8)).save(folder / "ghost.png")
    categories = (*truth.categories, Category(99, "ghost"))
    ghost = ImageLabels.build("ghost.png", (64, 80), [[20, 20, 50, 50]], [len(truth.categories)])
    images = [few.image(row) for row in range(len(few))]
    write_coco(Labels.from_images([*images, ghost], categories), folder / "shots.json")

    def claimed(source, *_, **__):
        found = [truth.image(row) for row in range(len(truth))]
        classes = [np.where(np.arange(len(own)) % 2, own.classes, len(truth.categories)) for own in found]
        scored = [ImageLabels.build(own.image_id, own.size_hw, own.boxes_xyxy, new, np.full(len(own), 0.9))
                  for own, new in zip(found, classes, strict=True)]  # fmt: skip
        return Labels.from_images(scored, categories)

    monkeypatch.setattr(module, "predict", claimed)
    settings = replace(SETTINGS, score_rule="agreement", agreement=0.0, corrector="none")
    run = autolabel(scenes, folder / "shots.json", tmp_path / "run", [tiny_config], init=pretrained, settings=settings)
    found = read_candidates(run.candidates("correct"))
    taken = found.labels.classes == len(truth.categories)
    assert len(found.kept) and set(found.reason[taken]) == {"other_class"}
    assert json.loads(run.stages.read_text())[1]["counts"]["other_class"] >= taken.sum() > 0
    assert "classes with shots of which no candidate was kept: " in caplog.text and "ghost" in caplog.text
    labels = read_labels(run.labels)
    assert (labels.classes == len(truth.categories)).sum() == 1, "the exemplar itself"


def test_precision_is_measured_on_left_out_shots(again, monkeypatch):
    seen = {}
    original = module.left_out_scores

    def spy(*arguments):
        seen["scores"], seen["right"] = original(*arguments)
        return seen["scores"], seen["right"]

    monkeypatch.setattr(module, "left_out_scores", spy)
    run = again(replace(SETTINGS, score_rule="precision", precision=0.0, corrector="none"))
    assert len(seen["scores"]) == len(seen["right"]) > 0
    labels = read_labels(run.path / "left_out" / "labels.parquet")
    assert len(labels) == 4  # every fifth image of the shots is left out


def test_the_encoder_of_the_pretraining_is_the_default(pretrained, tmp_path):
    assert type(encoder_for(None, pretrained)).__name__ == "ColourTextureEncoder"
    assert type(encoder_for(None, pretrained / "stage1" / "detector")).__name__ == "ColourTextureEncoder"
    assert encoder_for("efficientnet-lite0", pretrained) == "efficientnet-lite0"
    with pytest.raises(ValueError, match="does not say what it was mined with; name one"):
        encoder_for(None, tmp_path)


def test_background_votes_too(again):
    run = again(
        replace(SETTINGS, background_shots=4, corrector="none", neighbours=1, agreement=0.0, score_rule="agreement")
    )
    found = read_candidates(run.candidates("verify"))
    assert (found.reason == "negative").any() and (found.evidence["vote"][found.reason == "negative"] == -1).all()


def test_classes_known_before_are_guarded(scenes, pretrained, tiny_config, tmp_path):
    """One class is known, and labelled on some images; the others are new."""
    truth = read_labels(scenes / "instances.json")
    old = int(truth.classes[0])
    novel = truth.select(truth.image_ids[:5])
    write_coco(novel.rows(np.flatnonzero(novel.classes != old)), tmp_path / "shots.json")
    write_coco(truth.rows(np.flatnonzero(truth.classes == old)), tmp_path / "base.json")
    arguments = {"init": pretrained, "base": tmp_path / "base.json", "settings": replace(SETTINGS, corrector="none")}
    run = autolabel(scenes, tmp_path / "shots.json", tmp_path / "run", [tiny_config], **arguments)
    assert json.loads(run.base.read_text()).keys() == {"init", "few_shot", "retrained"}
    found = read_candidates(run.candidates("correct"))
    assert len(found.kept) and old not in found.labels.classes[found.kept]
    assert (found.reason[found.labels.classes == old] != "").all()
    training = read_labels(run.training_labels)
    assert (training.classes[~training.crowd] == old).any()  # its own labels are learnt again


def test_the_guard_says_what_was_lost(finished, pretrained, scenes, tmp_path, monkeypatch, caplog):
    truth = read_labels(scenes / "instances.json")
    new = int(truth.classes[0])
    write_coco(truth.rows(np.flatnonzero(truth.classes == new)), tmp_path / "shots.json")
    write_coco(truth.rows(np.flatnonzero(truth.classes != new)), tmp_path / "base.json")
    inputs = LabellingInputs.read(scenes, tmp_path / "shots.json", base=tmp_path / "base.json")
    values = iter([0.5, 0.49, 0.47, 0.5, 0.49, 0.481])
    monkeypatch.setattr(module, "coco_metrics", lambda truth, found: {"AP": next(values)})
    detectors = dict.fromkeys(("init", "few_shot", "retrained"), finished.detector)
    for warned in (True, False):
        caplog.clear()
        scores = module.guard_base(finished, inputs, detectors, "cpu")
        assert ("have lost: AP" in caplog.text) == warned and scores["init"] == 0.5

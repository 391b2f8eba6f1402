"""The whole method on a dozen scenes with the smallest detector: results, resuming, bad input."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from simdetr import pipeline
from simdetr.data.annotations import LabelError
from simdetr.data.images import open_images, read_image
from simdetr.data.label_files import read_labels, write_result
from simdetr.data.labels import Labels
from simdetr.data.quarantine import TooManyUnreadableError
from simdetr.data.scenes import PLAIN_CLASSES, render_scenes
from simdetr.mining.batch import MiningConfig
from simdetr.mining.clustering_config import ClusteringConfig
from simdetr.mining.colour_texture import ColourTextureEncoder
from simdetr.mining.rivals import mine_rival
from simdetr.mining.store import ProposalStore, StoreError
from simdetr.training.detector_encoder import DetectorEncoder
from simdetr.training.fusion import Fusion
from simdetr.training.recipe_choice import for_pretraining
from simdetr.training.run_folder import LEADER_LOCK, RunFolder, RunMismatchError, detector_folder


def same_labels(a: Labels, b: Labels) -> bool:
    columns = ("sizes_hw", "offsets", "boxes_xyxy", "classes", "scores")
    return a.image_ids == b.image_ids and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in columns)


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory, scenes, tiny_config) -> RunFolder:
    """A pretraining of two stages of one step each."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    return pipeline.pretrain(
        scenes, out, [tiny_config], truth=scenes / "instances.json", options=["--self_training.stages=2"]
    )


def test_pretraining_makes_every_part_of_a_run(run, scenes):
    assert [path.name for path in sorted(run.path.iterdir()) if path.name != LEADER_LOCK] == [
        "config.yaml", "proposals", "report", "stage0", "stage1", "stage2", "steps.jsonl",
    ]  # fmt: skip
    steps = [json.loads(line)["name"] for line in run.steps.read_text().splitlines()]
    assert steps == ["mine", "cluster", "fit-stage1", "relabel-stage1", "fit-stage2", "relabel-stage2"]
    mined = read_labels(run.labels(0))
    assert (mined.stage, mined.num_classes, len(mined)) == (0, 3, 12)
    assert mined.scores.min() > 0 and mined.scores.max() <= 1 and len(np.unique(mined.scores)) > 3  # the miner's
    for stage in (1, 2):
        labels = read_labels(run.labels(stage))
        assert (labels.stage, labels.num_classes, labels.image_ids) == (stage, 3, mined.image_ids)
        assert max(np.diff(labels.offsets)) <= 5  # max_boxes
    for stage in (1, 2):
        agreement = json.loads((run.stage(stage) / "agreement.json").read_text())
        trained_on = read_labels(run.labels(stage - 1)).sharpened(0.15, 1.0)
        assert agreement["proposals_per_image"] == len(trained_on.classes) / 12 and agreement["classes"] == 3
        assert agreement["agreeing"] <= agreement["found"] <= agreement["boxes"] == len(trained_on.classes)
        assert f">{agreement['proposals_per_image']:.1f}</td>" in run.report.read_text()
    assert run.report.is_file()


def test_every_box_of_every_stage_says_where_it_comes_from(run, tmp_path):
    before = None
    for stage in range(3):
        labels = read_labels(run.labels(stage))
        lineage = labels.lineage
        assert ((lineage.born >= 0) & (lineage.born <= stage)).all()
        assert ((lineage.stride > 0) == (lineage.born == 0)).all()  # what mining knew has not been lost
        if before is not None:
            for image_id in labels.image_ids:
                own, old = labels.of(image_id), before.of(image_id)
                known = {(born, row) for born, row in zip(old.lineage.born, old.lineage.born_row, strict=True)}
                for born, row in zip(own.lineage.born, own.lineage.born_row, strict=True):
                    assert born == stage or (born, row) in known
        before = labels
        write_result(labels, tmp_path / "labels.json")
        assert (read_labels(tmp_path / "labels.json").lineage.born_row == lineage.born_row).all()
    assert "Not shown: these labels" not in run.report.read_text()
    assert "stride 32, K 2" in run.report.read_text()


def test_relabelled_boxes_do_not_overlap(run):
    for stage in (1, 2):
        labels = read_labels(run.labels(stage))
        for i in range(len(labels)):
            boxes = torch.from_numpy(labels.image(i).boxes_xyxy)
            overlaps = box_iou(boxes, boxes).fill_diagonal_(0)
            assert not (overlaps > Fusion().max_iou).any()


def test_the_same_call_again_changes_nothing(run, scenes, tiny_config):
    before = times(run.path)
    again = pipeline.pretrain(scenes, run.path, [tiny_config], options=["--self_training.stages=2"])
    assert again.path == run.path
    assert times(run.path) == before


def test_a_detector_that_cannot_be_built_is_refused_before_mining(scenes, tiny_config, tmp_path):
    with pytest.raises(ValueError, match="two_stage=True needs with_box_refine=True"):
        pipeline.pretrain(
            scenes,
            tmp_path / "run",
            [tiny_config],
            options=["--model.detector.init_args.two_stage=true", "--model.detector.init_args.with_box_refine=false"],
        )
    assert not (tmp_path / "run" / "proposals").exists()


def test_a_stage_can_be_added_on_other_devices(run, scenes, tiny_config, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run.path, out)
    options = ["--self_training.stages=3", "--trainer.devices=1", "--data.num_workers=1", "--inference.batch_size=3"]
    before = times(run.path)
    resumed = pipeline.pretrain(scenes, out, [tiny_config], options=options)
    assert resumed.stages() == [0, 1, 2, 3]
    assert resumed.has_detector(3) and read_labels(resumed.labels(3)).stage == 3
    for stage in range(3):
        assert same_labels(read_labels(resumed.labels(stage)), read_labels(run.labels(stage)))
    assert times(run.path) == before


def test_other_settings_on_a_run_are_refused(run, scenes, tiny_config):
    with pytest.raises(RunMismatchError, match=r"model\.lr is 0\.001 there, 0\.5 asked"):
        pipeline.pretrain(scenes, run.path, [tiny_config], options=["--self_training.stages=2", "--model.lr=0.5"])


def test_after_a_failed_first_step_a_smaller_batch_goes_on_without_mining(run, scenes, tiny_config, tmp_path, caplog):
    out = tmp_path / "run"
    shutil.copytree(run.path, out)
    shutil.rmtree(out / "stage2" / "detector")  # as if it had not fitted the memory
    (out / "stage2" / "labels.parquet").unlink()
    options = ["--self_training.stages=2", "--data.batch_size=1", "--trainer.accumulate_grad_batches=1"]
    with pytest.raises(RunMismatchError, match=r"self_training\.max_boxes"):
        pipeline.pretrain(scenes, out, [tiny_config], options=[*options, "--self_training.max_boxes=4"])
    with caplog.at_level("INFO"):
        resumed = pipeline.pretrain(scenes, out, [tiny_config], options=options)
    assert resumed.has_detector(2)
    assert "data.batch_size 2 -> 1" in caplog.text
    with pytest.raises(RunMismatchError, match=r"data\.batch_size is 1 there, 2 asked"):
        pipeline.pretrain(scenes, out, [tiny_config], options=["--self_training.stages=2"])


@pytest.fixture(scope="module")
def strangers(tmp_path_factory, scenes) -> Path:
    """Random boxes on the twelve scenes, 6 of each, as `simdetr rivals` stores them."""
    out = tmp_path_factory.mktemp("rivals") / "random"
    mine_rival("random", open_images(scenes), ColourTextureEncoder(), MiningConfig(image_size=64), out, max_boxes=6)
    return out


def test_given_proposals_take_the_place_of_mining(strangers, scenes, tiny_config, tmp_path):
    run = pipeline.pretrain(scenes, tmp_path / "run", [tiny_config], proposals=strangers)
    steps = [json.loads(line)["name"] for line in run.steps.read_text().splitlines()]
    assert steps == ["take", "cluster", "fit-stage1", "relabel-stage1"]
    labels, given = read_labels(run.labels(0)), list(ProposalStore(strangers).iter_rows())
    assert labels.num_classes == 3 and labels.image_ids == tuple(row.image_id for row in given)
    assert np.array_equal(labels.boxes_xyxy, np.concatenate([row.regions.boxes_xyxy for row in given]))
    before = times(run.path)
    shutil.copytree(strangers, tmp_path / "moved")
    pipeline.pretrain(scenes, run.path, [tiny_config], proposals=tmp_path / "moved")  # the same, elsewhere
    assert times(run.path) == before


def test_a_run_goes_on_with_the_proposals_it_was_begun_with(run, strangers, scenes, tiny_config, tmp_path, monkeypatch):
    with pytest.raises(RunMismatchError, match="was mined by itself"):
        pipeline.pretrain(scenes, run.path, [tiny_config], options=["--self_training.stages=2"], proposals=strangers)

    def die(*args, **kwargs):
        raise InterruptedError

    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(pipeline, "make_pseudo_labels", die)
        pipeline.pretrain(scenes, out, [tiny_config], proposals=strangers)
    others = tmp_path / "others"
    source, config = open_images(scenes), MiningConfig(image_size=64, seed=1)
    mine_rival("random", source, ColourTextureEncoder(), config, others, max_boxes=6)
    with pytest.raises(RunMismatchError, match="begun with --proposals of another folder"):
        pipeline.pretrain(scenes, out, [tiny_config], proposals=others)
    with pytest.raises(RunMismatchError, match="begun with --proposals, which are not given now"):
        pipeline.pretrain(scenes, out, [tiny_config])
    resumed = pipeline.pretrain(scenes, out, [tiny_config], proposals=strangers)
    assert resumed.has_detector(1)
    assert list(ProposalStore(strangers).written()) == list(ProposalStore(resumed.proposals).written())


def test_proposals_that_do_not_fit_are_refused_before_the_work(strangers, scenes, own_scenes, tiny_config, tmp_path):
    def pretrain(images=scenes, proposals=strangers, options=()):
        pipeline.pretrain(images, tmp_path / "run", [tiny_config], proposals=proposals, options=options)

    with pytest.raises(StoreError, match="was mined from 12 images, those to pretrain on are 6"):
        pretrain(images=own_scenes)
    with pytest.raises(StoreError, match=r"holds no proposals \(manifest.json is missing\)"):
        pretrain(proposals=tmp_path)
    with pytest.raises(ValueError, match="got 100 classes for 72 mined regions"):
        pretrain(options=["--clustering.num_classes=100"])
    part = tmp_path / "part"
    shutil.copytree(strangers, part)
    next(part.glob("shard-*.parquet")).unlink()
    with pytest.raises(StoreError, match=r"lacks 1 of 1 shards \(the first is shard-00000.parquet\)"):
        pretrain(proposals=part)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", ["added", "removed", "renamed"])
def test_images_that_changed_since_they_were_mined_are_refused(change, own_scenes, tiny_config, tmp_path):
    images, options = own_scenes / "images", ["--clustering.num_classes=1", "--self_training.stages=0"]
    first, second = sorted(images.iterdir())[:2]
    pipeline.pretrain(images, tmp_path / "run", [tiny_config], options=options)
    if change == "added":
        shutil.copyfile(first, images / "more.jpg")
    elif change == "removed":
        first.unlink()
    else:
        second.rename(images / "other.jpg")
    now = {"added": "7", "removed": "5", "renamed": "others, as many"}[change]
    with pytest.raises(RunMismatchError, match=f"was mined from 6 images, now there are {now}"):
        pipeline.pretrain(images, tmp_path / "run", [tiny_config], options=[options[0]])


@pytest.mark.parametrize("killed_in", ["make_pseudo_labels", "train", "relabel", "load_detector"])
def test_a_run_killed_between_steps_ends_with_the_same_labels(killed_in, run, scenes, tiny_config, tmp_path):
    out, options = tmp_path / "run", ["--self_training.stages=2"]

    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, killed_in, die)
        with pytest.raises(Killed):
            pipeline.pretrain(scenes, out, [tiny_config], options=options)
    done = {path: stamp for path, stamp in times(out).items() if path.suffix in (".parquet", ".safetensors")}
    assert done
    resumed = pipeline.pretrain(scenes, out, [tiny_config], options=options)
    for stage in range(3):
        assert same_labels(read_labels(resumed.labels(stage)), read_labels(run.labels(stage)))
    now = times(out)
    assert all(now[path] == stamp for path, stamp in done.items())


def test_the_next_stage_starts_from_the_last_or_from_scratch(run, scenes, tiny_config, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "train", lambda training, out: seen.append(training.model.init_weights))
    monkeypatch.setattr(pipeline.RunFolder, "has_detector", lambda self, stage: False)
    for from_scratch in ("false", "true"):
        recipe = pipeline.Recipe(
            (str(tiny_config),), (f"--data.images={scenes}", f"--self_training.from_scratch={from_scratch}")
        )
        pipeline.fit_stage(run, recipe, recipe.sections(), 2, num_images=1)
    assert seen == [str(run.detector(1)), None]


@pytest.mark.parametrize("killed_in", [None, "make_pseudo_labels"])
def test_a_stage_may_mine_anew_with_its_own_backbone(killed_in, scenes, tiny_config, tmp_path, monkeypatch):
    out, options = tmp_path / "run", ["--self_training.stages=2", "--self_training.remine=true"]
    if killed_in:
        once = getattr(pipeline, killed_in)

        def die(*args, **kwargs):
            if kwargs["folder"].name == "stage1":
                raise InterruptedError
            return once(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(pipeline, killed_in, die)
            pipeline.pretrain(scenes, out, [tiny_config], options=options)
        before = times(out / "stage1" / "proposals")
    run = pipeline.pretrain(scenes, out, [tiny_config], options=options)
    stores = [ProposalStore(folder) for folder in (run.proposals, *(run.stage(j) / "proposals" for j in (1, 2)))]
    mined, first, second = (store.manifest.encoder for store in stores)
    assert not mined.startswith("detector:") and first.startswith("detector:") and first != second
    assert first == DetectorEncoder(run.detector(1)).fingerprint
    assert not killed_in or times(out / "stage1" / "proposals") == before  # mined once
    steps = [json.loads(line)["name"] for line in run.steps.read_text().splitlines()]
    assert list(dict.fromkeys(name for name in steps if "stage1" in name)) == [
        "fit-stage1",
        "mine-stage1",
        "cluster-stage1",
    ]
    labels = [read_labels(run.labels(stage)) for stage in range(3)]
    for stage in (1, 2):
        rows = list(stores[stage].iter_rows(["boxes_xyxy"]))
        assert np.array_equal(labels[stage].boxes_xyxy, np.concatenate([row.regions.boxes_xyxy for row in rows]))
        assert (labels[stage].stage, labels[stage].num_classes) == (stage, 3)
        assert labels[stage].categories != labels[stage - 1].categories  # another clustering, other classes
    assert "Mine by the backbone of stage 1" in run.report.read_text()
    before = times(run.path)
    pipeline.pretrain(scenes, out, [tiny_config], options=options)
    assert times(run.path) == before


def test_class_unaware_pretraining(scenes, tiny_config, tmp_path):
    run = pipeline.pretrain(scenes, tmp_path, [tiny_config], options=["--clustering.num_classes=1"])
    assert read_labels(run.labels(0)).num_classes == read_labels(run.labels(1)).num_classes == 1


def test_too_few_regions_name_both_numbers_and_can_be_put_right(scenes, tiny_config, tmp_path):
    with pytest.raises(ValueError, match=r"5,?000") as caught:
        pipeline.pretrain(scenes, tmp_path, [tiny_config], options=["--clustering.num_classes=5000"])
    regions = json.loads((tmp_path / "steps.jsonl").read_text().splitlines()[0])["count"]
    assert str(regions) in str(caught.value).replace(",", "")
    run = pipeline.pretrain(scenes, tmp_path, [tiny_config])  # the mined proposals are used again
    assert read_labels(run.labels(0)).num_classes == 3


def test_mining_and_clustering_alone(run, scenes, tiny_config, tmp_path):
    store = pipeline.mine_proposals(scenes, tmp_path, [tiny_config])
    assert len(store) == 12
    assert same_labels(
        pipeline.cluster_proposals(tmp_path, ClusteringConfig(num_classes=3)), read_labels(run.labels(0))
    )


def test_clustering_of_its_own_and_pretraining_agree(run, scenes, tiny_config, tmp_path):
    shutil.copytree(run.proposals, tmp_path / "proposals")
    with pytest.raises(RunMismatchError, match=r"pretraining has begun in .*clusters by itself"):
        pipeline.cluster_proposals(run.path, ClusteringConfig(num_classes=4))
    pipeline.cluster_proposals(tmp_path, ClusteringConfig(num_classes=4, seed=2))
    with pytest.raises(RunMismatchError, match=r"stage0 holds 4 pseudo-classes, 3 asked. Give --clustering.num_cl"):
        pipeline.pretrain(scenes, tmp_path, [tiny_config])
    assert not (tmp_path / "config.yaml").exists()
    chosen = for_pretraining((), open_images(scenes), RunFolder(tmp_path))
    assert {"--clustering.num_classes=4", "--clustering.seed=2", "--clustering.spherical=true"} <= set(chosen.options)
    pipeline.cluster_proposals(tmp_path, ClusteringConfig(num_classes=1))
    assert "--clustering.num_classes=1" in for_pretraining((), open_images(scenes), RunFolder(tmp_path)).options


def test_predictions_on_a_path_a_folder_and_an_array_are_equal(run, scenes):
    folder = pipeline.predict(scenes, run.path)
    assert len(folder) == 12
    image_id = folder.image_ids[4]
    expected = folder.of(image_id)
    path = scenes / image_id
    pixels = read_image(path)
    singles = [
        pipeline.predict(path, run.path),
        pipeline.predict(str(path), run.detector(2)),
        pipeline.predict(pixels, run.path),
        pipeline.predict(pixels.permute(1, 2, 0).numpy(), run.path),
    ]
    for single in singles:
        found = single.image(0)
        assert len(expected.scores) == len(found.scores) > 0
        np.testing.assert_allclose(found.boxes_xyxy, expected.boxes_xyxy, atol=2e-3)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
        assert np.array_equal(found.classes, expected.classes)


def test_prediction_options(run, scenes):
    everything = pipeline.predict(scenes, run.path)
    threshold = float(np.median(everything.scores))
    assert pipeline.predict(scenes, run.path, min_score=threshold).scores.min() >= threshold
    assert max(np.diff(pipeline.predict(scenes, run.path, max_boxes=2).offsets)) == 2


@pytest.mark.parametrize("image", [torch.zeros(3, 8, 8), torch.zeros(8, 8, 3, dtype=torch.uint8)])
def test_arrays_of_another_kind_are_refused(image, run):
    with pytest.raises(ValueError, match=r"images: expected a uint8 array \[3, H, W\]"):
        pipeline.predict(image, run.path)


def test_finetuning_writes_class_ids_back_as_they_came(run, own_scenes, tiny_config, tmp_path):
    path = own_scenes / "instances.json"
    content = json.loads(path.read_text())
    new = {row["id"]: f"k{7 * row['id']}" if row["id"] % 2 else 100 * row["id"] for row in content["categories"]}
    for row in content["categories"]:
        row["id"] = new[row["id"]]
    for row in content["annotations"]:
        row["category_id"] = new[row["category_id"]]
    path.write_text(json.dumps(content))
    detector = pipeline.finetune(own_scenes, path, tmp_path / "ft", [tiny_config], init=run.path)
    before = times(tmp_path / "ft")
    assert pipeline.finetune(own_scenes, path, tmp_path / "ft", [tiny_config], init=run.path) == detector
    assert times(tmp_path / "ft").keys() == before.keys()
    found = pipeline.predict(own_scenes, detector)
    assert {category.id: category.name for category in found.categories} == {
        row["id"]: row["name"] for row in content["categories"]
    }
    assert not math.isnan(pipeline.evaluate(own_scenes, path, detector)["AP"])  # the classes are the truth's


def without_last_box(path):
    content = json.loads(path.read_text())
    content["annotations"].pop()
    path.write_text(json.dumps(content))


def test_corrected_labels_are_no_finished_training(own_scenes, tiny_config, tmp_path, caplog):
    labels, val = own_scenes / "instances.json", tmp_path / "val.json"
    shutil.copyfile(labels, val)
    arguments = (own_scenes, labels, tmp_path / "ft", [tiny_config])
    checked = {"val_images": own_scenes, "val_labels": val}
    detector = pipeline.finetune(*arguments, **checked)
    labels.write_bytes(labels.read_bytes())  # another date, and says the same
    with caplog.at_level("INFO"):
        assert pipeline.finetune(*arguments, **checked) == detector
    assert f"{detector} is finished already, nothing was trained" in caplog.text
    without_last_box(val)
    with pytest.raises(RunMismatchError, match=r"on other labels \(data\.val_labels changed since\)"):
        pipeline.finetune(*arguments, **checked)
    without_last_box(labels)
    with pytest.raises(RunMismatchError, match=r"\(data\.labels, data\.val_labels changed since\)"):
        pipeline.finetune(*arguments, **checked)
    (tmp_path / "ft" / "inputs.json").unlink()  # a folder of before there was a record
    assert pipeline.finetune(*arguments, **checked) == detector


def test_rows_of_a_comparison_are_of_one_set_of_labels(run, own_scenes, tiny_config, tmp_path):
    truth, val = own_scenes / "instances.json", tmp_path / "val.json"
    shutil.copyfile(truth, val)
    arguments = (own_scenes, truth, run.path, tmp_path / "cmp", [tiny_config])
    checked = {"val_images": own_scenes, "val_labels": val, "workers": 1}
    pipeline.compare(*arguments, **checked, fractions=(0.5,), seeds=(0,))
    without_last_box(val)
    with pytest.raises(RunMismatchError, match=r"on other labels \(val_labels changed since\)"):
        pipeline.compare(*arguments, **checked, fractions=(0.5,), seeds=(0, 1))


def test_evaluation_looks_at_labelled_images_only_and_refuses_strangers(run, own_scenes, scenes, tiny_config, tmp_path):
    detector = pipeline.finetune(own_scenes, own_scenes / "instances.json", tmp_path / "ft", [tiny_config])
    truth = own_scenes / "instances.json"  # six of the twelve
    assert pipeline.evaluate(scenes, truth, detector) == pytest.approx(
        pipeline.evaluate(own_scenes, truth, detector), nan_ok=True
    )
    assert pipeline.evaluate(own_scenes / "images", truth, detector) == pytest.approx(
        pipeline.evaluate(own_scenes, truth, detector), nan_ok=True
    )
    with pytest.raises(ValueError, match=r"none of the 1 images .* is in .*other.png.*000000\.jpg"):
        Image.new("RGB", (64, 64)).save(tmp_path / "other.png")
        pipeline.evaluate(tmp_path / "other.png", truth, detector)


def test_other_classes_of_validation_stop_before_the_first_step(own_scenes, scenes, tiny_config, run, tmp_path):
    path = own_scenes / "instances.json"
    content = json.loads(path.read_text())
    content["categories"] = [{"id": 900 + row["id"], "name": f"other {row['name']}"} for row in content["categories"]]
    content["annotations"] = [row | {"category_id": 900 + row["category_id"]} for row in content["annotations"]]
    path.write_text(json.dumps(content))
    truth, out = scenes / "instances.json", tmp_path / "out"
    with pytest.raises(LabelError, match=r"own/instances.json and .*scenes0/instances.json have no category in common"):
        pipeline.finetune(scenes, truth, out, [tiny_config], val_images=own_scenes, val_labels=path)
    assert not (out / "detector").exists() and not [*out.rglob("metrics.csv")]
    with pytest.raises(LabelError, match="no category in common"):
        pipeline.compare(
            scenes, truth, run.path, tmp_path / "cmp", [tiny_config], val_images=own_scenes, val_labels=path
        )
    assert not (tmp_path / "cmp").exists()


@pytest.fixture
def compare(run, scenes, tiny_config, tmp_path):
    """Compare on the twelve scenes, in this process."""

    def make(out="cmp", **more):
        truth = scenes / "instances.json"
        given = {"val_images": scenes, "val_labels": truth, "fractions": (0.5,), "seeds": (0,), "workers": 1}
        return pipeline.compare(scenes, truth, run.path, tmp_path / out, [tiny_config], **given | more)

    return make


def keys_of(rows):
    return [(row["initialisation"], row["label_budget"], row["seed"]) for row in rows]


def test_comparison_resumes_row_by_row(compare, tmp_path, monkeypatch):
    evaluate = pipeline.evaluate
    calls = []

    def dying(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(pipeline, "evaluate", dying)
    with pytest.raises(KeyboardInterrupt):
        compare()
    found = compare()
    assert len(calls) == 3  # one was done, one interrupted and done again
    assert keys_of(found.rows) == [("random", 0.5, 0), ("stage2", 0.5, 0)]
    assert json.loads((tmp_path / "cmp" / "comparison.json").read_text()) == found.rows
    with pytest.raises(RunMismatchError, match=r"model\.lr"):
        compare(options=["--model.lr=0.7"])


def test_arms_budgets_and_seeds_may_be_added_and_pairs_learn_from_the_same_labels(compare, run, tmp_path):
    first = compare()
    before = times(tmp_path / "cmp" / "0.5-seed0-stage2")
    more = compare(arms=["random", "stage1", f"checkpoint={run.detector(1)}"], shots=(1,), seeds=(0, 1))
    assert times(tmp_path / "cmp" / "0.5-seed0-stage2") == before
    expected = [
        (arm, budget, seed)
        for budget in (0.5, "1-shot")
        for arm in ("random", "stage1", "checkpoint")
        for seed in (0, 1)
    ]
    assert keys_of(more.rows) == expected
    assert more.rows[0] == first.rows[0]
    kept = json.loads((tmp_path / "cmp" / "comparison.json").read_text())
    assert keys_of(kept) == [*expected, ("stage2", 0.5, 0)]  # no row is lost
    labels = {}
    for row in kept:
        labels.setdefault((row["label_budget"], row["seed"]), set()).add((row["images"], row["labels"]))
    assert all(len(counts) == 1 for counts in labels.values())
    one = [row for row in kept if row["label_budget"] == "1-shot"]
    assert all(row["labels"] <= 8 for row in one)  # classes
    assert (more.baseline, more.subject) == ("random", "stage1")
    assert set(more.verdicts) == {"stage1", "checkpoint"}
    assert (tmp_path / "cmp" / "report" / "index.html").is_file()
    summary = json.loads((tmp_path / "cmp" / "summary.json").read_text())
    assert summary["verdict"]["answer"] == more.verdict.answer == "cannot tell yet"  # one step teaches nothing


def test_arms_of_their_own_are_pretrained_once_on_the_same_proposals(compare, run, tmp_path):
    found = compare(arms=["random", "class-unaware", "from-scratch"])
    assert keys_of(found.rows) == [(arm, 0.5, 0) for arm in ("random", "class-unaware", "from-scratch")]
    unaware, scratch = (RunFolder(tmp_path / "cmp" / "pretraining" / arm) for arm in ("class-unaware", "from-scratch"))
    assert read_labels(unaware.labels(0)).num_classes == 1
    assert read_labels(scratch.labels(0)).fingerprint() == read_labels(run.labels(0)).fingerprint()
    assert unaware.stages() == scratch.stages() == run.stages()  # as many steps
    before = times(unaware.path)
    assert compare(arms=["random", "class-unaware", "from-scratch"]).rows == found.rows
    assert times(unaware.path) == before
    spent = {cost.initialisation: cost.pretraining_s for cost in found.costs}
    assert spent["random"] == 0 < spent["class-unaware"]


def test_without_validation_images_a_part_of_the_labelled_ones_is_held_out(compare, tmp_path):
    compare(val_images=None, val_labels=None, holdout=0.25, fractions=(1.0,))
    train, val = (read_labels(tmp_path / "cmp" / "labels" / f"{name}.json") for name in ("train", "val"))
    assert (len(train), len(val)) == (9, 3) and not set(train.image_ids) & set(val.image_ids)
    rows = json.loads((tmp_path / "cmp" / "comparison.json").read_text())
    assert {row["images"] for row in rows} == {9}


def test_a_comparison_of_an_earlier_version_is_refused_in_words(compare, tmp_path):
    (tmp_path / "cmp").mkdir()
    old = [{"initialisation": "pretrained", "label_budget": 0.5, "seed": 0, "AP": 0.2}]
    (tmp_path / "cmp" / "comparison.json").write_text(json.dumps(old))
    with pytest.raises(RunMismatchError, match=r"is of an earlier version.*choose another out"):
        compare()


def test_trainings_side_by_side_give_the_same_rows(compare, caplog):
    alone = compare("alone", seeds=(0, 1))
    with caplog.at_level("INFO"):
        together = compare("together", seeds=(0, 1), workers=2)

    def scores(rows):
        return [{name: value for name, value in row.items() if name not in ("seconds", "device")} for row in rows]

    assert scores(together.rows) == scores(alone.rows)
    assert sum("random, 50 % of the labels" in record.message for record in caplog.records) == 2


def test_a_training_that_fails_side_by_side_says_why(compare, monkeypatch, tmp_path):
    compare(fractions=(0.5,))
    (tmp_path / "cmp" / "0.5-seed0-stage2" / "row.json").unlink()
    (tmp_path / "cmp" / "0.5-seed0-stage2" / "detector" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match=r"a training failed: .*process\d.log"):
        compare(fractions=(0.5,), workers=2)


def test_pretraining_warns_of_what_was_mined_before_it_trains(scenes, tiny_config, tmp_path, monkeypatch, caplog):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "fit_stage", stop)
    with pytest.raises(KeyboardInterrupt):
        pipeline.pretrain(scenes, tmp_path / "run", [tiny_config], truth=scenes / "instances.json")
    assert "before any training: only 12 images were mined" in caplog.text


@pytest.mark.slow
def test_a_planted_order_comes_out(tmp_path):
    """A detector that was trained on the truth of these very images beats random weights, in so many words."""
    folder = Path(pipeline.__file__).parent / "commands"
    configs = [folder / "quickstart_pretrain.yaml", folder / "quickstart_finetune.yaml"]
    quiet = ("--trainer.enable_progress_bar=false", "--data.short_sides=[96]", "--data.batch_size=4")
    scenes, truth = tmp_path / "scenes", tmp_path / "scenes" / "instances.json"
    render_scenes(scenes, 24, (96, 96), 0, PLAIN_CLASSES, "plain")
    taught = pipeline.finetune(scenes, truth, tmp_path / "taught", configs, options=(*quiet, "--trainer.max_steps=140"))
    found = pipeline.compare(
        scenes,
        truth,
        taught,
        tmp_path / "cmp",
        configs,
        val_images=scenes,
        val_labels=truth,
        arms=["random", "pretrained"],
        workers=1,
        fractions=(0.5,),
        seeds=(0, 1, 2),
        options=(*quiet, "--trainer.max_steps=10"),
    )
    assert found.verdict.answer == "pays", found.text()
    gains = [one for one in found.differences if one.metric == "AP"]
    assert [one.initialisation for one in gains] == ["pretrained"] and gains[0].both.low > 5
    assert [one.bound for one in found.saved] == ["at least"]


def test_a_half_written_detector_is_trained_again(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    (copy / "stage2" / "detector" / "config.json").unlink()
    assert detector_folder(copy) == copy / "stage1" / "detector"


@pytest.mark.parametrize("path", ["missing", "empty"])
def test_a_folder_without_detector_is_named(path, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="checkpoint: expected a run folder"):
        detector_folder(tmp_path / path)


# --- bad input ---


@pytest.fixture
def many_scenes(scenes, tmp_path):
    """24 images; a second copy of the twelve under other names."""
    folder = tmp_path / "many"
    folder.mkdir()
    for path in (scenes / "images").iterdir():
        for copy in "ab":
            shutil.copyfile(path, folder / f"{copy}{path.name}")
    return folder


def test_an_unreadable_image_is_put_aside_and_the_run_goes_on(many_scenes, tiny_config, tmp_path):
    (many_scenes / "a000003.jpg").write_bytes(b"no picture")
    run = pipeline.pretrain(many_scenes, tmp_path / "run", [tiny_config])
    for path in (run.proposals / "quarantine.csv", run.stage(1) / "quarantine.csv"):
        with path.open() as file:
            assert [row["image_id"] for row in csv.DictReader(file)] == ["a000003.jpg"]
    assert len(read_labels(run.labels(1))) == 23


def test_an_image_that_becomes_unreadable_before_training_or_prediction(many_scenes, tiny_config, tmp_path):
    labels = pipeline.mine_proposals(many_scenes, tmp_path / "run", [tiny_config])
    assert len(labels) == 24
    (many_scenes / "a000003.jpg").write_bytes(b"no picture")
    run = pipeline.pretrain(many_scenes, tmp_path / "run", [tiny_config], options=["--data.batch_size=24"])
    with (run.stage(1) / "quarantine.csv").open() as file:
        assert [row["image_id"] for row in csv.DictReader(file)] == ["a000003.jpg"]
    assert len(pipeline.predict(many_scenes, run.path)) == 23


def test_too_many_unreadable_images_stop_training_and_prediction(run, own_scenes, tiny_config, tmp_path):
    for path in sorted((own_scenes / "images").iterdir())[:2]:
        path.write_bytes(b"")
    arguments = (own_scenes, own_scenes / "instances.json", tmp_path / "ft", [tiny_config])
    with pytest.raises(TooManyUnreadableError, match=r"of 6 images are unreadable.*more with --mining\.max_unreadable"):
        pipeline.finetune(*arguments, options=["--data.batch_size=6"])
    assert pipeline.finetune(*arguments, options=["--data.batch_size=6", "--mining.max_unreadable=0.5"]).is_dir()
    with pytest.raises(TooManyUnreadableError, match=r"of 6 images are unreadable.*more with --max_unreadable"):
        pipeline.predict(own_scenes, run.path, quarantine=tmp_path / "quarantine.csv", max_unreadable=0.1)
    assert (tmp_path / "quarantine.csv").is_file()


def test_a_run_may_allow_more_unreadable_images_than_it_was_begun_with(own_scenes, tiny_config, tmp_path):
    """Between mining and relabelling, also where the run was begun with other settings of what is allowed."""
    arguments = (own_scenes, tmp_path / "run", [tiny_config])
    pipeline.pretrain(*arguments, options=["--clustering.num_classes=1", "--self_training.stages=0"])
    min((own_scenes / "images").iterdir()).write_bytes(b"")
    options = ["--clustering.num_classes=1", "--data.batch_size=6"]
    with pytest.raises(TooManyUnreadableError, match=r"--mining\.max_unreadable"):
        pipeline.pretrain(*arguments, options=options)
    run = pipeline.pretrain(*arguments, options=[*options, "--mining.max_unreadable=0.2"])
    assert len(read_labels(run.labels(1))) == 5


@pytest.mark.parametrize("listed", [True, False])
def test_prediction_and_evaluation_do_without_what_cannot_be_read(listed, run, own_scenes, tmp_path, caplog):
    paths, truth = sorted((own_scenes / "images").iterdir()), own_scenes / "instances.json"
    whole = pipeline.predict(own_scenes, run.path)
    for path in paths[:2]:
        path.write_bytes(b"")
    aside = {"quarantine": tmp_path / "quarantine.csv"} if listed else {}
    found = pipeline.predict(own_scenes, run.path, **aside)
    assert same_labels(found, whole.select(whole.image_ids[2:]))
    assert "2 of 6 images could not be read" in caplog.text
    assert pipeline.evaluate(own_scenes, truth, run.path)["AR@100"] >= 0
    assert "what is on them counts as missed" in caplog.text
    with pytest.raises(TooManyUnreadableError, match="2 of 6 images are unreadable, more than 10%"):
        pipeline.evaluate(own_scenes, truth, run.path, max_unreadable=0.1)
    for path in paths:
        path.write_bytes(b"")
    aside = {"quarantine": tmp_path / "all.csv"} if listed else {}
    with pytest.raises(TooManyUnreadableError, match=r"6 of 6 images are unreadable.*repair or remove the files$"):
        pipeline.predict(own_scenes, run.path, **aside)


def test_an_empty_folder_is_an_error(tiny_config, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        pipeline.pretrain(tmp_path / "empty", tmp_path / "run", [tiny_config])
    assert not (tmp_path / "run").exists()


def test_one_image_is_enough(scenes, tiny_config, tmp_path):
    run = pipeline.pretrain(
        scenes / "images" / "000001.jpg", tmp_path, [tiny_config], options=["--clustering.num_classes=1"]
    )
    assert len(read_labels(run.labels(1))) == 1


def test_an_output_that_cannot_be_written_fails_before_the_work(scenes, tiny_config, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("simdetr.recipe.mine", lambda *a, **k: pytest.fail("mining began"))
    with pytest.raises(OSError, match="file"):
        pipeline.pretrain(scenes, tmp_path / "file" / "run", [tiny_config])
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(PermissionError):
            pipeline.pretrain(scenes, tmp_path / "locked" / "run", [tiny_config])

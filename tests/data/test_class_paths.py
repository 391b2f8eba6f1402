"""Configs and checkpoints of before: every moved class path leads to a class of today."""

from __future__ import annotations

import importlib

import pytest
import yaml

from simdetr.data.class_paths import MOVED, class_of, current, current_arguments
from simdetr.detectors import Detector
from simdetr.heads import HeadedDetector
from simdetr.recipe import Recipe

CLASSES = {
    "simdetr.data.mosaic.Mosaic": "simdetr.data.augmentation.Mosaic",
    "simdetr.data.transforms.RandomMirror": "simdetr.data.augmentation.RandomMirror",
    "simdetr.detectors.neck_free_loss.NeckFreeLoss": "simdetr.detectors.vidt_losses.NeckFreeLoss",
    "simdetr.evaluation.validation.CocoValidation": "simdetr.training.detection_task.CocoValidation",
    "simdetr.heads.attention_tap.Tap": "simdetr.heads.attention.Tap",
    "simdetr.heads.headed_backbone.HeadedBackbone": "simdetr.heads.headed.HeadedBackbone",
    "simdetr.heads.headed_detector.HeadedDetector": "simdetr.heads.headed.HeadedDetector",
    "simdetr.heads.non_local_attention.NonLocalAttention": "simdetr.heads.attention.NonLocalAttention",
    "simdetr.proposals.TimmEncoder": "simdetr.mining.TimmEncoder",
    "simdetr.proposals.batch_mining.MiningConfig": "simdetr.mining.batch.MiningConfig",
    "simdetr.proposals.colour_texture.ColourTextureEncoder": "simdetr.mining.colour_texture.ColourTextureEncoder",
    "simdetr.proposals.features.TimmEncoder": "simdetr.mining.encoders.TimmEncoder",
    "simdetr.proposals.fitted_encoder.FittedEncoder": "simdetr.mining.encoders.FittedEncoder",
    "simdetr.training.checkpoints.AtomicCheckpointIO": "simdetr.training.train.AtomicCheckpointIO",
    "simdetr.training.convergence.StopOnConvergence": "simdetr.training.optimisation.StopOnConvergence",
    "simdetr.training.encoder_objectives.VICReg": "simdetr.encoder_training.objectives.VICReg",
    "simdetr.training.epoch_sampler.EpochBatchSampler": "simdetr.training.sampler.EpochBatchSampler",
    "simdetr.detectors.DeformableDETR": "simdetr.detectors.DeformableDETR",
    "simdetr.detectors.deformable_detr.DeformableDETR": "simdetr.detectors.deformable_detr.DeformableDETR",
}


@pytest.mark.parametrize(("before", "now"), CLASSES.items())
def test_every_class_path_of_before_leads_to_its_class(before, now):
    assert current(before) == now
    module, _, name = now.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)


def test_every_row_of_the_table_is_tried():
    tried = {before.rpartition(".")[0] for before in CLASSES}
    assert set(MOVED) <= tried


def test_text_around_class_paths_stays():
    assert current("a simdetr.proposals.x.simdetr and simdetr.json") == "a simdetr.mining.x.simdetr and simdetr.json"
    assert current("mysimdetr.proposals.features.TimmEncoder") == "mysimdetr.proposals.features.TimmEncoder"


def test_only_classes_of_the_wanted_kind_are_built():
    assert class_of("simdetr.heads.headed_detector.HeadedDetector", Detector) is HeadedDetector
    with pytest.raises(ValueError, match=r"expected a Detector of simdetr\.detectors, got"):
        class_of("simdetr.heads.HeadedDetector", Detector, ("detectors.",))
    for foreign in ("os.system", "simdetr.data.images.open_images", "simdetr.heads.Nothing"):
        with pytest.raises(ValueError, match="class_path: expected a Detector"):
            class_of(foreign, Detector)


def test_a_config_of_before_gives_the_same_recipe(tmp_path, tiny_config, scenes):
    content = yaml.safe_load(tiny_config.read_text(encoding="utf-8"))
    content["encoder"] = {
        "class_path": "simdetr.proposals.features.TimmEncoder",
        "init_args": {"model": "test_resnet", "pretrained": False, "random_weights": True},
    }
    older = tmp_path / "older.yaml"
    older.write_text(yaml.safe_dump(content), encoding="utf-8")
    newer = tmp_path / "newer.yaml"
    newer.write_text(current(older.read_text(encoding="utf-8")), encoding="utf-8")
    images = (f"--data.images={scenes}",)
    assert Recipe((str(older),), images).resolved()[1] == Recipe((str(newer),), images).resolved()[1]
    sections = Recipe((str(older),), (*images, "--encoder=simdetr.proposals.ColourTextureEncoder")).sections()
    assert sections.encoder.__class__.__module__ == "simdetr.mining.colour_texture"


@pytest.mark.parametrize("words", [("--config={}",), ("--config", "{}"), ("-c", "{}"), ("-c={}",)])
def test_config_files_are_read_however_they_are_named(tmp_path, words):
    older = tmp_path / "older.yaml"
    older.write_text("encoder: simdetr.proposals.TimmEncoder\n", encoding="utf-8")
    arguments = [word.format(older) for word in words]
    assert "simdetr.mining.TimmEncoder" in list(current_arguments(arguments))[-1]
    older.write_text("encoder: simdetr.mining.TimmEncoder\n", encoding="utf-8")
    assert list(current_arguments(arguments)) == arguments

"""Every shipped configuration trains one step; those of full size are shrunk by the tiny one of their detector."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import simdetr
from simdetr.encoder_training.fit_encoder import fit_encoder, read_settings
from simdetr.mining import FittedEncoder, MiningConfig
from simdetr.recipe import Recipe
from simdetr.training.train import train

REPOSITORY = Path(__file__).parents[1]
ENCODER_CONFIGS = sorted((REPOSITORY / "configs" / "encoder").glob("*.yaml"))
CONFIGS = sorted({*(REPOSITORY / "configs").rglob("*.yaml")} - {*ENCODER_CONFIGS})
BUILT_IN = sorted(Path(simdetr.__file__).parent.glob("*/*.yaml"))
SMALLEST = (
    "--trainer.max_steps=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--data.batch_size=2",
    "--data.num_workers=0",
    "--data.num_queries=10",
    "--data.short_sides=[64]",
    "--data.max_side=80",
)
TINY = {
    "DeformableDETR": ("tiny.yaml", {"backbone": "test_resnet"}),
    "DETReg": ("tiny.yaml", {"backbone": "test_resnet"}),
    "ViDT": ("vidt_tiny.yaml", {"backbone": "swin_pico"}),
    "TorchvisionDetector": ("faster_rcnn_tiny.yaml", {}),
    "rt_detr_v2": ("rt_detr_v2_tiny.yaml", {}),
    "lw_detr": ("lw_detr_tiny.yaml", {}),
    "rf_detr": ("rf_detr_tiny.yaml", {}),
    "HeadedDetector": (None, {"detector.init_args.backbone": "test_resnet", "detector.init_args.num_queries": 10}),
    "HeadedBackbone": (None, {"backbone": "test_resnet"}),
}
"""Config that shrinks those of a detector (or of a family of transformers'), where there is one, and arguments that
shrink it further."""


def kind_of(detector):
    """The key in ``TINY`` of a section ``detector``."""
    name = detector["class_path"].rpartition(".")[2]
    return detector["init_args"]["config"]["model_type"] if name == "TransformersDetector" else name


def test_there_are_configs():
    assert {path.relative_to(REPOSITORY / "configs").as_posix() for path in CONFIGS} >= {
        "tiny.yaml",
        "pretrain/deformable_detr_r50.yaml",
        "pretrain/detreg_r50.yaml",
        "finetune/deformable_detr_r50.yaml",
        "vidt_tiny.yaml",
        "pretrain/vidt_plus_swin_tiny.yaml",
        "finetune/vidt_plus_swin_tiny.yaml",
        "rt_detr_v2_tiny.yaml",
        "pretrain/rt_detr_v2.yaml",
        "lw_detr_tiny.yaml",
        "pretrain/lw_detr.yaml",
        "rf_detr_tiny.yaml",
        "pretrain/rf_detr.yaml",
        "pretrain/from_scratch_deformable_detr.yaml",
        "pretrain/from_scratch_vidt_plus.yaml",
        "faster_rcnn_tiny.yaml",
        "heads/landmarks_traffic_lights.yaml",
        "heads/landmarks_grid.yaml",
        "heads/localisation_fod.yaml",
        "heads/fixed_camera.yaml",
    }
    assert [path.name for path in BUILT_IN] == [
        "quickstart_finetune.yaml",
        "quickstart_pretrain.yaml",
        "recipe_finetune.yaml",
        "recipe_gpu.yaml",
        "recipe_laptop.yaml",
        "recipe_weights.yaml",
    ]


SMALLER = {
    "landmarks_grid.yaml": {"head.init_args.grid": "[2, 2]"},
    "recipe_weights.yaml": {"pretrained_backbone": "false"},  # the test's backbone has no weights
}
"""What else single configs need for images of 64 pixels."""


def test_recipes_of_the_document_mine_with_its_filters():
    """A config that says that it is the document's pretraining departs from it in no silent default."""
    claiming = [
        path
        for path in (REPOSITORY / "configs" / "pretrain").glob("*.yaml")
        if path.read_text().startswith("# The document's")
    ]
    assert len(claiming) == 5
    for path in claiming:
        untrained = "--encoder.init_args.random_weights=true"
        sections = Recipe((str(path),), ("--data.images=none", "--data.labels=none", untrained)).sections()
        mining, rounds = sections.mining, sections.self_training
        assert (rounds.fusion, rounds.min_certainty, rounds.sharpening) == (None, 0, 1), path.name
        assert mining.level_sets is None and list(mining.filters) == list(MiningConfig().filters), path.name
        assert len(mining.filters) == 5


SCRATCH = sorted((REPOSITORY / "configs" / "pretrain").glob("from_scratch_*.yaml"))


@pytest.mark.parametrize("path", SCRATCH, ids=lambda path: path.name)
def test_from_scratch_nothing_has_weights_and_all_of_the_backbone_learns(path):
    recipe = Recipe((str(path),), ("--data.images=none", "--data.labels=none"))
    detector = recipe.check_detector(2048)  # a detector that would freeze random weights is refused
    assert not recipe.brings_weights() and all(p.requires_grad for p in detector.parameters())
    config, _ = recipe.resolved()
    assert (config.encoder.class_path, config.trainer.max_epochs) == ("simdetr.mining.ColourTextureEncoder", 1000)
    assert config.model.backbone_lr == config.model.lr


@pytest.mark.parametrize("path", [*CONFIGS, *BUILT_IN], ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_trains_one_step(path, scenes, learned_backbone, tmp_path):
    detector = yaml.safe_load(path.read_text())["model"].get("detector")
    name, changes = TINY[kind_of(detector) if detector else "DeformableDETR"]
    tiny = [REPOSITORY / "configs" / name] if name else []
    configs = [path, *tiny] if detector else [*tiny, path]  # a config without detector is put after one that has it
    data = (f"--data.images={scenes}", f"--data.labels={scenes / 'instances.json'}")
    changes = changes | SMALLER.get(path.name, {})
    smallest = (*SMALLEST, *(f"--model.detector.init_args.{key}={value}" for key, value in changes.items()))
    if "DETReg" in str(detector):  # its backbone is frozen whole
        smallest = (*smallest, f"--model.backbone_weights={learned_backbone}")
    recipe = Recipe(tuple(str(config) for config in configs), (*data, *smallest))
    cli = recipe.training(tmp_path)
    train(cli, tmp_path)
    assert cli.trainer.global_step == 1
    assert (tmp_path / "detector" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", [*CONFIGS, *BUILT_IN], ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_is_valid_as_it_stands(path, scenes):
    tiny = str(REPOSITORY / "configs" / "tiny.yaml")
    configs = (str(path),) if "detector" in yaml.safe_load(path.read_text())["model"] else (tiny, str(path))
    config, _ = Recipe(configs, (f"--data.images={scenes}",)).resolved()
    if config.trainer.max_steps != -1:
        # a limit in epochs of an earlier file would end the training before its steps
        assert config.trainer.max_epochs in (None, -1)


@pytest.mark.parametrize("path", ENCODER_CONFIGS, ids=lambda path: path.name)
def test_encoder_config_trains_one_step(path, scenes, tmp_path):
    small = ("--image_size=64", "--batch_size=4", "--max_steps=1", "--precision=32-true", "--num_workers=0")
    settings = read_settings([str(path)], [*small, "--objective_args.hidden_dim=16", "--objective_args.output_dim=16"])
    encoder = FittedEncoder(fit_encoder(scenes, tmp_path, settings, device="cpu"))
    assert (encoder.record["steps"], encoder.record["model"]) == (1, read_settings([str(path)]).model)


def test_there_is_an_encoder_config():
    assert [path.name for path in ENCODER_CONFIGS] == ["resnet18.yaml"]

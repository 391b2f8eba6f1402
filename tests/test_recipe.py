""""""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from pytorch_lightning.callbacks import EMAWeightAveraging

from simdetr import pipeline
from simdetr.commands.main import main
from simdetr.data.pretrained_weights import PretrainedWeightsError
from simdetr.exchange.weights import checkpoint_config, load_detector, save_detector
from simdetr.mining import ColourTextureEncoder
from simdetr.recipe import Recipe, RecipeCLI, RecipeError, fit_to_device, is_chosen
from simdetr.training import auto_batch
from simdetr.training.detection_task import RandomStartError
from simdetr.training.run_folder import RunFolder, RunMismatchError
from simdetr.training.train import AtomicCheckpointIO, ResumePoint, train


def test_the_same_yaml_runs_under_lightning_and_under_the_pipeline(recipe, tmp_path):
    made = recipe("--self_training.checkpoint_every_steps=1")
    train(made.training(tmp_path / "own"), tmp_path / "own")
    RecipeCLI(["fit", *made.arguments(f"--trainer.default_root_dir={tmp_path / 'fit'}")])
    resume = tmp_path / "fit" / "checkpoints" / "resume.ckpt"
    mine, theirs = (load_detector(p).detector.state_dict() for p in (tmp_path / "own" / "detector", resume))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_validation_under_lightning(recipe, scenes, tmp_path, capsys):
    made = recipe(f"--data.val_images={scenes}", f"--data.val_labels={scenes / 'instances.json'}")
    RecipeCLI(["validate", *made.arguments(f"--trainer.default_root_dir={tmp_path}")])
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert "val/AP50" in metrics.read_text().splitlines()[0]


def test_the_number_of_classes_comes_from_the_labels(recipe, tmp_path, scenes):
    classes = len(json.loads((scenes / "instances.json").read_text())["categories"])
    assert recipe().training(tmp_path).model.detector.num_classes == classes


def test_sections_are_built(recipe):
    sections = recipe("--self_training.iou_threshold=0.4", "--mining.image_size=32").sections()
    assert isinstance(sections.encoder, ColourTextureEncoder)
    assert sections.mining.image_size == 32
    assert sections.clustering.num_classes == 3
    assert (sections.self_training.stages, sections.self_training.iou_threshold) == (1, 0.4)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--data.mosaik=0.5", "mosaik"),
        ("--model.lr=fast", "lr"),
        ("--mining.flux=1", "flux"),
        ("--model.detector.init_args.num_querries=3", "num_querries"),
        ("--model.detector.class_path=simdetr.detectors.Nothing", "Nothing"),
        ("--model.schedule=linear", "schedule"),
    ],
)
def test_unknown_keys_and_wrong_values_are_errors(option, named, recipe):
    with pytest.raises(RecipeError, match=named):
        recipe(option).resolved()


def test_unknown_keys_of_a_file_are_errors(recipe, tmp_path):
    (tmp_path / "more.yaml").write_text("trainer: {max_epoch: 3}\n")
    made = recipe()
    with pytest.raises(RecipeError, match="max_epoch"):
        Recipe((*made.configs, str(tmp_path / "more.yaml")), made.options).resolved()


def test_later_files_and_options_win(recipe, tmp_path):
    (tmp_path / "more.yaml").write_text("model: {lr: 0.25, backbone_lr: 0.125}\n")
    made = recipe("--model.lr=0.75")
    config, text = Recipe((*made.configs, str(tmp_path / "more.yaml")), made.options).resolved()
    assert (config.model.lr, config.model.backbone_lr) == (0.75, 0.125)
    assert yaml.safe_load(text)["model"]["lr"] == 0.75


def test_callbacks_of_the_user_stay_beside_ours(recipe, tmp_path):
    (tmp_path / "ema.yaml").write_text(
        "trainer: {callbacks: [{class_path: pytorch_lightning.callbacks.EMAWeightAveraging}]}\n"
    )
    made = recipe()
    trainer = Recipe((*made.configs, str(tmp_path / "ema.yaml")), made.options).training(tmp_path).trainer
    kinds = [type(callback) for callback in trainer.callbacks]
    assert EMAWeightAveraging in kinds
    assert ResumePoint in kinds
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)


@pytest.mark.parametrize("weights", [True, False])
def test_starting_from_a_detector_takes_its_architecture(weights, recipe, make_detector, tmp_path):
    detector = make_detector(3, num_queries=5)
    detector.init_args["pretrained_backbone"] = True
    save_detector(detector, checkpoint_config(detector, None), tmp_path / "detector")
    config, _ = recipe().starting_from(tmp_path / "detector", tmp_path / "out", weights=weights).resolved()
    arguments = config.model.detector.init_args
    assert arguments.num_queries == 5
    assert config.model.init_weights == (str(tmp_path / "detector") if weights else None)
    assert arguments.pretrained_backbone is not weights  # never downloaded only to be overwritten


def test_bare_weights_are_for_the_detector_of_the_config(recipe, make_detector, tmp_path):
    save_detector(make_detector(3), checkpoint_config(make_detector(3), None), tmp_path)
    (tmp_path / "config.json").unlink()
    made = recipe()
    config, _ = made.starting_from(tmp_path, tmp_path / "out").resolved()
    assert config.model.detector == made.resolved()[0].model.detector
    assert config.model.init_weights == str(tmp_path)
    data = made.options[:2]
    with pytest.raises(RecipeError, match=r"model\.detector"):
        Recipe((), data).starting_from(tmp_path, tmp_path / "other").resolved()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), False),
        (("--model.detector.init_args.pretrained_backbone=true",), True),
        (("--model.backbone_weights=backbone.pth",), True),
        (("--model.init_weights=detector",), True),
    ],
)
def test_what_a_detector_starts_from_is_known(recipe, options, expected):
    assert recipe(*options).brings_weights() is expected


@pytest.mark.parametrize("class_path", ["HeadedDetector", "HeadedBackbone"])
def test_a_file_goes_under_the_recipes_own_head(class_path, recipe, make_detector, tmp_path):
    detector = make_detector(3, num_queries=5)
    save_detector(detector, checkpoint_config(detector, None), tmp_path / "detector")
    head = {"class_path": "simdetr.heads.LandmarkHead", "init_args": {"variant": "query", "mode": "eq5"}}
    arguments = {"head": head, "detector": {"class_path": "simdetr.detectors.DeformableDETR", "init_args": {}}}
    if class_path == "HeadedBackbone":
        head["init_args"]["variant"] = "grid"
        arguments = {"head": head, "backbone": "test_resnet"}
    config = tmp_path / "head.yaml"
    model = {"detector": {"class_path": f"simdetr.heads.{class_path}", "init_args": arguments}}
    config.write_text(yaml.safe_dump({"model": model}))
    made = Recipe((str(config),), recipe().options[:2]).starting_from(tmp_path / "detector", tmp_path / "out")
    resolved = made.resolved()[0].model
    assert resolved.detector.class_path.endswith(class_path)
    assert resolved.detector.init_args.head.init_args.mode == "eq5"
    assert resolved.init_weights == str(tmp_path / "detector")
    if class_path == "HeadedDetector":
        assert resolved.detector.init_args.detector.init_args.num_queries == 5
    else:
        assert resolved.detector.init_args.backbone == "test_resnet"


def test_images_are_normalised_as_the_detectors_weights_want(recipe, make_detector, tmp_path):
    word = "--model.detector.init_args.backbone=efficientnet-lite0"
    assert recipe(word).training(tmp_path / "a").datamodule.image_settings["mean"] == [127 / 255] * 3

    detector = make_detector(3)
    trained = {"short_side": 96, "max_side": 120, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    config = checkpoint_config(detector, None) | {"image_settings": trained}
    save_detector(detector, config, tmp_path / "detector")
    started = recipe(f"--model.init_weights={tmp_path / 'detector'}").training(tmp_path / "b").datamodule
    assert started.image_settings == trained | {"short_side": 64, "max_side": 80}  # the config names sizes
    left_open = [f"--data.{name}=null" for name in ("short_sides", "max_side")]
    for weights in (True, False):
        made = recipe().starting_from(tmp_path / "detector", tmp_path / f"out{weights}", weights=weights)
        assert made.training(tmp_path / "c").datamodule.image_settings["short_side"] == 64
    opened = Recipe(recipe().configs, (*recipe().options, *left_open))
    opened = opened.starting_from(tmp_path / "detector", tmp_path / "d", weights=True)
    assert opened.training(tmp_path / "d").datamodule.image_settings == trained


FROZEN = ("--model.detector.init_args.frozen_batch_norm=true", "--model.detector.init_args.freeze_stem=true")


def test_random_weights_that_would_stay_are_refused(recipe, learned_backbone, tmp_path):
    frozen = recipe(*FROZEN)
    for refused in (frozen.training(tmp_path), None):
        with pytest.raises(RandomStartError, match=r"random weights.*\(frozen_batch_norm: false, freeze_stem: false\)"):
            train(refused, tmp_path) if refused is not None else frozen.check_detector(3)
    given = recipe(*FROZEN, f"--model.backbone_weights={learned_backbone}")
    given.check_detector(3)
    train(given.training(tmp_path), tmp_path)
    started = recipe(*FROZEN, f"--model.init_weights={tmp_path / 'detector'}")
    started.check_detector(3)
    assert train(started.training(tmp_path / "again"), tmp_path / "again").num_classes > 0


@pytest.mark.parametrize("given", [True, False])
def test_an_architecture_without_weights_learns_its_whole_backbone(given, recipe, make_detector, tmp_path, caplog):
    detector = make_detector(3, frozen_batch_norm=True, freeze_stem=True)
    save_detector(detector, checkpoint_config(detector, None), tmp_path)
    made = recipe(*([f"--model.backbone_weights={tmp_path}/b.pth"] if given else []))
    with caplog.at_level("INFO"):
        config, _ = made.starting_from(tmp_path, tmp_path / "out", weights=False).resolved()
    arguments = config.model.detector.init_args
    assert (arguments.frozen_batch_norm, arguments.freeze_stem) == (given, given)
    assert ("learns its whole backbone" in caplog.text) is not given


def test_without_its_backbones_weights_nothing_is_left_of_a_detector(recipe, make_detector, tmp_path):
    detector = make_detector(3, frozen_batch_norm=True, freeze_stem=True)
    save_detector(detector, checkpoint_config(detector, None), tmp_path)
    given = recipe(f"--model.backbone_weights={tmp_path}/b.pth", "--model.backbone_lr=1e-5", "--model.lr=3e-4")
    model = given.starting_from(tmp_path, tmp_path / "out", weights=False, backbone=False).resolved()[0].model
    arguments = model.detector.init_args
    assert (arguments.frozen_batch_norm, arguments.freeze_stem, arguments.pretrained_backbone) == (False,) * 3
    assert (model.backbone_weights, model.init_weights, model.backbone_lr) == (None, None, 3e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Errors of constructors in a config reach the user as they were raised.


@pytest.fixture
def recipe_with(tiny_config, scenes):
    return lambda *options: Recipe((str(tiny_config),), (f"--data.images={scenes}", *options))


def test_constructors_are_heard_alone(recipe_with, tmp_path):
    """Without what the parser thinks of the other types that an option might have had."""
    torch.save({"net.weight": torch.zeros(2)}, tmp_path / "other.pth")
    encoder = "--encoder.class_path=simdetr.mining.TimmEncoder"
    weights = (encoder, "--encoder.init_args.model=resnet18", f"--encoder.init_args.weights={tmp_path / 'other.pth'}")
    with pytest.raises(PretrainedWeightsError, match=r"^weights: only 0 of the model's 60"):
        recipe_with(*weights).sections()
    with pytest.raises(ValueError, match=r"^cell_px: expected 1, 2, 4, 8 or 16, got -1$"):
        recipe_with("--mining.level_sets.cell_px=-1").sections()
    with pytest.raises(ValueError, match=r"^weights: resnet50 would look at images with random weights"):
        recipe_with(encoder).sections()
    assert recipe_with(encoder, "--encoder.init_args.random_weights=true").sections().encoder.region_dim == 2048


# ----------------------------------------------------------------------------------------------------------------------
# ``--auto-batch`` from the command line to the run folder, and again when the run is resumed.


def settings(folder):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return config["data"]["batch_size"], config["model"]["lr"], config["model"]["backbone_lr"]


@pytest.fixture
def searches(monkeypatch):
    """How often a batch size was looked for; four images fit."""
    calls = []

    def search(training):
        calls.append(training)
        return {"batch_size": 4, "device": "cpu", "size_hw": [64, 80]}

    monkeypatch.setattr(auto_batch, "largest_batch", search)
    return calls


def test_fine_tuning_keeps_its_batch_when_resumed(tiny_config, scenes, tmp_path, searches):
    out = tmp_path / "run"
    arguments = ["finetune", f"--images={scenes}", f"--labels={scenes / 'instances.json'}", f"--out={out}"]
    arguments += [f"--config={tiny_config}", "--auto-batch"]
    main(arguments)
    # two images and 1e-3 in the recipe
    assert settings(out) == (4, 2e-3, 2e-3)
    stored = (out / "detector" / "config.json").read_text()
    main(arguments)
    assert len(searches) == 1 and (out / "detector" / "config.json").read_text() == stored
    with pytest.raises(RunMismatchError, match=r"data\.batch_size is 4 there, 2 asked"):
        pipeline.finetune(scenes, scenes / "instances.json", out, (tiny_config,))


def test_pretraining_looks_after_mining(tiny_config, scenes, tmp_path, searches):
    out = tmp_path / "run"
    for _ in range(2):
        pipeline.pretrain(scenes, out, (tiny_config,), auto_batch="sqrt")
        size, lr, backbone_lr = settings(out)
        assert (size, lr, backbone_lr) == (4, pytest.approx(1e-3 * 2**0.5), pytest.approx(1e-3 * 2**0.5))
    (training,) = searches
    assert len(training.datamodule.labels) == 12 and training.datamodule.labels.stage == 0
    assert json.loads((out / "auto_batch.json").read_text())["scaling"] == "sqrt"


def test_nothing_happens_unless_asked(tiny_config, tmp_path, searches):
    recipe, run = Recipe((str(tiny_config),)), RunFolder(tmp_path)
    assert fit_to_device(recipe, run, False) is recipe
    assert not searches and not is_chosen(run)

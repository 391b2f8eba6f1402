from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from simdetr.data.dataset import Batch
from simdetr.exchange.weights import checkpoint_config, load_detector, save_detector
from simdetr.training.detection_task import DetectionTask, NonFiniteLossError
from simdetr.training.train import train

TWO_RANKS = ("--trainer.devices=2", "--trainer.strategy=ddp_spawn")
STEADY = ("--data.mosaic=0", "--data.colour=none", "--trainer.log_every_n_steps=1", "--model.schedule=constant")
TWO_STAGE = (
    "--model.detector.init_args.with_box_refine=true",
    "--model.detector.init_args.two_stage=true",
    "--data.num_queries=2",
)
NO_DROPOUT = "--model.detector.init_args.dropout=0"


def logged(folder: Path) -> dict[str, float]:
    """The last value of every column."""
    values: dict[str, float] = {}
    with (folder / "logs" / "version_0" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            values |= {name: float(value) for name, value in row.items() if value}
    return values


def without_boxes(folder: Path, *keep: int) -> None:
    """Leave boxes on the images with these ids only."""
    path = folder / "instances.json"
    content = json.loads(path.read_text())
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] in keep]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "variant",
    [(), TWO_STAGE],
    ids=["base", "two-stage"],
)
@pytest.mark.parametrize("keep", [(1,), ()], ids=["one image with boxes", "no boxes at all"])
def test_images_and_batches_without_objects(variant, keep, recipe, own_scenes, tmp_path):
    without_boxes(own_scenes, *keep)
    made = recipe(*STEADY, *variant, "--trainer.max_steps=3", "--data.batch_size=1", images=own_scenes)
    train(made.training(tmp_path / "run"), tmp_path / "run")
    losses = logged(tmp_path / "run")
    assert all(torch.isfinite(torch.tensor(value)) for value in losses.values())
    if not keep:
        assert losses["train/loss_bbox"] == losses["train/loss_giou"] == 0  # specs/detectors.md T18
        assert losses["train/loss_ce"] > 0


def test_one_image_of_one_class(recipe, own_scenes, tmp_path):
    path = own_scenes / "instances.json"
    content = json.loads(path.read_text())
    content["images"] = content["images"][:1]
    content["annotations"] = [
        {**row, "category_id": 1} for row in content["annotations"] if row["image_id"] == content["images"][0]["id"]
    ]
    content["categories"] = content["categories"][:1]
    path.write_text(json.dumps(content))
    made = recipe("--trainer.max_steps=2", images=own_scenes)
    train(made.training(tmp_path / "run"), tmp_path / "run")
    assert load_detector(tmp_path / "run" / "detector").detector.num_classes == 1


def test_a_poisoned_batch_stops_the_training_and_is_saved(recipe, make_detector, tmp_path):
    cli = recipe(*STEADY).training(tmp_path)
    clean = cli.datamodule.train_dataloader

    def poisoned():
        loader = clean()
        collate = loader.collate_fn

        def poison(samples):
            batch = collate(samples)
            batch.images[0, 0, 0, 0] = float("nan")
            return batch

        loader.collate_fn = poison
        return loader

    cli.datamodule.train_dataloader = poisoned
    with pytest.raises(NonFiniteLossError) as caught:
        train(cli, tmp_path)
    message = str(caught.value)
    (saved,) = tmp_path.glob("non_finite_batch_step0_rank0.pt")
    replay = torch.load(saved, weights_only=True)
    assert str(saved) in message
    assert len(replay["image_ids"]) == 2
    assert all(image_id in message and image_id.startswith("images/") for image_id in replay["image_ids"])

    detector = make_detector(8)
    detector.load_state_dict(replay["state_dict"])
    batch = Batch(*replay["batch"])
    losses = detector.losses(batch.images, batch.mask, batch.targets)
    assert not torch.isfinite(losses["loss"])
    assert not (tmp_path / "detector").exists()


def test_backbone_rate_zero_freezes_the_backbone_alone(recipe, learned_backbone, tmp_path):
    frozen = ("--model.detector.init_args.frozen_batch_norm=true", f"--model.backbone_weights={learned_backbone}")
    cli = recipe("--model.backbone_lr=0", *frozen).training(tmp_path)
    before = {name: value.clone() for name, value in cli.model.detector.state_dict().items()}
    train(cli, tmp_path)
    after = load_detector(tmp_path / "detector").detector.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any(name.startswith("backbone.") for name in changed)


def test_backbone_starts_from_given_weights_unless_the_whole_detector_does(make_detector, tmp_path):
    donor = make_detector(3)
    torch.save(donor.backbone.body.state_dict(), tmp_path / "backbone.pth")
    weight = "backbone.body.layer1.0.conv1.weight"
    assert weight in donor.state_dict()
    task = DetectionTask(make_detector(3), backbone_weights=str(tmp_path / "backbone.pth"))
    assert torch.equal(task.detector.state_dict()[weight], donor.state_dict()[weight])

    other = make_detector(3)
    save_detector(other, {}, tmp_path / "detector")
    task = DetectionTask(
        make_detector(3),
        backbone_weights=str(tmp_path / "backbone.pth"),
        init_weights=str(tmp_path / "detector"),
    )
    assert torch.equal(task.detector.state_dict()[weight], other.state_dict()[weight])


def test_heads_of_other_classes_learn_with_their_own_rate(make_detector, tmp_path):
    save_detector(make_detector(3), {}, tmp_path / "detector")
    task = DetectionTask(make_detector(5), init_weights=str(tmp_path / "detector"), lr=1e-4, new_lr=2e-3)
    names = {id(parameter): name for name, parameter in task.detector.named_parameters()}
    new = next(group for group in task.new_optimiser().param_groups if group["name"] == "new")
    assert new["lr"] == 2e-3
    found = {names[id(parameter)] for parameter in new["params"]}
    assert found and all("class_embed" in name for name in found)
    alone = DetectionTask(make_detector(5), lr=1e-4, new_lr=2e-3)  # so that both are trained alike
    names = {id(parameter): name for name, parameter in alone.detector.named_parameters()}
    new = next(group for group in alone.new_optimiser().param_groups if group["name"] == "new")
    assert {names[id(parameter)] for parameter in new["params"]} == found
    without = DetectionTask(make_detector(5), lr=1e-4)
    assert "new" not in {group["name"] for group in without.new_optimiser().param_groups}


def options_of(**changes):
    return tuple(f"--model.{name}={str(value).lower()}" for name, value in changes.items())


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"channels_last": True}, id="channels last"),
        pytest.param({"compile": "aot_eager"}, id="compiled", marks=pytest.mark.slow),
    ],
)
def test_faster_ways_to_the_same_step(changes, recipe, tmp_path):
    """The same loss, and weights that are stored and read back, in another layout and from a compiled detector."""
    steady = (*STEADY, NO_DROPOUT, "--data.short_sides=[64]", "--trainer.max_steps=2")
    for name, more in (("plain", {}), ("faster", changes)):
        cli = recipe(*steady, *options_of(**more)).training(tmp_path / name)
        train(cli, tmp_path / name)
    assert logged(tmp_path / "faster") == pytest.approx(logged(tmp_path / "plain"), rel=1e-4, abs=1e-6)
    assert len(load_detector(tmp_path / "faster" / "detector").detector.state_dict()) > 50
    weight = cli.model.detector.state_dict()["backbone.body.conv1.0.weight"]
    if "channels_last" in changes:
        assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    else:
        assert cli.model.detector._compiled_call_impl is not None


def test_a_batch_that_was_only_accumulated_stops_the_training_too(recipe, tmp_path, monkeypatch):
    """The loss of the first of two batches is broken; the weights have not moved when that is known."""
    cli = recipe(*STEADY, "--trainer.accumulate_grad_batches=2", "--trainer.max_steps=1").training(tmp_path)
    before = {name: value.clone() for name, value in cli.model.detector.named_parameters()}
    own, calls = DetectionTask.losses, []

    def broken(self, batch):
        calls.append(batch)
        losses = own(self, batch)
        return losses if len(calls) > 1 else {**losses, "loss": losses["loss"] * float("inf")}

    monkeypatch.setattr(DetectionTask, "losses", broken)
    with pytest.raises(NonFiniteLossError, match="loss became NaN or infinite at step 0"):
        train(cli, tmp_path)
    assert len(calls) == 1
    assert all(torch.equal(before[name], value) for name, value in cli.model.detector.named_parameters())


def test_half_precision_step(recipe, tmp_path):
    train(recipe("--trainer.precision=bf16-mixed", *STEADY).training(tmp_path), tmp_path)
    assert logged(tmp_path)["train/loss"] > 0


def test_dropout_differs_between_accumulated_batches(recipe, tmp_path, monkeypatch):
    draws = []
    step = DetectionTask.training_step
    monkeypatch.setattr(
        DetectionTask, "training_step", lambda self, *args: (draws.append(float(torch.rand(()))), step(self, *args))[1]
    )
    train(recipe("--trainer.accumulate_grad_batches=2", "--trainer.max_steps=2").training(tmp_path), tmp_path)
    assert len(set(draws)) == len(draws) == 4


@pytest.mark.dist
def test_two_ranks_take_the_step_of_one(recipe, scenes, learned_backbone, tmp_path):
    """Loss and weights of 2 ranks x 2 images and of 1 rank x 4 images; no dropout, batch norm is frozen."""
    validation = (f"--data.val_images={scenes}", f"--data.val_labels={scenes / 'instances.json'}")
    sizes = ("--data.short_sides=[64]", "--trainer.max_steps=1", NO_DROPOUT, *validation, "--data.label_fraction=0.33")
    frozen = ("--model.detector.init_args.frozen_batch_norm=true", f"--model.backbone_weights={learned_backbone}")
    for name, options in (("one", ("--data.batch_size=4",)), ("two", ("--data.batch_size=2", *TWO_RANKS))):
        made = recipe(*STEADY, *sizes, *frozen, *options)
        train(made.training(tmp_path / name), tmp_path / name)
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    detectors = [load_detector(tmp_path / name / "detector").detector.state_dict() for name in ("one", "two")]
    assert all(torch.allclose(detectors[0][name], detectors[1][name], atol=2e-5) for name in detectors[0])
    assert {name: two[name] for name in one if name.startswith("val/")} == pytest.approx(
        {name: value for name, value in one.items() if name.startswith("val/")}, abs=1e-6, nan_ok=True
    )


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    "variant",
    [(), TWO_STAGE],
    ids=["base", "two-stage"],
)
def test_a_rank_without_targets_and_uneven_validation(variant, recipe, own_scenes, tmp_path):
    """Only one of four images has boxes, so one rank has none; five validation images on two ranks of two."""
    without_boxes(own_scenes, 1)
    validation = (f"--data.val_images={own_scenes}", f"--data.val_labels={own_scenes / 'instances.json'}")
    made = recipe(*STEADY, *variant, *validation, *TWO_RANKS, "--trainer.max_steps=3", images=own_scenes)
    train(made.training(tmp_path / "run"), tmp_path / "run")
    assert logged(tmp_path / "run")["val/AP"] >= 0


def test_a_class_head_is_kept_for_the_same_classes_alone(recipe, make_detector, tmp_path):
    """As many pseudo-classes as the data has classes are none of them; the classes of the data go on."""
    plain = recipe().training(tmp_path / "plain")
    data, detector = plain.datamodule, make_detector(plain.datamodule.num_classes)
    pseudo = [{"id": number, "name": f"cluster {number:04d}"} for number in range(data.num_classes)]
    save_detector(detector, {**checkpoint_config(detector, data), "categories": pseudo}, tmp_path / "pseudo")
    save_detector(detector, checkpoint_config(detector, data), tmp_path / "same")
    reports = {
        name: recipe(f"--model.init_weights={tmp_path / name}").training(tmp_path / "run").model.load_report
        for name in ("pseudo", "same")
    }
    assert reports["same"].replaced == [] and reports["same"].reason == ""
    assert {name.split(".")[0] for name in reports["pseudo"].replaced} == {"class_embed"}
    assert "cluster 0000" in reports["pseudo"].summary()


def test_objects_past_half_of_the_queries_are_left_out_and_counted(recipe, scenes, tmp_path):
    """Two queries learn one object per image; none of those that are left is without a query."""
    content = json.loads((scenes / "instances.json").read_text())
    objects = len(content["annotations"])
    options = (*STEADY, "--data.num_queries=2", "--data.batch_size=12", "--trainer.max_steps=1")
    train(recipe(*options).training(tmp_path / "run"), tmp_path / "run")
    losses = logged(tmp_path / "run")
    with_objects = len({row["image_id"] for row in content["annotations"]})
    assert losses["train/dropped"] == objects - with_objects > 0
    assert losses["train/unmatched"] == 0

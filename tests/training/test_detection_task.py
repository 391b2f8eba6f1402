"""Trainings of the smallest detector: data without objects, broken losses, starts, learning rates, validation."""

from __future__ import annotations

import csv
import json
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.dataset import Batch
from simdetr.data.labels import Labels
from simdetr.detectors import DetectionLoss, TorchvisionDetector, TransformersDetector, matcher
from simdetr.detectors.predictions import Findings
from simdetr.evaluation.coco_metric import coco_metrics
from simdetr.exchange.weights import checkpoint_config, load_detector, save_detector
from simdetr.heads import HeadedDetector
from simdetr.training.detection_task import (
    CocoValidation,
    DetectionTask,
    NonFiniteLossError,
    PendingLosses,
    RandomStartError,
    check_start,
    fixed_parts,
    is_untrained,
    thawing,
)
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


@pytest.mark.parametrize("variant", [(), TWO_STAGE], ids=["base", "two-stage"])
@pytest.mark.parametrize("keep", [(1,), ()], ids=["one image with boxes", "no boxes at all"])
def test_images_and_batches_without_objects(variant, keep, recipe, own_scenes, tmp_path):
    without_boxes(own_scenes, 1)
    made = recipe(*STEADY, *variant, "--trainer.max_steps=3", "--data.batch_size=1", images=own_scenes)
    training = made.training(tmp_path / "run")
    if not keep:  # as on a device whose share of the images has none
        training.datamodule.labels = training.datamodule.labels.rows(np.zeros(0, np.int64))
    train(training, tmp_path / "run")
    losses = logged(tmp_path / "run")
    assert all(torch.isfinite(torch.tensor(value)) for value in losses.values())
    if not keep:
        assert losses["train/loss_bbox"] == losses["train/loss_giou"] == 0
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
    trained = cli.model.detector.state_dict()
    stored = load_detector(tmp_path / "faster" / "detector").detector.state_dict()
    assert stored.keys() == trained.keys() and all(torch.equal(stored[name], trained[name]) for name in stored)
    weight = trained["backbone.body.conv1.0.weight"]
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


def test_parts_of_the_detector_are_asked_for_alarms_once_per_epoch(recipe, tmp_path, monkeypatch, caplog):
    cli = recipe(*STEADY, "--trainer.max_epochs=2", "--trainer.max_steps=-1", "--data.batch_size=5").training(tmp_path)
    asked = []
    said = lambda epochs: asked.append([*epochs]) or [f"alarm {len(asked)}"]  # noqa: E731
    monkeypatch.setattr(cli.model.detector, "alarms", said)
    train(cli, tmp_path)
    assert [len(epochs) for epochs in asked] == [1, 2] and asked[0] == asked[1][:1]
    with (tmp_path / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for epoch, means in enumerate(asked[1]):
        for name in ("loss", "loss_ce", "loss_giou"):
            values = [float(row[f"train/{name}"]) for row in rows if row["epoch"] == str(epoch) and row["train/loss"]]
            assert len(values) > 1 and means[name] == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert "epoch 0: alarm 1" in caplog.text and "epoch 1: alarm 2" in caplog.text


def test_half_precision_gives_nearly_the_same_loss(recipe, tmp_path):
    losses = []
    for precision in ("bf16-mixed", "32-true"):
        out = tmp_path / precision
        train(recipe(f"--trainer.precision={precision}", *STEADY, NO_DROPOUT).training(out), out)
        losses.append(logged(out)["train/loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


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
@pytest.mark.parametrize("variant", [(), TWO_STAGE], ids=["base", "two-stage"])
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


# ----------------------------------------------------------------------------------------------------------------------
# Losses on their way to the host, and how often a training step waits for its device.
#
# There need not be a GPU: tensors of torch's fake mode have a device and no data, so that whatever needs a value on the
# host (``if tensor``, ``item``, ``nonzero``, indexing with booleans) raises, and every copy between devices is seen.


NOTHING = Batch(torch.zeros(0, 3, 1, 1), torch.zeros(0, 1, 1, dtype=torch.bool), [])


def test_values_arrive_by_name():
    losses = {"loss": torch.tensor(2.5, requires_grad=True), "loss_ce": torch.tensor(1.0, dtype=torch.float64)}
    pending = PendingLosses(NOTHING, losses)
    values, finite = pending.read()
    assert {name: float(value) for name, value in values.items()} == {"loss": 2.5, "loss_ce": 1.0}
    assert finite and not any(value.requires_grad for value in values.values())
    assert pending.batch is NOTHING


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_broken_term_is_seen(value):
    values, finite = PendingLosses(NOTHING, {"loss": torch.tensor(1.0), "other": torch.tensor(value)}).read()
    assert not finite
    assert [name for name, term in values.items() if not torch.isfinite(term)] == ["other"]


def broken_on_one_rank(rank, address, folder):
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    values, finite = PendingLosses(NOTHING, {"loss": torch.tensor(float("nan") if rank else 1.0)}).read()
    torch.save({"loss": values["loss"], "finite": finite}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
def test_all_ranks_hear_of_it(in_two_processes, tmp_path):
    in_two_processes(broken_on_one_rank, str(tmp_path / "rendezvous"), str(tmp_path))
    sound, broken = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert not sound["finite"] and not broken["finite"]
    assert sound["loss"] == 1.0 and broken["loss"].isnan()


class Copy(NamedTuple):
    """A copy between devices."""

    to: str
    waits: bool
    numel: int


class Copies(TorchDispatchMode):
    """Lists the copies between devices."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        source = {value.device.type for value in args if isinstance(value, Tensor)}
        if isinstance(result, Tensor) and source and source != {result.device.type} and operator._schema.name in COPIES:
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True))
            self.seen.append(Copy(result.device.type, waits, result.numel()))
        return result


COPIES = ("aten::_to_copy", "aten::copy_", "aten::to")


class Event:
    def synchronize(self):
        """There is nothing to wait for."""


@pytest.fixture
def fake_gpu(monkeypatch):
    """What code for a GPU asks of one beside tensors."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    stream = type("Stream", (), {"record_event": lambda self: Event()})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    # the solver wants numbers, which fake tensors have not, also on the host
    monkeypatch.setattr(matcher, "_assign_layers", first_queries)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def first_queries(costs, counts):
    """An assignment for every layer."""
    with unset_fake_temporarily():
        images = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        order = torch.cat([torch.arange(count) for count in counts])
        return matcher.Matches(*(indices.expand(len(costs), -1) for indices in (images, order, order)))


def batch_on(device, counts=(3, 1)):
    images = torch.randn(len(counts), 3, 64, 64, device=device)
    mask = torch.zeros(len(counts), 64, 64, dtype=torch.bool, device=device)
    targets = [
        {
            "labels": torch.zeros(count, dtype=torch.int64, device=device),
            "boxes": torch.full((count, 4), 0.5, device=device),
        }
        for count in counts
    ]
    return Batch(images, mask, targets)


VARIANTS = {"base": {}, "two-stage": {"with_box_refine": True, "two_stage": True}}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("criterion", [None, DetectionLoss], ids=["own loss", "criterion"])
def test_a_step_waits_for_its_device_once(variant, criterion, fake_gpu, make_detector):
    with torch.device("cuda"):
        detector = make_detector(3, num_feature_levels=4, **VARIANTS[variant]).train()
    task = DetectionTask(detector, criterion=criterion and criterion())
    batch = batch_on("cuda")
    with Copies() as copies:
        loss = task.training_step(batch, 0)
    assert loss.device.type == "cuda" and loss.requires_grad
    matches = [copy for copy in copies.seen if copy.to == "cuda"]
    out = [copy for copy in copies.seen if copy.to == "cpu"]
    decoders = 1 + (variant == "two-stage")
    assert len(matches) == decoders and not any(copy.waits for copy in matches)
    # the costs of all layers and images, which matching needs, and the losses, which nobody waits for
    assert [copy.waits for copy in out] == [True, False]
    cells = sum(side**2 for side in (8, 4, 2, 1)) if variant == "two-stage" else 0
    assert out[0].numel == 2 * 3 * (2 * 8 + cells)


class Values(TorchDispatchMode):
    """Lists the operators that want a tensor's value on the host."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name.removeprefix("aten::")
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"):
            self.seen.append(name)
        return operator(*args, **(kwargs or {}))


def test_backward_pass_and_optimiser_need_no_values(make_detector):
    """The engine of the backward pass wants a real device, so this part runs on the CPU."""
    task = DetectionTask(make_detector(3, num_queries=4, with_box_refine=True, two_stage=True).train())
    optimiser = task.new_optimiser()
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for _ in range(2):  # the second step finds the optimiser's state
        loss = task.training_step(batch_on("cpu"), 0)
        with Values() as values:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.1)
            optimiser.step()
            optimiser.zero_grad()
        assert values.seen == []
    with Values() as values:
        loss.item()
    assert values.seen == ["_local_scalar_dense"]


def test_the_oracle_sees_what_it_should(fake_gpu):
    value = torch.ones(3, device="cuda")
    for needs_the_value in (lambda: bool(value.sum()), lambda: value.nonzero(), lambda: value[value > 0], value.tolist):
        with pytest.raises(Exception, match=r"aten\.|data-dependent|data dependent"):
            needs_the_value()
    with Copies() as copies:
        torch.tensor([1.0, 2.0], device="cpu").to("cuda")
        value.new_tensor([1.0, 2.0])
        value.cpu()
        value.to("cpu", non_blocking=True)
    assert [copy[:2] for copy in copies.seen[-2:]] == [("cpu", True), ("cpu", False)]
    assert [copy[:2] for copy in copies.seen[:-2]] == [("cuda", True)] * 2


# ----------------------------------------------------------------------------------------------------------------------
# Which weights are random is read off normalisation layers; what is frozen, off the network itself.


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_new_networks_are_untrained_until_one_step(name):
    net = timm.create_model(name, num_classes=2)
    assert is_untrained(net)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.rand(2, 3, 224, 224)).square().sum().backward()
    optimiser.step()
    assert not is_untrained(net)
    assert not is_untrained(torch.nn.Linear(2, 2))  # does not tell


def test_what_is_fixed_and_what_would_free_it(make_detector, make_other):
    frozen = make_detector(3, frozen_batch_norm=True, freeze_stem=True)
    assert {"bn1", "conv1.0.weight"} <= set(fixed_parts(frozen))
    assert thawing(frozen) == ["frozen_batch_norm: false", "freeze_stem: false"]
    assert fixed_parts(make_detector(3)) == thawing(make_detector(3)) == []
    with pytest.raises(RandomStartError, match="frozen_batch_norm: false, freeze_stem: false"):
        check_start(frozen, fixed_parts(frozen))
    check_start(frozen, [])
    frozen.backbone.body.bn1.running_mean.fill_(0.3)
    check_start(frozen, fixed_parts(frozen))


def test_other_libraries_detectors(make_other):
    assert fixed_parts(make_other("rt_detr_v2")) == fixed_parts(make_other("faster_rcnn")) == []
    fixed = make_other("fcos", trainable_layers=3, frozen_batch_norm=True)
    assert thawing(fixed) == ["trainable_layers: 5", "frozen_batch_norm: false"] and fixed_parts(fixed)
    always = make_other("detr")
    with pytest.raises(RandomStartError, match=r"a trained detector to start from\)\.$"):
        check_start(always, fixed_parts(always))
    assert TransformersDetector.thawed({"config": {"freeze_backbone_batch_norms": True}}) == {
        "config": {"freeze_backbone_batch_norms": False}
    }
    assert TorchvisionDetector.thawed({"backbone": "resnet18"})["trainable_layers"] == 5


def test_a_head_is_no_hindrance():
    inner = {"class_path": "simdetr.detectors.DeformableDETR", "init_args": {"backbone": "resnet18"}}
    thawed = HeadedDetector.thawed({"detector": inner, "detector_weight": 0.5})
    assert thawed["detector"]["init_args"] == {
        "backbone": "resnet18",
        "frozen_batch_norm": False,
        "freeze_stem": False,
        "freeze_backbone": False,
    }
    assert thawed["detector_weight"] == 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Scores of a validation are those of the metric.


CATEGORIES = (Category("a", "a"), Category(5, "b"))
TRUTH = Labels.from_images(
    [
        ImageLabels.build("0.jpg", (40, 40), [[0, 0, 10, 10], [20, 20, 40, 40]], [0, 1]),
        ImageLabels.build("1.jpg", (40, 40), [[5, 5, 25, 25]], [1]),
        ImageLabels.build("2.jpg", (40, 40), [], []),
    ],
    CATEGORIES,
)


class Module:
    def __init__(self):
        self.logged = {}

    def log(self, name, value, **_):
        self.logged[name] = value


def found(row, boxes, labels, scores):
    target = {"orig_size": torch.tensor([40, 40]), "image_index": torch.tensor(row)}
    detections = {
        "boxes_xyxy": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": torch.tensor(scores),
        "queries": torch.arange(len(scores)),
    }
    return target, Findings(detections, detections)


def validate(batches, **options):
    trainer = types.SimpleNamespace(
        sanity_checking=False, world_size=1, datamodule=types.SimpleNamespace(val_labels=TRUTH, categories=CATEGORIES)
    )
    callback, module = CocoValidation(**options), Module()
    callback.on_validation_epoch_start(trainer, module)
    for index, batch in enumerate(batches):
        targets, outputs = [pair[0] for pair in batch], [pair[1] for pair in batch]
        content = types.SimpleNamespace(targets=targets) if batch else None
        callback.on_validation_batch_end(trainer, module, outputs, content, index)
    callback.on_validation_epoch_end(trainer, module)
    return module.logged


PERFECT = [
    [found(0, [[0, 0, 10, 10], [20, 20, 40, 40]], [0, 1], [0.9, 0.8]), found(2, [], [], [])],
    [],  # a rank that has run out of images
    [found(1, [[5, 5, 25, 25]], [1], [0.7])],
]


def test_perfect_detections():
    scores = validate(PERFECT)
    assert scores["val/AP"] == scores["val/AP50"] == 1


def test_classes_count_unless_recall_is_asked_for():
    wrong = [[found(1, [[5, 5, 25, 25]], [0], [0.7])]]
    assert validate(wrong)["val/AP"] == 0
    assert validate(wrong, class_agnostic=True)["val/AR@100"] == pytest.approx(1 / 3)


def test_equals_the_metric_on_the_same_boxes():
    scores = validate([[found(0, [[0, 0, 10, 12]], [0], [0.4])]])
    row = ImageLabels.build("0.jpg", (40, 40), [[0, 0, 10, 12]], [0], [0.4])
    expected = coco_metrics(TRUTH, Labels.from_images([row], CATEGORIES))
    assert scores == pytest.approx({f"val/{name}": value for name, value in expected.items()}, nan_ok=True)


def test_no_detections_at_all():
    assert validate([[]])["val/AP"] == 0

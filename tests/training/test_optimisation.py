"""Groups, schedules, and the end of a training by its losses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from simdetr.detectors import DeformableDETR, ViDT
from simdetr.training.optimisation import StopOnConvergence, adamw, lr_factor, parameter_groups


def test_groups_of_the_base_model_have_the_official_sizes():
    detector = DeformableDETR(91)
    groups = parameter_groups(detector, lr=2e-4, backbone_lr=2e-5)
    sizes = {group["name"]: sum(p.numel() for p in group["params"]) for group in groups}
    assert sizes == {"rest": 15_824_735, "backbone": 23_232_512, "slow": 790_018}
    assert {g["name"]: g["lr"] for g in groups} == {"rest": 2e-4, "backbone": 2e-5, "slow": pytest.approx(2e-5)}
    members = [id(p) for group in groups for p in group["params"]]
    assert len(members) == len(set(members))
    assert set(members) == {id(p) for p in detector.parameters() if p.requires_grad}


def test_groups_of_vidt_spare_vectors_and_tokens_of_the_body_alone():
    detector = ViDT(5, backbone="swin_pico", hidden_dim=32, num_heads=4, num_decoder_layers=1, num_queries=4)
    names = {id(parameter): name for name, parameter in detector.named_parameters()}
    groups = {group["name"]: group for group in parameter_groups(detector, lr=1e-4, backbone_lr=1e-4)}
    members = {name: {names[id(p)] for p in group["params"]} for name, group in groups.items()}
    assert set(groups) == {"backbone", "backbone_vectors", "rest"}
    assert {name: group["lr"] for name, group in groups.items()} == dict.fromkeys(groups, 1e-4)
    assert groups["backbone_vectors"]["weight_decay"] == 0 and "weight_decay" not in groups["rest"]
    tables = {name for name in names.values() if name.endswith("relative_position_bias_table")}
    assert tables and tables <= members["backbone"]
    assert {"backbone.det_token", "backbone.det_pos_embed"} <= members["backbone_vectors"]
    assert any(name.endswith("norm1.bias") for name in members["rest"])  # the neck's vectors do decay
    assert set().union(*members.values()) == set(names.values())


def test_frozen_parameters_and_empty_groups_are_left_out():
    detector = DeformableDETR(3, backbone="resnet18", hidden_dim=16, num_heads=2, ffn_dim=16, freeze_backbone=True)
    groups = parameter_groups(detector, lr=1.0, backbone_lr=1.0)
    assert [group["name"] for group in groups] == ["slow", "rest"]
    assert all(p.requires_grad for group in groups for p in group["params"])


def test_parameters_that_the_start_did_not_bring_have_a_group_of_their_own():
    detector = DeformableDETR(3, backbone="resnet18", hidden_dim=16, num_heads=2, ffn_dim=16)
    names = {id(parameter): name for name, parameter in detector.named_parameters() if parameter.requires_grad}
    new = {name for name in names.values() if "class_embed" in name}
    groups = parameter_groups(detector, lr=1e-4, backbone_lr=1e-5, new=new, new_lr=2e-3)
    members = {group["name"]: [names[id(p)] for p in group["params"]] for group in groups}
    assert new and set(members["new"]) == new
    assert groups[0]["name"] == "new" and groups[0]["lr"] == 2e-3
    assert sorted(name for own in members.values() for name in own) == sorted(names.values())  # each once
    plain = parameter_groups(detector, lr=1e-4, backbone_lr=1e-5, new=new)
    assert [group["name"] for group in plain] == ["backbone", "slow", "rest"]


@pytest.mark.parametrize(
    ("schedule", "options", "expected"),
    [
        ("constant", {}, {0: 1, 9: 1}),
        ("constant", {"warmup_steps": 3}, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1, 9: 1}),
        ("step", {}, {0: 1, 7: 1, 8: 0.1, 9: 0.1}),
        ("step", {"drop_at": 0.5, "warmup_steps": 1}, {0: 0.5, 1: 1, 4: 1, 5: 0.1}),
        # halfway between 1 and the floor, then a quarter of the cosine: 0.5 (1 + cos 135°) = 0.146447
        ("cosine", {"floor": 0.0}, {0: 1, 5: 0.5, 7.5: 0.1464466, 10: 0, 12: 0}),
        ("cosine", {"warmup_steps": 2, "floor": 0.1}, {0: 1 / 3, 1: 2 / 3, 2: 1, 6: 0.55, 10: 0.1}),
    ],
)
def test_schedules(schedule, options, expected):
    factor = lr_factor(schedule, 10, **options)
    assert {step: factor(step) for step in expected} == pytest.approx(expected, abs=1e-6)


def test_deformable_detr_drops_at_epoch_40_of_50():
    steps_per_epoch = 7
    factor = lr_factor("step", 50 * steps_per_epoch, drop_at=0.8)
    assert factor(40 * steps_per_epoch - 1) == 1
    assert factor(40 * steps_per_epoch) == 0.1


def test_the_optimiser_is_fused_where_it_can_be():
    layer = nn.Linear(3, 2)
    optimiser = adamw([{"params": list(layer.parameters()), "lr": 0.5}], lr=1.0, weight_decay=0.1)
    (group,) = optimiser.param_groups
    assert (group["fused"], group["lr"], group["weight_decay"]) == (True, 0.5, 0.1)
    elsewhere = adamw([{"params": list(nn.Linear(3, 2, device="meta").parameters())}], lr=1.0, weight_decay=0.1)
    assert not elsewhere.param_groups[0]["fused"] and elsewhere.param_groups[0]["weight_decay"] == 0.1


def test_the_fused_optimiser_takes_the_steps_of_the_plain_one():
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    weights = [nn.Parameter(start.clone()) for _ in range(2)]
    optimisers = [adamw([{"params": weights[:1]}], lr=0.1, weight_decay=0.1)]
    optimisers.append(torch.optim.AdamW(weights[1:], lr=0.1, weight_decay=0.1, foreach=False))
    for _ in range(3):
        for weight, optimiser in zip(weights, optimisers, strict=True):
            optimiser.zero_grad()
            weight.pow(3).sum().backward()
            optimiser.step()
    torch.testing.assert_close(*weights)
    assert not torch.allclose(weights[0], start, atol=0.1)


# ----------------------------------------------------------------------------------------------------------------------
# The end of a training by its losses: after how many epochs, across a resume, in two processes.


class Scripted(pl.LightningModule):
    """Its losses are the batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return batch.mean() + 0.0 * self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class Epochs(pl.LightningDataModule):
    """Two batches per epoch, whose mean is the next of the given numbers."""

    def __init__(self, means):
        super().__init__()
        self.means = means

    def train_dataloader(self):
        mean = self.means[min(self.trainer.current_epoch, len(self.means) - 1)]
        return DataLoader(torch.tensor([0.5 * mean, 1.5 * mean]))


def epochs_run(folder, means, callback, max_epochs=20, **options):
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[callback],
        enable_checkpointing=False,
    )
    trainer.fit(Scripted(), datamodule=Epochs(means), **options)
    return trainer


@pytest.mark.parametrize(
    ("means", "settings", "epochs"),
    [
        # the fifth, sixth and seventh epochs change by less than a thousandth
        ([9.0, 5.0, 4.0, 3.0, 3.001, 2.999, 3.0, 3.0], {}, 7),
        # the change is counted in a row: the sixth epoch's is not small
        ([9.0, 3.0, 3.001, 3.002, 3.02, 3.02, 3.02, 3.02], {}, 8),
        ([9.0, 5.0, 4.0, 3.0, 3.001, 2.999], {"patience": 1}, 5),
        ([9.0, 5.0, 4.0, 3.9, 3.8, 3.7], {"tolerance": 0.05}, 6),
        # a loss that rises has not converged, as it would have for one that waits for improvement
        ([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.1, 2.2], {}, 16),
    ],
)
def test_stops_when_the_mean_loss_stands_still(tmp_path, means, settings, epochs):
    trainer = epochs_run(tmp_path, means, StopOnConvergence(**settings))
    assert trainer.current_epoch == epochs


def test_a_resumed_training_stops_where_it_would_have(tmp_path):
    means = [9.0, 5.0, 3.0, 3.001, 2.999, 3.0, 3.0, 3.0]
    whole = epochs_run(tmp_path, means, StopOnConvergence())
    first = epochs_run(tmp_path, means, StopOnConvergence(), max_epochs=5)
    first.save_checkpoint(tmp_path / "half.ckpt")
    second = epochs_run(tmp_path, means, StopOnConvergence(), ckpt_path=str(tmp_path / "half.ckpt"))
    assert whole.current_epoch == second.current_epoch == 6


def test_all_processes_look_at_their_common_mean():
    """What this one sees stands still, but the mean of all does not."""
    seen = iter([5.0, 4.0, 3.0, 2.0, 2.0, 2.0, 2.0])
    strategy = SimpleNamespace(reduce=lambda here, reduce_op: torch.tensor(next(seen)))
    trainer = SimpleNamespace(strategy=strategy, should_stop=False)
    module = SimpleNamespace(device=torch.device("cpu"))
    callback = StopOnConvergence()
    stops = []
    for _ in range(7):
        callback.on_train_batch_end(trainer, module, {"loss": torch.tensor(1.0)}, None, 0)
        callback.on_train_epoch_end(trainer, module)
        stops.append(trainer.should_stop)
    assert stops == [False] * 6 + [True]


def test_bad_settings():
    with pytest.raises(ValueError, match="tolerance must be above 0, got 0"):
        StopOnConvergence(tolerance=0.0)
    with pytest.raises(ValueError, match="patience must be at least 1 epoch, got 0"):
        StopOnConvergence(patience=0)


def test_a_config_names_it(recipe, tmp_path):
    """A detector whose loss does not change: two epochs show it."""
    made = recipe(
        "--trainer.max_steps=30",
        "--model.lr=0",
        "--model.backbone_lr=0",
        "--trainer.callbacks=StopOnConvergence",
        "--trainer.callbacks.tolerance=0.9",
        "--trainer.callbacks.patience=1",
    )
    training = made.training(tmp_path)
    training.trainer.fit(training.model, datamodule=training.datamodule)
    assert training.trainer.current_epoch == 2 and training.trainer.global_step == 12

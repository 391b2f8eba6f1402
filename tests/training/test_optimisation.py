from __future__ import annotations

import pytest
import torch
from torch import nn

from simdetr.detectors import DeformableDETR, ViDT
from simdetr.training.optimisation import adamw, lr_factor, parameter_groups


def test_groups_of_the_base_model_have_the_official_sizes():
    detector = DeformableDETR(91)
    groups = parameter_groups(detector, lr=2e-4, backbone_lr=2e-5)
    sizes = {group["name"]: sum(p.numel() for p in group["params"]) for group in groups}
    assert sizes == {"rest": 15_824_735, "backbone": 23_232_512, "slow": 790_018}  # specs/detectors.md T5
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

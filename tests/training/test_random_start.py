"""Which weights are random is read off normalisation layers; what is frozen, off the network itself."""

from __future__ import annotations

import pytest
import timm
import torch

from simdetr.detectors import TorchvisionDetector, TransformersDetector
from simdetr.heads import HeadedDetector
from simdetr.training.detection_task import RandomStartError, check_start, fixed_parts, is_untrained, thawing


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

"""The contract holds for Deformable DETR, and what breaks it cannot be built."""

import pytest
import torch

from simdetr.detectors import Detector
from simdetr.detectors.losses import DetectionLoss


def test_a_detector_needs_both_methods():
    class Half(Detector):
        def forward(self, images, mask=None):
            return {}

    with pytest.raises(TypeError, match="losses"):
        Half()


@pytest.mark.parametrize("variant", ["base", "two_stage"])
def test_own_losses_are_the_criterion_of_the_outputs(make_detector, batch, variant):
    images, mask, targets = batch
    detector = make_detector(variant)
    ours = detector.losses(images, mask, targets)
    expected = DetectionLoss()(detector(images, mask), targets)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value)


def test_names_of_submodules_exist(make_detector):
    detector = make_detector()
    body = detector.get_submodule(detector.body_name)
    assert any(parameter.requires_grad for parameter in body.parameters())
    assert detector.body_name.startswith(detector.backbone_name)
    assert detector.init_args["num_classes"] == detector.num_classes

"""Descriptions of parts: from a part and back, and nothing but parts of simdetr."""

from __future__ import annotations

import pytest

from simdetr.data.class_paths import class_of
from simdetr.detectors import DeformableDETR
from simdetr.detectors.detector import QueryDetector
from simdetr.heads.head import Head, described, factory


def test_a_description_builds_the_same_again():
    arguments = {"backbone": "test_resnet", "hidden_dim": 16, "num_heads": 2, "num_queries": 5}
    detector = DeformableDETR(4, **arguments)
    description = described(detector)
    assert description["class_path"] == "simdetr.detectors.deformable_detr.DeformableDETR"
    assert description["init_args"] == detector.init_args
    del description["init_args"]["num_classes"]
    assert "num_classes" in detector.init_args, "the description is a copy"
    again = factory(description, QueryDetector)(7)
    assert again.init_args == {**detector.init_args, "num_classes": 7}


def test_a_function_stays_itself():
    assert factory(len, Head)("abc") == 3


@pytest.mark.parametrize("class_path", ["os.system", "simdetr.boxes.clip", "simdetr.heads.Nothing", "torch.nn.Linear"])
def test_nothing_else_is_built(class_path):
    with pytest.raises(ValueError, match=rf"class_path: expected a Head of simdetr, got '{class_path}'"):
        class_of(class_path, Head)

"""What a detector is made of is counted."""

from __future__ import annotations

from simdetr.app.summaries import summary_of
from simdetr.exchange.weights import load_detector


def test_parameters_layers_and_operations_are_those_of_the_detector(small_detector):
    found, detector = summary_of(small_detector), load_detector(small_detector).detector
    assert found.detector == "DeformableDETR"
    assert found.parameters == sum(one.numel() for one in detector.parameters())
    assert 0 < found.trainable <= found.parameters
    assert found.layers == len({name.rpartition(".")[0] for name, _ in detector.named_parameters()})
    assert found.image_size_hw == (64, 80)
    assert found.gflops is not None and found.gflops * 1e9 > found.parameters

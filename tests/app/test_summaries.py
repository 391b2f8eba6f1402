"""What a detector is made of is counted."""

from __future__ import annotations

import torch

from simdetr.app.summaries import _activation_bytes, process_bytes, summary_of
from simdetr.exchange.weights import load_detector


def test_parameters_layers_and_operations_are_those_of_the_detector(small_detector):
    found, detector = summary_of(small_detector), load_detector(small_detector).detector
    assert found.detector == "DeformableDETR"
    assert found.parameters == sum(one.numel() for one in detector.parameters())
    assert 0 < found.trainable <= found.parameters
    assert found.layers == len({name.rpartition(".")[0] for name, _ in detector.named_parameters()})
    assert found.image_size_hw == (64, 80)
    assert found.gflops is not None and found.gflops * 1e9 > found.parameters


def test_memory_of_a_training_grows_with_its_batch_by_what_a_forward_pass_keeps(small_detector):
    found = summary_of(small_detector)
    assert found.activation_bytes is not None
    one, two = found.training_bytes(1), found.training_bytes(2)
    assert one is not None and two is not None
    assert two - one == found.activation_bytes > 3 * 64 * 80 * 4
    assert one - found.activation_bytes == 4 * found.parameters + 12 * found.trainable


def test_the_memory_of_a_training_is_told_with_that_of_its_process(serve, small_detector):
    person = serve(run=small_detector, device="cpu")
    alone = summary_of(small_detector).training_bytes(2)
    told = person.get("/projects/1/models/start/memory", batch_size=2)
    assert told["bytes"] > alone + (100 << 20) and process_bytes() > 100 << 20  # torch alone takes more
    assert f"{(told['bytes'] - alone) >> 20:,} MiB of it are the process itself" in told["basis"]
    on_gpu = person.get("/projects/1/models/start/memory", batch_size=2, device="cuda:0")
    assert on_gpu["bytes"] == alone and "process" not in on_gpu["basis"]


def test_activations_are_counted_once_and_weights_are_none():
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5, bias=False), torch.nn.Sigmoid())

    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = linear

        def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.layers(images)

    assert _activation_bytes(Small(), (8, 8)) == 4 * (3 * 8 * 8 + 5)  # what Linear multiplied, what Sigmoid gave
    assert _activation_bytes(torch.nn.Linear(1, 1), (8, 8)) is None

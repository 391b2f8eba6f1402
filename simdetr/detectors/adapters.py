"""What the adapters to other libraries share: padding masks, losses in which every parameter takes part, sure targets.

Letters: B images, H and W the padded size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from simdetr.detectors.matcher import Target


class _TakePart(torch.autograd.Function):
    """The identity of a loss, with a gradient of zero for every further argument."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:  # noqa: ANN401
        ctx.shapes = [parameter.shape for parameter in parameters]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        zero = gradients[0].new_zeros(())
        return gradients[0], *(zero.expand(shape) for shape in ctx.shapes)


def in_graph(loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """The loss, of the same value, in which every trainable parameter takes part.

    Ranks exchange gradients of all parameters; one whose batch has no objects leaves out heads and embeddings that the
    others use. Adding 0 · Σ would read every parameter; this only hands out zeros.
    """
    kept: Tensor = _TakePart.apply(loss, *(parameter for parameter in parameters if parameter.requires_grad))
    return kept


def likely_objects(target: Target) -> dict[str, Tensor]:
    """Labels and boxes of the objects that are more likely there than not, for losses that take all for certain."""
    likely = target["scores"] >= 0.5 if "scores" in target else torch.ones_like(target["labels"], dtype=torch.bool)
    return {name: target[name][likely] for name in ("labels", "boxes")}


def valid_sizes(mask: Tensor) -> Tensor:
    """Height and width of each image without its padding, int64 [B, 2], from a mask [B, H, W] (True = padding)."""
    return torch.stack([(~mask[:, :, 0]).sum(dim=1), (~mask[:, 0]).sum(dim=1)], dim=1)

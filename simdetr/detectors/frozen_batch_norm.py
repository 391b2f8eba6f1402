"""Frozen batch norm as one pass over the activations: a map [B, C, H, W] in, the same in its own precision out.

torchvision's takes two passes and, under autocast, turns half precision into float32, which doubles the memory of
everything up to the next convolution. Names in a state dict are torchvision's and torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


class FrozenBatchNorm(FrozenBatchNorm2d):  # type: ignore[misc]
    """Batch norm with fixed statistics and affine parameters, all of them buffers.

    Args:
        num_features: channels.
        eps: added to the variance.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift every channel; nothing of ``x`` is kept for the backward pass."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])


def with_one_pass(body: nn.Module) -> nn.Module:
    """Put `FrozenBatchNorm` in the place of torchvision's frozen batch norms, with their buffers; returns ``body``."""
    for parent in list(body.modules()):
        for name, child in parent.named_children():
            if type(child) is FrozenBatchNorm2d:
                buffers = dict(child.named_buffers())
                own = FrozenBatchNorm(len(buffers["weight"]), child.eps)
                for key, value in buffers.items():
                    setattr(own, key, value)
                setattr(parent, name, own)
    return body

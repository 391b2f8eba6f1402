"""Linear layers at the full speed of the processor: rows [..., C] in, rows [..., D] out.

torch multiplies float32 matrices on x86 with MKL, which on AMD processors reaches about half of what oneDNN does, the
library that torch uses for convolutions. This goes through torch's own operator for it, in the same precision; on
other devices and dtypes, under autocast, in compiled and exported graphs a layer is ``torch.nn.Linear``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """``torch.nn.Linear`` with `linear` as its product."""

    def forward(self, rows: Tensor) -> Tensor:
        """[..., C] to [..., D]."""
        return linear(rows, self.weight, self.bias)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear``, by oneDNN where that is the faster.

    Args:
        rows: [..., C].
        weight: [D, C].
        bias: [D] or None.
    """
    plain = (
        rows.device.type != "cpu"
        or rows.dtype != torch.float32
        or weight.dtype != torch.float32
        or rows.numel() == 0
        or type(rows) is not Tensor
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
        or torch.is_autocast_enabled("cpu")
        or not _has_onednn()
    )
    if plain:
        return F.linear(rows, weight, bias)
    product: Tensor = _OneDnnLinear.apply(rows.reshape(-1, rows.shape[-1]), weight, bias)
    return product.view(*rows.shape[:-1], -1)


class _OneDnnLinear(torch.autograd.Function):
    """The product of rows [N, C] and its gradients, three calls of one operator."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(rows, weight)
        return _product(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # noqa: ANN401
        rows, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            _product(grad, weight.t(), None) if wanted[0] else None,
            _product(grad.t(), rows.t(), None) if wanted[1] else None,
            grad.sum(dim=0) if wanted[2] else None,
        )


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


@functools.cache
def _has_onednn() -> bool:
    """Whether torch has the operator, which is not part of its public interface, and it does what it should."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    rows, weight, bias = (torch.arange(float(n)).view(shape) for n, shape in ((6, (2, 3)), (12, (4, 3)), (4, (4,))))
    try:
        return torch.allclose(_product(rows, weight, bias), F.linear(rows, weight, bias))
    except (AttributeError, RuntimeError, TypeError):
        return False

"""Batched matrix products of large float32 factors: two tensors in, their product out, by the host's faster library."""

from __future__ import annotations

import torch
from torch import Tensor


def large_product(left: Tensor, right: Tensor) -> Tensor:
    """`torch.bmm`, [B, N, D] and [B, D, M] to [B, N, M], on the host by oneDNN, which torch takes only on request.

    It is two to four times faster than the default library for large factors (and slower for small ones;
    `benchmarks/LOG.md`). The error is that of float32 unless the processor has a matrix unit for bfloat16, which then
    rounds the factors but not the sums. Products on other devices are left as they are.
    """
    if not left.is_cpu:
        return torch.bmm(left, right)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        return torch.bmm(left, right)
    finally:
        torch.set_float32_matmul_precision(before)

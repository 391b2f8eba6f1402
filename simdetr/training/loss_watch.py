"""The losses of a training step on their way to the host, without the host waiting for the GPU.

In: the loss tensors of a batch. Out: their values and whether those of all processes are finite, asked for once the
backward pass is queued: by then the few numbers have long arrived, while the GPU still has work to do.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from simdetr.data.dataset import Batch


class PendingLosses:
    """One asynchronous copy of all losses of a step.

    Args:
        batch: What the losses are of.
        losses: Scalars by name, on one device.
    """

    def __init__(self, batch: Batch, losses: Mapping[str, Tensor]) -> None:
        self.batch, self._names = batch, tuple(losses)
        values = torch.stack([value.detach().float() for value in losses.values()])
        broken = (~values.isfinite()).any().float()[None]
        if dist.is_available() and dist.is_initialized():
            # a process alone in stopping would leave the others waiting, or let them step on its broken gradients
            dist.all_reduce(broken, op=dist.ReduceOp.MAX)
        on_gpu = values.device.type == "cuda"
        self._host = torch.cat((values, broken)).to("cpu", non_blocking=on_gpu)
        self._arrived = torch.cuda.current_stream(values.device).record_event() if on_gpu else None

    def read(self) -> tuple[dict[str, Tensor], bool]:
        """Values by name, scalars on the CPU, and whether those of all processes are finite."""
        if self._arrived is not None:
            self._arrived.synchronize()
        *values, broken = self._host.unbind()
        return dict(zip(self._names, values, strict=True)), not bool(broken)

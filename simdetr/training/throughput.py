"""How fast images go through a trained detector: what the user says, and what follows from the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from simdetr.data.machine import default_workers

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Throughput:
    """How fast images go through a trained detector; what is not set follows from the machine.

    Args:
        batch_size: Images per forward pass; 16 on a GPU, else 8.
        num_workers: Processes that decode images; on a GPU the cores of this process but one, at most 8 and no more
            than there are batches to read ahead; on a CPU none.
        precision: Of the forward pass. The default does not depend on the machine, so that results do not either; GPUs
            that have bf16 compute faster in it, and boxes move a little.
    """

    batch_size: int | None = None
    num_workers: int | None = None
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {self.batch_size}")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers: expected 0 or more, got {self.num_workers}")

    def on(self, device: str, num_images: int) -> dict[str, Any]:
        """The choices for so many images on a device, as ``InferenceSettings.of`` takes them."""
        batch_size = self.batch_size or (8 if device.partition(":")[0] == "cpu" else 16)
        num_workers = self.num_workers
        if num_workers is None:
            num_workers = min(default_workers(device), -(-num_images // batch_size) - 1)
        loading = {"batch_size": batch_size, "num_workers": max(0, num_workers)}
        return {"device": device, "precision": self.precision, **loading}


OF_THE_MACHINE = Throughput()

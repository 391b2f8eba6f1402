"""The largest batch that fits the device, found by real training steps, and learning rates that go with it.

In: a training that is built but not begun. Out: options for its recipe, and a small file in the run folder, so that a
resumed run keeps them. Lightning's BatchSizeFinder does not serve here: it comes after the optimiser and the schedule
are made from the old numbers, and steps on whatever images come first instead of the largest.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from pytorch_lightning.utilities.memory import garbage_collection_cuda, is_oom_error
from torch import Tensor

from simdetr.data.dataset import Batch
from simdetr.data.storage import write_json
from simdetr.training.datamodule import DetectionData
from simdetr.training.run_folder import RunFolder
from simdetr.training.train import Training

LOG = logging.getLogger(__name__)
Scaling = Literal["linear", "sqrt"]

_RESERVE = 0.08
"""Share of a GPU's memory kept free during the trials: for fragments, gradient buckets of DDP, other processes."""
_CPU_SHARE = 0.5
"""Share of the free main memory that activations may take on the CPU, which would swap instead of refusing."""
_CROP_ASPECT = 600 / 384
"""Of the longest window that the random crop cuts out."""
_TILES = 4  # of a mosaic


@dataclass(frozen=True)
class BatchSettings:
    """Images per step and rank, and the learning rates that go with them, see ``DetectionTask``."""

    batch_size: int
    lr: float
    backbone_lr: float
    new_lr: float | None = None

    def scaled_to(self, batch_size: int, scaling: Scaling) -> BatchSettings:
        """Another batch size, with learning rates times the ratio of the sizes or its square root."""
        ratio = batch_size / self.batch_size
        factor = ratio if scaling == "linear" else ratio**0.5
        new_lr = None if self.new_lr is None else self.new_lr * factor
        return BatchSettings(batch_size, self.lr * factor, self.backbone_lr * factor, new_lr)

    def options(self) -> tuple[str, ...]:
        """For a recipe."""
        rates = {"lr": self.lr, "backbone_lr": self.backbone_lr, "new_lr": self.new_lr}
        given = (f"--model.{name}={rate!r}" for name, rate in rates.items() if rate is not None)
        return (f"--data.batch_size={self.batch_size}", *given)


def auto_batch_options(
    path: Path, before: BatchSettings, scaling: Scaling, build: Callable[[], Training]
) -> tuple[str, ...]:
    """Options of the largest batch that fits, found once per run and kept at ``path``.

    ``before`` are the recipe's own numbers; ``build`` makes the training to try, whose weights are spoilt.

    Raises:
        ValueError: The file is of another scaling.
        MemoryError: Not even one image fits.
    """

    def find() -> None:
        write_json(path, largest_batch(build()) | {"scaling": scaling, "before": asdict(before)}, indent=2)

    new = not path.is_file()
    RunFolder(path.parent).made_once(path, find)
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["scaling"] != scaling:
        raise ValueError(
            f"auto_batch: expected {found['scaling']!r}, with which {path.parent} was begun, got {scaling!r}. Repeat "
            "the first command, or choose another out."
        )
    after = before.scaled_to(found["batch_size"], scaling)
    LOG.info(
        "auto_batch: batch_size %d -> %d (%s on %s at %d x %d px), lr %.3g -> %.3g, backbone_lr %.3g -> %.3g (%s)",
        *(before.batch_size, after.batch_size, "largest that fits or the set fills" if new else "found before"),
        *(found["device"], *found["size_hw"]),
        *(before.lr, after.lr, before.backbone_lr, after.backbone_lr, scaling),
    )
    return after.options()


def largest_batch(training: Training) -> dict[str, object]:
    """``batch_size``, the largest power of two whose step fits, ``device``, ``size_hw``; MemoryError if none does."""
    trial = TrialStep(training)
    most = -(-len(training.datamodule.labels) // training.trainer.world_size)
    if trial.device.type == "cpu":
        most = min(most, int(_CPU_SHARE * psutil.virtual_memory().available) // trial.bytes_per_image())
    reserve = _reserved(trial.device)
    found = largest_power_of_two(trial, most)
    del reserve
    height, width = trial.size_hw
    if not found:
        raise MemoryError(
            f"auto_batch: a training step of one image of {height} x {width} px does not fit the memory of "
            f"{trial.device}; use smaller short_sides and max_side, --trainer.precision bf16-mixed, or the detector's "
            "activation_checkpointing."
        )
    return {"batch_size": found, "device": str(trial.device), "size_hw": [height, width]}


def largest_power_of_two(attempt: Callable[[int], object], most: int) -> int:
    """The largest power of two up to ``most`` for which ``attempt`` does not run out of memory; 0 if none."""
    found, size = 0, 1
    while size <= most:
        garbage_collection_cuda()
        try:
            attempt(size)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, MemoryError) or is_oom_error(error):
                break
            raise
        found, size = size, 2 * size
    garbage_collection_cuda()
    return found


class TrialStep:
    """Training steps on a batch of the largest images that the settings of a training allow; spoils its weights."""

    def __init__(self, training: Training) -> None:
        trainer, data = training.trainer, training.datamodule
        self.device: torch.device = trainer.strategy.root_device
        self.size_hw = largest_size_hw(data)
        most = int(np.diff(data.labels.offsets).max(initial=1)) * (_TILES if data.mosaic else 1)
        self._num_boxes = min(most, max(1, data.num_queries // 2))
        self._masks, self._with_unlabelled = data.masks, data.unlabelled is not None
        self._precision = trainer.precision_plugin
        self._task = training.model
        self._precision.convert_module(self._task.to(self.device)).train()
        self._optimiser = self._task.new_optimiser()

    def __call__(self, batch_size: int) -> None:
        """Two steps: the optimiser's state is there from the second on."""
        batch = self._precision.convert_input(self._batch(batch_size))
        for _ in range(2):
            with self._precision.train_step_context():
                loss: Tensor = self._task.losses(batch)["loss"]
            self._precision.backward(loss, self._task, None)
            torch.nn.utils.clip_grad_norm_(self._task.parameters(), 0.1)
            self._optimiser.step()
            self._optimiser.zero_grad()

    def bytes_per_image(self) -> int:
        """What a step keeps of one image for its backward pass."""
        sizes: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
            self._precision.train_step_context(),
        ):
            self._task.losses(self._precision.convert_input(self._batch(1)))
        weights = {parameter.untyped_storage().data_ptr() for parameter in self._task.parameters()}
        return sum(size for place, size in sizes.items() if place not in weights)

    def _batch(self, batch_size: int) -> Batch:
        height, width = self.size_hw
        target = {
            "labels": torch.zeros(self._num_boxes, dtype=torch.int64, device=self.device),
            "boxes": torch.tensor([0.5, 0.5, 0.2, 0.2], device=self.device).expand(self._num_boxes, -1),
        }
        if self._masks:
            target["masks"] = torch.zeros(self._num_boxes, height, width, dtype=torch.bool, device=self.device)
        targets: list[dict[str, Any]] = [target] * batch_size
        if self._with_unlabelled:
            nothing = {name: target[name][:0] for name in target}
            targets += [{**nothing, "labelled": False}] * batch_size
        images = torch.zeros(len(targets), 3, height, width, device=self.device)
        # one image is padded, as in most batches
        mask = torch.zeros(len(targets), height, width, dtype=torch.bool, device=self.device)
        mask[0, height // 2 :] = True
        return Batch(images, mask, targets)


def largest_size_hw(data: DetectionData) -> tuple[int, int]:
    """Height and width in pixels of the largest batch: of the tallest and the widest image at the largest size."""
    sizes = data.labels.sizes_hw.astype(np.float64)
    if data.crop:
        sizes = np.concatenate((sizes, [(1.0, _CROP_ASPECT), (_CROP_ASPECT, 1.0)]))
    scale = np.minimum(max(data.short_sides) / sizes.min(axis=1), data.max_side / sizes.max(axis=1))
    height, width = np.rint(sizes * scale[:, None]).max(axis=0).astype(int).tolist()
    return height, width


def _reserved(device: torch.device) -> Tensor | None:
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    return torch.empty(int(_RESERVE * total), dtype=torch.uint8, device=device)

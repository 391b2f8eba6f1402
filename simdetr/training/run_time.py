"""The parts of a run in; about how long mining, trainings and relabellings will take on this machine, out.

Measured on the spot: a few images are mined, and one training step is done on noise of the images' size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jsonargparse import Namespace
from torch import Tensor

from simdetr.data.images import ImageSource
from simdetr.detectors.detector import Detector
from simdetr.mining.batch import MiningConfig
from simdetr.mining.encoders import Encoder
from simdetr.mining.preview import mine_timed, warm_up
from simdetr.training.datamodule import MAX_SIDE, SHORT_SIDES
from simdetr.training.recipe_choice import typical_sides

_MINED = 3
QUERIES, _OBJECTS = 100, 25  # of a training whose labels are not known yet
_FORWARD = 1 / 3  # of a training step


@dataclass(frozen=True)
class RunTime:
    """Seconds that the rest of a run takes, about."""

    mining: float  # of all images; 0 once they are mined
    training: float  # of each stage, and so relabelling and steps
    relabelling: float
    stages: int  # that are not trained yet
    steps: int

    @property
    def total(self) -> float:
        """Of all parts."""
        return self.mining + self.stages * (self.training + self.relabelling)

    def __str__(self) -> str:
        parts = [f"mining {_minutes(self.mining)}"] if self.mining else []
        parts.append(
            f"{self.stages} x ({self.steps:,} training steps {_minutes(self.training)}, "
            f"relabelling {_minutes(self.relabelling)})"
        )
        return f"about {_minutes(self.total)}: {', '.join(parts)}"


def measure(
    source: ImageSource,
    encoder: Encoder,
    mining: MiningConfig,
    detector: Detector,
    config: Namespace,
    device: str,
    *,
    objects: int,
    stages: int,
    mined: bool = False,
    num_ranks: int = 1,
) -> RunTime | None:
    """How long a run takes; None where none of the sampled images can be read.

    Of the training's ``config`` the sections ``data``, ``model`` and ``trainer`` are read; ``objects`` are in each
    image, ``stages`` are to be trained, ``mined`` says whether the mining, by ``num_ranks`` processes, is done.
    """
    sides = typical_sides(source)
    positions = sorted({round(index * (len(source) - 1) / (_MINED - 1)) for index in range(_MINED)})
    warm_up(source, positions[:1], encoder, mining, device)
    _, _, taken = mine_timed(source, positions, encoder, mining, device)
    if sides is None or taken.images == 0:
        return None
    decoding = taken.decoding / taken.images
    batch_size, steps = config.data.batch_size, config.trainer.max_steps
    if steps == -1:
        steps = (config.trainer.max_epochs or 1) * -(-len(source) // batch_size)
    memory_format = torch.channels_last if config.model.channels_last else torch.contiguous_format
    detector.get_submodule(detector.backbone_name).to(memory_format=memory_format)
    images = _noise(sides, batch_size, config.data.short_sides or SHORT_SIDES, config.data.max_side or MAX_SIDE)
    step = step_seconds(
        detector,
        images.contiguous(memory_format=memory_format),
        min(objects, _OBJECTS),
        device,
        half="bf16" in str(config.trainer.precision),
    )
    return RunTime(
        mining=0.0 if mined else taken.total / taken.images * len(source) / num_ranks,
        training=steps * (step + batch_size * decoding),
        relabelling=(decoding + _FORWARD * step / batch_size) * len(source),
        stages=stages,
        steps=steps,
    )


def step_seconds(detector: Detector, images: Tensor, objects: int, device: str, *, half: bool = False) -> float:
    """Time of a forward and a backward pass, after one to warm up; leaves the global random numbers as they are.

    The detector's batch statistics change. ``images`` are [B, 3, H, W], with so many objects in each; ``half`` computes
    in bfloat16 where possible.
    """
    detector, images = detector.to(device).train(), images.to(device)
    mask = torch.zeros_like(images[:, 0], dtype=torch.bool)
    sides = torch.linspace(0.1, 0.4, objects, device=device)
    boxes = torch.stack([1 - sides, sides + 0.1, sides, sides], dim=1)  # cx, cy, w, h
    target = {"labels": torch.zeros(objects, dtype=torch.int64, device=device), "boxes": boxes}
    kind = torch.device(device).type
    start = 0.0
    with torch.random.fork_rng(devices=[] if kind == "cpu" else None):
        for _ in range(2):
            start = time.perf_counter()
            with torch.autocast(kind, torch.bfloat16, enabled=half):
                loss = detector.losses(images, mask, [target] * len(images))["loss"]
            loss.backward()  # type: ignore[no-untyped-call]
            float(loss.detach())  # waits for the device
            if kind == "cuda":
                torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _noise(sides: tuple[float, float], batch_size: int, short_sides: Sequence[int], max_side: int) -> Tensor:
    """A batch of images of a typical shape at the middle of the training's sizes, float [B, 3, H, W]."""
    shorter, longer = sides
    side = sorted(short_sides)[len(short_sides) // 2]
    long = min(round(side * longer / shorter), max_side)
    return torch.rand((batch_size, 3, side, long), generator=torch.Generator().manual_seed(0))


def _minutes(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"

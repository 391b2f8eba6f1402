"""Where a training step of Deformable DETR R50 spends its time: its parts, and its operators by torch.profiler.

Forward, matching, losses, backward pass and optimiser are timed apart (medians); the operators are those of one step,
by their own time, without what they call. CPU: 224 px, batch 2, float32; GPU, if there is one: 640 px, batch 8, bf16.

python -m benchmarks.training_profile
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.detector_pair import PACKAGES, make_batch
from benchmarks.environment import environment, write_result
from benchmarks.training_step import SETTINGS
from simdetr.detectors import DeformableDETR
from simdetr.training.detection_task import DetectionTask

PARTS = ("forward", "matching", "losses", "backward", "optimiser")
TOP = 15


class Step:
    """One training step, its parts told apart."""

    def __init__(self, device: str, side: int, batch_size: int, precision: str, **small: Any) -> None:
        torch.manual_seed(0)
        self.device, self.detector = device, DeformableDETR(91, **small).to(device).train()
        self.optimiser = DetectionTask(self.detector).new_optimiser()
        self.parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        self.images, self.mask, self.targets = make_batch(batch_size, side, device)
        self.half = torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16")

    def __call__(self) -> list[float]:
        """Seconds of each of ``PARTS``."""
        times = [self._now()]
        criterion = self.detector.criterion
        self.optimiser.zero_grad()
        with self.half:
            outputs = self.detector(self.images, self.mask)
            times.append(self._now())
            matched = criterion.match(outputs, self.targets)
            times.append(self._now())
            loss = criterion.of_matched(outputs, self.targets, matched)["loss"]
        times.append(self._now())
        loss.backward()
        times.append(self._now())
        torch.nn.utils.clip_grad_norm_(self.parameters, 0.1)
        self.optimiser.step()
        times.append(self._now())
        return [after - before for before, after in itertools.pairwise(times)]

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(device: str, repeats: int, **changes: Any) -> dict[str, Any]:
    """Shares of the parts and of the operators that take longest."""
    settings = SETTINGS[device] | {name: changes.pop(name) for name in ("side", "batch") if name in changes}
    step = Step(device, settings["side"], settings["batch"], settings["precision"], **changes)
    step()
    medians = [statistics.median(times) for times in zip(*(step() for _ in range(repeats)), strict=True)]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        step()
    own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, own))
    total = sum(getattr(event, own) for event in events)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        **settings,
        "parts": [
            {"part": part, "ms": round(1000 * seconds, 2), "share": round(seconds / sum(medians), 4)}
            for part, seconds in zip(PARTS, medians, strict=True)
        ],
        "operators": [
            {
                "operator": event.key,
                "calls": event.count,
                "ms": round(getattr(event, own) / 1000, 2),
                "share": round(getattr(event, own) / total, 4),
            }
            for event in events[:TOP]
        ],
    }


def main() -> None:
    """Measure and write ``results/training_profile.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--side", type=int, help="of the images, in place of the bar's")
    parser.add_argument("--layers", type=int, help="of encoder and decoder, in place of 6, for a quick look")
    parser.add_argument("--name", default="training_profile", help="of the result file")
    arguments = parser.parse_args()
    changes: dict[str, Any] = {"side": arguments.side} if arguments.side else {}
    if arguments.layers:
        changes |= {"num_encoder_layers": arguments.layers, "num_decoder_layers": arguments.layers}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    result: dict[str, object] = {
        "rows": [measure(device, arguments.repeats, **changes) for device in devices],
        "gpu": "measured" if "cuda" in devices else "not measured",
        "environment": environment(PACKAGES),
    }
    print(write_result(arguments.name, result).read_text())


if __name__ == "__main__":
    main()

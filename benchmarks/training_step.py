"""A training step of Deformable DETR R50 against transformers': forward, losses, backward, clipping, optimiser.

Same weights, batch, precision, clipping and optimiser (fused AdamW, the default of transformers' Trainer), in turns
in one process. CPU: 224 px, batch 2, float32. GPU: 640 px, batch 8, bf16, with the peak memory of each; a row says so
where there is no GPU.

python -m benchmarks.training_step
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.detector_pair import PACKAGES, build_pair, make_batch, transformers_inputs
from benchmarks.environment import environment, write_result
from benchmarks.turns import compare_in_turns
from simdetr.detectors import DetectionLoss
from simdetr.training.detection_task import DetectionTask

BARS = {"cpu": 1.2, "cuda": 1.5}
SETTINGS = {
    "cpu": {"side": 224, "batch": 2, "precision": "fp32"},
    "cuda": {"side": 640, "batch": 8, "precision": "bf16"},
}


def step_of(model: nn.Module, loss_of: Callable[[], Tensor], optimiser: torch.optim.Optimizer) -> Callable[[], Tensor]:
    """One step of training; gives its loss without waiting for it on a GPU."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> Tensor:
        optimiser.zero_grad()
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimiser.step()
        return loss.detach()

    return step


def both_steps(
    device: str, side: int, batch_size: int, precision: str, channels_last: bool, **small: Any
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Our step and theirs; both detectors begin with the same weights."""
    ours, theirs = build_pair(device, **small)
    ours.criterion = DetectionLoss(class_weight=1.0)  # as transformers weighs its terms
    images, mask, targets = make_batch(batch_size, side, device)
    inputs = transformers_inputs(images, mask, targets)
    task = DetectionTask(ours.train(), lr=1e-6, backbone_lr=1e-7, channels_last=channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    own_images = images.contiguous(memory_format=memory_format)
    half = torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16")

    def our_loss() -> Tensor:
        with half:
            return ours.losses(own_images, mask, targets)["loss"]

    def their_loss() -> Tensor:
        with half:
            return theirs(**inputs).loss

    rest = [parameter for parameter in theirs.train().parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(rest, lr=1e-6, weight_decay=task.weight_decay, fused=True)
    return step_of(ours, our_loss, task.new_optimiser()), step_of(theirs, their_loss, optimiser)


def measure(device: str, repeats: int, channels_last: bool, **changes: Any) -> dict[str, Any]:
    """Times, ratio, first losses of both and peak memory."""
    settings = SETTINGS[device] | {name: changes.pop(name) for name in ("side", "batch") if name in changes}
    ours, theirs = both_steps(
        device, settings["side"], settings["batch"], settings["precision"], channels_last, **changes
    )
    losses = float(ours()), float(theirs())
    memory = {"ours": peak_mb(ours, device), "theirs": peak_mb(theirs, device)}
    times = compare_in_turns(ours, theirs, device, repeats)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        **settings,
        "channels_last": channels_last,
        "first_losses": {"ours": losses[0], "theirs": losses[1]},
        **times,
        "peak_mb": memory,
        "bar": BARS[device],
        "met": bool(times["wall"]["ratio"] >= BARS[device]),
    }


def peak_mb(step: Callable[[], object], device: str) -> float | None:
    """Peak memory of a step on the GPU, in MB, parameters of both detectors included; None on the CPU."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_allocated() / 1e6, 1)


def main() -> None:
    """Measure and write ``results/training_step.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--side", type=int, help="of the images, in place of the bar's")
    parser.add_argument("--layers", type=int, help="of encoder and decoder, 2 or more, in place of 6, for a quick look")
    parser.add_argument("--name", default="training_step", help="of the result file")
    arguments = parser.parse_args()
    changes: dict[str, Any] = {"side": arguments.side} if arguments.side else {}
    if arguments.layers:
        changes |= {"num_encoder_layers": arguments.layers, "num_decoder_layers": arguments.layers}
    rows = [measure("cpu", arguments.repeats, channels_last=False, **changes)]
    if torch.cuda.is_available():
        rows += [measure("cuda", arguments.repeats, channels_last=last, **changes) for last in (False, True)]
    result: dict[str, object] = {
        "rows": rows,
        "gpu": "measured" if torch.cuda.is_available() else "not measured",
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "environment": environment(PACKAGES),
    }
    print(write_result(arguments.name, result).read_text())


if __name__ == "__main__":
    main()

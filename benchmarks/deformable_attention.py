"""Deformable attention: our implementations and the one in transformers on the same inputs, and their peak memory.

Shapes are those of an 800 x 1066 image: levels of 100 x 134, 50 x 67, 25 x 34 and 13 x 17 cells, 8 heads of 32
channels, 4 points. In the encoder each of the 17 821 cells asks, at points a few cells around itself; in the decoder
300 queries ask anywhere. All take turns on the same inputs, so that other load on the machine meets all; a ratio is the
median of the ratios within a turn. Peak memory is what a forward and backward pass needs beyond its inputs: on the CPU
in a process of its own (Linux), on the GPU by the allocator. Where other work shares the cores, OpenMP's waiting
threads spoil timings with several threads; run on a quiet machine, or with OMP_WAIT_POLICY=passive.

Bars: on the CPU 1.2 times as fast as transformers forward and backward; on a GPU Triton twice as fast as grid_sample
with at most half its memory. A GPU that is not here is "not measured".

python -m benchmarks.deformable_attention
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

from benchmarks.environment import environment, write_result
from simdetr.detectors.deformable_attention import IMPLEMENTATIONS, multi_scale_deformable_attention, obstacle

SHAPES = [(100, 134), (50, 67), (25, 34), (13, 17)]
HEADS, DIM, POINTS, QUERIES = 8, 32, 4, 300
BARS = {"cpu_speed": 1.2, "gpu_speed": 2.0, "gpu_memory": 0.5}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_inputs(case: str, batch: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Value, locations and weights that require gradients; locations and weights are float32, as under autocast."""
    generator = torch.Generator().manual_seed(0)
    if case == "encoder":
        grids = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in SHAPES]
        centres = torch.cat(grids).flip(-1).expand(batch, -1, -1)
    else:
        centres = torch.rand(batch, QUERIES, 2, generator=generator)
    size = (batch, centres.shape[1], HEADS, len(SHAPES), POINTS)
    offsets = 3.0 * torch.randn(*size, 2, generator=generator)
    sizes_wh = torch.tensor([(width, height) for height, width in SHAPES])
    value = torch.randn(batch, sum(h * w for h, w in SHAPES), HEADS, DIM, generator=generator)
    locations = centres[:, :, None, None, None] + offsets / sizes_wh[:, None]
    weights = torch.randn(*size, generator=generator).flatten(3).softmax(-1).view(size)
    placed = (value.to(device, dtype), locations.to(device), weights.to(device))
    return tuple(tensor.requires_grad_() for tensor in placed)


def contenders(device: str) -> dict[str, Attention]:
    """All that can run on the device, by name."""
    theirs = MultiScaleDeformableAttention()
    found: dict[str, Attention] = {
        name: lambda v, x, w, name=name: multi_scale_deformable_attention(v, SHAPES, x, w, name)
        for name in IMPLEMENTATIONS
        if obstacle(name, device) is None
    }
    # theirs wants all in one type
    found["transformers"] = lambda v, x, w: theirs(v, None, SHAPES, None, x.to(v.dtype), w.to(v.dtype), 64)
    return found


def forward(attention: Attention, inputs: tuple[Tensor, ...]) -> None:
    """Without what a gradient would need."""
    with torch.inference_mode():
        attention(*inputs)


def step(attention: Attention, inputs: tuple[Tensor, ...]) -> None:
    """Forward and backward."""
    found = attention(*inputs)
    torch.autograd.grad(found, inputs, torch.ones_like(found))


def take_turns(
    work: Callable[[Attention, tuple[Tensor, ...]], None],
    attentions: dict[str, Attention],
    inputs: tuple[Tensor, ...],
    repeats: int,
) -> dict[str, dict[str, Any]]:
    """Median milliseconds of each by wall clock and CPU time, and how many times as long the others take."""
    wait = torch.cuda.synchronize if inputs[0].is_cuda else (lambda: None)
    times: dict[str, list[np.ndarray]] = {name: [] for name in attentions}
    for turn in range(repeats + 1):  # the first one warms up
        for name, attention in attentions.items():
            wait()
            started = clocks()
            work(attention, inputs)
            wait()
            if turn:
                times[name].append(clocks() - started)
    return {
        name: dict(zip(("ms", "cpu_ms"), np.round(1e3 * np.median(own, axis=0), 3).tolist(), strict=True))
        | {
            f"{clock}times_as_fast_as_{other}": round(float(np.median(np.divide(times[other], own)[:, column])), 2)
            for column, clock in enumerate(("", "cpu_"))
            for other in ("transformers", "grid_sample")
            if other != name
        }
        for name, own in times.items()
    }


def clocks() -> np.ndarray:
    """Wall clock and CPU time of all threads of this process, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def cuda_memory(attention: Attention, inputs: tuple[Tensor, ...]) -> float:
    """Peak MB of a step beyond the inputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(attention, inputs)
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def own_cpu_memory(name: str, case: str, batch: int) -> float | None:
    """Peak MB of this process's first step beyond the inputs; None where the system has no such counter."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None
    inputs = make_inputs(case, batch, "cpu", torch.float32)
    attention = contenders("cpu")[name]

    def peak_kb() -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))

    reset.write_text("5")
    before = peak_kb()
    step(attention, inputs)
    return round((peak_kb() - before) / 1e3, 1)


def cpu_memory(name: str, case: str, batch: int, threads: int) -> float | None:
    """The same, measured in a new process."""
    words = ["--memory-of", name, case, str(batch), "--threads", str(threads)]
    command = [sys.executable, "-m", "benchmarks.deformable_attention", *words]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout
    return json.loads(printed)


def measure(case: str, batch: int, device: str, dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, Any]:
    """All numbers of one case, by implementation."""
    inputs, attentions = make_inputs(case, batch, device, dtype), contenders(device)
    forwards = take_turns(forward, attentions, inputs, arguments.repeats)
    steps = take_turns(step, attentions, inputs, arguments.repeats)
    return {
        name: {
            "forward": forwards[name],
            "forward_and_backward": steps[name],
            "peak_mb": cuda_memory(attention, inputs)
            if device == "cuda"
            else cpu_memory(name, case, batch, arguments.threads),
        }
        for name, attention in attentions.items()
    }


def met(device: str, found: dict[str, Any]) -> bool:
    """Whether the default of the device passes its bar in one case."""
    if device == "cpu":
        return bool(found["rows"]["forward_and_backward"]["times_as_fast_as_transformers"] >= BARS["cpu_speed"])
    if "triton" not in found:
        return False
    faster = found["triton"]["forward_and_backward"]["times_as_fast_as_grid_sample"] >= BARS["gpu_speed"]
    return bool(faster and found["triton"]["peak_mb"] <= BARS["gpu_memory"] * found["grid_sample"]["peak_mb"])


def main() -> None:
    """Measure and write ``results/deformable_attention.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", default=["encoder", "decoder"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--name", default="deformable_attention", help="of the result file")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        name, case, batch = arguments.memory_of
        print(json.dumps(own_cpu_memory(name, case, int(batch))))
        return
    result: dict[str, Any] = {"levels": SHAPES, "heads": HEADS, "channels_per_head": DIM, "points": POINTS}
    settings = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16)}
    for device, dtypes in settings.items():
        if device == "cuda" and not torch.cuda.is_available():
            result[device] = "not measured: no GPU here"
            continue
        result[device] = {
            f"{case}, batch {batch}, {str(dtype).removeprefix('torch.')}": measure(
                case, batch, device, dtype, arguments
            )
            for case in arguments.cases
            for batch in arguments.batches
            for dtype in dtypes
        }
        result[f"{device}_met"] = {case: met(device, found) for case, found in result[device].items()}
    result |= {"bars": BARS, "environment": environment(("torch", "transformers"))}
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
    print(write_result(arguments.name, result).read_text())


if __name__ == "__main__":
    main()

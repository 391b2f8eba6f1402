"""Deformable attention on CUDA devices, written in Triton: values, locations and weights in, sums of samples out.

Same sums as in ``deformable_attention_torch.py``, without samples in memory: one kernel forward, one backward, which
computes the corners again. Nothing is compiled before the first call.

One program is a block of neighbouring queries of one image and head. Its tiles are [queries, channels] with the
channels of a head side by side in memory, so that a warp reads whole rows of cells, and neighbouring queries, whose
points lie close, share them in the cache. The sum over levels and points stays in registers in float32, whatever the
inputs' type. Backward, gradients of locations and weights are sums over channels within the program; gradients of cells
are float32 atomic additions of whole rows, whose order is not fixed: the last bits of the value's gradient may differ
from run to run. Levels' sizes are read from a small table on the device, so that new image sizes compile nothing.
There is no autotuning: it would run each kernel dozens of times at the first call of every new size.

Letters: B batch, N queries, S cells of all levels together, M heads, D channels per head, L levels, P points.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from simdetr.detectors.deformable_attention_torch import attach_gradient, by_grid_sample, constant_table

_FORWARD_WARPS = 4
_BACKWARD_WARPS = 1  # sums over channels then pass between threads without waiting for other warps


def by_triton(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Deformable attention by Triton kernels, on a CUDA device; as `by_grid_sample`, but in the dtype of ``value``.

    Each input is float32, bfloat16 or float16 for itself.
    """
    attended: Tensor = _forward(value, list(itertools.chain.from_iterable(shapes)), locations, weights)
    return attended


def try_out(device: torch.device) -> None:
    """Run both kernels on a small case; raises what Triton raises, or RuntimeError if the numbers are wrong."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (2, 2)]
    value = torch.randn(1, 19, 2, 8, generator=generator)
    locations = torch.rand(1, 3, 2, 2, 1, 2, generator=generator) * 1.4 - 0.2
    weights = torch.rand(1, 3, 2, 2, 1, generator=generator)
    results = []
    for function, place in ((by_grid_sample, torch.device("cpu")), (by_triton, device)):
        inputs = [tensor.to(place).requires_grad_() for tensor in (value, locations, weights)]
        attended = function(inputs[0], shapes, inputs[1], inputs[2])
        gradients = torch.autograd.grad(attended.square().sum(), inputs)
        results.append([tensor.detach().cpu() for tensor in (attended, *gradients)])
    for expected, found in zip(*results, strict=True):
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference < 1e-4:
            raise RuntimeError(f"its results differ from PyTorch's by {difference:.1e}")


@triton.jit
def _block(num_queries: tl.tensor, HEADS: tl.constexpr, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """This program's image (64 bits: offsets of large batches need them), head and queries [BLOCK]."""
    blocks = tl.cdiv(num_queries, BLOCK)
    program = tl.program_id(0)
    queries = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return (program // blocks // HEADS).to(tl.int64), program // blocks % HEADS, queries


@triton.jit
def _locate(
    point: tl.tensor, wanted: tl.tensor, height: tl.tensor, width: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Upper left cell (row, column) of each point, its distance from there in cells, and whether it touches the map."""
    x = tl.load(point, mask=wanted, other=0.0).to(tl.float32) * width - 0.5
    y = tl.load(point + 1, mask=wanted, other=0.0).to(tl.float32) * height - 0.5
    outside = (x <= -1.0) | (y <= -1.0) | (x >= width) | (y >= height)
    touches = wanted & ~outside  # NaN is not outside, so that it reaches the output
    x = tl.where(touches, x, 0.0)
    y = tl.where(touches, y, 0.0)
    top = tl.floor(y)
    left = tl.floor(x)
    return top.to(tl.int32), left.to(tl.int32), y - top, x - left, touches


@triton.jit
def _share(part: tl.tensor, second: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Weight of the first or second cell of a pair for a point this part of the way, and the weight's slope."""
    if second:
        return part, 1.0
    return 1.0 - part, -1.0


@triton.jit
def _forward_kernel(
    value: tl.tensor,
    levels: tl.tensor,
    locations: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    num_cells: tl.tensor,
    num_queries: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    image, head, queries = _block(num_queries, HEADS, BLOCK)
    channels = tl.arange(0, CHANNELS)
    is_query = queries < num_queries
    is_channel = (channels < DIM)[None, :]
    owners = (image * num_queries + queries) * HEADS + head
    table = value + (image * num_cells * HEADS + head) * DIM + channels[None, :]
    total = tl.zeros((BLOCK, CHANNELS), dtype=tl.float32)
    for level in range(LEVELS):
        height = tl.load(levels + level * 3)
        width = tl.load(levels + level * 3 + 1)
        start = tl.load(levels + level * 3 + 2)
        for point in tl.static_range(POINTS):
            at = owners * (LEVELS * POINTS) + level * POINTS + point
            top, left, part_y, part_x, touches = _locate(locations + at * 2, is_query, height, width)
            attention = tl.load(weights + at, mask=touches, other=0.0).to(tl.float32)
            for corner in tl.static_range(4):
                row = top + corner // 2
                column = left + corner % 2
                share_y, _ = _share(part_y, corner // 2)
                share_x, _ = _share(part_x, corner % 2)
                inside = touches & (row >= 0) & (row < height) & (column >= 0) & (column < width)
                cells = (start + row * width + column) * (HEADS * DIM)
                rows = tl.load(table + cells[:, None], mask=inside[:, None] & is_channel, other=0.0)
                total += (attention * share_y * share_x)[:, None] * rows.to(tl.float32)
    tl.store(out + owners[:, None] * DIM + channels[None, :], total, mask=is_query[:, None] & is_channel)


@triton.jit
def _backward_kernel(
    grad: tl.tensor,
    value: tl.tensor,
    levels: tl.tensor,
    locations: tl.tensor,
    weights: tl.tensor,
    grad_value: tl.tensor,
    grad_locations: tl.tensor,
    grad_weights: tl.tensor,
    num_cells: tl.tensor,
    num_queries: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    image, head, queries = _block(num_queries, HEADS, BLOCK)
    channels = tl.arange(0, CHANNELS)
    is_query = queries < num_queries
    is_channel = (channels < DIM)[None, :]
    owners = (image * num_queries + queries) * HEADS + head
    offset = (image * num_cells * HEADS + head) * DIM + channels[None, :]
    grads = tl.load(grad + owners[:, None] * DIM + channels[None, :], mask=is_query[:, None] & is_channel, other=0.0)
    grads = grads.to(tl.float32)
    for level in range(LEVELS):
        height = tl.load(levels + level * 3)
        width = tl.load(levels + level * 3 + 1)
        start = tl.load(levels + level * 3 + 2)
        for point in tl.static_range(POINTS):
            at = owners * (LEVELS * POINTS) + level * POINTS + point
            top, left, part_y, part_x, touches = _locate(locations + at * 2, is_query, height, width)
            attention = tl.load(weights + at, mask=touches, other=0.0).to(tl.float32)
            sample = tl.zeros((BLOCK,), dtype=tl.float32)
            slope_y = tl.zeros((BLOCK,), dtype=tl.float32)
            slope_x = tl.zeros((BLOCK,), dtype=tl.float32)
            for corner in tl.static_range(4):
                row = top + corner // 2
                column = left + corner % 2
                share_y, sign_y = _share(part_y, corner // 2)
                share_x, sign_x = _share(part_x, corner % 2)
                inside = touches & (row >= 0) & (row < height) & (column >= 0) & (column < width)
                cells = offset + ((start + row * width + column) * (HEADS * DIM))[:, None]
                mask = inside[:, None] & is_channel
                rows = tl.load(value + cells, mask=mask, other=0.0).to(tl.float32)
                shares = (attention * share_y * share_x)[:, None] * grads
                tl.atomic_add(grad_value + cells, shares, mask=mask, sem="relaxed")
                dot = tl.sum(rows * grads, axis=1)
                sample += share_y * share_x * dot
                slope_y += sign_y * share_x * dot
                slope_x += sign_x * share_y * dot
            tl.store(grad_weights + at, sample, mask=is_query)
            tl.store(grad_locations + at * 2, slope_x * attention * width, mask=is_query)
            tl.store(grad_locations + at * 2 + 1, slope_y * attention * height, mask=is_query)


def _options(value: Tensor, locations: Tensor, warps: int) -> dict[str, Any]:
    """Constants of a kernel: four channels per thread, which one instruction loads or adds."""
    channels = triton.next_power_of_2(value.shape[3])
    return {
        "HEADS": value.shape[2],
        "DIM": value.shape[3],
        "LEVELS": locations.shape[3],
        "POINTS": locations.shape[4],
        "BLOCK": max(1, 128 * warps // channels),
        "CHANNELS": channels,
        "num_warps": warps,
        # the default, but Triton 3.9 warns of a coming change where it is not said
        "enable_fp_fusion": True,
    }


def _level_table(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Height, width and first cell of each level, int32 [L, 3]."""
    rows, start = [], 0
    for height, width in zip(sizes[::2], sizes[1::2], strict=True):
        rows.append((height, width, start))
        start += height * width
    return constant_table(tuple(rows), torch.int32, device)


def _launch(
    kernel: Any,  # noqa: ANN401 - Triton has no type for it
    warps: int,
    inputs: tuple[Tensor, Sequence[int], Tensor, Tensor],
    results: Sequence[Tensor],
    grad: Sequence[Tensor] = (),
) -> None:
    """Run a kernel: one program per image, head and block of queries."""
    value, sizes, locations, weights = inputs
    options = _options(value, locations, warps)
    programs = value.shape[0] * value.shape[2] * triton.cdiv(locations.shape[1], options["BLOCK"])
    levels = _level_table(sizes, value.device)
    tensors = [*grad, value.contiguous(), levels, locations.contiguous(), weights.contiguous(), *results]
    # Triton starts kernels on the current device; on the CPU its interpreter runs them
    place: AbstractContextManager[object] = torch.cuda.device(value.device) if value.is_cuda else nullcontext()
    with place:
        kernel[(programs,)](*tensors, value.shape[1], locations.shape[1], **options)


@torch.library.custom_op(
    "simdetr::deformable_attention_triton",
    mutates_args=(),
    schema="(Tensor value, SymInt[] sizes, Tensor locations, Tensor weights) -> Tensor",
)
def _forward(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, dim = value.shape
    out = value.new_empty(batch, locations.shape[1], heads * dim)
    if out.numel():
        _launch(_forward_kernel, _FORWARD_WARPS, (value, sizes, locations, weights), [out])
    return out


@torch.library.custom_op(
    "simdetr::deformable_attention_triton_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor value, SymInt[] sizes, Tensor locations, Tensor weights) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_value = value.new_zeros(value.shape, dtype=torch.float32)
    grad_locations, grad_weights = locations.new_empty(locations.shape), weights.new_empty(weights.shape)
    if grad.numel():
        inputs, results = (value, sizes, locations, weights), (grad_value, grad_locations, grad_weights)
        _launch(_backward_kernel, _BACKWARD_WARPS, inputs, results, [grad.contiguous()])
    return grad_value.to(value.dtype), grad_locations, grad_weights


attach_gradient(_forward, _backward)

"""Deformable attention in plain PyTorch: values, locations and weights in, weighted sums of samples out.

Two formulations of the same sums; `deformable_attention` chooses between them.

* ``grid_sample``: level by level, as the original's reference does. Runs on every device and exports to ONNX.
* ``rows``: for processors. The values are a table of rows, one per cell and head, and each query and head is a bag of
  L · P · 4 rows whose weights are attention times bilinear weight. `torch.nn.functional.embedding_bag` sums bags
  without storing samples. The value's gradient is a bag sum too, with the roles exchanged: sorted by cell, the
  points that touch a cell are a bag of the queries' gradients. Arithmetic on points goes along rows of many bags.

Letters: B batch, N queries, S cells of all levels together, M heads, D channels per head, L levels, P points;
H pairs of head and image, in this order, or those that are computed together, and R = H · N bags.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.library import CustomOpDef  # type: ignore[attr-defined]

# so that temporary tensors stay in the processor's caches
_POINTS_AT_ONCE = 2**17
_BAGS_AT_ONCE = 512


def by_grid_sample(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Deformable attention by ``grid_sample``, one level after the other to bound the memory.

    Args:
        value: float32 or float64 [B, S, M, D].
        shapes: (height, width) of each level, none empty.
        locations: [B, N, M, L, P, 2] in the dtype of ``value``.
        weights: [B, N, M, L, P] in the dtype of ``value``.

    Returns:
        [B, N, M · D].
    """
    batch, _, heads, _ = value.shape
    grids = 2.0 * locations - 1.0
    total: Tensor | None = None
    levels = value.split_with_sizes([height * width for height, width in shapes], dim=1)
    for level, (cells, (height, width)) in enumerate(zip(levels, shapes, strict=True)):
        samples = F.grid_sample(
            rearrange(cells, "b (h w) m d -> (b m) d h w", h=height, w=width),
            rearrange(grids[:, :, :, level], "b n m p xy -> (b m) p n xy"),
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        # points before queries: the sum over the few points then runs along long rows
        summed = (samples * rearrange(weights[:, :, :, level], "b n m p -> (b m) 1 p n")).sum(dim=2)
        total = summed if total is None else total + summed
    assert total is not None, "no levels"
    return rearrange(total, "(b m) d n -> b n (m d)", b=batch, m=heads)


def by_rows(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Deformable attention by sums of bags of rows, on the CPU; arguments and result as of `by_grid_sample`."""
    attended: Tensor = _forward(value, list(itertools.chain.from_iterable(shapes)), locations, weights)
    return attended


@functools.lru_cache(maxsize=512)
def constant_table(rows: tuple[tuple[int, ...], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor of these numbers, sent to the device once and without waiting for it; never change it."""
    # outside of inference mode, since training may use the same tensor later
    with torch.inference_mode(False):
        table = torch.tensor(rows, dtype=dtype)
        return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def attach_gradient(forward: CustomOpDef, backward: CustomOpDef, *, same_layout: bool = False) -> None:
    """Make one custom operator the gradient of another, and tell torch.compile the shapes of what they return.

    They take value, sizes (the shapes in one flat list), locations and weights; the gradient takes the output's first.
    Gradients of locations and weights lie in memory row by row, or as these do (``same_layout``).
    """

    def new_like(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor) if same_layout else tensor.new_empty(tensor.shape)

    def output(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
        return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])

    def gradients(
        grad: Tensor, value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return value.new_empty(value.shape), new_like(locations), new_like(weights)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401 - torch has no type for it
        value, ctx.sizes, locations, weights = inputs
        ctx.save_for_backward(value, locations, weights)

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:  # noqa: ANN401
        value, locations, weights = ctx.saved_tensors
        grad_value, grad_locations, grad_weights = backward(grad, value, ctx.sizes, locations, weights)
        return grad_value, None, grad_locations, grad_weights

    forward.register_fake(output)
    backward.register_fake(gradients)
    forward.register_autograd(differentiate, setup_context=keep)


class _Levels:
    """What all points of a level share."""

    def __init__(self, sizes: Sequence[int], value: Tensor) -> None:
        shapes = list(zip(sizes[::2], sizes[1::2], strict=True))
        self.height, self.width = value.new_tensor(shapes).T[..., None, None]
        """As floats [L, 1, 1]."""
        starts = itertools.accumulate((height * width for height, width in shapes), initial=0)
        self.cells = list(itertools.pairwise(starts))
        """First cell of each level, and first of the next."""
        self.steps = [
            [[down * width * (height > 1) + right * (width > 1) for right in (0, 1)] for down in (0, 1)]
            for height, width in shapes
        ]
        """From a pair's first cell to the cell (down, right); 0 where the level has no such neighbour."""
        first = torch.tensor(self.steps, dtype=torch.int32).movedim(0, 2)
        self.first_rows = (first + torch.tensor(self.cells, dtype=torch.int32)[:, 0])[..., None, None]
        """A level's first cell, moved by the steps, int32 [2, 2, L, 1, 1]."""


class _Axis(NamedTuple):
    """Where points lie along x or y: the pair of cells around them, or the pair next to them at the border."""

    first: Tensor
    """The pair's first cell [L, P, R], as a float; its one cell where the map is one cell wide."""
    weights: Tensor
    """Linear interpolation's weight of each cell of the pair [2, L, P, R]."""
    slopes: Tensor
    """Derivatives of the weights with respect to the position in cells; without elements unless asked for."""


class _Bags(NamedTuple):
    """The bags of some pairs of head and image, and what each of their points reads by corner (down, right)."""

    y: _Axis
    x: _Axis
    rows: Tensor
    """Of the pairs' cells, int32 [2, 2, L, P, R]."""
    weights: Tensor
    """Attention times bilinear weight [2, 2, L, P, R]."""


def _axis(locations: Tensor, size: Tensor, slopes: bool) -> _Axis:
    """The pair of cells that a point in [0, size] interpolates between; locations [L, P, R], sizes [L, 1, 1].

    A cell's weight is a hat, max(0, 1 - distance). For a point that is outside, or between the border and the centre of
    the outermost cell, the nearest pair's hats give the missing neighbour no weight without any mask.
    """
    # clamping keeps whole numbers representable; points two cells outside have no weight anyway
    positions = (locations * size).sub_(0.5).clamp_(min=-2.0).clamp_(max=size + 1.0)
    # NaN stays in the weights, from where it reaches the output, but does not become a cell's number
    first = positions.floor().clamp_(min=0.0).clamp_(max=(size - 2.0).clamp_(min=0.0)).nan_to_num_(nan=0.0)
    exists = torch.stack((torch.ones_like(size), (size > 1).to(size.dtype)))
    offsets = positions.sub_(first) - torch.arange(2, dtype=size.dtype)[:, None, None, None]
    weights = (1.0 - offsets.abs()).clamp_(min=0.0).mul_(exists)
    if not slopes:
        return _Axis(first, weights, weights[:0])
    # the hat rises where floor(offset) is -1 and falls where it is 0
    below = offsets.floor_()
    rising, falling = (below.eq(cell).to(below.dtype) for cell in (-1.0, 0.0))
    return _Axis(first, weights, rising.sub_(falling).mul_(exists))


def _pairs(values: Tensor) -> Tensor:
    """[B, N, M, ...] as [H, N, ...]."""
    return rearrange(values, "b n m ... -> (m b) n ...")


def _points(locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Locations [2, L, P, H, N], x first, and attention [L, P, H, N]."""
    places = rearrange(locations, "b n m l p xy -> xy l p (m b) n")
    return places, rearrange(weights, "b n m l p -> l p (m b) n")


def _groups(attention: Tensor) -> list[slice]:
    """Pairs to compute together, of attention [L, P, H, N]."""
    together = max(1, _POINTS_AT_ONCE // max(1, attention[:, :, 0].numel()))
    return [slice(start, start + together) for start in range(0, attention.shape[2], together)]


def _bags(places: Tensor, attention: Tensor, levels: _Levels, *, slopes: bool = False) -> _Bags:
    """Of locations [2, L, P, R] and attention [L, P, H, N] of some pairs."""
    along_x, along_y = (_axis(*pair, slopes) for pair in zip(places, (levels.width, levels.height), strict=True))
    cells = (along_y.first * levels.width + along_x.first).int()
    cells.view(attention.shape).add_(torch.arange(attention.shape[2], dtype=torch.int32)[:, None] * levels.cells[-1][1])
    corners = (along_y.weights * attention.flatten(2))[:, None] * along_x.weights
    return _Bags(along_y, along_x, cells + levels.first_rows, corners)


def _by_bag(values: Tensor) -> Tensor:
    """Rows or weights [2, 2, L, P, R] as [R, 4 · L · P]."""
    return values.flatten(0, 3).T.contiguous()


@torch.library.custom_op(
    "simdetr::deformable_attention_rows",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor value, SymInt[] sizes, Tensor locations, Tensor weights) -> Tensor",
)
def _forward(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    levels, (places, attention) = _Levels(sizes, value), _points(locations, weights)
    values = _pairs(value)
    sums = value.new_empty(len(values), locations.shape[1], value.shape[3])
    for pairs in _groups(attention) if sums.numel() else ():
        bags = _bags(places[..., pairs, :].flatten(3), attention[..., pairs, :], levels)
        rows, shares = _by_bag(bags.rows), _by_bag(bags.weights)
        found = F.embedding_bag(rows, values[pairs].flatten(0, 1), mode="sum", per_sample_weights=shares)
        sums[pairs] = found.view_as(sums[pairs])
    return rearrange(sums, "(m b) n d -> b n (m d)", m=value.shape[2]).contiguous()


@torch.library.custom_op(
    "simdetr::deformable_attention_rows_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad, Tensor value, SymInt[] sizes, Tensor locations, Tensor weights) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    heads = value.shape[2]
    levels, (places, attention) = _Levels(sizes, value), _points(locations, weights)
    values, grads = _pairs(value), rearrange(grad, "b n (m d) -> (m b) n d", m=heads)
    grad_value, grad_places, grad_attention = (torch.zeros_like(x) for x in (values, places, attention))
    for pairs in _groups(attention) if grad.numel() else ():
        shares, own = attention[..., pairs, :], grads[pairs].flatten(0, 1)
        bags = _bags(places[..., pairs, :].flatten(3), shares, levels, slopes=True)
        left, right = _row_dots(values[pairs].flatten(0, 1), _by_bag(bags.rows), own).view(bags.rows.shape).unbind(1)
        along_x = _dot(bags.x.weights, (left, right))
        grad_attention[..., pairs, :] = _dot(bags.y.weights, along_x).view(shares.shape)
        towards_x = _dot(bags.y.weights, _dot(bags.x.slopes, (left, right))).mul_(levels.width).view(shares.shape)
        towards_y = _dot(bags.y.slopes, along_x).mul_(levels.height).view(shares.shape)
        grad_places[0, ..., pairs, :], grad_places[1, ..., pairs, :] = towards_x * shares, towards_y * shares
        _sum_by_cell(grad_value[pairs], levels, bags, own)
    back = rearrange(grad_places, "xy l p (m b) n -> b n m l p xy", m=heads)
    return (
        rearrange(grad_value, "(m b) s d -> b s m d", m=heads).contiguous(),
        torch.empty_like(locations).copy_(back),
        torch.empty_like(weights).copy_(rearrange(grad_attention, "l p (m b) n -> b n m l p", m=heads)),
    )


def _dot(pair: Tensor, others: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Scalar product over two cells."""
    return (pair[0] * others[0]).addcmul_(pair[1], others[1])


def _row_dots(table: Tensor, rows: Tensor, grads: Tensor) -> Tensor:
    """Scalar product of each row that a point reads with its query's gradient; of rows [R, K], [K, R].

    A few queries at a time, so that the rows they read are still in the processor's cache when they are multiplied.
    """
    dots = grads.new_empty(rows.shape)
    for part, bags, own in zip(*(torch.split(x, _BAGS_AT_ONCE) for x in (dots, rows, grads)), strict=True):
        read = table.index_select(0, bags.flatten()).view(*bags.shape, -1)
        part.copy_(torch.bmm(own[:, None], read.mT)[:, 0])
    return dots.T.contiguous()


def _sum_by_cell(grad_value: Tensor, levels: _Levels, bags: _Bags, grads: Tensor) -> None:
    """Add to the gradient [H, S, D] of the pairs' values.

    Points are sorted once, by the first cell of their pairs; each of a point's corners is then the same bag sum, moved
    by a step.
    """
    keys, order = bags.rows[0, 0].flatten().sort(stable=True)  # stable: torch then sorts whole numbers by radix
    counts = torch.bincount(keys, minlength=grad_value[..., 0].numel())
    starts = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    queries = (order % len(grads)).int()
    for down, right in itertools.product(range(2), range(2)):
        shares = bags.weights[down, right].flatten().index_select(0, order)
        sums = F.embedding_bag(queries, grads, starts, mode="sum", per_sample_weights=shares, include_last_offset=True)
        sums = sums.view(grad_value.shape)
        for (first, end), steps in zip(levels.cells, levels.steps, strict=True):
            step = steps[down][right]
            grad_value[:, first + step : end] += sums[:, first : end - step]


attach_gradient(_forward, _backward, same_layout=True)

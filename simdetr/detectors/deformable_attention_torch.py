"""Deformable attention in plain PyTorch: values, locations and weights in, weighted sums of samples out.

Two formulations of the same sums; `deformable_attention` chooses between them.

* ``grid_sample``: level by level, as the original's reference does. Runs on every device and exports to ONNX.
* ``rows``: for processors. The values are a table of rows, one per cell and head, and each query and head is a bag of
  up to L · P · 4 rows whose weights are attention times bilinear weight. `torch.nn.functional.embedding_bag` sums
  bags without storing samples. The value's gradient is a bag sum too, with the roles exchanged: sorted by cell, the
  points that touch a cell are a bag of the queries' gradients.

Letters: B batch, N queries, S cells of all levels together, M heads, D channels per head, L levels, P points;
G images that are computed together.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.library import CustomOpDef  # type: ignore[attr-defined]

# small images share their operations' fixed costs; the temporary tensors of large ones stay near the caches
_POINTS_AT_ONCE = 2**20
_BAGS_AT_ONCE = 2048
_MAX_ROWS = 2**31 - 1


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


def attach_gradient(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Make one custom operator the gradient of another, and tell torch.compile the shapes of what they return.

    They take value, sizes (the shapes in one flat list), locations and weights; the gradient takes the output's first.
    """

    def output(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
        return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])

    def gradients(
        grad: Tensor, value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)

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


class _Axis(NamedTuple):
    """Where points lie along x or y: the pair of cells around them, or the pair next to them at the border."""

    first: Tensor
    """The pair's first cell, as a float; its one cell where the map is one cell wide."""
    weights: list[Tensor]
    """Linear interpolation's weight of each cell of the pair."""
    slopes: list[Tensor]
    """Derivatives of the weights with respect to the position in cells; empty unless asked for."""


class _Level(NamedTuple):
    """One level of a group of images."""

    number: int
    height: int
    width: int
    cells: slice
    """Its cells among all S."""


def _axis(locations: Tensor, size: int, slopes: bool = False) -> _Axis:
    """The pair of cells that a point in [0, size] interpolates between.

    A cell's weight is a hat, max(0, 1 - distance). For a point that is outside, or between the border and the centre of
    the outermost cell, the nearest pair's hats give the missing neighbour no weight without any mask.
    """
    # clamping keeps whole numbers representable; points two cells outside have no weight anyway
    positions = (locations * size - 0.5).clamp_(-2.0, size + 1.0)
    # NaN stays in the weights, from where it reaches the output, but does not become a cell's number
    first = positions.floor().clamp_(0.0, max(size - 2, 0)).nan_to_num_(nan=0.0)
    offset = positions - first
    weights = [(1.0 - (offset - cell).abs()).clamp_(min=0.0) for cell in range(min(size, 2))]
    if not slopes:
        return _Axis(first, weights, [])
    # the hat of cell c rises where floor(offset) is c - 1 and falls where it is c
    between = offset.floor_()
    steps = [between.eq(cell).to(between.dtype) for cell in range(-1, min(size, 2))]
    return _Axis(first, weights, [rising - falling for rising, falling in itertools.pairwise(steps)])


def _levels(sizes: Sequence[int]) -> Iterator[_Level]:
    start = 0
    for index, (height, width) in enumerate(zip(sizes[::2], sizes[1::2], strict=True)):
        if height * width:
            yield _Level(index, height, width, slice(start, start + height * width))
        start += height * width


def _groups(value: Tensor, locations: Tensor) -> list[slice]:
    """Images to compute together: as many as keep temporary tensors small and rows' numbers within int32."""
    batch, cells, heads, _ = value.shape
    points = locations.shape[1] * heads * locations.shape[4]
    together = max(1, min(_POINTS_AT_ONCE // max(points, 1), _MAX_ROWS // max(cells * heads, 1)))
    return [slice(start, start + together) for start in range(0, batch, together)]


def _first_rows(images: int, heads: int, cells: int) -> Tensor:
    """Row of each image's and head's first cell in a table [G · cells · M, D], int32 [G, 1, M, 1]."""
    starts = torch.arange(images, dtype=torch.int32) * (cells * heads)
    return starts[:, None, None, None] + torch.arange(heads, dtype=torch.int32)[:, None]


def _row_numbers(y: _Axis, x: _Axis, level: _Level, num_cells: int) -> Tensor:
    """Rows [G, N, M, P, corners] of the table [G · S · M, D] that each point reads, int32."""
    images, _, heads, _ = x.first.shape
    cells = (y.first * level.width + x.first).int().add_(level.cells.start)
    rows = cells.mul_(heads).add_(_first_rows(images, heads, num_cells))
    corners = itertools.product(range(len(y.weights)), range(len(x.weights)))
    return torch.stack([rows + (down * level.width + right) * heads for down, right in corners], dim=-1)


def _corner_weights(y: _Axis, x: _Axis, weights: Tensor) -> dict[tuple[int, int], Tensor]:
    """Attention times bilinear weight [G, N, M, P] by corner (down, right), in the order of `_row_numbers`."""
    weighted = [vertical * weights for vertical in y.weights]
    return {(i, j): down * right for i, down in enumerate(weighted) for j, right in enumerate(x.weights)}


@torch.library.custom_op(
    "simdetr::deformable_attention_rows",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor value, SymInt[] sizes, Tensor locations, Tensor weights) -> Tensor",
)
def _forward(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    batch, num_cells, heads, dim = value.shape
    queries = locations.shape[1]
    total = value.new_zeros(batch, queries, heads, dim)
    if queries == 0:
        return total.flatten(2)
    for images in _groups(value, locations):
        table = value[images].reshape(-1, dim)
        for level in _levels(sizes):
            points = locations[images, :, :, level.number]
            y, x = _axis(points[..., 1], level.height), _axis(points[..., 0], level.width)
            rows = _row_numbers(y, x, level, num_cells)
            corners = _corner_weights(y, x, weights[images, :, :, level.number])
            sums = F.embedding_bag(
                rearrange(rows, "g n m p c -> (g n m) (p c)"),
                table,
                mode="sum",
                per_sample_weights=rearrange(list(corners.values()), "c g n m p -> (g n m) (p c)"),
            )
            total[images] += sums.view(-1, queries, heads, dim)
    return total.flatten(2)


@torch.library.custom_op(
    "simdetr::deformable_attention_rows_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad, Tensor value, SymInt[] sizes, Tensor locations, Tensor weights) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    num_cells, dim = value.shape[1], value.shape[3]
    grad_value, grad_locations, grad_weights = (x.new_zeros(x.shape) for x in (value, locations, weights))
    if locations.shape[1] == 0:
        return grad_value, grad_locations, grad_weights
    for images in _groups(value, locations):
        table, grads = value[images].reshape(-1, dim), grad[images].reshape(-1, dim)
        for level in _levels(sizes):
            points, attention = locations[images, :, :, level.number], weights[images, :, :, level.number]
            y, x = _axis(points[..., 1], level.height, slopes=True), _axis(points[..., 0], level.width, slopes=True)
            rows = _row_numbers(y, x, level, num_cells)
            dots = _row_dots(table, rows, grads).view(len(y.weights), len(x.weights), *attention.shape)
            along_x = [_dot(x.weights, row) for row in dots]
            grad_weights[images, :, :, level.number] = _dot(y.weights, along_x)
            towards_x = _dot(y.weights, [_dot(x.slopes, row) for row in dots])
            grad_locations[images, :, :, level.number, :, 0] = towards_x * attention * level.width
            grad_locations[images, :, :, level.number, :, 1] = _dot(y.slopes, along_x) * attention * level.height
            corners = _corner_weights(y, x, attention)
            if points.shape[1] * points.shape[3] < level.height * level.width:
                _scatter(grad_value[images].view(-1, dim), rows, grads, corners)
            else:
                canvas = grad_value[images, level.cells].view(-1, level.height, level.width, *value.shape[2:])
                _sum_by_cell(canvas, y, x, grads, corners)
    return grad_value, grad_locations, grad_weights


def _dot(lefts: Sequence[Tensor], rights: Iterable[Tensor]) -> Tensor:
    products = [left * right for left, right in zip(lefts, rights, strict=True)]
    return products[0] if len(products) == 1 else products[0] + products[1]


def _row_dots(table: Tensor, rows: Tensor, grads: Tensor) -> Tensor:
    """Scalar product of each row that a point reads with its query's gradient, [corners, G, N, M, P].

    A few queries at a time, so that the rows they read are still in the processor's cache when they are multiplied.
    """
    numbers = rows.reshape(len(grads), -1)
    dots = grads.new_empty(numbers.shape)
    for part, bags, own in zip(*(torch.split(x, _BAGS_AT_ONCE) for x in (dots, numbers, grads)), strict=True):
        read = table.index_select(0, bags.flatten()).view(*bags.shape, -1)
        part.copy_(torch.bmm(read, own[:, :, None])[..., 0])
    return dots.view(rows.shape).movedim(-1, 0).contiguous()


def _scatter(table: Tensor, rows: Tensor, grads: Tensor, corners: dict[tuple[int, int], Tensor]) -> None:
    """Add to the table's gradient [G · S · M, D] point by point: for fewer points than cells."""
    shares = rearrange(list(corners.values()), "c g n m p -> (g n m) (p c) 1") * grads[:, None]
    numbers = rows.flatten().long()[:, None].expand(-1, table.shape[1])  # torch adds whole rows of an expanded index
    table.scatter_add_(0, numbers, shares.flatten(0, 1))


def _sum_by_cell(canvas: Tensor, y: _Axis, x: _Axis, grads: Tensor, corners: dict[tuple[int, int], Tensor]) -> None:
    """Add to the level's gradient [G, H, W, M, D] cell by cell: for more points than cells.

    Points are sorted once, by the first cell of their pairs; each of a point's corners is then the same bag sum, moved
    by a cell.
    """
    images, _, heads, num_points = x.first.shape
    height, width = canvas.shape[1] - len(y.weights) + 1, canvas.shape[2] - len(x.weights) + 1
    keys = (y.first * width + x.first).int().mul_(heads).add_(_first_rows(images, heads, height * width))
    keys, order = keys.flatten().sort(stable=True)  # stable: torch then sorts whole numbers by radix
    counts = torch.bincount(keys, minlength=images * height * width * heads)
    starts = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    bags = (order // num_points).int()
    for (down, right), corner in corners.items():
        shares = corner.flatten().index_select(0, order)
        sums = F.embedding_bag(bags, grads, starts, mode="sum", per_sample_weights=shares, include_last_offset=True)
        canvas[:, down : down + height, right : right + width] += sums.view(images, height, width, heads, -1)


attach_gradient(_forward, _backward)

"""Connected components: label grids or masks in, one number per contiguous region out (seed 003 [0033])."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from scipy import ndimage
from torch import Tensor


def connected_components(labels: Tensor, *, connectivity: int = 4) -> Tensor:
    """Join neighbouring cells of equal label; int64 [..., H, W] to the flat index of each component's first cell.

    Grids along the leading dimensions are independent. On the host scipy labels all masks of all grids in one call,
    with a structure that does not reach from one mask to the next; on other devices cells are joined where they are.

    Raises:
        ValueError: if connectivity is neither 4 nor 8.
    """
    if connectivity not in (4, 8):
        raise ValueError(f"connectivity must be 4 or 8, got {connectivity}")
    if not labels.numel():
        return labels.clone()
    return _components_on_host(labels, connectivity) if labels.is_cpu else _components_on_device(labels, connectivity)


def mask_components(masks: Tensor, *, connectivity: int = 4) -> Tensor:
    """Join neighbouring set cells of each mask, bool [M, H, W].

    Returns:
        The number of each cell's component, int32 [M, H, W], counted from 1 over all masks in the order of first cells;
        0 for cells that are not set.

    Raises:
        ValueError: if connectivity is neither 4 nor 8.
    """
    if connectivity not in (4, 8):
        raise ValueError(f"connectivity must be 4 or 8, got {connectivity}")
    if masks.is_cpu:
        within = ndimage.generate_binary_structure(2, 1 if connectivity == 4 else 2)
        numbers, _ = ndimage.label(masks.numpy(), np.stack([0 * within, within, 0 * within]))
        return torch.from_numpy(numbers.astype(np.int32, copy=False))
    return _number_on_device(masks, connectivity)


def _number_on_device(masks: Tensor, connectivity: int) -> Tensor:
    cells = masks.flatten().nonzero()[:, 0]
    dense = torch.zeros(masks.numel(), dtype=torch.int64, device=masks.device)
    dense[cells] = torch.arange(len(cells), device=masks.device)
    roots = _join(len(cells), dense[_neighbour_pairs(masks, connectivity, only=masks)])
    numbers = torch.zeros(masks.numel(), dtype=torch.int32, device=masks.device)
    numbers[cells] = torch.unique(roots, return_inverse=True)[1].int() + 1
    return numbers.reshape(masks.shape)


def _components_on_host(labels: Tensor, connectivity: int) -> Tensor:
    grids = rearrange(labels, "... h w -> (...) 1 h w").numpy()
    masks = grids == np.arange(grids.max() + 1)[:, None, None]
    within = ndimage.generate_binary_structure(2, 1 if connectivity == 4 else 2)
    numbers, count = ndimage.label(masks.reshape(-1, *grids.shape[2:]), np.stack([0 * within, within, 0 * within]))
    numbers = numbers.reshape(masks.shape).max(axis=1).ravel()
    first = np.empty(count + 1, np.int64)
    first[numbers[::-1]] = np.arange(numbers.size)[::-1]
    return torch.from_numpy(first[numbers]).reshape(labels.shape)


def _components_on_device(labels: Tensor, connectivity: int) -> Tensor:
    pairs = _neighbour_pairs(labels, connectivity)
    return _join(labels.numel(), pairs).reshape(labels.shape)


def _join(count: int, pairs: Tensor) -> Tensor:
    """Lowest member of each of ``count`` nodes' component, where pairs [2, P] of nodes are joined; int64 [count].

    In each round a node takes over the lowest pointer among its neighbours (hooking) and follows it (jumping), as
    parallel algorithms do (Shiloach and Vishkin 1982), so the number of rounds grows with the logarithm of a
    component's extent.
    """
    pointers = torch.arange(count, device=pairs.device)
    while True:
        ends = pointers[pairs]
        low = ends.amin(dim=0)
        hooked = pointers.scatter_reduce(0, ends.flatten(), low.repeat(2), "amin")
        hooked = hooked[hooked]
        hooked = hooked[hooked]
        if torch.equal(hooked, pointers):
            return pointers
        pointers = hooked


def _neighbour_pairs(labels: Tensor, connectivity: int, only: Tensor | None = None) -> Tensor:
    """Flat indices of all neighbouring cells with equal labels, int64 [2, P]; of the cells in a mask only, if given."""
    index = torch.arange(labels.numel(), device=labels.device).reshape(labels.shape)
    height, width = labels.shape[-2:]
    shifts = [(0, 1), (1, 0)] + ([(1, 1), (1, -1)] if connectivity == 8 else [])
    pairs = []
    for down, right in shifts:
        here = (..., slice(0, height - down), slice(max(-right, 0), width - max(right, 0)))
        there = (..., slice(down, height), slice(max(right, 0), width - max(-right, 0)))
        equal = labels[here] == labels[there]
        if only is not None:
            equal = equal & only[here]
        pairs.append(torch.stack([index[here][equal], index[there][equal]]))
    return torch.cat(pairs, dim=1)

"""Cluster labels in, regions out: connected components, their boxes, areas and pooled features.

Source: US 2025/0265826 [0033]. Letters: B images of one shape, L clusterings (level and K), H x W cells of the finest
grid, N = H W, R region rows per image (padded), C channels of the last level's map. A coarser level's labels are
repeated on the finest grid, so that all masks of an image can be compared cell by cell. No loop goes over images or
regions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Regions:
    """Proposals of one image, N rows.

    Attributes:
        boxes_xyxy: float32 [N, 4], pixels of the upright original.
        features: float32 [N, D], average of the last level's map over the region; D may be 0 where they were not read.
        area: float32 [N], of the region (not of its box), square pixels of the original.
        stride: int16 [N], level whose clustering found the region.
        k: int16 [N], number of clusters of that clustering.
        cluster: int16 [N], which of its clusters the region is a part of.
        score: float32 [N], how sure the miner is of it, higher is better; 1 where it gives none.
    """

    boxes_xyxy: NDArray[np.float32]
    features: NDArray[np.float32]
    area: NDArray[np.float32]
    stride: NDArray[np.int16]
    k: NDArray[np.int16]
    cluster: NDArray[np.int16]
    score: NDArray[np.float32]

    def __post_init__(self) -> None:
        rows = len(self.boxes_xyxy)
        widths = {"boxes_xyxy": (4,), "features": self.features.shape[-1:] or (0,)}
        for name in ("boxes_xyxy", "area", "stride", "k", "cluster", "score", "features"):
            dtype = "int16" if name in ("stride", "k", "cluster") else "float32"
            column, shape = getattr(self, name), (rows, *widths.get(name, ()))
            if column.shape != shape or column.dtype != dtype:
                raise ValueError(
                    f"{name}: expected {dtype} of shape {shape}, got {column.dtype} of shape {column.shape}"
                )
        sides = self.boxes_xyxy[:, 2:] - self.boxes_xyxy[:, :2]
        if not (np.isfinite(self.boxes_xyxy).all() and (sides > 0).all()):
            raise ValueError("boxes_xyxy: expected finite boxes with x1 > x0 and y1 > y0, in pixels")

    def __len__(self) -> int:
        return len(self.boxes_xyxy)

    def first(self, count: int) -> Regions:
        """The first rows, as many as there are up to ``count``."""
        return Regions(**{column.name: getattr(self, column.name)[:count] for column in fields(self)})


@dataclass(frozen=True)
class Candidates:
    """Regions of a batch of images of one shape, on their way through the filters."""

    labels: Tensor  # int64 [B, L, H, W], cluster of every cell of the finest grid in every clustering
    strides: tuple[int, ...]  # levels of the L clusterings
    ks: tuple[int, ...]  # numbers of clusters of the L clusterings
    maps: Mapping[int, Tensor]  # the feature maps by stride, [B, C, H_l, W_l]
    connectivity: int  # 4 or 8 neighbours join cells to a region
    centre: bool  # whether similarities are taken after subtracting the image's mean feature
    components: Tensor  # int64 [B, L, H, W], number of the region, within its image, that a cell belongs to
    ids: Tensor  # int64 [B, R], the region numbers that are still candidates; -1 pads
    clustering: Tensor  # int64 [B, R], which clustering a region comes from
    cluster: Tensor  # int64 [B, R], and which of its clusters
    cells: Tensor  # int64 [B, R], size in cells of the finest grid; 0 for padding
    boxes: Tensor  # int64 [B, R, 4], x0, y0, x1, y1 in cells of the finest grid, far edges exclusive
    scores: Tensor  # float32 [B, R], higher is better; 1 until a filter ranks the regions

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def valid(self) -> Tensor:
        """Which rows are regions and not padding, bool [B, R]."""
        return self.ids >= 0

    @cached_property
    def masks(self) -> Tensor:
        """Cells of every region, bool [B, R, N]."""
        return self._cells_of(self.components)

    @cached_property
    def features(self) -> Tensor:
        """Average of the last level's map over every region, float32 [B, R, C]; 0 for padding.

        The map is resampled (bilinear) to the grid of the region's own level. Averaging is linear, so the regions'
        masks are carried to the last level's grid instead, which is far smaller than the resampled map.
        """
        last = self.maps[max(self.maps)]
        cells = rearrange(last, "b c h w -> b (h w) c").float()
        units = torch.eye(cells.shape[1]).reshape(1, -1, *last.shape[-2:])
        weights = cells.new_zeros(*self.ids.shape, cells.shape[1])
        stride_of = torch.tensor(self.strides, device=self.ids.device)[self.clustering]
        for stride in sorted(set(self.strides)):
            grid = self.maps[stride].shape[-2:]
            step = self.labels.shape[-2] // grid[0]
            member = self._cells_of(self.components[:, :, ::step, ::step]) & (stride_of == stride)[:, :, None]
            # with which weights resampling takes each of the grid's cells from the last level's
            taken = functional.interpolate(units, tuple(grid), mode="bilinear", align_corners=False)[0].flatten(1)
            weights = weights + member.float() @ taken.mT.to(cells)
        return torch.bmm(weights / weights.sum(dim=2, keepdim=True).clamp(min=1e-6), cells)

    @cached_property
    def directions(self) -> Tensor:
        """Region features as unit vectors for cosine similarity, [B, R, C]; centred if ``centre``."""
        features = self.features
        if self.centre:
            features = features - self.maps[max(self.maps)].float().mean(dim=(2, 3))[:, None]
        return functional.normalize(features, dim=2) * self.valid[:, :, None]

    def where(self, keep: Tensor) -> Candidates:
        """The candidates without the rows in which ``keep``, bool [B, R], is false; order is kept."""
        keep = keep & self.valid
        rows = int(keep.sum(dim=1).max()) if keep.numel() else 0
        order = (~keep).int().argsort(dim=1, stable=True)[:, :rows]
        kept = keep.gather(1, order)
        return replace(
            self,
            ids=self.ids.gather(1, order).masked_fill(~kept, -1),
            cells=self.cells.gather(1, order).masked_fill(~kept, 0),
            boxes=self.boxes.gather(1, order[:, :, None].expand(-1, -1, 4)) * kept[:, :, None],
            **{name: getattr(self, name).gather(1, order) for name in ("clustering", "cluster", "scores")},
        )

    def _cells_of(self, components: Tensor) -> Tensor:
        """Compare the region numbers of a grid's cells, [B, L, h, w], with every row's own, to bool [B, R, h w]."""
        flat = components.flatten(2)
        return flat.gather(1, self.clustering[:, :, None].expand(-1, -1, flat.shape[2])) == self.ids[:, :, None]


def find_candidates(
    labels: Tensor,
    strides: Sequence[int],
    ks: Sequence[int],
    maps: Mapping[int, Tensor],
    *,
    connectivity: int = 4,
    centre: bool = True,
) -> Candidates:
    """Connected components of all cluster masks of a batch, in the order of clustering and first cell.

    The arguments are the attributes of :class:`Candidates`.
    """
    batch, levels, height, width = labels.shape
    roots = connected_components(labels, connectivity=connectivity)
    firsts, numbers = torch.unique(roots, return_inverse=True)
    image = firsts // (levels * height * width)
    counts = torch.bincount(image, minlength=batch)
    offsets = counts.cumsum(0) - counts
    row = torch.arange(len(firsts), device=labels.device) - offsets[image]
    rows = int(counts.max()) if batch else 0

    def padded(values: Tensor, fill: int) -> Tensor:
        table = torch.full((batch, rows), fill, device=labels.device)
        table[image, row] = values
        return table

    flat = numbers.flatten()
    place = torch.arange(flat.numel(), device=labels.device)
    axes = (place % width, place // width % height)
    zeros = torch.zeros_like(firsts)
    edges = [zeros.scatter_reduce(0, flat, axis, "amin", include_self=False) for axis in axes]
    edges += [zeros.scatter_reduce(0, flat, axis, "amax", include_self=False) + 1 for axis in axes]
    return Candidates(
        labels=labels,
        strides=tuple(strides),
        ks=tuple(ks),
        maps=maps,
        connectivity=connectivity,
        centre=centre,
        components=numbers - offsets[:, None, None, None],
        ids=padded(row, -1),
        clustering=padded(firsts // (height * width) % levels, 0),
        cluster=padded(labels.flatten()[firsts], 0),
        cells=padded(torch.bincount(flat, minlength=len(firsts)), 0),
        boxes=torch.stack([padded(edge, 0) for edge in edges], dim=2),
        scores=torch.ones(batch, rows, device=labels.device),
    )


def to_regions(candidates: Candidates, sizes_hw: Sequence[tuple[int, int]]) -> list[Regions]:
    """Regions on the host of each image, sizes_hw its (height, width) in pixels, of what the filters left."""
    origins = np.array([candidates.strides, candidates.ks], np.int16).T
    columns = ("boxes", "features", "cells", "clustering", "cluster", "scores")
    boxes, features, cells, clustering, cluster, scores = (getattr(candidates, name).cpu().numpy() for name in columns)
    regions = []
    for image, (count, size_hw) in enumerate(zip(candidates.valid.sum(dim=1).tolist(), sizes_hw, strict=True)):
        own = (image, slice(count))
        origin = np.column_stack((origins[clustering[own]], cluster[own]))
        grid = candidates.labels.shape[-2:]
        regions.append(in_pixels(boxes[own], cells[own], features[own], origin, scores[own], grid, size_hw))
    return regions


def in_pixels(
    boxes: NDArray[Any],
    cells: NDArray[Any],
    features: NDArray[np.float32],
    origin: NDArray[Any],
    score: NDArray[np.float32],
    grid_hw: Sequence[int],
    size_hw: Sequence[int],
) -> Regions:
    """Regions of one image from boxes [N, 4] and sizes [N] in cells of a grid over it; origin is stride, K, cluster."""
    cell_px = np.array([size_hw[1] / grid_hw[1], size_hw[0] / grid_hw[0]])
    stride, k, cluster = origin.astype(np.int16).T.copy()
    return Regions(
        boxes_xyxy=(boxes * np.tile(cell_px, 2)).astype(np.float32),
        features=features.copy(),
        area=(cells * cell_px.prod()).astype(np.float32),
        stride=stride,
        k=k,
        cluster=cluster,
        score=score,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Connected components: label grids or masks in, one number per contiguous region out (US 2025/0265826 [0033]).


def connected_components(labels: Tensor, *, connectivity: int = 4) -> Tensor:
    """Join neighbouring cells of equal label; int64 [..., H, W] to the flat index of each component's first cell.

    Grids along the leading dimensions are independent. ValueError if connectivity is neither 4 nor 8.
    """
    structure = _structure(connectivity)
    if not labels.numel():
        return labels.clone()
    if not labels.is_cpu:
        return _components_on_device(labels, connectivity)
    grids = rearrange(labels, "... h w -> (...) 1 h w").numpy()
    masks = grids == np.arange(grids.max() + 1)[:, None, None]
    numbers, count = ndimage.label(masks.reshape(-1, *grids.shape[2:]), structure)
    numbers = numbers.reshape(masks.shape).max(axis=1).ravel()
    first = np.empty(count + 1, np.int64)
    first[numbers[::-1]] = np.arange(numbers.size)[::-1]
    return torch.from_numpy(first[numbers]).reshape(labels.shape)


def mask_components(masks: Tensor, *, connectivity: int = 4) -> Tensor:
    """Join neighbouring set cells of each mask, bool [M, H, W].

    Returns:
        The number of each cell's component, int32 [M, H, W], counted from 1 over all masks in the order of first cells;
        0 for cells that are not set. ValueError if connectivity is neither 4 nor 8.
    """
    structure = _structure(connectivity)
    if not masks.is_cpu:
        return _number_on_device(masks, connectivity)
    numbers, _ = ndimage.label(masks.numpy(), structure)
    return torch.from_numpy(numbers.astype(np.int32, copy=False))


def _structure(connectivity: int) -> NDArray[np.bool_]:
    """Scipy's neighbours [3, 3, 3] for many masks in one call: they do not reach from one mask to the next."""
    if connectivity not in (4, 8):
        raise ValueError(f"connectivity must be 4 or 8, got {connectivity}")
    within = ndimage.generate_binary_structure(2, 1 if connectivity == 4 else 2)
    return np.stack([0 * within, within, 0 * within])


def _number_on_device(masks: Tensor, connectivity: int) -> Tensor:
    cells = masks.flatten().nonzero()[:, 0]
    dense = torch.zeros(masks.numel(), dtype=torch.int64, device=masks.device)
    dense[cells] = torch.arange(len(cells), device=masks.device)
    roots = _join(len(cells), dense[_neighbour_pairs(masks, connectivity, only=masks)])
    numbers = torch.zeros(masks.numel(), dtype=torch.int32, device=masks.device)
    numbers[cells] = torch.unique(roots, return_inverse=True)[1].int() + 1
    return numbers.reshape(masks.shape)


def _components_on_device(labels: Tensor, connectivity: int) -> Tensor:
    return _join(labels.numel(), _neighbour_pairs(labels, connectivity)).reshape(labels.shape)


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

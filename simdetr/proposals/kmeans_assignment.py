"""Feature blocks and centroids -> nearest clusters, their sums and counts: one pass of k-means over all rows.

All work on a row happens while it is in the cache: blocks of any float type are cut into tiles, and a tile is made
float32, brought to unit length if spherical, multiplied with the centroids and added to the sums. Sums are float64, so
that the result does not depend on how rows are spread over blocks and ranks beyond the last bit.

Letters: D dimensions, C clusters, n rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import faiss
import torch
from torch import Tensor
from torch.nn import functional

from simdetr.proposals.kmeans_ranks import sum_over_ranks
from simdetr.proposals.kmeans_threads import in_order

Backend = Literal["torch", "faiss"]
Nearest = Callable[[Tensor], Tensor]
_TILE_BYTES = 1 << 23  # of a tile's distances on the CPU: they stay in the cache between product and minimum
_TILE_BYTES_GPU = 1 << 28
_FAISS_TILE_ROWS = 1 << 14  # it cuts tiles of its own
_PIECE_ROWS, _PIECE_ROWS_GPU = 1 << 14, 1 << 18  # one thread's work at a time
_IMAGES = 16  # single-threaded, torch leaves a 1 × 1 convolution to oneDNN only from so many images on


@dataclass(frozen=True)
class Assignment:
    """Rows by their nearest centroid.

    Attributes:
        sums: float64 [C, D], of each cluster's rows, over all ranks.
        counts: int64 [C], rows of each cluster, over all ranks.
        inertia: sum of squared distances of all ranks' rows to their centroids.
        labels: int32 [n], cluster of each row of this rank, on the CPU.
    """

    sums: Tensor
    counts: Tensor
    inertia: float
    labels: Tensor


def prepare_rows(block: Tensor, spherical: bool) -> Tensor:
    """Rows as float32, of unit length if spherical (zero rows stay zero); [n, D] to [n, D].

    Raises:
        ValueError: for another number of axes.
    """
    if block.ndim != 2:
        raise ValueError(f"features: expected blocks [n, D], got shape {tuple(block.shape)}")
    block = block.float()
    return functional.normalize(block, dim=1) if spherical else block


def assign_blocks(blocks: Iterable[Tensor], centroids: Tensor, spherical: bool, backend: Backend) -> Assignment:
    """Go once through all rows of this rank, and add up over ranks.

    Args:
        blocks: float [n, D] each, of any number of rows.
        centroids: float32 [C, D].
        spherical: compare rows by direction; the centroids are of unit length then.
        backend: what finds the nearest centroid.
    """
    nearest = faiss_nearest(centroids) if backend == "faiss" else torch_nearest(centroids)
    piece_rows = _PIECE_ROWS if centroids.device.type == "cpu" else _PIECE_ROWS_GPU
    pieces = (piece for block in blocks if len(block) for piece in torch.split(block, piece_rows))

    def assign(piece: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _assign_piece(piece, centroids, spherical, nearest, tile_rows(centroids, backend))

    sums = torch.zeros(centroids.shape, dtype=torch.float64, device=centroids.device)
    squares = torch.zeros((), dtype=torch.float64, device=centroids.device)
    labels = [torch.zeros(0, dtype=torch.int32, device=centroids.device)]
    threads = torch.get_num_threads() if backend == "torch" and centroids.device.type == "cpu" else 1
    for own_sums, own_squares, own_labels in in_order(assign, pieces, threads) if threads > 1 else map(assign, pieces):
        sums += own_sums
        squares += own_squares
        labels.append(own_labels)
    own = torch.cat(labels)
    counts = torch.bincount(own, minlength=len(centroids))
    total = sum_over_ranks(torch.cat((sums.flatten(), counts.double(), squares[None])))
    sums, counts = total[: sums.numel()].view_as(sums), total[sums.numel() : -1].long()
    # |x - c|² summed over the rows of every cluster, without a second look at them
    exact = centroids.double()
    inertia = total[-1] - 2 * (sums * exact).sum() + (counts * exact.square().sum(dim=1)).sum()
    return Assignment(sums, counts, max(0.0, float(inertia)), own.cpu())


def _assign_piece(
    piece: Tensor, centroids: Tensor, spherical: bool, nearest: Nearest, tile_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums float64 [C, D], the sum of all squares and labels int32 [n] of some rows."""
    sums = torch.zeros(centroids.shape, dtype=torch.float64, device=centroids.device)
    squares = torch.zeros((), dtype=torch.float64, device=centroids.device)
    labels = []
    for tile in torch.split(piece, tile_rows):
        rows = prepare_rows(tile.to(centroids.device), spherical)
        label = nearest(rows)
        exact = rows.double()
        sums.index_add_(0, label, exact)
        squares += exact.square().sum()
        labels.append(label.int())
    return sums, squares, torch.cat(labels)


def nearest_cluster(rows: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid of each row, float32 [n, D] to int64 [n], in tiles: memory does not grow with n times C."""
    nearest = torch_nearest(centroids)
    return torch.cat([nearest(tile) for tile in torch.split(rows, tile_rows(centroids, "torch"))])


def tile_rows(centroids: Tensor, backend: Backend) -> int:
    """Rows that are compared with all centroids at once."""
    if backend == "faiss":
        return _FAISS_TILE_ROWS
    tile_bytes = _TILE_BYTES if centroids.device.type == "cpu" else _TILE_BYTES_GPU
    return max(_IMAGES, tile_bytes // (4 * len(centroids)) // _IMAGES * _IMAGES)


def torch_nearest(centroids: Tensor) -> Nearest:
    """A function from float32 rows [n, D] on the centroids' device to the nearest centroid, int64 [n]."""
    half_norms = centroids.square().sum(dim=1) / 2

    def by_product(rows: Tensor) -> Tensor:
        # argmin |x - c|² = argmin |c|²/2 - x·c: one matrix product with the norms folded in
        return torch.addmm(half_norms, rows, centroids.T, alpha=-1).argmin(dim=1)

    if centroids.device.type != "cpu":
        return by_product
    kernels = centroids[:, :, None, None].contiguous(memory_format=torch.channels_last)

    def by_convolution(rows: Tensor) -> Tensor:
        # the same product as a 1 x 1 convolution, which torch gives to oneDNN: it uses the processor's widest vectors
        # whoever made it, where the matrix product of torch (MKL) does so for Intel's only (half as fast on a Zen 5)
        padding = -len(rows) % _IMAGES if len(rows) else _IMAGES
        padded = functional.pad(rows, (0, 0, 0, padding)) if padding else rows.contiguous()
        images = padded.view(_IMAGES, -1, 1, rows.shape[1]).permute(0, 3, 1, 2)
        scores = functional.conv2d(images, kernels, -half_norms).permute(0, 2, 3, 1)
        return scores.reshape(len(padded), len(centroids))[: len(rows)].max(dim=1).indices

    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return by_convolution if has_onednn else by_product


def faiss_nearest(centroids: Tensor) -> Nearest:
    """As :func:`torch_nearest`, by an exact index of faiss; of its GPU edition, where installed, for CUDA centroids."""
    index: faiss.Index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(centroids.cpu().numpy())
    if centroids.device.type == "cuda" and faiss.get_num_gpus():
        index = faiss.index_cpu_to_all_gpus(index)

    def nearest(rows: Tensor) -> Tensor:
        found = index.search(rows.cpu().numpy(), 1)[1]
        return torch.from_numpy(found[:, 0]).to(rows.device)

    return nearest

"""Feature blocks -> centroids: Lloyd's k-means over more rows than fit in memory, on one process or on many ranks.

The global clustering of region features into pseudo-classes (US 2025/0265826 [0054]-[0055], Algorithm 1 line 8). Rows
come as a tensor or as a repeatable iterable of blocks of any float type; an iteration is one pass over them. Ranks add
up their sums and counts through ``torch.distributed`` (gloo, or nccl on GPUs), so every rank ends with the same
centroids. A journal, one safetensors file that is whole at any time, lets a killed clustering go on after its last
iteration.

Letters: M rows (all blocks, all ranks), D dimensions, C clusters, n rows of one rank or block, m rows of the sample.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from math import log
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import faiss
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from simdetr.data.machine import in_order
from simdetr.data.storage import atomic_path
from simdetr.mining.clustering_config import Backend

Nearest = Callable[[Tensor], Tensor]
In = TypeVar("In")
Out = TypeVar("Out")
T = TypeVar("T")

_BLOCK_ROWS = 1 << 13  # of a tensor that is given whole
_TILE_BYTES = 1 << 23  # of a tile's distances on the CPU: they stay in the cache between product and minimum
_TILE_BYTES_GPU = 1 << 28
_FAISS_TILE_ROWS = 1 << 14  # it cuts tiles of its own
_PIECE_ROWS, _PIECE_ROWS_GPU = 1 << 14, 1 << 18  # one thread's work at a time
_IMAGES = 16  # single-threaded, torch leaves a 1 × 1 convolution to oneDNN only from so many images on
_SAMPLE_PER_CLUSTER, _SAMPLE_AT_LEAST = 16, 8192
_EXTRA_TRIALS = 2  # of greedy k-means++, beside the logarithm of C
_STARTS_PER_NEW, _NEW_AT_MOST = 32, 16  # starts drawn at once: one for so many that there are, and at most so many
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Iteration:
    """One pass over all rows."""

    number: int  # 0 assigns rows to the starts
    inertia: float  # of the centroids that the pass began with
    empty: int  # clusters without any row; they start anew elsewhere
    seconds: float  # of the pass and of what led to its centroids


History = tuple[Iteration, ...]


@dataclass(frozen=True)
class Journal:
    """Keeps the centroids and the history after every iteration; only the first rank writes and tells."""

    path: Path | None = None  # of the file; nothing is kept without one
    data: str = ""  # what is clustered, in words; a file of other data or other settings is not gone on from
    tell: Callable[[Iteration], None] | None = None  # called after every iteration

    def restore(self, settings: str) -> tuple[Tensor, History] | None:
        """The centroids to go on with and the iterations done, the same on every rank; None to begin."""
        return from_first(self._read(settings) if rank() == 0 else None)

    def keep(self, centroids: Tensor, history: History, settings: str) -> None:
        """Replace the file by the state before the next iteration."""
        if self.path is None or rank() > 0:
            return
        notes = {"made_of": f"{self.data}; {settings}", "history": json.dumps([asdict(step) for step in history])}
        with atomic_path(self.path) as temporary:
            save_file({"centroids": centroids.cpu().contiguous()}, temporary, notes)

    def report(self, iteration: Iteration) -> None:
        """Tell the user of an iteration."""
        if self.tell is not None and rank() == 0:
            self.tell(iteration)

    def _read(self, settings: str) -> tuple[Tensor, History] | None:
        if self.path is None or not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                notes, centroids = file.metadata() or {}, file.get_tensor("centroids")
            history = tuple(Iteration(**step) for step in json.loads(notes["history"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            _log.warning("%s cannot be read (%s); the clustering begins anew", self.path, error)
            return None
        if notes.get("made_of") != f"{self.data}; {settings}":
            _log.info("%s is of other regions or settings; the clustering begins anew", self.path)
            return None
        _log.info("going on after iteration %d of %s", history[-1].number, self.path)
        return centroids, history


@dataclass(frozen=True)
class KMeans:
    """A fitted clustering."""

    centroids: Tensor  # float32 [C, D], of unit length when spherical
    counts: Tensor  # int64 [C], rows of each cluster, over all ranks
    labels: Tensor  # int32 [n], cluster of each row that this rank gave, in their order
    history: History  # all passes over the rows, the last of which gave counts and labels
    spherical: bool  # whether rows and centroids are compared by direction

    @property
    def inertia(self) -> float:
        """Sum of squared distances of all rows (of unit length if spherical) to their nearest centroid."""
        return self.history[-1].inertia

    @property
    def iterations(self) -> int:
        """Times that the centroids moved."""
        return self.history[-1].number

    def assign(self, features: Tensor) -> Tensor:
        """Nearest cluster of each row, [n, D] to int64 [n]."""
        return nearest_cluster(prepare_rows(features, self.spherical), self.centroids.to(features.device))


def fit_kmeans(
    features: Tensor | Iterable[Tensor],
    num_clusters: int,
    *,
    seed: int = 0,
    spherical: bool = True,
    max_iterations: int = 50,
    tolerance: float = 1e-4,
    backend: Backend = "torch",
    journal: Journal | None = None,
) -> KMeans:
    """Cluster rows around centroids; every rank of a process group gives its own rows and gets the same result.

    Args:
        features: [M, D] float rows, or an iterable of such blocks that can be gone through again and again (a list or
            an object whose ``__iter__`` starts anew; not a generator). Blocks may be empty.
        num_clusters: C, at most M.
        seed: of the starts and of replacements for empty clusters.
        spherical: cluster directions (cosine) instead of positions.
        max_iterations: Lloyd iterations at most, each one pass over the rows.
        tolerance: stop when the inertia falls by less than this fraction.
        backend: what finds the nearest centroids: "torch" (about twice as fast on CPUs of AMD), or "faiss".
        journal: keeps every iteration, so that the same call goes on after the last one that ended.

    Raises:
        ValueError: for fewer rows than clusters, numbers out of range, rows that are not finite, or an iterable that
            cannot be repeated.
    """
    if num_clusters < 1 or max_iterations < 1:
        raise ValueError(
            f"num_clusters, max_iterations: expected at least 1 each, got {num_clusters}, {max_iterations}"
        )
    if isinstance(features, Iterator):
        raise ValueError(
            "features: expected an iterable that can be repeated, got an iterator; give a list or a loader"
        )
    if backend not in ("torch", "faiss"):
        raise ValueError(f"backend: expected 'torch' or 'faiss', got {backend!r}")
    blocks: Iterable[Tensor] = torch.split(features, _BLOCK_ROWS) if isinstance(features, Tensor) else features
    journal = journal or Journal()
    settings = f"{num_clusters=} {seed=} {spherical=} {max_iterations=} {tolerance=} {backend=}"
    sample = sample_rows(blocks, num_clusters, spherical, seed)
    generator = torch.Generator().manual_seed(seed)
    centroids, history = journal.restore(settings) or (spread_starts(sample, num_clusters, generator), ())
    centroids = centroids.to(sample.device)
    while True:
        began = time.perf_counter()
        found = assign_blocks(blocks, centroids, spherical, backend)
        means = _means(found.sums, found.counts, centroids, sample, spherical)
        empty = int((found.counts == 0).sum())
        history += (Iteration(len(history), found.inertia, empty, time.perf_counter() - began),)
        journal.report(history[-1])
        if len(history) > 1 and (
            history[-1].number == max_iterations or history[-2].inertia - found.inertia <= tolerance * found.inertia
        ):
            return KMeans(centroids, found.counts, found.labels, history, spherical)
        centroids = means
        journal.keep(centroids, history, settings)


def _means(sums: Tensor, counts: Tensor, centroids: Tensor, sample: Tensor, spherical: bool) -> Tensor:
    """New centroids; an empty cluster starts again at the sampled row that is farthest from all centroids."""
    means = (sums / counts.clamp(min=1)[:, None]).to(centroids.dtype)
    if spherical:
        means = functional.normalize(means, dim=1)
    empty = counts == 0
    if bool(empty.any()):
        used = means[~empty]
        distances = (sample - used[nearest_cluster(sample, used)]).square().sum(dim=1)
        for cluster in empty.nonzero().flatten().tolist():
            farthest = int(distances.argmax())
            means[cluster] = sample[farthest]
            distances = torch.minimum(distances, (sample - sample[farthest]).square().sum(dim=1))
    return means


# ----------------------------------------------------------------------------------------------------------------------
# One pass over all rows: nearest clusters, their sums and counts.


class Assignment(NamedTuple):
    """Rows by their nearest centroid."""

    sums: Tensor  # float64 [C, D], of each cluster's rows, over all ranks
    counts: Tensor  # int64 [C], rows of each cluster, over all ranks
    inertia: float  # sum of squared distances of all ranks' rows to their centroids
    labels: Tensor  # int32 [n], cluster of each row of this rank, on the CPU


def prepare_rows(block: Tensor, spherical: bool) -> Tensor:
    """Rows [n, D] as float32, of unit length if spherical (zero rows stay zero); ValueError for other shapes."""
    if block.ndim != 2:
        raise ValueError(f"features: expected blocks [n, D], got shape {tuple(block.shape)}")
    block = block.float()
    return functional.normalize(block, dim=1) if spherical else block


def assign_blocks(blocks: Iterable[Tensor], centroids: Tensor, spherical: bool, backend: Backend) -> Assignment:
    """Go once through all rows of this rank, blocks float [n, D], and add up over ranks.

    All work on a row happens while it is in the cache: a tile is made float32, brought to unit length if spherical
    (as the centroids, float32 [C, D], are then), multiplied with the centroids and added to the sums. Sums are float64,
    so that the result does not depend on how rows are spread over blocks and ranks beyond the last bit.
    """
    nearest = faiss_nearest(centroids) if backend == "faiss" else torch_nearest(centroids)
    piece_rows = _PIECE_ROWS if centroids.device.type == "cpu" else _PIECE_ROWS_GPU
    pieces = (piece for block in blocks if len(block) for piece in torch.split(block, piece_rows))
    exact = centroids.double()

    def assign(piece: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums [C, D], the sum of all squares and labels int32 [n] of some rows."""
        sums, squares, labels = torch.zeros_like(exact), exact.new_zeros(()), []
        for tile in torch.split(piece, tile_rows(centroids, backend)):
            rows = prepare_rows(tile.to(centroids.device), spherical)
            label, rows = nearest(rows), rows.double()
            sums.index_add_(0, label, rows)
            squares += rows.square().sum()
            labels.append(label.int())
        return sums, squares, torch.cat(labels)

    sums, squares = torch.zeros_like(exact), exact.new_zeros(())
    labels = [torch.zeros(0, dtype=torch.int32, device=centroids.device)]
    threads = torch.get_num_threads() if backend == "torch" and centroids.device.type == "cpu" else 1
    for own_sums, own_squares, own_labels in (
        on_single_cores(assign, pieces, threads) if threads > 1 else map(assign, pieces)
    ):
        sums += own_sums
        squares += own_squares
        labels.append(own_labels)
    own = torch.cat(labels)
    counts = torch.bincount(own, minlength=len(centroids))
    total = sum_over_ranks(torch.cat((sums.flatten(), counts.double(), squares[None])))
    sums, counts = total[: sums.numel()].view_as(sums), total[sums.numel() : -1].long()
    # |x - c|² summed over the rows of every cluster, without a second look at them
    inertia = total[-1] - 2 * (sums * exact).sum() + (counts * exact.square().sum(dim=1)).sum()
    return Assignment(sums, counts, max(0.0, float(inertia)), own.cpu())


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


# ----------------------------------------------------------------------------------------------------------------------
# Starting centroids: a sample of the rows, and k-means++ within it.


def sample_rows(blocks: Iterable[Tensor], num_clusters: int, spherical: bool, seed: int) -> Tensor:
    """A sample [m, D] of the different rows of all ranks, the same however they are spread over blocks and ranks.

    A row's key is a hash of its values; the rows with the lowest keys stay. One pass, memory of two samples. A
    ValueError on every rank for rows that are not finite, blocks of unequal width or too few rows.
    """
    wanted = max(num_clusters * _SAMPLE_PER_CLUSTER, _SAMPLE_AT_LEAST)
    keys, kept, total = torch.empty(0, dtype=torch.int64), torch.empty(0, 0), 0
    problem, device = "", torch.device("cpu")
    for block in blocks:
        device = block.device
        if len(block) == 0:
            continue
        problem = _problem(block, kept.shape[1] if total else block.shape[-1])
        if problem:
            break
        total += len(block)
        new = _hash_rows(block, seed)
        if len(keys) == wanted:  # past the first blocks only few rows have a chance
            chosen = new < keys[-1]
            new, block = new[chosen], block[chosen.to(block.device)]
        if len(new):
            rows = prepare_rows(block, spherical)
            keys, kept = _lowest(torch.cat((keys, new)), torch.cat((kept, rows)) if len(keys) else rows, wanted)
    parts = gather((keys, kept.cpu(), total, problem))
    problem = next((part[3] for part in parts if part[3]), "")
    total = sum(part[2] for part in parts)
    if not problem and total < num_clusters:
        problem = f"num_clusters: expected at most the number of rows, got {num_clusters} clusters for {total} rows"
    if problem:
        raise ValueError(problem)
    held = [part for part in parts if part[2]]
    return _lowest(torch.cat([part[0] for part in held]), torch.cat([part[1] for part in held]), wanted)[1].to(device)


def _problem(block: Tensor, dims: int) -> str:
    """What is wrong with a block, in words; empty if nothing."""
    if block.ndim != 2:
        return f"features: expected blocks [n, D], got shape {tuple(block.shape)}"
    if block.shape[1] != dims:
        return f"features: expected blocks of {dims} dimensions, got {block.shape[1]}"
    if not bool(torch.isfinite(block).all()):
        return "features: expected finite rows, got NaN or infinity; mine these images again"
    return ""


def _hash_rows(block: Tensor, seed: int) -> Tensor:
    """Keys int64 [n] in pseudo-random order, equal for equal rows [n, D]; integers, hence exact in any blocking."""
    bits = block.float().contiguous().view(torch.int32).long().cpu()
    generator = torch.Generator().manual_seed(seed)
    odd = torch.randint(-(2**62), 2**62, (block.shape[1],), generator=generator) * 2 + 1
    keys = (bits * odd).sum(dim=1)  # wraps around, which is what mixes
    for _ in range(2):
        keys = (keys ^ (keys >> 29)) * odd[0]
    return keys ^ (keys >> 32)


def _lowest(keys: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The different rows with the lowest keys, in the order of their keys."""
    order = keys.argsort(stable=True)
    ordered = keys[order]
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    order = order[is_first][:count]
    return keys[order], rows[order.to(rows.device)]


def spread_starts(sample: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007) within a sample: [m, D] to C starts [C, D].

    Each new start is drawn in proportion to the squared distance from the starts so far; of several draws the one that
    lowers the sum most is taken. Past the first starts, a few at a time are drawn from the same distances (as in
    k-means||, Bahmani et al. 2012): among many starts two new ones seldom fall close to each other, and one pass over
    the sample serves them all.
    """
    trials = _EXTRA_TRIALS + int(log(num_clusters))
    norms = sample.square().sum(dim=1)
    chosen = torch.randint(len(sample), (1,), generator=generator)
    distance = _squared_distances(sample, norms, chosen)[:, 0]
    while len(chosen) < num_clusters:
        count = min(max(1, len(chosen) // _STARTS_PER_NEW), _NEW_AT_MOST, num_clusters - len(chosen))
        cumulative = distance.double().cumsum(dim=0).cpu()
        if float(cumulative[-1]) <= 0:  # fewer different rows than clusters: the rest coincide
            draws = torch.randint(len(sample), (count * trials,), generator=generator)
        else:
            points = torch.rand(count * trials, generator=generator, dtype=torch.float64) * cumulative[-1]
            draws = torch.searchsorted(cumulative, points).clamp(max=len(sample) - 1)
        candidates = _squared_distances(sample, norms, draws)
        torch.minimum(candidates, distance[:, None], out=candidates)
        best = candidates.sum(dim=0).view(count, trials).argmin(dim=1)
        best += trials * torch.arange(count, device=sample.device)
        chosen = torch.cat((chosen, draws[best.cpu()]))
        distance = candidates[:, best].amin(dim=1)
    return sample[chosen.to(sample.device)].clone()


def _squared_distances(sample: Tensor, norms: Tensor, picks: Tensor) -> Tensor:
    """Of all rows [m, D] to picked rows, [m, number of picks]."""
    picks = picks.to(sample.device)
    distances = torch.addmm(norms[picks], sample, sample[picks].T, alpha=-2)
    return distances.add_(norms[:, None]).clamp_(min=0)


# ----------------------------------------------------------------------------------------------------------------------
# What is told of a clustering.


def cluster_balance(sizes: NDArray[np.int64]) -> dict[str, float]:
    """Numbers about the sizes [C] of clusters in rows: a few that hold most, or many that hold none, teach little.

    Returns:
        ``min``, ``median``, ``max`` (rows), ``empty`` (clusters), ``entropy`` (of the shares; 1 when all are equal, 0
        when one cluster has all), ``perplexity`` (how many equal clusters would have this entropy),
        ``perplexity_share`` (of C), ``largest_percent_share`` (rows in the largest 1 % of clusters, at least one
        cluster) and ``gini`` (0 when all are equal, towards 1 when one has all).

    Raises:
        ValueError: no rows.
    """
    total = int(sizes.sum())
    if total == 0:
        raise ValueError(f"sizes: expected at least one row, got none in {len(sizes)} clusters")
    ascending = np.sort(sizes)
    shares = ascending[ascending > 0] / total
    entropy = max(0.0, float(-(shares * np.log(shares)).sum()))
    largest = ascending[-max(1, round(len(sizes) / 100)) :]
    weights = 2 * np.arange(1, len(sizes) + 1) - len(sizes) - 1
    return {
        "min": int(ascending[0]),
        "median": float(np.median(ascending)),
        "max": int(ascending[-1]),
        "empty": int((sizes == 0).sum()),
        "entropy": entropy / np.log(len(sizes)) if len(sizes) > 1 else 1.0,
        "perplexity": float(np.exp(entropy)),
        "perplexity_share": float(np.exp(entropy)) / len(sizes),
        "largest_percent_share": float(largest.sum() / total),
        "gini": float((weights * ascending).sum() / (len(sizes) * total)),
    }


def clustering_record(clustering: KMeans, settings: dict[str, Any]) -> dict[str, Any]:
    """What is worth keeping of a clustering beside the labels, as JSON can say it.

    ``inertia``, ``empty`` and ``seconds`` have a number per pass; ``sizes`` are the regions of each cluster.
    """
    sizes = clustering.counts.cpu().numpy()
    return {
        "settings": settings,
        "regions": int(sizes.sum()),
        "iterations": clustering.iterations,
        "inertia": [step.inertia for step in clustering.history],
        "empty": [step.empty for step in clustering.history],
        "seconds": [round(step.seconds, 3) for step in clustering.history],
        "balance": cluster_balance(sizes),
        "sizes": sizes.tolist(),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Threads and ranks.


def on_single_cores(work: Callable[[In], Out], items: Iterable[In], threads: int) -> Iterator[Out]:
    """``in_order``, with each thread's torch operations on its own core.

    Several threads that do one item each never wait for one another, where several threads of one small operation do at
    its end, which costs most on a busy machine.
    """
    intra_op = torch.get_num_threads()
    try:
        yield from in_order(work, items, threads, prepare=partial(torch.set_num_threads, 1))
    finally:
        torch.set_num_threads(intra_op)  # threads that others start later are not meant


def world_size() -> int:
    """Ranks of the process group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's place in the group, 0 without one."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(value: Tensor) -> Tensor:
    """Add up a tensor in place."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def gather(value: T) -> list[T]:
    """The values of all ranks, in the order of ranks."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """The first rank's value."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


@contextmanager
def process_group(device: str | torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, for a while; nothing happens in a single process or within a group.

    The device is that of the tensors that will be added up.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()

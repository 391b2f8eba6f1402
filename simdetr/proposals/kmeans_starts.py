"""Feature blocks -> starting centroids for k-means: a sample of the rows, and k-means++ within it.

The sample depends on the rows and the seed only, not on how rows are spread over blocks and ranks, so one rank and many
start alike. Letters as in :mod:`simdetr.proposals.kmeans`; m rows of the sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import log

import torch
from torch import Tensor

from simdetr.proposals.kmeans_assignment import prepare_rows
from simdetr.proposals.kmeans_ranks import gather, world_size

_SAMPLE_PER_CLUSTER = 16
_SAMPLE_AT_LEAST = 8192
_EXTRA_TRIALS = 2  # of greedy k-means++, beside the logarithm of C
_STARTS_PER_NEW, _NEW_AT_MOST = 32, 16  # starts drawn at once: one for so many that there are, and at most so many


def sample_rows(blocks: Iterable[Tensor], num_clusters: int, spherical: bool, seed: int) -> Tensor:
    """A sample of the different rows of all ranks, the same however rows are spread over blocks and ranks.

    A row's key is a hash of its values; the rows with the lowest keys stay. One pass, memory of two samples.

    Raises:
        ValueError: on every rank, for rows that are not finite, blocks of unequal width or too few rows.
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
    parts = gather((keys, kept.cpu(), total, problem)) if world_size() > 1 else [(keys, kept, total, problem)]
    problem = next((part[3] for part in parts if part[3]), "")
    total = sum(part[2] for part in parts)
    if not problem and total < num_clusters:
        problem = f"num_clusters: expected at most the number of rows, got {num_clusters} clusters for {total} rows"
    if problem:
        raise ValueError(problem)
    held = [part for part in parts if part[2]]
    if len(held) > 1:
        keys, rows = torch.cat([part[0] for part in held]), torch.cat([part[1] for part in held])
        return _lowest(keys, rows, wanted)[1].to(device)
    return held[0][1].to(device)


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

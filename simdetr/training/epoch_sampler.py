"""Batches that depend only on (seed, epoch, step): what makes a killed training resume exactly.

In: number of images, batch size, rank. Out: lists of indices, the same on every run; the loader remembers how many
batches of the epoch it has served, so that Lightning's checkpoint resumes in the middle of an epoch. For validation,
the share of each rank in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class EpochBatchSampler(Sampler[list[int]]):
    """Shuffled index batches of one epoch for one rank.

    Every rank draws the same permutation and takes every ``world_size``-th batch; all ranks get the same number of
    batches, the last ones filled up from the start of the permutation.

    Args:
        num_images: Size of the set; fewer images than the batch size give one batch that repeats them.
        batch_size: Images per batch and rank.
        seed: Seed of the whole training.
        epoch: Epoch the permutation belongs to.
        rank: Rank of this process.
        world_size: Number of processes.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if num_images < 1:
            raise ValueError(f"num_images: expected at least 1 image to train on, got {num_images}.")
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(num_images, generator=generator)
        per_step = batch_size * world_size
        self.num_batches = -(-num_images // per_step)
        repeats = -(-self.num_batches * per_step // num_images)
        order = order.repeat(repeats)[: self.num_batches * per_step]
        self._batches = order.view(self.num_batches, world_size, batch_size)[:, rank]
        self.start = 0

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.num_batches):
            yield self._batches[step].tolist()


class ShareBatchSampler(Sampler[list[int]]):
    """Batches of this rank's share of a set, in order: images rank, rank + world_size, ...

    All ranks get the same number of batches, since a step of one rank may wait for the others; the last ones may be
    empty.

    Args:
        num_images: Size of the set.
        batch_size: Images per batch and rank.
        rank: Rank of this process.
        world_size: Number of processes.
    """

    def __init__(self, num_images: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        mine = list(range(rank, num_images, world_size))
        num_batches = -(-num_images // (batch_size * world_size))
        self._batches = [mine[i * batch_size : (i + 1) * batch_size] for i in range(num_batches)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)


class ResumableLoader(DataLoader[Any]):
    """A DataLoader whose position in the epoch is saved and restored by Lightning's checkpoints.

    Args:
        dataset: Images and targets.
        epoch: Epoch the loader serves; a saved position of another epoch is ignored.
        batch_sampler: The epoch's batches.
        kwargs: What DataLoader takes.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        epoch: int,
        batch_sampler: EpochBatchSampler,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, **kwargs)
        self._epoch = epoch
        self._served = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            self._served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of batches served in it."""
        return {"epoch": self._epoch, "served": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip what an interrupted run has already trained on, if the position is of this epoch."""
        if state["epoch"] == self._epoch and isinstance(self.batch_sampler, EpochBatchSampler):
            self._served = self.batch_sampler.start = state["served"]

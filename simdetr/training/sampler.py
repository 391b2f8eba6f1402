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
    batches, the last ones filled up from the start of the permutation. The sampler can begin another epoch, and go on
    in the middle of one that other ranks or another batch size began: what they have served is not served again.

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
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.begin(epoch)

    @property
    def per_step(self) -> int:
        """Images that all ranks take in a step."""
        return self.batch_size * self.world_size

    def begin(self, epoch: int, served: int = 0, seen: int | None = None) -> None:
        """Serve an epoch from its start, or from where an interrupted run stood in it.

        Then ``served`` batches per rank are done, which held ``seen`` images of all ranks; as many as these ranks take,
        if left out.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.num_images, generator=generator)
        self.epoch, self.start = epoch, served
        self._seen = served * self.per_step if seen is None else seen
        left = max(0, -(-(self.num_images - self._seen) // self.per_step))
        places = (self._seen + torch.arange(left * self.per_step)) % self.num_images
        self._batches = order[places].view(left, self.world_size, self.batch_size)[:, self.rank]

    def seen_after(self, served: int) -> int:
        """Images of the permutation that all ranks have taken after so many batches of the epoch."""
        return self._seen + (served - self.start) * self.per_step

    def __len__(self) -> int:
        return self.start + len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches:
            yield batch.tolist()


class ShareBatchSampler(Sampler[list[int]]):
    """Batches of this rank's share of a set, in order: images rank, rank + world_size, ...

    All ranks get the same number of batches, since a step of one rank may wait for the others; the last ones may be
    empty. Arguments as of ``EpochBatchSampler``.
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

    One loader may serve epoch after epoch (``begin``), so that its processes live on (``persistent_workers``). It takes
    what DataLoader takes; a saved position of another epoch than that of the batches is ignored.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_sampler: EpochBatchSampler,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, **kwargs)
        self._batches = batch_sampler
        self._served = 0

    def begin(self, epoch: int) -> None:
        """Serve another epoch, from its start."""
        self._batches.begin(epoch)
        self._served = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            self._served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, batches served in it, and how many images of its order they held, of all ranks."""
        seen = self._batches.seen_after(self._served)
        return {"epoch": self._batches.epoch, "served": self._served, "seen": seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip what an interrupted run has already trained on, if the position is of this epoch."""
        if state["epoch"] == self._batches.epoch:
            self._batches.begin(state["epoch"], state["served"], state.get("seen"))
            self._served = state["served"]

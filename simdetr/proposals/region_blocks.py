"""A proposal store -> the region features of this rank's shards, block by block, again and again.

Every rank reads its own shards only. Features stay in memory as they are stored (fp16) up to a limit; beyond it they
are read anew in every pass, the next shard by a thread while the last one is worked on.

Letters: M regions, D feature dimensions, n regions of a shard.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from simdetr.proposals.kmeans_ranks import gather, rank, world_size
from simdetr.proposals.kmeans_threads import in_order
from simdetr.proposals.shards import read_table
from simdetr.proposals.store import ProposalStore, StoreError


def own_shards(store: ProposalStore) -> list[int]:
    """Numbers of the written shards that are this rank's: every world_size-th."""
    return store.written()[rank() :: world_size()]


def read_columns(store: ProposalStore, shard: int, columns: list[str]) -> pa.Table:
    """Some columns of one shard and nothing else of it.

    Raises:
        StoreError: if it is damaged.
    """
    path = store.shard_path(shard)
    try:
        return read_table(path, columns)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is damaged ({error}); run the mining command again to redo it") from error


def count_regions(store: ProposalStore) -> int:
    """Regions of all images, M.

    Raises:
        ValueError: when there are none.
    """
    own = (read_columns(store, shard, ["area"])["area"] for shard in own_shards(store))
    regions = sum(gather(sum(len(chunk.flatten()) for column in own for chunk in column.chunks)))
    if regions == 0:
        raise ValueError(
            f"store: expected proposals in {store.folder}, got none in {len(store)} images; loosen the filters, take "
            "larger images or another encoder, and mine again"
        )
    return regions


class RegionBlocks:
    """This rank's region features, one block fp16 [n, D] per shard; every iteration starts anew.

    Args:
        store: mined proposals.
        device: where the blocks go.
        in_memory: read the shards once and keep their features.
    """

    def __init__(self, store: ProposalStore, device: str | torch.device = "cpu", *, in_memory: bool = False) -> None:
        self.store = store
        self.device = torch.device(device)
        self._kept = list(self._read_all()) if in_memory else None

    def __iter__(self) -> Iterator[Tensor]:
        return self._read_all() if self._kept is None else iter(self._kept)

    def _read_all(self) -> Iterator[Tensor]:
        shards = own_shards(self.store)
        if not shards:  # more ranks than shards; the device is told all the same
            yield torch.zeros(0, self.store.manifest.region_dim, dtype=torch.float16, device=self.device)
        for block in in_order(self._read, shards, threads=1):
            yield block.to(self.device)

    def _read(self, shard: int) -> Tensor:
        features = read_columns(self.store, shard, ["features"])["features"].combine_chunks().flatten()
        values = np.array(features.flatten().to_numpy(zero_copy_only=False))  # a copy that may be written to
        return torch.from_numpy(values.reshape(len(features), self.store.manifest.region_dim))

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset

from simdetr.training.epoch_sampler import EpochBatchSampler, ResumableLoader, ShareBatchSampler


class Numbers(Dataset):
    def __len__(self):
        return 11

    def __getitem__(self, index):
        return index


def loader(epoch=1, num_workers=0):
    return ResumableLoader(
        Numbers(), epoch=epoch, batch_sampler=EpochBatchSampler(11, 3, seed=5, epoch=epoch), num_workers=num_workers
    )


def test_every_image_is_served_in_every_epoch():
    for epoch in range(3):
        served = [index for batch in EpochBatchSampler(11, 3, seed=0, epoch=epoch) for index in batch]
        assert set(served) == set(range(11))
        assert len(served) == 12  # the last batch is filled up


def test_epochs_and_seeds_differ_and_repeat():
    batches = {(seed, epoch): list(EpochBatchSampler(11, 3, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len({str(value) for value in batches.values()}) == 4
    assert batches[1, 1] == list(EpochBatchSampler(11, 3, 1, 1))


@pytest.mark.parametrize(("num_images", "batch_size", "world_size"), [(11, 3, 2), (8, 2, 2), (1, 4, 2), (5, 1, 3)])
def test_ranks_share_an_epoch(num_images, batch_size, world_size):
    ranks = [EpochBatchSampler(num_images, batch_size, 0, 0, rank, world_size) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    together = [index for step in zip(*ranks, strict=True) for batch in step for index in batch]
    one_rank = [i for batch in EpochBatchSampler(num_images, batch_size * world_size, 0, 0) for i in batch]
    assert together == one_rank
    assert set(together) == set(range(num_images))


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="num_images: expected at least 1"):
        EpochBatchSampler(0, 2, 0, 0)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("served", [0, 1, 3, 4])
def test_resumed_loader_neither_repeats_nor_skips(num_workers, served):
    whole = [batch.tolist() for batch in loader()]
    first = loader(num_workers=num_workers)
    batches = iter(first)
    before = [next(batches).tolist() for _ in range(served)]
    state = first.state_dict()  # workers have read ahead by now; only what was handed out counts
    second = loader(num_workers=num_workers)
    second.load_state_dict(state)
    assert len(second) == len(first)  # Lightning counts the whole epoch
    assert before + [batch.tolist() for batch in second] == whole
    assert second.state_dict() == {"epoch": 1, "served": len(whole)}


def test_position_of_another_epoch_is_ignored():
    fresh = loader(epoch=2)
    fresh.load_state_dict({"epoch": 1, "served": 3})
    assert [b.tolist() for b in fresh] == [b.tolist() for b in loader(epoch=2)]


@pytest.mark.parametrize(("num_images", "world_size"), [(7, 2), (1, 2), (8, 2), (5, 1), (3, 4)])
def test_shares_cover_the_set_once_in_equal_steps(num_images, world_size):
    ranks = [list(ShareBatchSampler(num_images, 2, rank, world_size)) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(index for rank in ranks for batch in rank for index in batch) == list(range(num_images))
    assert len(ranks[0]) == len(ShareBatchSampler(num_images, 2, 0, world_size))


def test_order_does_not_touch_the_global_generator():
    before = torch.random.get_rng_state()
    list(EpochBatchSampler(11, 3, 0, 0))
    assert torch.equal(before, torch.random.get_rng_state())

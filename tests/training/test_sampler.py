from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset

from simdetr.training.sampler import EpochBatchSampler, ResumableLoader, ShareBatchSampler


class Numbers(Dataset):
    def __len__(self):
        return 11

    def __getitem__(self, index):
        return index


def loader(epoch=1, num_workers=0):
    return ResumableLoader(
        Numbers(), batch_sampler=EpochBatchSampler(11, 3, seed=5, epoch=epoch), num_workers=num_workers
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
    assert second.state_dict() == {"epoch": 1, "served": len(whole), "seen": 12}


@pytest.mark.parametrize("served", [0, 1, 2, 3])
@pytest.mark.parametrize(("before", "after"), [((8, 2), (4, 2)), ((8, 2), (4, 4)), ((4, 3), (8, 1)), ((2, 3), (3, 3))])
def test_another_number_of_ranks_goes_on_where_the_first_stood(served, before, after):
    def samplers(world_size, batch_size):
        return [EpochBatchSampler(45, batch_size, 7, 2, rank, world_size) for rank in range(world_size)]

    def take(ranks, steps):
        batches = [list(rank)[:steps] for rank in ranks]
        return [index for step in zip(*batches, strict=True) for batch in step for index in batch]

    first, second = samplers(*before), samplers(*after)
    done = take(first, served)
    assert len({rank.seen_after(served) for rank in first}) == 1
    for rank in second:
        rank.begin(2, served, first[0].seen_after(served))
    rest = take(second, None)
    order = torch.randperm(45, generator=torch.Generator().manual_seed(7 * 1_000_003 + 2)).tolist()
    assert (done + rest)[:45] == order  # every image once, in the order of the epoch, before any comes again
    assert len(done + rest) - 45 < after[0] * after[1]
    assert {len(rank) for rank in second} == {served + len(rest) // (after[0] * after[1])}
    for rank, fresh in zip(second, samplers(*after), strict=True):  # the next epoch is whole again
        rank.begin(3)
        fresh.begin(3)
        assert list(rank) == list(fresh) and len(rank) == len(fresh)


def test_one_loader_serves_epoch_after_epoch_with_the_same_processes():
    one = ResumableLoader(
        Numbers(), batch_sampler=EpochBatchSampler(11, 3, 5, 0), num_workers=1, persistent_workers=True
    )
    processes = set()
    for epoch in range(3):
        one.begin(epoch)
        batches = iter(one)
        got = [next(batches).tolist()]
        processes |= {worker.pid for worker in one._iterator._workers}
        if epoch == 1:
            continue  # left in the middle
        got += [batch.tolist() for batch in batches]
        assert got == [batch.tolist() for batch in loader(epoch=epoch)]
    assert len(processes) == 1


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

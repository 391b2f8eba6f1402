import threading
import time

import pytest
import torch

from simdetr.mining.kmeans import in_order


@pytest.mark.parametrize("threads", [1, 3])
def test_results_are_in_order_and_made_elsewhere(threads):
    seen = set()

    def work(item):
        time.sleep(0.002 * (item % 3))  # later ones end earlier
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return item * 10

    assert list(in_order(work, range(20), threads)) == [10 * item for item in range(20)]
    assert list(in_order(work, [], threads)) == []
    assert len({thread for thread, _ in seen} - {threading.get_ident()}) == threads
    assert {intra_op for _, intra_op in seen} == {1}  # each on its own core


def test_no_more_is_begun_than_threads_can_hold():
    begun = []
    results = in_order(begun.append, range(50), threads=2)
    for taken in range(1, 10):
        next(results)
        time.sleep(0.005)
        assert len(begun) <= taken + 2
    results.close()
    assert len(begun) <= 11


def test_threads_of_torch_are_as_before():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        results = in_order(abs, range(9), threads=2)
        next(results)
        assert torch.get_num_threads() == 3
        results.close()
        counts = []
        thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        thread.start(), thread.join()
        assert torch.get_num_threads() == 3 and counts == [3]  # also of threads that others start now
    finally:
        torch.set_num_threads(before)


def test_what_goes_wrong_is_told_in_its_place():
    results = in_order(lambda item: 1 // item, [1, 0, 1], threads=2)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)

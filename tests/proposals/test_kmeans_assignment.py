import numpy as np
import pytest
import torch

from simdetr.mining import kmeans as kmeans_assignment
from simdetr.mining.kmeans import assign_blocks, faiss_nearest, nearest_cluster, torch_nearest


def made(rows, dims, seed):
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed))


def exact(rows, centroids):
    """Labels, sums, counts and inertia the slow way, in float64."""
    rows, centroids = rows.double(), centroids.double()
    distances, labels = torch.cdist(rows, centroids).square().min(dim=1)
    one_hot = torch.nn.functional.one_hot(labels, len(centroids)).double()
    return labels, one_hot.T @ rows, one_hot.sum(dim=0).long(), float(distances.sum())


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("dims", [1, 7, 64])
def test_pass_is_exact(backend, dims):
    rows, centroids = made(333, dims, 0) + 3, made(19, dims, 1) + 3
    found = assign_blocks([rows], centroids, spherical=False, backend=backend)
    labels, sums, counts, inertia = exact(rows, centroids)
    assert torch.equal(found.labels.long(), labels) and torch.equal(found.counts, counts)
    torch.testing.assert_close(found.sums, sums, rtol=0, atol=1e-9)
    assert found.inertia == pytest.approx(inertia, rel=1e-7)


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 160, 161])
def test_any_number_of_rows_is_compared(rows):
    values, centroids = made(rows, 12, 0), made(7, 12, 1)
    assert torch.equal(torch_nearest(centroids)(values), exact(values, centroids)[0])
    assert torch.equal(faiss_nearest(centroids)(values), exact(values, centroids)[0])


def test_product_and_convolution_agree(monkeypatch):
    values, centroids = made(1000, 48, 0), made(100, 48, 1)
    convolved = torch_nearest(centroids)(values)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    product = torch_nearest(centroids)
    assert product.__name__ == "by_product" and torch.equal(product(values), convolved)


def test_threads_do_not_change_anything(monkeypatch):
    monkeypatch.setattr(kmeans_assignment, "_PIECE_ROWS", 700)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(assign_blocks([made(5000, 16, 0)], made(40, 16, 1), spherical=True, backend="torch"))
    finally:
        torch.set_num_threads(before)
    units = torch.nn.functional.normalize(made(5000, 16, 0), dim=1)
    torch.testing.assert_close(found[0].sums, exact(units, made(40, 16, 1))[1], rtol=0, atol=1e-9)
    for other in found[1:]:
        assert torch.equal(other.sums, found[0].sums) and torch.equal(other.labels, found[0].labels)
        assert other.inertia == found[0].inertia


@pytest.mark.parametrize("tile_bytes", [1, 1000, 1 << 23])
@pytest.mark.parametrize("block_rows", [1, 13, 400, 5000])
def test_blocks_and_tiles_of_any_size_give_the_same(monkeypatch, tile_bytes, block_rows):
    rows, centroids = made(401, 10, 0), made(9, 10, 1)
    whole = assign_blocks([rows], centroids, spherical=True, backend="torch")
    monkeypatch.setattr(kmeans_assignment, "_TILE_BYTES", tile_bytes)
    found = assign_blocks(torch.split(rows, block_rows), centroids, spherical=True, backend="torch")
    assert torch.equal(found.labels, whole.labels)
    torch.testing.assert_close(found.sums, whole.sums, rtol=0, atol=1e-12)
    assert torch.equal(nearest_cluster(rows, centroids), exact(rows, centroids)[0])


def test_rows_are_taken_in_any_float_type_and_zero_rows_stay_zero():
    rows = made(100, 8, 0).half()
    rows[3] = 0
    centroids = torch.nn.functional.normalize(made(5, 8, 1), dim=1)
    found = assign_blocks([rows, rows[:0]], centroids, spherical=True, backend="torch")
    units = torch.nn.functional.normalize(rows.float(), dim=1)
    torch.testing.assert_close(found.sums, exact(units, centroids)[1], rtol=0, atol=1e-9)
    assert units[3].abs().sum() == 0 and found.inertia == pytest.approx(exact(units, centroids)[3], rel=1e-6)
    assert len(found.labels) == 100 and found.labels.dtype == torch.int32


def test_no_rows_give_zeros():
    found = assign_blocks([], made(5, 8, 1), spherical=False, backend="torch")
    assert found.inertia == 0 and not found.sums.any() and not found.counts.any() and len(found.labels) == 0


def test_far_from_the_origin_the_inertia_does_not_drown():
    rows = made(200, 4, 0) + 1000
    centroids = made(3, 4, 1) + 1000
    found = assign_blocks([rows], centroids, spherical=False, backend="torch")
    own = (rows.double() - centroids.double()[found.labels.long()]).square().sum()
    assert found.inertia == pytest.approx(float(own), rel=1e-8)
    assert np.isfinite(found.inertia)

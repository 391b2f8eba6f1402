"""K-means against scikit-learn, faiss and float64 by brute force; streamed, on two ranks, killed and gone on with."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
import warnings

import faiss
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.exceptions import ConvergenceWarning

from simdetr.mining import kmeans
from simdetr.mining.kmeans import (
    Iteration,
    Journal,
    _means,
    assign_blocks,
    cluster_balance,
    clustering_record,
    faiss_nearest,
    fit_kmeans,
    from_first,
    gather,
    nearest_cluster,
    on_single_cores,
    process_group,
    rank,
    sample_rows,
    spread_starts,
    sum_over_ranks,
    torch_nearest,
    world_size,
)


def blobs(clusters=12, rows=3000, dims=10, spread=0.35, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, dims, generator=generator)
    own = torch.randint(clusters, (rows,), generator=generator)
    return centres[own] + spread * torch.randn(rows, dims, generator=generator)


def best_of(seeds, rows, clusters, **options):
    return min((fit_kmeans(rows, clusters, seed=seed, **options) for seed in range(seeds)), key=lambda run: run.inertia)


def exact_inertia(rows, centroids):
    return float(torch.cdist(rows.double(), centroids.double()).amin(dim=1).square().sum())


@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_inertia_is_within_one_percent_of_scikit_learn(spread):
    rows = blobs(spread=spread)
    ours = best_of(4, rows, 12, spherical=False, max_iterations=100)
    theirs = SklearnKMeans(12, n_init=10, random_state=0).fit(rows.numpy())
    assert ours.inertia <= 1.01 * theirs.inertia_
    assert ours.inertia == pytest.approx(exact_inertia(rows, ours.centroids), rel=1e-4)
    assert torch.equal(ours.counts, torch.bincount(ours.assign(rows), minlength=12))


def test_single_starts_are_as_good_as_scikit_learns():
    """Many well separated groups, where poor starts are never mended: the average over seeds must not be worse."""
    rows = blobs(clusters=40, rows=3000)
    ours = [fit_kmeans(rows, 40, spherical=False, seed=seed).inertia for seed in range(5)]
    theirs = [SklearnKMeans(40, n_init=1, random_state=seed).fit(rows.numpy()).inertia_ for seed in range(5)]
    assert np.mean(ours) <= 1.03 * np.mean(theirs)
    assert min(ours) <= 1.01 * np.mean(theirs)


def test_spherical_clusters_are_directions():
    rows = blobs(dims=6)
    scaled = rows * torch.rand(len(rows), 1, generator=torch.Generator().manual_seed(1)).mul(5).add(0.1)
    plain, other = fit_kmeans(rows, 8), fit_kmeans(scaled, 8)
    torch.testing.assert_close(plain.centroids.norm(dim=1), torch.ones(8))
    assert other.inertia == pytest.approx(plain.inertia, rel=0.01)
    units = torch.nn.functional.normalize(rows, dim=1)
    assert plain.inertia == pytest.approx(exact_inertia(units, plain.centroids), rel=1e-4)
    assert torch.equal(plain.assign(rows), plain.assign(rows * 7))


def starts_of(rows, clusters, seed, spherical=False):
    sample = sample_rows([rows], clusters, spherical, seed)
    return spread_starts(sample, clusters, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("iterations", [1, 3, 12])
def test_iterations_are_those_of_scikit_learn_from_the_same_starts(iterations):
    rows = blobs(spread=0.8)
    ours = fit_kmeans(rows, 12, seed=1, spherical=False, max_iterations=iterations, tolerance=-1)
    starts = starts_of(rows, 12, seed=1).numpy()
    theirs = SklearnKMeans(12, init=starts, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        theirs.fit(rows.numpy())
    assert ours.iterations == iterations
    np.testing.assert_allclose(ours.centroids.numpy(), theirs.cluster_centers_, atol=1e-5)
    assert (ours.labels.numpy() == theirs.predict(rows.numpy())).all()


@pytest.mark.parametrize("spherical", [False, True])
def test_backends_agree_within_one_percent_and_with_the_iterations_of_faiss(spherical):
    rows = blobs(clusters=20, rows=4000, spread=0.7)
    ours = fit_kmeans(rows, 20, spherical=spherical, max_iterations=10, tolerance=-1)
    other = fit_kmeans(rows, 20, spherical=spherical, max_iterations=10, tolerance=-1, backend="faiss")
    assert other.inertia == pytest.approx(ours.inertia, rel=0.01)
    assert int(other.counts.sum()) == len(rows)
    units = torch.nn.functional.normalize(rows, dim=1) if spherical else rows
    options = {"niter": 10, "spherical": spherical, "max_points_per_centroid": len(rows), "min_points_per_centroid": 1}
    theirs = faiss.Kmeans(rows.shape[1], 20, **options)
    theirs.train(units.numpy(), init_centroids=starts_of(rows, 20, 0, spherical).numpy())
    assert exact_inertia(units, torch.from_numpy(theirs.centroids)) == pytest.approx(ours.inertia, rel=0.01)


class Blocks:
    """Blocks made anew in every pass; counts the passes."""

    def __init__(self, rows, size):
        self.rows, self.size, self.passes = rows, size, 0

    def __iter__(self):
        self.passes += 1
        yield from torch.split(self.rows, self.size)
        yield self.rows[:0]


def test_streaming_equals_clustering_at_once():
    rows = blobs(rows=2500)
    blocks = Blocks(rows, 170)
    streamed, whole = fit_kmeans(blocks, 12, seed=3), fit_kmeans(rows, 12, seed=3)
    torch.testing.assert_close(streamed.centroids, whole.centroids, atol=1e-5, rtol=1e-4)
    assert torch.equal(streamed.counts, whole.counts)
    assert blocks.passes == streamed.iterations + 2  # one for the sample, one for the first assignment


def test_sample_depends_on_the_rows_only():
    rows = torch.cat((blobs(rows=9000), torch.zeros(5000, 10)))  # a flat image's regions must not fill the sample
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(5))
    first, second = sample_rows([rows], 4, False, 0), sample_rows(torch.split(rows[order], 999), 4, False, 0)
    assert torch.equal(first, second)
    assert len(first) < 9000 and int((first == 0).all(dim=1).sum()) <= 1
    assert not torch.equal(first, sample_rows([rows], 4, False, 1))
    picked = first[:, 0].double()
    assert float(picked.mean()) == pytest.approx(float(rows[:9000, 0].double().mean()), abs=0.03)


def test_starts_are_rows_and_spread_over_far_groups():
    rows = torch.cat([torch.full((300, 2), 100.0 * group) + torch.rand(300, 2) for group in range(5)])
    starts = spread_starts(rows, 5, torch.Generator().manual_seed(0))
    assert sorted((starts[:, 0] // 100).int().tolist()) == [0, 1, 2, 3, 4]


def test_empty_clusters_start_again():
    """From starts that all coincide, every cluster but one is empty at first; still each group gets its own."""
    groups = torch.tensor([[0.0, 1.0], [9.0, 0.0], [50.0, 9.0], [51.0, 30.0], [-80.0, 7.0]])
    rows = groups.repeat(50, 1)
    centroids = rows[:1].repeat(5, 1)
    empty = []
    for _ in range(4):
        found = assign_blocks([rows], centroids, spherical=False, backend="torch")
        empty.append(int((found.counts == 0).sum()))
        centroids = _means(found.sums, found.counts, centroids, groups, spherical=False)
    assert empty[0] == 4 and empty[-1] == 0
    assert (found.counts == 50).all()
    assert found.inertia == pytest.approx(0, abs=1e-6)


def test_history_tells_every_pass():
    rows, told = blobs(), []
    result = fit_kmeans(rows, 12, seed=2, journal=Journal(tell=told.append))
    assert tuple(told) == result.history
    assert [step.number for step in told] == list(range(result.iterations + 1))
    falls = -np.diff([step.inertia for step in told])
    assert (falls > -1e-6 * told[0].inertia).all() and falls[-1] <= 1e-4 * told[-1].inertia
    assert all(step.empty == 0 for step in told)


def test_fewer_different_rows_than_clusters_is_defined():
    result = fit_kmeans(torch.ones(30, 4), 3)
    assert result.inertia == pytest.approx(0, abs=1e-5)
    assert int(result.counts.sum()) == 30 and torch.isfinite(result.centroids).all()


def test_one_cluster_is_the_mean():
    rows = blobs(rows=500)
    result = fit_kmeans(rows, 1, spherical=False)
    torch.testing.assert_close(result.centroids[0], rows.mean(dim=0), atol=1e-5, rtol=1e-4)
    assert result.inertia == pytest.approx(float((rows - rows.mean(dim=0)).square().sum()), rel=1e-4)
    assert result.counts.tolist() == [500]


def test_same_seed_same_result_and_global_generator_untouched():
    rows = blobs()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = fit_kmeans(rows, 12, seed=7), fit_kmeans(rows, 12, seed=7)
    assert torch.equal(first.centroids, second.centroids)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_more_clusters_than_rows_names_both_numbers(backend):
    with pytest.raises(ValueError, match="got 11 clusters for 10 rows"):
        fit_kmeans(torch.rand(10, 3), 11, backend=backend)


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (torch.rand(10, 3), {"num_clusters": 0}, "at least 1 each, got 0, 50"),
        (torch.full((10, 3), torch.nan), {"num_clusters": 2}, "finite rows"),
        (torch.rand(10), {"num_clusters": 2}, r"blocks \[n, D\], got shape \(10,\)"),
        ([torch.rand(10, 3), torch.rand(10, 4)], {"num_clusters": 2}, "blocks of 3 dimensions, got 4"),
        (iter([torch.rand(10, 3)]), {"num_clusters": 2}, "can be repeated, got an iterator"),
        ([], {"num_clusters": 2}, "got 2 clusters for 0 rows"),
        (torch.rand(10, 3), {"num_clusters": 2, "backend": "other"}, "expected 'torch' or 'faiss', got 'other'"),
    ],
)
def test_wrong_input_is_refused(features, options, message):
    with pytest.raises(ValueError, match=message):
        fit_kmeans(features, **options)


def _cluster_a_shard(rank, address, rows, out):
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    shard = rows[rank::2][: len(rows) // 2 - 40 * rank]  # unequal shares, rows interleaved
    result = fit_kmeans(shard if rank == 0 else [shard[:100], shard[100:]], 12, seed=3)
    failures = []
    for features, clusters in ((torch.rand(3, 4), 7), (torch.full((9, 4), torch.nan if rank else 0.0), 2)):
        try:
            fit_kmeans(features, clusters)
        except ValueError as error:
            failures.append(str(error))
    torch.save((result.centroids, result.counts, result.inertia, failures), out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_ranks_equal_one(in_two_processes, tmp_path):
    rows = blobs(rows=2000)
    in_two_processes(_cluster_a_shard, tmp_path / "rendezvous", rows, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    seen = torch.cat((rows[0::2], rows[1::2][: len(rows) // 2 - 40]))
    alone = fit_kmeans(seen, 12, seed=3)
    torch.testing.assert_close(first[0], alone.centroids, atol=1e-5, rtol=1e-4)
    assert torch.equal(first[1], alone.counts)
    assert first[2] == pytest.approx(alone.inertia, rel=1e-5)
    for _, _, _, failures in (first, second):  # both ranks stop, also the one whose own rows are fine
        assert "got 7 clusters for 6 rows" in failures[0] and "finite rows" in failures[1]


KILLED_RUN = """
import sys, torch
from pathlib import Path
from simdetr.mining.kmeans import Journal, fit_kmeans

tell = lambda step: die() if step.number == 5 else None
rows = torch.load(sys.argv[1])
fit_kmeans(rows, 12, seed=3, max_iterations=12, tolerance=-1, journal=Journal(Path(sys.argv[2]), "rows", tell))
"""


def test_a_killed_clustering_goes_on_and_ends_the_same(tmp_path, run_until_killed):
    rows, file = blobs(spread=1.0), tmp_path / "journal.safetensors"
    torch.save(rows, tmp_path / "rows.pt")
    run_until_killed(KILLED_RUN, tmp_path / "rows.pt", file)
    settings = {"seed": 3, "max_iterations": 12, "tolerance": -1}
    told = []
    resumed = fit_kmeans(rows, 12, **settings, journal=Journal(file, "rows", told.append))
    assert 4 < told[0].number < 8  # not from the start
    whole = fit_kmeans(rows, 12, **settings)
    assert torch.equal(resumed.centroids, whole.centroids) and torch.equal(resumed.labels, whole.labels)
    inertias = [[step.inertia for step in run.history] for run in (resumed, whole)]
    assert inertias[0] == inertias[1] and len(inertias[0]) == 13


class DiesInPass:
    """This rank's rows, and its end (as by kill -9) when it has been asked for them so many times."""

    def __init__(self, rows, last_pass):
        self.rows, self.left = rows, last_pass

    def __iter__(self):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return iter([self.rows])


def _cluster_and_die(rank, address, rows, out, last_pass):
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    blocks = DiesInPass(rows[rank::2], last_pass if rank else -1)
    settings = {"seed": 3, "max_iterations": 8, "tolerance": -1}
    result = fit_kmeans(blocks, 12, **settings, journal=Journal(out / "journal.safetensors", "rows"))
    passes = -1 - blocks.left
    whole = fit_kmeans(rows[rank::2], 12, **settings)
    torch.save((result.centroids, result.iterations, passes, whole.centroids), out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_ranks_go_on_after_one_was_killed(in_two_processes, tmp_path):
    rows = blobs(rows=2000, spread=1.0)
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        in_two_processes(_cluster_and_die, tmp_path / "first", rows, tmp_path, 6)
    in_two_processes(_cluster_and_die, tmp_path / "second", rows, tmp_path, -1)
    for number in range(2):
        resumed, iterations, passes, whole = torch.load(tmp_path / f"{number}.pt")
        assert torch.equal(resumed, whole) and iterations == 8
        assert passes == 1 + 9 - 4  # the sample, and all but the four passes that had ended


def test_result_is_plain_numbers():
    result = fit_kmeans(blobs(rows=200), 3)
    assert isinstance(result.inertia, float) and result.counts.dtype == torch.int64
    assert result.labels.dtype == torch.int32 and torch.equal(result.labels.long(), result.assign(blobs(rows=200)))


# ----------------------------------------------------------------------------------------------------------------------
# One pass over all rows.


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
    monkeypatch.setattr(kmeans, "_PIECE_ROWS", 700)
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
    monkeypatch.setattr(kmeans, "_TILE_BYTES", tile_bytes)
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


# ----------------------------------------------------------------------------------------------------------------------
# The journal.


HISTORY = (Iteration(0, 12.5, 1, 0.25), Iteration(1, 1 / 3, 0, 0.2))


def test_what_was_kept_comes_back_exactly(tmp_path):
    journal = Journal(tmp_path / "new" / "journal.safetensors", "these rows")
    assert journal.restore("C=3") is None
    centroids = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    journal.keep(centroids + 1, HISTORY[:1], "C=3")
    journal.keep(centroids, HISTORY, "C=3")
    restored, history = journal.restore("C=3")
    assert torch.equal(restored, centroids) and history == HISTORY
    assert [path.name for path in journal.path.parent.iterdir()] == ["journal.safetensors"]
    with safe_open(journal.path, framework="np") as file:  # others can read it
        assert json.loads(file.metadata()["history"])[1]["inertia"] == 1 / 3


@pytest.mark.parametrize(("data", "settings"), [("other rows", "C=3"), ("these rows", "C=4")])
def test_other_data_or_settings_begin_anew(tmp_path, caplog, data, settings):
    Journal(tmp_path / "j.safetensors", "these rows").keep(torch.zeros(3, 4), HISTORY, "C=3")
    with caplog.at_level(logging.INFO):
        assert Journal(tmp_path / "j.safetensors", data).restore(settings) is None
    assert "of other regions or settings; the clustering begins anew" in caplog.text


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "pickle", "without notes"])
def test_a_damaged_file_begins_anew(tmp_path, caplog, damage):
    journal = Journal(tmp_path / "j.safetensors", "these rows")
    journal.keep(torch.zeros(30, 40), HISTORY, "C=3")
    whole = journal.path.read_bytes()
    if damage == "pickle":
        torch.save({"centroids": torch.zeros(30, 40)}, journal.path)
    elif damage == "without notes":
        journal.path.write_bytes(whole.replace(b'"history"', b'"hisTory"'))
    else:
        journal.path.write_bytes({"empty": b"", "cut": whole[:-100], "text": b"centroids" * 99}[damage])
    assert journal.restore("C=3") is None
    assert "cannot be read" in caplog.text and "begins anew" in caplog.text


def test_a_full_disk_leaves_the_last_state(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "j.safetensors")
    journal.keep(torch.ones(2, 2), HISTORY[:1], "C=2")

    def full(tensors, path, notes):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("simdetr.mining.kmeans.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        journal.keep(torch.zeros(2, 2), HISTORY, "C=2")
    assert torch.equal(journal.restore("C=2")[0], torch.ones(2, 2))
    assert len(list(tmp_path.iterdir())) == 1


def test_without_a_path_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = []
    journal = Journal(tell=told.append)
    journal.keep(torch.zeros(2, 2), HISTORY, "C=2")
    journal.report(HISTORY[0])
    assert journal.restore("C=2") is None and told == [HISTORY[0]] and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# What is told of a clustering.


def test_equal_clusters():
    found = cluster_balance(np.full(200, 7))
    rows = {"min": 7, "median": 7, "max": 7, "empty": 0}
    spread = {"entropy": 1, "perplexity": 200, "perplexity_share": 1, "largest_percent_share": 0.01, "gini": 0}
    assert found == pytest.approx(rows | spread)


def test_one_cluster_has_all():
    found = cluster_balance(np.array([0, 0, 50, 0]))
    assert (found["empty"], found["entropy"], found["perplexity"], found["largest_percent_share"]) == (3, 0, 1, 1)
    assert found["gini"] == pytest.approx(3 / 4)
    assert cluster_balance(np.array([9]))["entropy"] == 1


def test_numbers_by_their_definitions():
    sizes = np.random.default_rng(0).integers(0, 500, 300)
    found = cluster_balance(sizes)
    shares = sizes[sizes > 0] / sizes.sum()
    perplexity = np.prod(shares**-shares)
    assert found["perplexity"] == pytest.approx(perplexity)
    assert found["entropy"] == pytest.approx(np.log(perplexity) / np.log(300))
    pairs = np.abs(sizes[:, None] - sizes[None]).sum()
    assert found["gini"] == pytest.approx(pairs / (2 * 300 * sizes.sum()))  # mean difference over twice the mean
    assert found["largest_percent_share"] == pytest.approx(sorted(sizes)[-3:] @ np.ones(3) / sizes.sum())


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="at least one row, got none in 3 clusters"):
        cluster_balance(np.zeros(3, np.int64))


def test_record_survives_json():
    clustering = fit_kmeans(torch.rand(300, 5, generator=torch.Generator().manual_seed(0)), 4)
    record = clustering_record(clustering, {"seed": 0})
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert sum(record["sizes"]) == record["regions"] == 300
    assert len(record["inertia"]) == record["iterations"] + 1 == len(record["seconds"]) == len(record["empty"])
    assert record["balance"]["max"] == max(record["sizes"]) and record["inertia"][-1] == clustering.inertia


# ----------------------------------------------------------------------------------------------------------------------
# Threads.


@pytest.mark.parametrize("threads", [1, 3])
def test_results_are_in_order_and_made_elsewhere(threads):
    seen = set()

    def work(item):
        time.sleep(0.002 * (item % 3))  # later ones end earlier
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return item * 10

    assert list(on_single_cores(work, range(20), threads)) == [10 * item for item in range(20)]
    assert list(on_single_cores(work, [], threads)) == []
    assert len({thread for thread, _ in seen} - {threading.get_ident()}) == threads
    assert {intra_op for _, intra_op in seen} == {1}  # each on its own core


def test_no_more_is_begun_than_threads_can_hold():
    begun = []
    results = on_single_cores(begun.append, range(50), threads=2)
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
        results = on_single_cores(abs, range(9), threads=2)
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
    results = on_single_cores(lambda item: 1 // item, [1, 0, 1], threads=2)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


# ----------------------------------------------------------------------------------------------------------------------
# Ranks.


def test_one_process_is_a_group_of_itself(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group("cpu"):
        assert not dist.is_initialized()
        assert (world_size(), rank(), gather("a"), from_first("b")) == (1, 0, ["a"], "b")
        assert sum_over_ranks(torch.ones(2)).tolist() == [1, 1]


def _talk(place, port, folder):
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(place), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with process_group("cpu"):
        heard = {"size": world_size(), "rank": rank(), "first": from_first(f"word of {place}")}
        with process_group("cpu"):  # joined already
            heard["gathered"] = gather([place])
        heard["sum"] = sum_over_ranks(torch.tensor([1.0, place])).tolist()
    heard["left"] = not dist.is_initialized()
    (folder / f"{place}.json").write_text(json.dumps(heard))


@pytest.mark.dist
def test_two_processes_hear_each_other(in_two_processes, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    in_two_processes(_talk, port, tmp_path)
    alike = {"size": 2, "first": "word of 0", "gathered": [[0], [1]], "sum": [2, 1], "left": True}
    assert [json.loads((tmp_path / f"{place}.json").read_text()) for place in (0, 1)] == [
        alike | {"rank": place} for place in (0, 1)
    ]

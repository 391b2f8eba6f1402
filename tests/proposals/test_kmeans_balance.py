import json

import numpy as np
import pytest
import torch

from simdetr.mining.kmeans import cluster_balance, clustering_record, fit_kmeans


def test_equal_clusters():
    found = cluster_balance(np.full(200, 7))
    assert found == pytest.approx(
        {
            "min": 7,
            "median": 7,
            "max": 7,
            "empty": 0,
            "entropy": 1,
            "perplexity": 200,
            "perplexity_share": 1,
            "largest_percent_share": 0.01,
            "gini": 0,
        }
    )


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
    assert found["gini"] == pytest.approx(
        pairs / (2 * 300 * sizes.sum())
    )  # mean absolute difference over twice the mean
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

"""Leading eigenvectors against LAPACK in double precision, and on graphs where solvers fail."""

import numpy as np
import pytest
import torch

from simdetr.mining.spectral_clustering import leading_eigenvectors, symmetric_eigh


def with_spectrum(values, nodes, seed=0):
    """A symmetric matrix with these leading eigenvalues and a low bulk."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(nodes, nodes)))[0]
    spectrum = rng.uniform(-0.2, 0.2, nodes)
    spectrum[: len(values)] = values
    return torch.from_numpy((basis * spectrum) @ basis.T).float()


def subspace_cosine(found, matrix, count):
    """Cosine of the largest angle between the found and the true leading subspace."""
    true = np.linalg.eigh(matrix.double().numpy())[1][:, -count:]
    return np.linalg.svd(found.double().numpy().T @ true, compute_uv=False).min()


@pytest.mark.parametrize("nodes", [40, 200, 500])
def test_equals_lapack(nodes):
    wanted = [1.0, 0.9, 0.85, 0.6, 0.5, 0.45]
    matrices = torch.stack([with_spectrum(wanted, nodes, seed) for seed in range(3)])
    values, vectors = leading_eigenvectors(matrices, 6)
    torch.testing.assert_close(values, torch.tensor([wanted] * 3), atol=1e-4, rtol=0)
    for matrix, found in zip(matrices, vectors, strict=True):
        torch.testing.assert_close(found.T @ found, torch.eye(6), atol=1e-4, rtol=0)
        assert subspace_cosine(found, matrix, 6) > 0.9999


@pytest.mark.parametrize("copies", [3, 4, 9])
def test_finds_every_copy_of_a_repeated_eigenvalue(copies):
    matrix = with_spectrum([1.0] * copies + [0.5] * (10 - copies), 400)[None]
    values, vectors = leading_eigenvectors(matrix, 10)
    torch.testing.assert_close(values[0], torch.tensor([1.0] * copies + [0.5] * (10 - copies)), atol=1e-4, rtol=0)
    assert subspace_cosine(vectors[0, :, :copies], matrix[0], copies) > 0.9999


def test_a_spectrum_without_gaps_is_still_solved():
    matrix = with_spectrum([0.5 - 1e-3 * i for i in range(300)], 400)[None]
    values, vectors = leading_eigenvectors(matrix, 6)
    torch.testing.assert_close(values[0], torch.tensor([0.5 - 1e-3 * i for i in range(6)]), atol=1e-5, rtol=0)
    residual = matrix[0] @ vectors[0] - vectors[0] * values[0]
    assert residual.norm(dim=0).max() < 1e-3


def test_flat_and_empty_graphs_are_finite():
    flat = (torch.ones(400, 400) - torch.eye(400)) / 399
    values, vectors = leading_eigenvectors(torch.stack([flat, torch.zeros(400, 400)]), 6)
    assert torch.isfinite(vectors).all()
    torch.testing.assert_close(values[0, 0], torch.tensor(1.0))
    assert (values[0, 1:] <= 1e-4).all()
    assert values[1].abs().max() < 1e-6


def test_a_matrix_does_not_feel_its_batch():
    hard = with_spectrum([0.5 - 2e-3 * i for i in range(200)], 400, seed=1)
    easy = with_spectrum([1.0, 0.9, 0.8, 0.7], 400, seed=2)
    alone = leading_eigenvectors(easy[None], 4)
    together = leading_eigenvectors(torch.stack([hard, easy, hard]), 4)
    torch.testing.assert_close(together[0][1], alone[0][0], atol=1e-6, rtol=0)
    torch.testing.assert_close(together[1][1], alone[1][0], atol=1e-5, rtol=0)


def test_no_more_vectors_than_nodes():
    values, vectors = leading_eigenvectors(torch.zeros(2, 3, 3), 8)
    assert values.shape == (2, 3)
    assert vectors.shape == (2, 3, 3)


def test_survives_lapack_failing(monkeypatch):
    matrices = torch.stack([with_spectrum([1.0, 1.0, 0.5], 30, seed) for seed in range(2)])
    expected = symmetric_eigh(matrices)[0]

    def fail(_):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    values, vectors = symmetric_eigh(matrices)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, matrices, atol=1e-5, rtol=0)


def test_survives_lapack_returning_nan(monkeypatch):
    matrices = with_spectrum([1.0, 0.5], 20)[None]
    broken = torch.full((1, 20), torch.nan), torch.full((1, 20, 20), torch.nan)
    monkeypatch.setattr(torch.linalg, "eigh", lambda _: broken)
    values, _ = symmetric_eigh(matrices)
    torch.testing.assert_close(values[0, -2:], torch.tensor([0.5, 1.0]), atol=1e-5, rtol=0)

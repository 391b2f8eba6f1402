"""Leading eigenvectors of many symmetric matrices at once: normalised graph matrices in, orthonormal vectors out.

Letters: B graphs, N nodes, C wanted eigenvectors. Small matrices are decomposed whole by LAPACK. Of larger ones a few
vectors out of hundreds are wanted, and block Lanczos with full reorthogonalisation (Golub, Underwood 1977) finds them
with the fewest products; `benchmarks/LOG.md` has the measurement against whole decompositions and Chebyshev-filtered
subspace iteration. Each matrix stops on its own residual and leaves the batch, so a result never depends on what else
was in the batch.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

WHOLE_UP_TO = 128  # nodes; up to here a whole decomposition is as fast as the iteration
BLOCK = 4  # vectors per product: one pass over the matrix serves all, and up to 3 equal eigenvalues are told apart
FIRST_BASIS, MORE_BASIS, LARGEST_BASIS = 4, 2, 12  # basis vectors per wanted one: at first, per round, at most
VANISHED = 1e-5  # length of a new basis vector below which it is rounding
EQUAL = 1e-4  # difference of eigenvalues below which they may be one, with several vectors


def leading_eigenvectors(
    matrices: Tensor, count: int, *, seed: int = 0, tolerance: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues, descending, and their orthonormal eigenvectors.

    Args:
        matrices: float [B, N, N], symmetric, with eigenvalues in [-1, 1] as D^-1/2 W D^-1/2 has them.
        count: how many; at most N are returned.
        seed: of the starting block, which is the same for every matrix of the batch.
        tolerance: largest norm of A v - lambda v that is accepted.

    Returns:
        Values [B, C] and vectors [B, N, C] with C = min(count, N). Where the eigenvalues that were found are all not
        positive from some place on, vectors there may be zero.
    """
    nodes = matrices.shape[-1]
    count = min(count, nodes)
    if nodes <= max(WHOLE_UP_TO, LARGEST_BASIS * count + BLOCK):
        return _leading_of_whole(matrices, count)
    values = matrices.new_zeros(len(matrices), count)
    vectors = matrices.new_zeros(len(matrices), nodes, count)
    active = torch.arange(len(matrices), device=matrices.device)
    lanczos = _BlockLanczos(matrices, seed)
    for size in range(FIRST_BASIS * count, LARGEST_BASIS * count + 1, MORE_BASIS * count):
        lanczos.grow(size)
        values[active], vectors[active], residual = lanczos.leading(count)
        unfinished = residual > tolerance
        active = active[unfinished]
        if not len(active):
            break
        lanczos.select(unfinished)
    # A block of b vectors finds b copies of an eigenvalue at most, so b equal ones may be more.
    crowded = ((values[:, : 1 - BLOCK] - values[:, BLOCK - 1 :] < EQUAL) & (values[:, : 1 - BLOCK] > EQUAL)).any(dim=1)
    crowded[active] = True
    if bool(crowded.any()):
        values[crowded], vectors[crowded] = _leading_of_whole(matrices[crowded], count)
    return values, vectors


def symmetric_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` that survives LAPACK's divide-and-conquer failing on repeated eigenvalues.

    Float [B, N, N] to values [B, N], ascending, and vectors [B, N, N]. Where the batched routine fails, every matrix is
    decomposed in double precision by the slower QR iteration, which has no such failure.
    """
    try:
        values, vectors = torch.linalg.eigh(matrices)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined] # the stubs forgot to export it
        return _eigh_by_qr_iteration(matrices)
    if matrices.is_cpu and not bool(torch.isfinite(vectors).all()):
        return _eigh_by_qr_iteration(matrices)
    return values, vectors


def _eigh_by_qr_iteration(matrices: Tensor) -> tuple[Tensor, Tensor]:
    pairs = [scipy.linalg.eigh(matrix, driver="ev") for matrix in matrices.detach().cpu().double().numpy()]
    values = torch.from_numpy(np.stack([value for value, _ in pairs]))
    vectors = torch.from_numpy(np.stack([vector for _, vector in pairs]))
    return values.to(matrices), vectors.to(matrices)


class _BlockLanczos:
    """Orthonormal bases of the Krylov spaces of a batch of matrices, and their projections, grown block by block."""

    def __init__(self, matrices: Tensor, seed: int) -> None:
        batch, nodes, _ = matrices.shape
        start = torch.randn(nodes, BLOCK, generator=torch.Generator().manual_seed(seed))
        block = torch.linalg.qr(start)[0].T.contiguous().to(matrices)
        self._matrices = matrices
        self._next = block.expand(batch, -1, -1)
        self._link = matrices.new_zeros(batch, BLOCK, BLOCK)  # of the next block to the last one of the basis
        self._basis = matrices.new_zeros(batch, 0, nodes)
        self._projected = matrices.new_zeros(batch, 0, 0)

    def grow(self, size: int) -> None:
        """Extend the bases to at least ``size`` vectors."""
        batch, start, nodes = self._basis.shape
        size = -(-size // BLOCK) * BLOCK
        basis = self._basis.new_zeros(batch, size, nodes)
        projected = self._basis.new_zeros(batch, size, size)
        basis[:, :start], projected[:, :start, :start] = self._basis, self._projected
        for end in range(start + BLOCK, size + 1, BLOCK):
            own, before = slice(end - BLOCK, end), slice(end - 2 * BLOCK, end - BLOCK)
            block = basis[:, own] = self._next
            if end > BLOCK:
                projected[:, own, before], projected[:, before, own] = self._link, self._link.mT
            product = torch.bmm(block, self._matrices)  # symmetric; rows times matrix is the faster side
            projected[:, own, own] = torch.bmm(product, block.mT)
            # In exact arithmetic the last two blocks would do; rounding errors grow from block to block, so all follow.
            for known in (basis[:, max(0, end - 2 * BLOCK) : end], basis[:, :end]):
                product = product - torch.bmm(torch.bmm(product, known.mT), known)
            rows, self._link = torch.linalg.qr(product.mT)
            lengths = self._link.diagonal(dim1=1, dim2=2).abs()
            self._next = (rows * (lengths > VANISHED)[:, None]).mT
        self._basis, self._projected = basis, projected

    def leading(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Best values [B, C], vectors [B, N, C] within the bases, and their largest residual norm [B]."""
        values, rotation = symmetric_eigh((self._projected + self._projected.mT) / 2)
        values, rotation = values[:, -count:].flip(1), rotation[:, :, -count:].flip(2)
        residual = torch.bmm(self._link, rotation[:, -BLOCK:]).norm(dim=1).amax(dim=1)
        return values, torch.bmm(self._basis.mT, rotation), residual

    def select(self, keep: Tensor) -> None:
        """Go on with some of the matrices only."""
        self._matrices, self._basis, self._projected = self._matrices[keep], self._basis[keep], self._projected[keep]
        self._next, self._link = self._next[keep], self._link[keep]


def _leading_of_whole(matrices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, vectors = symmetric_eigh(matrices)
    return values[:, -count:].flip(1), vectors[:, :, -count:].flip(2)

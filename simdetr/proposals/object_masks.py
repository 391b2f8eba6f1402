"""Rivals that cut objects out of one feature map: features [D, H, W] of an image in, masks bool [M, H, W] out.

LOST (Siméoni et al. 2021, "Localizing Objects with Self-Supervised Transformers and no Labels"), TokenCut (Wang et al.
2022, "Self-supervised Transformers for Unsupervised Object Discovery using Normalized Cut") and MaskCut (Wang et al.
2023, CutLER, section 3.2), from the papers' descriptions. They were made for the keys of a DINO transformer, whose
products have both signs; so that any encoder serves, an image's mean feature is subtracted first, as our own mining
does (``centre``). MaskCut is without the conditional random field that sharpens its masks afterwards.

Letters: D channels, H x W cells, N = H W, M masks. For comparison only: one image at a time.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from simdetr.proposals.components import connected_components
from simdetr.proposals.eigenvectors import leading_eigenvectors
from simdetr.proposals.spectral_clustering import FLAT, NO_GROUP

WEAK = 1e-5  # weight of an edge between cells that are not similar; above zero, so that the graph hangs together
SOLVED_TOGETHER = 4  # eigenvectors asked for: the two that are wanted converge sooner in a larger basis


def lost(features: Tensor, expansion: int = 100) -> Tensor:
    """The one object of LOST.

    The seed is the cell with the fewest cells of positive product. Of the ``expansion`` cells with the fewest, those of
    positive product with the seed grow it; the object is what has a positive product with their sum, as far as it hangs
    together with the seed.

    Args:
        features: float [D, H, W].
        expansion: cells that may grow the seed.

    Returns:
        Bool [1, H, W].
    """
    cells = _centred(features)
    products = cells @ cells.T
    ascending = (products >= 0).sum(dim=1).argsort(stable=True)
    seed, candidates = ascending[0], ascending[:expansion]
    grown = candidates[products[seed, candidates] >= 0]
    mask = products[:, grown].sum(dim=1) >= 0
    return _around(mask.reshape(features.shape[-2:]), int(seed))[None]


def token_cut(features: Tensor, threshold: float = 0.2, *, centre: bool = True) -> Tensor:
    """The one object of TokenCut: the prominent side of the best normalised cut, around its most prominent cell.

    Args:
        features: float [D, H, W].
        threshold: cosine from which two cells are joined.
        centre: subtract the image's mean feature before the cosine.

    Returns:
        Bool [1, H, W], or [0, H, W] where the map has no two groups.
    """
    value, vector = second_eigenvector(_similar(_directions(features, centre), threshold))
    if value <= NO_GROUP:
        return torch.zeros(0, *features.shape[-2:], dtype=torch.bool, device=features.device)
    side = _prominent_side(vector).reshape(features.shape[-2:])
    return _around(side, int(vector.abs().argmax()))[None]


def mask_cut(features: Tensor, threshold: float = 0.15, masks: int = 3, *, centre: bool = True) -> Tensor:
    """Several objects: TokenCut again and again, with the cells of the objects found so far taken out of the graph.

    A side with two or more of the map's corners is the background, however prominent, and the other one is taken.

    Args:
        features: float [D, H, W].
        threshold: cosine from which two cells are joined.
        masks: most objects.
        centre: subtract the image's mean feature before the cosine.

    Returns:
        Bool [M, H, W], M at most ``masks``, in the order in which they were found; fewer where nothing is left to cut.
    """
    height, width = features.shape[-2:]
    directions = _directions(features, centre)
    found = torch.zeros(height * width, dtype=torch.bool, device=features.device)
    objects = []
    for _ in range(masks):
        value, vector = second_eigenvector(_similar(directions * ~found[:, None], threshold))
        side = _prominent_side(vector)
        if side[[0, width - 1, -width, -1]].sum() >= 2:
            side = ~side
        side = side & ~found
        if value <= NO_GROUP or not bool(side.any()):
            break
        seed = vector.abs().masked_fill(~side, -1).argmax()
        objects.append(_around(side.reshape(height, width), int(seed)))
        found |= objects[-1].flatten()
    return torch.stack(objects) if objects else found.new_zeros(0, height, width)


def second_eigenvector(weights: Tensor) -> tuple[float, Tensor]:
    """Second smallest eigenvector x of (D - W) x = lambda D x, the relaxed normalised cut (Shi and Malik 2000).

    Args:
        weights: W, float [N, N], symmetric and positive; D is the diagonal of its row sums.

    Returns:
        1 - lambda, and x as float [N] of either sign. 1 - lambda is positive only where the graph has two groups.
    """
    if len(weights) < 2:
        return 0.0, weights.new_zeros(len(weights))
    scale = weights.sum(dim=1).rsqrt()
    values, vectors = leading_eigenvectors((weights * scale[:, None] * scale)[None], SOLVED_TOGETHER, tolerance=1e-6)
    return float(values[0, 1]), vectors[0, :, 1] * scale


def _centred(features: Tensor) -> Tensor:
    """Cells [N, D] less their mean; zero where a cell equals the mean but for rounding."""
    cells: Tensor = rearrange(features, "d h w -> (h w) d").float()
    centred = cells - cells.mean(dim=0)
    lengths, before = (torch.linalg.vector_norm(vectors, dim=1) for vectors in (centred, cells))
    has_direction: Tensor = lengths > FLAT * before
    return centred * has_direction[:, None]


def _directions(features: Tensor, centre: bool) -> Tensor:
    cells = _centred(features) if centre else rearrange(features, "d h w -> (h w) d").float()
    return functional.normalize(cells, dim=1)


def _similar(directions: Tensor, threshold: float) -> Tensor:
    """The graph of TokenCut: weight 1 between cells at least so similar, nearly none between others; double [N, N].

    In double precision, where the device has it: the first eigenvalues of a graph in pieces differ by no more than the
    weak edges.
    """
    precision = torch.float32 if directions.device.type == "mps" else torch.float64
    return (directions @ directions.T >= threshold).to(precision).clamp(min=WEAK)


def _prominent_side(vector: Tensor) -> Tensor:
    """The vector cut at its mean, bool [N]: the side with the entry of largest absolute value."""
    above = vector > vector.mean()
    return above == above[vector.abs().argmax()]


def _around(mask: Tensor, seed: int) -> Tensor:
    """The part of a mask [H, W] that hangs together with one of its cells, by 4 neighbours."""
    parts = connected_components(mask.long())
    return torch.eq(parts, parts.flatten()[seed])

"""Other people's proposals, to compare ours with: images and their feature maps in, Regions or a store of them out.

Every rival has one signature, :data:`Baseline`, and a name in :data:`BASELINES`. Selective Search (Uijlings et al.
2013) looks at pixels only, random boxes at nothing. The others cut objects out of the very maps that our mining
clusters, as their papers describe it: LOST (Siméoni et al. 2021, "Localizing Objects with Self-Supervised Transformers
and no Labels"), TokenCut (Wang et al. 2022, "Self-supervised Transformers for Unsupervised Object Discovery using
Normalized Cut") and MaskCut (Wang et al. 2023, CutLER, section 3.2). They were made for the keys of a DINO transformer,
whose products have both signs; so that any encoder serves, an image's mean feature is subtracted first, as our own
mining does (``centre``). MaskCut is without the conditional random field that sharpens its masks afterwards.

Features are averaged from the last level's map as ours are, so that a rival's regions can go wherever ours go. The
score only gives the order: 1 for the first box of an image, then less.

Letters: B images, D channels, H x W cells, N = H W, M masks, n boxes of one image. Relative boxes are xyxy in 0..1 of
width and height.
"""

from __future__ import annotations

import ctypes
import sys
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from einops import einsum, rearrange
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import masks_to_boxes

from simdetr.data.images import ImageSource
from simdetr.mining.batch import MiningConfig, encode, images_ahead
from simdetr.mining.encoders import Encoder
from simdetr.mining.miner import finish, open_store
from simdetr.mining.ranking import coverage
from simdetr.mining.regions import Regions, connected_components
from simdetr.mining.spectral_clustering import FLAT, NO_GROUP, leading_eigenvectors
from simdetr.mining.store import ProposalRow, ProposalStore

WEAK = 1e-5  # weight of an edge between cells that are not similar; above zero, so that the graph hangs together
SOLVED_TOGETHER = 4  # eigenvectors asked for: the two that are wanted converge sooner in a larger basis
SMALLEST_SIDE = 1 / 32  # of random boxes: the geometric mean of their relative sides is at least this
LARGEST_ASPECT = 3.0  # of random boxes: one relative side is at most so many times the other
MOST_BOXES = 100  # per image; recall is reported up to here
_WORKERS = 2  # threads that decode; the methods themselves are far slower

Baseline = Callable[[Tensor, Mapping[int, Tensor], tuple[int, int], int, int], Regions]
"""Shrunk image uint8 [3, h, w], its maps [1, D, H_l, W_l] by stride, (height, width) of the original, most boxes, seed
-> boxes in pixels of the original."""


def lost(features: Tensor, expansion: int = 100) -> Tensor:
    """The one object of LOST in features [D, H, W], bool [1, H, W].

    The seed is the cell with the fewest cells of positive product. Of the ``expansion`` cells with the fewest, those of
    positive product with the seed grow it; the object is what has a positive product with their sum, as far as it hangs
    together with the seed.
    """
    cells = _cells(features)
    products = cells @ cells.T
    ascending = (products >= 0).sum(dim=1).argsort(stable=True)
    seed, candidates = ascending[0], ascending[:expansion]
    grown = candidates[products[seed, candidates] >= 0]
    mask = products[:, grown].sum(dim=1) >= 0
    return _around(mask.reshape(features.shape[-2:]), int(seed))[None]


def token_cut(features: Tensor, threshold: float = 0.2, *, centre: bool = True) -> Tensor:
    """The one object of TokenCut: the prominent side of the best normalised cut, around its most prominent cell.

    From features [D, H, W] to bool [1, H, W], or [0, H, W] where the map has no two groups. Cells are joined from a
    cosine of ``threshold`` on; ``centre`` subtracts the image's mean feature before.
    """
    value, vector = second_eigenvector(_similar(functional.normalize(_cells(features, centre), dim=1), threshold))
    if value <= NO_GROUP:
        return torch.zeros(0, *features.shape[-2:], dtype=torch.bool, device=features.device)
    side = _prominent_side(vector).reshape(features.shape[-2:])
    return _around(side, int(vector.abs().argmax()))[None]


def mask_cut(features: Tensor, threshold: float = 0.15, masks: int = 3, *, centre: bool = True) -> Tensor:
    """Several objects: TokenCut again and again, with the cells of the objects found so far taken out of the graph.

    A side with two or more of the map's corners is the background, however prominent, and the other one is taken. Bool
    [M, H, W], M at most ``masks``, in the order in which they were found; the other arguments are those of `token_cut`.
    """
    height, width = features.shape[-2:]
    directions = functional.normalize(_cells(features, centre), dim=1)
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

    Of weights W [N, N], symmetric and positive, with their row sums D: 1 - lambda, which is positive only where the
    graph has two groups, and x [N] of either sign.
    """
    if len(weights) < 2:
        return 0.0, weights.new_zeros(len(weights))
    scale = weights.sum(dim=1).rsqrt()
    values, vectors = leading_eigenvectors((weights * scale[:, None] * scale)[None], SOLVED_TOGETHER, tolerance=1e-6)
    return float(values[0, 1]), vectors[0, :, 1] * scale


def _cells(features: Tensor, centre: bool = True) -> Tensor:
    """Cells [N, D], less their mean if asked; then zero where a cell equals the mean but for rounding."""
    cells: Tensor = rearrange(features, "d h w -> (h w) d").float()
    if not centre:
        return cells
    centred = cells - cells.mean(dim=0)
    lengths, before = (torch.linalg.vector_norm(vectors, dim=1) for vectors in (centred, cells))
    has_direction: Tensor = lengths > FLAT * before
    return centred * has_direction[:, None]


def _similar(directions: Tensor, threshold: float) -> Tensor:
    """The graph of TokenCut: weight 1 between cells at least so similar, nearly none between others; double [N, N]."""
    # double where the device has it: the first eigenvalues of a graph in pieces differ by no more than the weak edges
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


def selective_search(
    image: Tensor, maps: Mapping[int, Tensor], size_hw: tuple[int, int], max_boxes: int, seed: int, *, side: int = 128
) -> Regions:
    """Selective Search in fast mode at ``side`` x ``side`` pixels, in OpenCV's order; errors as of `search_boxes`."""
    return _of_boxes(search_boxes(image, side, seed=_own_seed(image, seed))[:max_boxes], maps, size_hw)


def search_boxes(image: Tensor, side: int = 128, *, seed: int = 0) -> NDArray[np.float64]:
    """All boxes of OpenCV's Selective Search, fast mode, best first: relative, double [n, 4].

    The image, uint8 [3, H, W] RGB, is resized to a square of ``side`` pixels, as is usual. ``seed`` is that of the
    order: drawn at random, more or less with the regions that were merged first before the others. RuntimeError if
    OpenCV's contrib modules are not installed.
    """
    try:
        import cv2
        from cv2.ximgproc import segmentation
    except ImportError as error:
        raise RuntimeError(
            "selective_search: expected OpenCV with its contrib modules (cv2.ximgproc), which is not installed; "
            "run pip install 'simdetr[bench]', or leave this method out"
        ) from error
    # INTER_AREA averages; OpenCV works on blue, green, red
    square = cv2.resize(image.permute(1, 2, 0).numpy(), (side, side), interpolation=cv2.INTER_AREA)
    search = segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(square[:, :, ::-1]))
    search.switchToSelectiveSearchFast()
    # OpenCV orders the boxes by the C library's rand() and has no seed of its own. Nothing else here draws from it.
    ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None).srand(ctypes.c_uint(seed))
    xywh = np.asarray(search.process(), np.float64).reshape(-1, 4)
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1) / side


def random_boxes(
    image: Tensor, maps: Mapping[int, Tensor], size_hw: tuple[int, int], max_boxes: int, seed: int
) -> Regions:
    """Boxes that know nothing: sizes and aspects log-uniform, places uniform within the image."""
    rng = np.random.default_rng(_own_seed(image, seed))
    size, aspect, place = np.split(rng.uniform(size=(max_boxes, 4)), [1, 2], axis=1)
    root, stretch = SMALLEST_SIDE**size, LARGEST_ASPECT ** (aspect - 0.5)
    sides = np.concatenate([root * stretch, root / stretch], axis=1).clip(max=1)
    corners = place * (1 - sides)
    return _of_boxes(np.concatenate([corners, corners + sides], axis=1), maps, size_hw)


def objects(
    find: Callable[[Tensor], Tensor],
    image: Tensor,
    maps: Mapping[int, Tensor],
    size_hw: tuple[int, int],
    max_boxes: int,
    seed: int,
    *,
    stride: int = 16,
) -> Regions:
    """Regions of the masks [M, H, W] that ``find`` cuts out of the map [D, H, W] of a stride; ValueError if absent."""
    if stride not in maps:
        raise ValueError(f"stride: expected one of the encoder's, {sorted(maps)}, got {stride}")
    return _of_masks(find(maps[stride][0])[:max_boxes], maps, size_hw, stride)


BASELINES: dict[str, Baseline] = {
    "selective_search": selective_search,
    "lost": partial(objects, lost),
    "token_cut": partial(objects, token_cut),
    "mask_cut": partial(objects, mask_cut),
    "random": random_boxes,
}


def baseline(name: str) -> Baseline:
    """The rival of a name; ValueError if there is none."""
    if name not in BASELINES:
        raise ValueError(f"methods: expected some of {', '.join(BASELINES)}, got {name!r}")
    return BASELINES[name]


def _own_seed(image: Tensor, seed: int) -> int:
    """A seed of the pixels, so that a result does not depend on an image's place in the source."""
    return zlib.crc32(image.contiguous().numpy().tobytes(), seed)


def _of_boxes(relative: NDArray[np.float64], maps: Mapping[int, Tensor], size_hw: tuple[int, int]) -> Regions:
    """Regions of boxes without a mask: averages over the box, stride 0 because no level has found them."""
    last = maps[max(maps)][0].float()
    rows, columns = last.shape[1:]
    shares = coverage(torch.from_numpy(relative * [columns, rows, columns, rows]).to(last), (rows, columns))
    features = shares @ last.flatten(1).T / shares.sum(dim=1, keepdim=True)
    boxes_px = relative * np.tile(np.array(size_hw[::-1], np.float64), 2)
    return _regions(boxes_px, features, (boxes_px[:, 2:] - boxes_px[:, :2]).prod(axis=1), 0)


def _of_masks(masks: Tensor, maps: Mapping[int, Tensor], size_hw: tuple[int, int], stride: int) -> Regions:
    """Regions of masks bool [n, H, W]: averages over the mask of the last level's map, resampled to the masks' grid."""
    height, width = masks.shape[-2:]
    last = functional.interpolate(maps[max(maps)].float(), (height, width), mode="bilinear", align_corners=False)[0]
    cells = masks.sum(dim=(1, 2))
    features = einsum(masks.to(last), last, "n h w, d h w -> n d") / cells[:, None]
    corners = masks_to_boxes(masks) + masks.new_tensor([0, 0, 1, 1], dtype=torch.float32)
    cell_px = np.array([size_hw[1] / width, size_hw[0] / height])
    boxes_px = corners.double().cpu().numpy() * np.tile(cell_px, 2)
    return _regions(boxes_px, features, cells.cpu().numpy() * cell_px.prod(), stride)


def _regions(boxes_px: NDArray[np.float64], features: Tensor, area: NDArray[np.float64], stride: int) -> Regions:
    rows = len(boxes_px)
    return Regions(
        boxes_xyxy=boxes_px.astype(np.float32),
        features=features.cpu().numpy().astype(np.float32),
        area=area.astype(np.float32),
        stride=np.full(rows, stride, np.int16),
        k=np.zeros(rows, np.int16),
        cluster=np.arange(rows, dtype=np.int16),
        score=(1 - np.arange(rows) / max(rows, 1)).astype(np.float32),
    )


@torch.no_grad()
def mine_rival(
    method: str,
    source: ImageSource,
    encoder: Encoder,
    config: MiningConfig,
    out: str | Path,
    *,
    max_boxes: int = MOST_BOXES,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> ProposalStore:
    """Mine every image of a source with a rival, one by one; the same call again goes on where it stopped.

    The store is as our own mining writes it, so that recall, report and clustering read either. The rival's name lies
    in the manifest's settings: stores of different methods are never mixed.

    Args:
        method: name in :data:`BASELINES`.
        source: the images.
        encoder: frozen; moved to ``device``. Methods that look at pixels only take the regions' features from it.
        config: settings of our own mining; image size, seed, shard size and the share of unreadable images count.
        out: folder of the store; also holds ``quarantine.csv``.
        max_boxes: of an image, the best.
        device: where encoding and graph methods run.
        progress: show a bar.

    Raises:
        ValueError: for an unknown method, or an empty source.
        StoreError: if the store is of another method, images or settings, or cannot be written.
        TooManyUnreadableError: past ``max_unreadable``.
        RuntimeError: for selective_search without OpenCV's contrib modules.
    """
    find = baseline(method)
    settings = {"method": method, "max_boxes": max_boxes, "image_size": config.image_size, "seed": config.seed}
    store = open_store(source, encoder, settings, config.shard_size, out)
    if isinstance(encoder, nn.Module):
        encoder.to(device).eval()
    missing = store.missing_shards()
    positions = [position for shard in missing for position in store.manifest.images_of(shard)]
    with images_ahead(source, positions, config.image_size, _WORKERS, ahead=config.batch_size) as loading:
        console = Console(stderr=True)
        loaded = iter(track(loading, method, len(positions), console=console, disable=not progress))
        for shard in missing:
            rows, unreadable = [], {}
            for image in islice(loaded, len(store.manifest.images_of(shard))):
                if image.pixels is None:
                    unreadable[image.image_id] = image.reason
                    continue
                maps = encode(image.pixels[None].to(device), encoder)
                regions = find(image.pixels, maps, image.size_hw, max_boxes, config.seed)
                rows.append(ProposalRow(image.image_id, *image.size_hw, regions))
            store.write_shard(shard, rows, unreadable)
    return finish(store, config.max_unreadable)

"""Mining in memory: images or feature maps of a batch in, at most a few dozen regions per image out.

Source: US 2025/0265826 [0032]-[0034], [0053], [0057]-[0063]. :func:`mine_batch` is the whole computation,
:func:`mine_maps` the part after the encoder, :func:`cluster_maps` the part before the filters.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TypeVar

import torch
from einops import repeat
from torch import Tensor
from torch.nn import functional

from simdetr.data.images import ImageRecord, ImageSource, UnreadableImageError, read_image
from simdetr.data.machine import default_workers, in_order
from simdetr.mining.encoders import Encoder
from simdetr.mining.filters import apply_filters
from simdetr.mining.level_sets import LevelSets, find_shapes
from simdetr.mining.ranking import rank_shapes, shapes_to_regions
from simdetr.mining.regions import Candidates, Regions, find_candidates, to_regions
from simdetr.mining.spectral_clustering import Affinity, spectral_clustering

Key = TypeVar("Key")
SIDE_MULTIPLE = 32  # both sides become multiples of this, so that the grids of strides 16 and 32 nest
LEAST_THREADS = 2  # by default: one decodes while the other resizes, beside the encoder's own threads
UNLIMITED = 100  # boxes of an image that a list of filters without a limit leaves, roughly
_LIMITS: dict[str, float] = {
    "merge_similar_clusters": 0.5,
    "drop_fragmented_clusters": 10,
    "drop_duplicate_boxes": 0.95,
    "drop_similar_subsets": 0.7,
    "keep_most_diverse": 25,
}


@dataclass(frozen=True)
class MiningConfig:
    """Settings of the mining.

    Args:
        image_size: Long side, in pixels, at which images are encoded. The aspect is kept: the short side is rounded to
            a multiple of 32 (no padding), and boxes are scaled back on each axis.
        clusters: Numbers of clusters K per stride of the encoder.
        affinity: Weight between two cells from their cosine: "exp" or "clamp".
        temperature: Of the "exp" affinity; lower separates more.
        centre: Subtract an image's mean feature before similarities are taken.
        kmeans_starts: Seedings of the k-means in the spectral embedding.
        cut_steps: Times that cells are moved between clusters to lower the normalised cut; 0 leaves the plain k-means.
        connectivity: 4 or 8 neighbours join cells to a region.
        level_sets: Not the document's, and on by default for every encoder: regions are found anew on a finer grid from
            each cluster's colours, ranked by their contour and by recurrence, and the best are kept; none of the
            document's five filters is applied, and of the encoder only its clusters are used. null is the document's
            way: boxes of the clusters' cells, and ``filters``.
        filters: The document's five box filters by name, each with its limit, in this order; without effect unless
            ``level_sets`` is null.
        batch_size: Images of one shape that are encoded and clustered together; does not change the result.
        shard_size: Images per file of the store; a killed run loses at most one unfinished shard.
        num_workers: Threads that decode images, 0 in between; by default what suits the machine. Does not change the
            result.
        max_unreadable: Fraction of unreadable images past which the run stops.
        seed: Of all random numbers.
    """

    image_size: int = 448
    clusters: dict[int, list[int]] = field(default_factory=lambda: {32: [2, 4, 8], 16: [8, 16]})
    affinity: Affinity = "exp"
    temperature: float = 0.1
    centre: bool = True
    kmeans_starts: int = 2
    cut_steps: int = 1
    connectivity: int = 4
    level_sets: LevelSets | None = field(default_factory=LevelSets)
    filters: dict[str, float] = field(default_factory=_LIMITS.copy)
    batch_size: int = 16
    shard_size: int = 512
    num_workers: int | None = None
    max_unreadable: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "shard_size", "kmeans_starts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {self.num_workers}")
        if self.image_size % SIDE_MULTIPLE:
            nearest = max(1, round(self.image_size / SIDE_MULTIPLE)) * SIDE_MULTIPLE
            raise ValueError(f"image_size must be a multiple of {SIDE_MULTIPLE}, got {self.image_size}; try {nearest}")
        if not self.clusters or not all(self.clusters.values()):
            raise ValueError(f"clusters must name numbers of clusters for at least one stride, got {self.clusters}")

    @property
    def most_boxes(self) -> int:
        """Boxes per image at most; a guess where the filters set no limit."""
        if self.level_sets is not None:
            return self.level_sets.max_boxes
        return int(self.filters.get("keep_most_diverse", UNLIMITED))

    def decoding_threads(self, device: str | torch.device) -> int:
        """Threads that decode images while they are encoded on ``device``."""
        return max(LEAST_THREADS, default_workers(str(device))) if self.num_workers is None else self.num_workers

    def result_settings(self) -> dict[str, object]:
        """The settings that change what is mined, not how it is split up."""
        of_the_run = ("batch_size", "shard_size", "num_workers", "max_unreadable")
        return {name: value for name, value in asdict(self).items() if name not in of_the_run}


@torch.no_grad()
def mine_batch(
    images: Sequence[Tensor], encoder: Encoder, config: MiningConfig, device: str | torch.device = "cpu"
) -> list[Regions]:
    """Regions of images in memory, the pure computation.

    Args:
        images: uint8 [3, H, W] RGB each, of any sizes, or one uint8 [B, 3, H, W].
        encoder: on ``device``.
        config: the settings.
        device: where to compute.

    Returns:
        One record per image, boxes in its own pixels.
    """
    shrunk = (shrink(image, config.image_size) for image in images)
    results: dict[int, Regions] = {}
    for batch, pixels in batches_of_one_shape(enumerate(shrunk), config.batch_size):
        sizes = [(images[index].shape[-2], images[index].shape[-1]) for index in batch]
        results.update(zip(batch, mine_pixels(pixels.to(device), encoder, sizes, config), strict=True))
    return [results[index] for index in range(len(images))]


def batches_of_one_shape(images: Iterable[tuple[Key, Tensor]], batch_size: int) -> Iterator[tuple[list[Key], Tensor]]:
    """Gather images of one shape, each with a key, as they come; keys and stacked images, ``batch_size`` at most."""
    waiting: dict[torch.Size, list[tuple[Key, Tensor]]] = defaultdict(list)

    def batch(shape: torch.Size) -> tuple[list[Key], Tensor]:
        keys, same = zip(*waiting.pop(shape), strict=True)
        return list(keys), torch.stack(same)

    for key, image in images:
        waiting[image.shape].append((key, image))
        if len(waiting[image.shape]) == batch_size:
            yield batch(image.shape)
    yield from map(batch, list(waiting))


def encode(pixels: Tensor, encoder: Encoder) -> dict[int, Tensor]:
    """Feature maps of uint8 images [B, 3, H, W]; FloatingPointError if the encoder gives NaN or infinity."""
    maps = encoder(pixels.float() / 255)
    for stride, level in maps.items():
        if not bool(torch.isfinite(level).all()):
            raise FloatingPointError(
                f"the encoder's map at stride {stride} has NaN or infinity; check weights and precision"
            )
    return maps


def mine_pixels(
    pixels: Tensor, encoder: Encoder, sizes_hw: Sequence[tuple[int, int]], config: MiningConfig
) -> list[Regions]:
    """Regions of images of one shape: encoder, clustering, then the document's filters or level sets.

    An image of one colour has none: all that could be found is the whole image. Pixels are uint8 [B, 3, H, W], sides
    multiples of 32; ``sizes_hw`` are the originals' (height, width) in pixels.
    """
    maps = encode(pixels, encoder)
    if config.level_sets is None:
        regions = mine_maps(maps, sizes_hw, config)
    else:
        regions = mine_level_sets(pixels, maps, sizes_hw, config)
    one_colour = (pixels.amax(dim=(2, 3)) == pixels.amin(dim=(2, 3))).all(dim=1).tolist()
    return [found.first(0) if plain else found for found, plain in zip(regions, one_colour, strict=True)]


def mine_level_sets(
    pixels: Tensor, maps: Mapping[int, Tensor], sizes_hw: Sequence[tuple[int, int]], config: MiningConfig
) -> list[Regions]:
    """Regions finer than the maps' cells, ranked; arguments as of :func:`mine_pixels` and :func:`mine_maps`.

    ValueError if the config has no ``level_sets`` or the encoder lacks a stride of it.
    """
    settings = config.level_sets
    if settings is None:
        raise ValueError("level_sets: expected settings, got null; set mining.level_sets")
    absent = {*settings.distance_powers, *settings.angle_powers} - set(maps)
    if absent:
        raise ValueError(
            f"distance_powers, angle_powers: expected strides out of {sorted(maps)}, which the encoder has, got "
            f"{sorted(absent)}; set mining.level_sets.distance_powers and angle_powers"
        )
    labels = cluster_levels(maps, config)
    coarsest = maps[max(maps)]

    def regions_of(own: slice) -> list[Regions]:
        part = {key: label[own] for key, label in labels.items()}
        shapes = find_shapes(pixels[own].float() / 255, part, settings, connectivity=config.connectivity)
        seen = {stride: level[own] for stride, level in maps.items()}
        kept, scores = rank_shapes(shapes, len(sizes_hw[own]), settings, seen)
        return shapes_to_regions(shapes, kept, scores, part, coarsest[own], sizes_hw[own])

    if not pixels.is_cpu:
        return regions_of(slice(len(pixels)))
    # On the host, image by image, so that the level sets stay in its cache, and several at a time: most of the work
    # is scipy's and numpy's, which use one thread and let others run.
    each = [slice(index, index + 1) for index in range(len(pixels))]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return [found for regions in pool.map(regions_of, each) for found in regions]


def cluster_levels(maps: Mapping[int, Tensor], config: MiningConfig) -> dict[tuple[int, int], Tensor]:
    """Local clustering of all levels: per (stride, K) the cluster of every cell, int64 [B, H_l, W_l], coarse first.

    Maps are features [B, C, H_l, W_l] by stride; ValueError if the encoder lacks a stride of the config.
    """
    absent = set(config.clusters) - set(maps)
    if absent:
        raise ValueError(
            f"clusters: expected strides out of {sorted(maps)}, which the encoder has, got {sorted(absent)}"
        )
    cluster = partial(
        spectral_clustering,
        affinity=config.affinity,
        temperature=config.temperature,
        centre=config.centre,
        starts=config.kmeans_starts,
        cut_steps=config.cut_steps,
        seed=config.seed,
    )
    strides = sorted(config.clusters, reverse=True)
    return {(s, k): label for s in strides for k, label in cluster(maps[s], config.clusters[s]).items()}


def cluster_maps(maps: Mapping[int, Tensor], config: MiningConfig) -> Candidates:
    """All regions of all clusterings, before any filter; maps are features [B, C, H_l, W_l] by stride.

    Raises:
        ValueError: if the encoder lacks a stride of the config or the strides' grids do not nest.
    """
    clustered = cluster_levels(maps, config)
    finest = min(config.clusters)
    height, width = maps[finest].shape[-2:]
    labels = []
    for (stride, _), label in clustered.items():
        rows, columns = label.shape[-2:]
        step = height // rows
        if (rows * step, columns * step) != (height, width):
            raise ValueError(
                f"maps: grids must nest, got {rows}x{columns} at {stride} and {height}x{width} at {finest}"
            )
        labels.append(repeat(label, "b h w -> b (h y) (w x)", y=step, x=step))
    strides, ks = zip(*clustered, strict=True)
    used = {stride: maps[stride] for stride in {*config.clusters, max(maps)}}
    grids = torch.stack(labels, dim=1)
    return find_candidates(grids, strides, ks, used, connectivity=config.connectivity, centre=config.centre)


def mine_maps(maps: Mapping[int, Tensor], sizes_hw: Sequence[tuple[int, int]], config: MiningConfig) -> list[Regions]:
    """Regions of images, sizes_hw their (height, width) in pixels, from their maps: clustering, components, filters."""
    return to_regions(apply_filters(cluster_maps(maps, config), config.filters), sizes_hw)


# ----------------------------------------------------------------------------------------------------------------------
# Images decoded ahead by threads: decoders and resizing release the interpreter's lock, and threads cost no memory.


@dataclass(frozen=True)
class LoadedImage:
    """One image, shrunk, with its original size and how long it took; or no pixels and the reason why."""

    image_id: str
    pixels: Tensor | None
    size_hw: tuple[int, int] = (0, 0)
    reason: str = ""
    seconds: float = 0.0


def images_ahead(
    source: ImageSource, positions: Iterable[int], image_size: int, num_workers: int, ahead: int
) -> closing[Generator[LoadedImage, None, None]]:
    """Give the images at some positions of a source, in that order and shrunk to ``image_size``, to a ``with`` block.

    So many threads, which end with the block, decode at most ``ahead`` images before they are asked for; without any an
    image is decoded when it is asked for.
    """

    def load(position: int) -> LoadedImage:
        return load_image(source[position], image_size)

    return closing(in_order(load, positions, num_workers, ahead))


def load_image(record: ImageRecord, image_size: int) -> LoadedImage:
    """Read and shrink one image; a file that cannot be decoded gives the reason instead of pixels."""
    start = time.perf_counter()
    try:
        image = read_image(record)
    except UnreadableImageError as error:
        return LoadedImage(record.id, None, reason=error.reason)
    pixels = shrink(image, image_size)
    return LoadedImage(record.id, pixels, (image.shape[1], image.shape[2]), seconds=time.perf_counter() - start)


def shrink(image: Tensor, image_size: int) -> Tensor:
    """Resize uint8 [3, H, W] so that the long side is ``image_size`` and the short one the nearest multiple of 32."""
    height, width = image.shape[-2:]
    scale = image_size / max(height, width)
    size = [max(1, round(side * scale / SIDE_MULTIPLE)) * SIDE_MULTIPLE for side in (height, width)]
    if size == [height, width]:
        return image
    # in uint8: four times as fast as in float, within one grey level of it, and no float copy of a large image
    return functional.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]

"""Boxes of a set of images in, a feature of the square crop of each box out, by any frozen encoder of pictures.

Each image is decoded once, ahead of the encoder and by threads; features go to disk as they come, so that neither many
boxes nor a killed run cost more than once. Crops follow label-verify-correct (Kaul, Xie and Zisserman, CVPR 2022):
square, with the object's surroundings in place of distortion, and black where the image ends.

Letters: M boxes of all images together, n of one image, B of one batch, S side of a crop in pixels, H, W an image's
size, D length of a feature. Boxes are xyxy in pixels of the upright original.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from simdetr.data.images import ImageRecord, ImageSource, UnreadableImageError, read_image
from simdetr.data.labels import Labels
from simdetr.data.machine import default_workers
from simdetr.data.pretrained_weights import PACKAGED, load_backbone_weights, load_into, normalisation, timm_name
from simdetr.data.storage import atomic_path, write_json
from simdetr.mining.colour_texture import ColourTextureEncoder
from simdetr.mining.encoders import Encoder, FittedEncoder

Fill = Literal["context", "zero"]
Interpolation = Literal["bilinear", "nearest"]
Progress = Callable[[int], None]
COLOUR_TEXTURE = "colour-texture"
"""The word for the encoder that needs no weights."""
MIN_SIDE_PX = 2
"""Of a box within its image; a smaller one shows nothing."""
TOO_SMALL, OUTSIDE, UNREADABLE = "too_small", "outside", "unreadable"
SIDE = 224
_PIECE = 64  # crops that a thread makes of an image at most; those of a crowd are made when the encoder comes to them
_LEAST_THREADS = 2
_FILL_ROWS = 1 << 14  # rows written at once to a new file
LOG = logging.getLogger(__name__)


# ----------------------------------------------------------------------------------------------------------------------
# Crops


def crop_boxes(
    pixels: Tensor,
    boxes_xyxy: Tensor,
    size: int = SIDE,
    *,
    fill: Fill = "context",
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """Square crops of an image around boxes.

    Corners are cut to the image, truncated to whole pixels, and the last one belongs to the crop. The shorter side
    grows alike on both sides until the crop is square (an odd pixel goes to the right or below).

    Args:
        pixels: uint8 [3, H, W] in RGB, on the CPU.
        boxes_xyxy: Boxes [n, 4] in pixels; they may reach over the image's edge.
        size: S, the side of all crops in pixels.
        fill: What the shorter side grows by: "context", the pixels of the image around the box and black past its
            edge, or "zero", black alone.
        interpolation: "bilinear", which averages where a crop shrinks, or "nearest" as in the published code.

    Returns:
        uint8 [n, 3, S, S], in memory channels last.

    Raises:
        ValueError: Pixels or boxes of another type or shape, an unknown option, or a box that is not finite, is upside
            down or lies outside the image.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"pixels: expected uint8 [3, H, W] in RGB, got {pixels.dtype} {tuple(pixels.shape)}")
    if boxes_xyxy.ndim != 2 or boxes_xyxy.shape[1] != 4:
        raise ValueError(f"boxes_xyxy: expected shape [n, 4], got {tuple(boxes_xyxy.shape)}")
    if size < 1:
        raise ValueError(f"size: expected at least 1 pixel, got {size}")
    _check_option("fill", fill, ("context", "zero"))
    _check_option("interpolation", interpolation, ("bilinear", "nearest"))
    height, width = pixels.shape[1:]
    boxes = boxes_xyxy.detach().cpu().double()
    limits = boxes.new_tensor([width, height])
    inside = (boxes[:, 2:] > 0).all(1) & (boxes[:, :2] < limits).all(1) & (boxes[:, 2:] >= boxes[:, :2]).all(1)
    bad = ~(inside & boxes.isfinite().all(1))
    if bool(bad.any()):
        row = int(bad.int().argmax())
        raise ValueError(
            f"boxes_xyxy: expected finite x0 <= x1 and y0 <= y1 that meet the image of {width}×{height} pixels, got "
            f"{boxes_xyxy[row].tolist()} in row {row}; leave such boxes out"
        )
    corners = torch.minimum(boxes.clamp(min=0), (limits - 1).repeat(2)).long()
    sides = 1 + (corners[:, 2:] - corners[:, :2]).amax(dim=1)
    if int(sides.square().sum()) > height * width:  # else each crop's own pixels are turned around, see _resize
        pixels = pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    crops = torch.empty((len(boxes), 3, size, size), dtype=torch.uint8, memory_format=torch.channels_last)
    for crop, (left, top, right, bottom) in zip(crops, corners.tolist(), strict=True):
        crop.copy_(_square(pixels, ((top, bottom + 1), (left, right + 1)), size, fill, interpolation))
    return crops


def _square(
    pixels: Tensor,
    window: tuple[tuple[int, int], tuple[int, int]],
    size: int,
    fill: Fill,
    interpolation: Interpolation,
) -> Tensor:
    """The crop [3, S, S] around a box, whose rows and columns are given with exclusive ends.

    Only the shorter side may need black pixels. The longer one is resized before they are added: a long thin box then
    never becomes a large black square.
    """
    lengths = [end - start for start, end in window]
    side, short = max(lengths), int(lengths[1] < lengths[0])
    start = window[short][0] - (side - lengths[short]) // 2
    limits = list(window)
    if fill == "context":
        limits[short] = (max(0, start), min(pixels.shape[1 + short], start + side))
    (top, bottom), (left, right) = limits
    part = pixels[:, top:bottom, left:right]
    first, last = limits[short]
    if last - first < side:
        part = _resize(part, (size, right - left) if short else (bottom - top, size), interpolation)
        black = (first - start, start + side - last)
        part = functional.pad(part, black if short else (0, 0, *black))
    return _resize(part, (size, size), interpolation)


def _resize(part: Tensor, size_hw: tuple[int, int], interpolation: Interpolation) -> Tensor:
    if tuple(part.shape[1:]) == size_hw:
        return part
    if interpolation == "nearest":
        return functional.interpolate(part[None], size=size_hw, mode="nearest")[0]
    # in uint8 with the colours of a pixel side by side: a fraction of the time of float32, within one grey level of it
    part = part[None].contiguous(memory_format=torch.channels_last)
    return functional.interpolate(part, size=size_hw, mode="bilinear", antialias=True)[0]


def _check_option(name: str, got: object, known: tuple[str, ...]) -> None:
    if got not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {got!r}")


# ----------------------------------------------------------------------------------------------------------------------
# Encoders


class CropEncoder(nn.Module):
    """A frozen network from crops to features; made by :meth:`of_timm`, :meth:`of_maps` or :func:`crop_encoder`.

    Args:
        net: From normalised images [B, 3, S, S] to features [B, D].
        fingerprint: Changes whenever the features of an image would.
        size: S, the side of the crops in pixels that the network was learnt with.
        mean: Of the colours 0..1 that it was learnt with.
        std: Their deviation.

    Attributes:
        dim: D.

    Raises:
        ValueError: The network gives something other than [B, D].
    """

    def __init__(
        self,
        net: nn.Module,
        fingerprint: str,
        size: int = SIDE,
        mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        std: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        self.net, self.size = net, size
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()
        with torch.inference_mode():
            features = self.net((torch.zeros(1, 3, size, size) - self.mean) / self.std)
        if not isinstance(features, Tensor) or features.ndim != 2:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"net: expected pooled features [B, D], got {got}; take a timm model that pools")
        self.dim: int = features.shape[1]
        self.fingerprint = f"{fingerprint}:{size}px"

    @classmethod
    def of_timm(
        cls,
        model: str,
        weights: str | Path | None = None,
        pretrained: bool = False,
        random_weights: bool = False,
        seed: int = 0,
        size: int | None = None,
    ) -> Self:
        """A timm model without its classifier: a ViT gives class token or average, as the model itself pools.

        Args:
            model: A timm name, or a word for weights that a package carries (``efficientnet-lite0``).
            weights: A local file or URL.
            pretrained: Fetch timm's own weights for the name, or read the package's; not together with ``weights``.
            random_weights: Build it untrained, where there are neither; a control.
            seed: Of the random weights.
            size: Side of the crops in pixels; the model's own when left out.

        Raises:
            ValueError: Both kinds of weights, or none and no ``random_weights``; a name that timm does not know.
            PretrainedWeightsError: The weights are unreadable or for another architecture.
        """
        if weights is not None and pretrained:
            raise ValueError("weights, pretrained: expected one of them, got both; drop pretrained to use your file")
        if weights is None and not pretrained and not random_weights:
            raise ValueError(
                f"weights: {model} would be untrained; give weights, pretrained=True or random_weights=True"
            )
        packaged = PACKAGED.get(model) if pretrained else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = _pooled(timm_name(model), pretrained and packaged is None, size)
        if packaged is not None:
            load_into(net, packaged.load())
        if weights is not None:
            LOG.info(
                "weights of %s into %s: %s", weights, model, load_into(net, load_backbone_weights(weights)).summary()
            )
        config: dict[str, Any] = net.pretrained_cfg
        mean, std = normalisation(model) if model in PACKAGED else (tuple(config["mean"]), tuple(config["std"]))
        name = f"timm:{timm_name(model)}:{_digest(net)}:{mean}:{std}"
        return cls(net, name, size or int(config["input_size"][-1]), mean, std)

    @classmethod
    def of_maps(cls, encoder: Encoder, size: int = SIDE) -> Self:
        """An encoder of mining: the average of its coarsest map over a crop of ``size`` pixels."""
        return cls(_MapAverage(encoder), f"average of {encoder.fingerprint}", size)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode whatever is asked: a frozen encoder keeps its statistics."""
        return super().train(False)

    @torch.inference_mode()
    def forward(self, crops: Tensor) -> Tensor:
        """Features float32 [B, D] of crops uint8 [B, 3, S, S]."""
        if not crops.is_cpu:
            return self._encode(crops)
        # one by one, as encoders of mining do on a processor: activations stay in its cache, and features are the
        # same in whatever batch
        return torch.cat([self._encode(crop[None]) for crop in crops]) if len(crops) else torch.zeros(0, self.dim)

    def _encode(self, crops: Tensor) -> Tensor:
        images = crops.to(torch.float32, memory_format=torch.channels_last).sub_(self.mean).div_(self.std)
        features: Tensor = self.net(images)
        return features.float()


class _MapAverage(nn.Module):
    """Images [B, 3, H, W] in 0..1 to the average [B, C] of an encoder's coarsest map."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images)[max(self.encoder.strides)].mean(dim=(2, 3))


def _pooled(model: str, pretrained: bool, size: int | None) -> Any:  # noqa: ANN401 (a module with timm's attributes)
    """A timm model without classifier; of those with a fixed size of images, for this size."""
    if not timm.is_model(model.partition(".")[0]):
        near = difflib.get_close_matches(model, [*PACKAGED, *timm.list_models()], n=3)
        raise ValueError(f"model: timm knows no {model!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    kinds: list[dict[str, Any]] = [{}] if size is None else [{"img_size": size}, {}]
    for options in kinds:
        try:
            net = timm.create_model(model, num_classes=0, pretrained=pretrained, **options)
            break
        except TypeError:  # this family takes any size and has no such option
            if not options:
                raise
    return net


def _digest(module: nn.Module) -> str:
    """Hash of all names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def crop_encoder(encoder: str | Path | Encoder | CropEncoder, device: str | torch.device = "cpu") -> CropEncoder:
    """The encoder of crops that a word or an encoder of mining stands for, on a device.

    Args:
        encoder: A timm name such as ``vit_small_patch8_224.dino``, whose weights are fetched; a word for weights of a
            package such as ``efficientnet-lite0``; ``colour-texture``, which needs none; a folder that ``simdetr
            encoder fit`` wrote; an encoder of mining; or an encoder of crops.
        device: Where it computes.

    Raises:
        FileNotFoundError: A folder that is absent or holds no finished training.
        ValueError: A name that timm does not know or has no weights for, or weights that cannot be fetched.
    """
    if isinstance(encoder, CropEncoder):
        return encoder.to(device)
    if isinstance(encoder, str | Path):
        return _of_word(str(encoder)).to(device)
    if not isinstance(encoder, Encoder):
        raise TypeError(
            f"encoder: expected a word, a folder, or an encoder with strides, region_dim and fingerprint, got "
            f"{type(encoder).__name__}; CropEncoder takes any module that pools"
        )
    return CropEncoder.of_maps(encoder).to(device)


def _of_word(word: str) -> CropEncoder:
    if word == COLOUR_TEXTURE:
        return CropEncoder.of_maps(ColourTextureEncoder())
    if Path(word).is_dir():
        return CropEncoder.of_maps(FittedEncoder(word))
    if Path(word).exists() or any(separator in word for separator in "/\\"):
        what = "a file" if Path(word).exists() else "which is not there"
        raise FileNotFoundError(
            f"encoder: expected a folder of `simdetr encoder fit` or a timm name, got {word}, {what}; for weights of "
            "your own, see CropEncoder.of_timm"
        )
    if word in PACKAGED:
        PACKAGED[word].path()  # tells how to install it
    try:
        return CropEncoder.of_timm(word, pretrained=True)
    except Exception as error:  # fetching fails in all kinds of ways
        raise ValueError(
            f"encoder: {word} cannot be used: {error} Without a network, give a folder of `simdetr encoder fit`, "
            f"{', '.join(PACKAGED)} or {COLOUR_TEXTURE}"
        ) from error


# ----------------------------------------------------------------------------------------------------------------------
# Features of many boxes


@dataclass(frozen=True)
class CropFeatures:
    """A feature for every box of some labels, in their order.

    Attributes:
        values: float32 [M, D]; NaN where a box has none. On disk where a cache was named: rows are read when used.
        faults: Text [M], why a box has none: "too_small", "outside", "unreadable"; "" where it has one.
        unreadable: Reason by the id of each image that could not be read, or is not of the size its labels say.
    """

    values: NDArray[np.float32]
    faults: NDArray[np.str_]
    unreadable: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.values)


def box_faults(labels: Labels) -> NDArray[np.str_]:
    """Which boxes cannot be cropped, text [M]: "outside" their image, "too_small" within it, or "" for the others."""
    sizes = np.repeat(labels.sizes_hw[:, ::-1], np.diff(labels.offsets), axis=0)
    low, high = np.maximum(labels.boxes_xyxy[:, :2], 0), np.minimum(labels.boxes_xyxy[:, 2:], sizes)
    outside = ((high <= 0) | (low >= sizes)).any(1)
    small = (high - low < MIN_SIDE_PX).any(1)
    return np.where(outside, OUTSIDE, np.where(small, TOO_SMALL, "")).astype("<U12")


def crop_features(
    source: ImageSource,
    labels: Labels,
    encoder: str | Path | Encoder | CropEncoder,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 32,
    cache: str | Path | None = None,
    fill: Fill = "context",
    interpolation: Interpolation = "bilinear",
    num_workers: int | None = None,
    progress: Progress = lambda count: None,
) -> CropFeatures:
    """Encode the crop of every box of some labels.

    With a cache, a killed run goes on where it stopped and the same boxes are never encoded twice by one encoder;
    images that could not be read are tried anew. One process at a time may fill a cache with the same boxes.

    Args:
        source: The images; those without boxes are not opened.
        labels: Their boxes; classes and scores play no part.
        encoder: As :func:`crop_encoder` takes it.
        device: Where to compute.
        batch_size: Crops that are encoded together; does not change the features on a CPU.
        cache: A folder for the features, ``<key>.npy`` with ``<key>.json`` that says what of; None keeps them in
            memory.
        fill: As :func:`crop_boxes` takes it.
        interpolation: Likewise.
        num_workers: Threads that decode and crop ahead of the encoder, 0 in between. By default 0 on a CPU, where they
            would hold up the encoder's own threads (22.5 s in place of 13.2 s for 929 crops on two cores), else what
            suits the machine.
        progress: Called with how many boxes more are done; they add up to M.

    Raises:
        ValueError: A labelled image is not in the source, or an option is out of range.
        FloatingPointError: The encoder gives NaN or infinity.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    network = crop_encoder(encoder, device)
    crop = partial(crop_boxes, size=network.size, fill=fill, interpolation=interpolation)
    _check_option("fill", fill, ("context", "zero"))
    _check_option("interpolation", interpolation, ("bilinear", "nearest"))
    counts = np.diff(labels.offsets).tolist()
    absent = [name for name, count in zip(labels.image_ids, counts, strict=True) if count and name not in source]
    if absent:
        raise ValueError(f"labels: {len(absent)} images with boxes are not among the images, such as {absent[0]!r}")
    faults = box_faults(labels)
    store = _Store.open(cache, labels, network, f"{fill}, {interpolation}")
    wanted = np.flatnonzero(store.missing() & (faults == ""))
    progress(len(faults) - len(wanted))
    threads = num_workers
    if threads is None:
        threads = 0 if torch.device(device).type == "cpu" else max(_LEAST_THREADS, default_workers(str(device)))
    unreadable: dict[str, str] = {}

    def pieces() -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        loading = _load_ahead(_jobs(source, labels, wanted), partial(_load, crop=crop), threads, 2 * batch_size)
        with closing(loading):
            for loaded in loading:
                if loaded.reason:
                    unreadable[loaded.job.record.id] = loaded.reason
                    progress(len(loaded.job.rows))
                else:
                    yield from loaded.pieces(crop)

    for rows, features in _encoded(_batches(pieces(), batch_size), network, torch.device(device)):
        store.write(rows, features)
        progress(len(rows))
    if unreadable:
        name, reason = next(iter(unreadable.items()))
        LOG.warning("%d images could not be cropped, such as %s: %s", len(unreadable), name, reason)
    faults[store.missing() & (faults == "")] = UNREADABLE
    return CropFeatures(store.values(), faults, unreadable)


class _Store:
    """Features [M, D] in memory or in a file, NaN where there are none yet: the file itself says what is left to do."""

    def __init__(self, place: NDArray[np.float32] | Path) -> None:
        self._place = place

    @classmethod
    def open(cls, cache: str | Path | None, labels: Labels, encoder: CropEncoder, settings: str) -> _Store:
        """That of some boxes, encoder and settings of the crops; made if the cache has none."""
        shape = (len(labels.boxes_xyxy), encoder.dim)
        if cache is None or not shape[0]:
            return cls(np.full(shape, np.nan, np.float32))
        boxes = hashlib.blake2b("\0".join(labels.image_ids).encode(), digest_size=16)
        for column in (labels.sizes_hw, labels.offsets, labels.boxes_xyxy):
            boxes.update(np.ascontiguousarray(column).tobytes())
        record = {"boxes": boxes.hexdigest(), "encoder": encoder.fingerprint, "crops": settings, "shape": shape}
        key = hashlib.blake2b(repr(sorted(record.items())).encode(), digest_size=12).hexdigest()
        path = Path(cache) / f"{key}.npy"
        if not path.is_file():
            write_json(path.with_suffix(".json"), record, indent=1)
            with atomic_path(path) as temporary, temporary.open("wb") as stream:
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
                for start in range(0, shape[0], _FILL_ROWS):
                    stream.write(np.full((min(_FILL_ROWS, shape[0] - start), shape[1]), np.nan, "<f4").tobytes())
        return cls(path)

    def values(self, mode: Literal["r", "r+"] = "r") -> NDArray[np.float32]:
        """All rows; those of a file are read when used."""
        if isinstance(self._place, Path):
            mapped: NDArray[np.float32] = np.load(self._place, mmap_mode=mode)
            return mapped
        return self._place

    def missing(self) -> NDArray[np.bool_]:
        """Which rows are not written, or not wholly, bool [M]."""
        values = self.values()
        parts = [values[start : start + _FILL_ROWS] for start in range(0, len(values), _FILL_ROWS)]
        return np.concatenate([np.zeros(0, np.bool_), *(np.isnan(part).any(1) for part in parts)])

    def write(self, rows: NDArray[np.int64], features: NDArray[np.float32]) -> None:
        """Write some rows; a file is mapped for the moment alone, or its pages would count as this process's."""
        self.values("r+")[rows] = features


@dataclass(frozen=True)
class _Job:
    """Boxes [n, 4] of one image, and their rows [n] among all."""

    record: ImageRecord
    size_hw: tuple[int, int]
    rows: NDArray[np.int64]
    boxes_xyxy: Tensor


@dataclass(frozen=True)
class _Loaded:
    """The first crops of an image, and its pixels while there are more; or the reason why there are none."""

    job: _Job
    crops: Tensor | None = None
    pixels: Tensor | None = None
    reason: str = ""

    def pieces(self, crop: Callable[[Tensor, Tensor], Tensor]) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Rows and crops, a few at a time."""
        if self.crops is not None:
            yield self.job.rows[:_PIECE], self.crops
        if self.pixels is not None:
            for start in range(_PIECE, len(self.job.rows), _PIECE):
                part = slice(start, start + _PIECE)
                yield self.job.rows[part], crop(self.pixels, self.job.boxes_xyxy[part])


def _jobs(source: ImageSource, labels: Labels, wanted: NDArray[np.int64]) -> Iterator[_Job]:
    """The images of some rows, in the labels' order."""
    ends = np.searchsorted(wanted, labels.offsets)
    for image in np.flatnonzero(np.diff(ends)).tolist():
        rows = wanted[ends[image] : ends[image + 1]]
        height, width = labels.sizes_hw[image].tolist()
        boxes = torch.from_numpy(labels.boxes_xyxy[rows])
        yield _Job(source.record(labels.image_ids[image]), (height, width), rows, boxes)


def _load(job: _Job, crop: Callable[[Tensor, Tensor], Tensor]) -> _Loaded:
    try:
        pixels = read_image(job.record)
    except UnreadableImageError as error:
        return _Loaded(job, reason=error.reason)
    size_hw = (pixels.shape[1], pixels.shape[2])
    if size_hw != job.size_hw:
        (height, width), (said_height, said_width) = size_hw, job.size_hw
        return _Loaded(job, reason=f"{width}×{height} pixels, but its labels speak of {said_width}×{said_height}")
    return _Loaded(job, crop(pixels, job.boxes_xyxy[:_PIECE]), pixels if len(job.rows) > _PIECE else None)


def _load_ahead(
    jobs: Iterable[_Job], load: Callable[[_Job], _Loaded], threads: int, ahead: int
) -> Generator[_Loaded, None, None]:
    """Results in order, worked out by threads while earlier ones are used.

    Every thread has an image, and further ones wait while fewer than ``ahead`` crops do.
    """
    if not threads:
        yield from map(load, jobs)
        return
    waiting: deque[Future[_Loaded]] = deque()
    sizes: deque[int] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for job in jobs:
            waiting.append(pool.submit(load, job))
            sizes.append(min(_PIECE, len(job.rows)))
            while len(waiting) > threads and sum(sizes) > ahead:
                sizes.popleft()
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(
    pieces: Iterable[tuple[NDArray[np.int64], Tensor]], batch_size: int
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Pieces joined and cut to batches of one size; the last may be smaller."""
    held_rows: list[NDArray[np.int64]] = []
    held_crops: list[Tensor] = []
    for rows, crops in pieces:
        held_rows.append(rows)
        held_crops.append(crops)
        if sum(map(len, held_rows)) < batch_size:
            continue
        all_rows, all_crops = np.concatenate(held_rows), torch.cat(held_crops)
        whole = len(all_rows) - len(all_rows) % batch_size
        for start in range(0, whole, batch_size):
            yield all_rows[start : start + batch_size], all_crops[start : start + batch_size]
        held_rows, held_crops = [all_rows[whole:]], [all_crops[whole:].clone()]
    if held_rows and sum(map(len, held_rows)):
        yield np.concatenate(held_rows), torch.cat(held_crops)


def _encoded(
    batches: Iterable[tuple[NDArray[np.int64], Tensor]], encoder: CropEncoder, device: torch.device
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Rows and features; a GPU works on a batch while the one before is fetched and written."""
    before: tuple[NDArray[np.int64], Tensor] | None = None
    for rows, crops in batches:
        crops = crops.pin_memory() if device.type == "cuda" else crops
        features = encoder(crops.to(device, non_blocking=True))
        if before is not None:
            yield _fetched(*before)
        before = rows, features
        if device.type == "cpu":
            yield _fetched(*before)
            before = None
    if before is not None:
        yield _fetched(*before)


def _fetched(rows: NDArray[np.int64], features: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    values: NDArray[np.float32] = features.cpu().numpy()
    if not np.isfinite(values).all():
        raise FloatingPointError("encoder: NaN or infinity among the features; check its weights and precision")
    return rows, values

"""Boxes that are about right in, boxes that fit better out: the third stage of Label, Verify, Correct.

``fit_corrector`` shakes the boxes of a few labelled images and teaches a network to undo it; ``correct_boxes`` applies
it to any labels. Classes, scores and the number of boxes stay as they are. The networks are in
`simdetr.labelling.corrector_networks`.

Sources: Label, Verify, Correct (Kaul et al., arXiv 2112.05749, section 3.3) and its published code: amounts of jitter,
overlaps of the stages, recipe. Departures are named where they are made.
Letters: B images, T boxes of one image, M boxes of all images.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from simdetr import boxes as box_ops
from simdetr.data.augmentation import Colour, Mosaic, train_transforms
from simdetr.data.dataset import Batch, DetectionDataset, Sample, collate, item_randomness, item_seed
from simdetr.data.images import ImageSource
from simdetr.data.labels import Labels
from simdetr.data.storage import atomic_path, write_json
from simdetr.detectors.backbone import Backbone
from simdetr.detectors.detector import Level
from simdetr.exchange.weights import LoadedDetector
from simdetr.labelling.corrector_networks import (
    BoxCorrector,
    Boxes,
    Corrector,
    Kind,
    LevelReader,
    QueryCorrector,
    build_corrector,
    decoder_to_start_from,
    sizes_of_decoder,
)
from simdetr.training.detection_task import NonFiniteLossError
from simdetr.training.optimisation import adamw, lr_factor
from simdetr.training.progress import image_progress
from simdetr.training.relabel import InferenceSettings
from simdetr.training.run_folder import RunFolder

__all__ = [
    "BoxCorrector",
    "Corrections",
    "CorrectorFit",
    "FittedCorrector",
    "QueryCorrector",
    "correct_boxes",
    "fit_corrector",
    "jitter_boxes",
    "load_corrector",
]

LOG = logging.getLogger(__name__)
WEIGHTS_NAME, RECORD_NAME, RESUME_NAME = "corrector.safetensors", "corrector.json", "resume.ckpt"
Anchor = Literal["corner", "centre"]
_SCALES = (0.8, 0.9, 1.0, 1.1, 1.2)  # sizes of the training images, in those that the backbone is used with
_PUBLISHED_SIDES = {"short_side": 800, "max_side": 1333}
_BACKBONE_SIDES = {"short_side": 512, "max_side": 852}  # of a backbone on its own, in pixels
_LOGGED_EVERY = 20
_BOXES_AT_ONCE = 2048
MIN_GAIN = 0.25
"""Least gain of overlap for which a box is moved."""


def jitter_boxes(
    boxes_xyxy: Tensor,
    size_hw: tuple[int, int],
    count: int,
    generator: torch.Generator,
    *,
    alpha: float = 0.35,
    beta: float = 0.5,
    anchor: Anchor = "corner",
    min_iou: float = 0.3,
    gentle: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Boxes near given ones: shifted by up to ``alpha`` of a side, sides 1 - ``beta`` to 1 + ``beta`` times as long.

    The logarithm of the factor is uniform. Far from the image's borders 73.05 % of the draws overlap their box by more
    than 0.3 with the published anchor, 90.16 % with the centre.

    Args:
        boxes_xyxy: [T, 4] in pixels.
        size_hw: height and width of the image; results are cut to it.
        count: draws per box.
        generator: of all draws, on the CPU.
        alpha: largest shift, in sides of the box.
        beta: largest change of a side, below 1.
        anchor: what is shifted, and stays where it is when the sides change: the top left corner, as published, or the
            centre.
        min_iou: draws stay that overlap any of the boxes by more than this.
        gentle: share of draws whose shift and change are multiplied by a factor from 0 to 1, drawn too.

    Returns:
        Jittered boxes [N, 4], and the row int64 [N] of the box that each was drawn around, in ascending order.

    Raises:
        ValueError: numbers out of range, an unknown anchor.
    """
    if anchor not in ("corner", "centre"):
        raise ValueError(f"anchor: expected 'corner' or 'centre', got {anchor!r}")
    if count < 0 or alpha < 0 or not 0 <= beta < 1 or not 0 <= gentle <= 1 or not 0 <= min_iou < 1:
        raise ValueError(
            "count and alpha: expected at least 0, beta and min_iou: at least 0 and below 1, gentle: 0 to 1; got "
            f"{count=}, {alpha=}, {beta=}, {min_iou=}, {gentle=}"
        )
    rows = torch.arange(len(boxes_xyxy)).repeat_interleave(count)
    draws = torch.rand(len(rows), 6, generator=generator)
    damped = torch.where(draws[:, 4] < gentle, draws[:, 5], 1.0)[:, None]
    shift = (2 * draws[:, :2] - 1) * alpha * damped
    low, high = math.log(1 - beta), math.log(1 + beta)
    growth = torch.exp((low + (high - low) * draws[:, 2:4]) * damped)
    starts = boxes_xyxy.float().cpu()[rows]
    found = box_ops.clip(displaced(starts, shift, growth, anchor), size_hw)
    near = box_ops.pairwise_iou(found, boxes_xyxy.float().cpu())
    kept = near.amax(dim=1) > min_iou if near.numel() else torch.zeros(len(found), dtype=torch.bool)
    return found[kept].to(boxes_xyxy.device), rows[kept].to(boxes_xyxy.device)


def displaced(boxes_xyxy: Tensor, shift: Tensor, growth: Tensor, anchor: Anchor = "corner") -> Tensor:
    """Boxes [N, 4] shifted by parts [N, 2] of their sides, which become so many times [N, 2] as long; see above."""
    sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    corner = boxes_xyxy[:, :2] + shift * sides
    if anchor == "centre":
        corner = corner + 0.5 * sides * (1 - growth)
    return torch.cat([corner, corner + sides * growth], dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# Training.


@dataclass(frozen=True)
class CorrectorFit:
    """Training of a corrector.

    Args:
        kind: ``cascade`` (`BoxCorrector`) or ``queries`` (`QueryCorrector`).
        options: Arguments of the network.
        from_decoder: Let queries begin as the decoder of the detector, where that has two stages and three layers; they
            then have its sizes.
        zoom: Side of the images, in those that the detector is used with; larger ones show small objects better.
        steps: Optimiser steps.
        batch_size: Images per step.
        boxes_per_image: Most jittered boxes of an image; twice as many are drawn, as published.
        alpha: Of ``jitter_boxes``, as are the next three.
        extra_share: Part of each batch that comes from the extra labels, where there are any.
        extra_until: Part of the training in which they take part.
        lr: Highest learning rate of AdamW, reached after the warm-up, from where it falls as a cosine.
        decoder_lr: The same of what queries took over from a detector's decoder.
        weight_decay: Of all weights.
        warmup: Part of the training in which the learning rate rises.
        crop: Cut windows out of half of the images.
        colour: Strength of the colour changes.
        mosaic: Share of images that are composed of four.
        seed: Of new weights, order, augmentation and jitter.
        checkpoint_every_steps: Steps between two points that a killed training resumes from.
    """

    kind: Kind = "cascade"
    options: dict[str, Any] = field(default_factory=dict)
    from_decoder: bool = True
    zoom: float = 1.0
    steps: int = 80
    batch_size: int = 8
    boxes_per_image: int = 32
    alpha: float = 0.35
    beta: float = 0.5
    anchor: Anchor = "centre"
    gentle: float = 0.8
    extra_share: float = 0.5
    extra_until: float = 1.0
    lr: float = 1e-3
    decoder_lr: float = 2e-4
    weight_decay: float = 1e-4
    warmup: float = 0.05
    crop: bool = True
    colour: Colour | float = "light"
    mosaic: float = 0.0
    seed: int = 0
    checkpoint_every_steps: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "boxes_per_image", "checkpoint_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("extra_share", "extra_until", "mosaic"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {getattr(self, name)}")
        for name in ("lr", "decoder_lr", "zoom"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected above 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: expected 0 to below 1, got {self.warmup}")

    def settled(self) -> dict[str, Any]:
        """The settings that the weights depend on, as plain types."""
        return {name: value for name, value in asdict(self).items() if name != "checkpoint_every_steps"}


@dataclass(frozen=True)
class FittedCorrector:
    """A trained corrector, the maps it reads and how images are prepared for them.

    Attributes:
        network: The corrector, in evaluation mode.
        reader: Of the frozen backbone.
        image_settings: ``short_side``, ``max_side``, ``mean`` and ``std``.
        record: What ``corrector.json`` says.
    """

    network: Corrector
    reader: LevelReader
    image_settings: dict[str, Any]
    record: dict[str, Any]


def fit_corrector(
    features: LoadedDetector | Backbone,
    source: ImageSource,
    labels: Labels,
    out: str | Path,
    settings: CorrectorFit | None = None,
    *,
    extra: Labels | None = None,
    device: str = "cpu",
    num_workers: int = 0,
) -> FittedCorrector:
    """Train a corrector on labelled boxes; the same call resumes a killed one, or returns what is finished.

    Args:
        features: Whose maps are read; they stay as they are.
        source: The images.
        labels: Boxes to learn from; their classes do not matter, images without boxes and crowds are left out.
        out: Folder of ``corrector.safetensors`` and ``corrector.json``.
        settings: Of the network and its training.
        extra: More boxes, such as mined ones, that share the batches with those of ``labels``.
        device: Torch device.
        num_workers: Processes that read and augment images; 0 does it in between.

    Raises:
        ValueError: No boxes, or features that are not to be had.
        LabelError: A labelled image is not in the source.
        RunMismatchError: ``out`` holds a corrector with other settings, images, boxes or features.
        NonFiniteLossError: Training diverges.
    """
    settings = settings or CorrectorFit()
    run, reader, images = RunFolder(Path(out)), level_reader(features), image_settings_of(features)
    images |= {name: max(1, round(images[name] * settings.zoom)) for name in ("short_side", "max_side")}
    parts = [_boxed("labels", labels)] + ([] if extra is None else [_boxed("extra", extra)])
    facts = {
        "settings": settings.settled(),
        "image_settings": {name: list(v) if isinstance(v, tuple) else v for name, v in images.items()},
        "features": features_fingerprint(reader),
        "boxes": [boxes_fingerprint(part) for part in parts],
    }
    begun = (run.path / RESUME_NAME).is_file() or is_fitted(run.path)
    run.claim(yaml.safe_dump({"corrector": facts}, sort_keys=False), None if begun else ())
    if is_fitted(run.path):
        return load_corrector(run.path, features, device=device)
    network = _new_network(reader, settings)
    data = _TrainingData(source, parts, images, settings)
    with run.step("corrector fit", "boxes") as step:
        losses, step.count = _train(network.to(device), reader.to(device), data, settings, run.path, num_workers)
    network.eval()
    with atomic_path(run.path / WEIGHTS_NAME) as temporary:
        save_file({name: value.contiguous().cpu() for name, value in network.state_dict().items()}, temporary)
    versions = {name: importlib.metadata.version(name) for name in ("simdetr", "torch", "torchvision")}
    record = {**facts, "kind": settings.kind, "options": network.init_args, "losses": losses, "versions": versions}
    write_json(run.path / RECORD_NAME, record, indent=2)
    (run.path / RESUME_NAME).unlink(missing_ok=True)
    return FittedCorrector(network, reader, images, record)


def _new_network(reader: LevelReader, settings: CorrectorFit) -> Corrector:
    """The network before training: queries begin as the detector's decoder where that can be."""
    detector, options = decoder_to_start_from(reader), settings.options
    if settings.kind != "queries" or detector is None or not settings.from_decoder:
        detector = None
    else:
        options = sizes_of_decoder(detector) | options
    with item_randomness(settings.seed, 0, 0):
        network = build_corrector(settings.kind, reader, options)
    if isinstance(network, QueryCorrector) and detector is not None:
        if network.init_args != sizes_of_decoder(detector):
            raise ValueError(
                f"options: the detector's decoder is of other sizes, {sizes_of_decoder(detector)}; leave them out, or "
                "set from_decoder=False"
            )
        network.start_from(detector)
    return network


def is_fitted(folder: Path) -> bool:
    """Whether ``fit_corrector`` ended well in this folder: it writes the record last."""
    return (folder / WEIGHTS_NAME).is_file() and (folder / RECORD_NAME).is_file()


def load_corrector(folder: str | Path, features: LoadedDetector | Backbone, *, device: str = "cpu") -> FittedCorrector:
    """The corrector that ``fit_corrector`` left in a folder.

    Args:
        folder: Where it is.
        features: The detector or backbone that it was trained on.
        device: Torch device.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It was trained on the features of other weights.
    """
    folder = Path(folder)
    if not is_fitted(folder):
        raise FileNotFoundError(f"corrector: expected {WEIGHTS_NAME} and {RECORD_NAME} in {folder}; fit one first")
    record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    reader = level_reader(features)
    if features_fingerprint(reader) != record["features"]:
        raise ValueError(
            f"features: {folder} holds a corrector that reads the maps of other weights; give the detector that it was "
            "trained on, or fit a corrector for this one"
        )
    network = build_corrector(record["kind"], reader, record["options"])
    network.load_state_dict(load_file(folder / WEIGHTS_NAME))
    return FittedCorrector(network.to(device).eval(), reader.to(device), dict(record["image_settings"]), record)


def level_reader(features: LoadedDetector | Backbone) -> LevelReader:
    """The maps of a loaded detector or a backbone."""
    return LevelReader(features.detector if isinstance(features, LoadedDetector) else features)


def image_settings_of(features: LoadedDetector | Backbone) -> dict[str, Any]:
    """How images are prepared: as the detector's, or at a short side of 512 px for a backbone on its own."""
    if isinstance(features, LoadedDetector):
        return {**_PUBLISHED_SIDES, **features.detector.normalisation, **features.image_settings}
    return {**_BACKBONE_SIDES, "mean": features.colour_mean, "std": features.colour_std}


def features_fingerprint(reader: LevelReader) -> str:
    """SHA-256 of the weights that the maps depend on."""
    digest = hashlib.sha256()
    for name, value in sorted(reader.network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def boxes_fingerprint(labels: Labels) -> str:
    """SHA-256 of images and boxes."""
    digest = hashlib.sha256("\0".join(labels.image_ids).encode())
    digest.update(labels.offsets.tobytes())
    digest.update(labels.boxes_xyxy.tobytes())
    return digest.hexdigest()


def _boxed(name: str, labels: Labels) -> Labels:
    """The images that have a box to learn from."""
    good = box_ops.has_area(torch.from_numpy(labels.boxes_xyxy)).numpy() & ~labels.crowd
    owners = np.repeat(np.arange(len(labels)), np.diff(labels.offsets))
    images = np.unique(owners[good])
    if not len(images):
        raise ValueError(
            f"{name}: expected at least one box with an area that is no crowd, got none; label some images"
        )
    return labels.select(labels.image_ids[i] for i in images)


class _TrainingData(Dataset[Sample | None]):
    """Samples by (part, number of the draw): each pass over a part has an order and an augmentation of its own."""

    def __init__(
        self, source: ImageSource, parts: Sequence[Labels], images: Mapping[str, Any], settings: CorrectorFit
    ) -> None:
        transform = train_transforms(
            [max(1, round(images["short_side"] * scale)) for scale in _SCALES],
            round(images["max_side"] * max(_SCALES)),
            crop=settings.crop,
            colour=settings.colour,
            mean=images["mean"],
            std=images["std"],
        )
        self.settings = settings
        self.parts: list[DetectionDataset | Mosaic] = []
        for index, part in enumerate(parts):
            seed = item_seed(settings.seed, index, 0)
            own = DetectionDataset(source, part, transform, replace_unreadable=True, seed=seed)
            self.parts.append(Mosaic(own, settings.mosaic) if settings.mosaic > 0 else own)

    def draws(self, first_step: int) -> Iterator[list[tuple[int, int]]]:
        """What each step reads, from one on."""
        settings, extra = self.settings, 0
        if len(self.parts) > 1:
            extra = round(settings.extra_share * settings.batch_size)
        done = [0, 0]
        for step in range(settings.steps):
            joined = extra if step < settings.extra_until * settings.steps else 0
            counts = (settings.batch_size - joined, joined)
            if step >= first_step:
                yield [(part, done[part] + i) for part, count in enumerate(counts) for i in range(count)]
            done = [before + count for before, count in zip(done, counts, strict=True)]

    def __getitem__(self, draw: tuple[int, int]) -> Sample | None:
        part, number = draw
        data = self.parts[part]
        turn, place = divmod(number, len(data))
        generator = torch.Generator().manual_seed(item_seed(self.settings.seed, turn, part))
        data.set_epoch(turn)
        return data[int(torch.randperm(len(data), generator=generator)[place])]


def _train(
    network: Corrector, reader: LevelReader, data: _TrainingData, settings: CorrectorFit, folder: Path, num_workers: int
) -> tuple[list[dict[str, float]], int]:
    """Train from where a killed training stopped; rows of mean losses, and the number of boxes seen."""
    resume = folder / RESUME_NAME
    slow = {id(parameter) for parameter in network.learnt_parameters()}
    own = list(network.parameters())
    rates = (
        (settings.lr, [parameter for parameter in own if id(parameter) not in slow]),
        (settings.decoder_lr, [parameter for parameter in own if id(parameter) in slow]),
    )
    groups = [{"params": members, "lr": lr, "initial_lr": lr} for lr, members in rates if members]
    optimiser = adamw(groups, settings.lr, settings.weight_decay)
    factor = lr_factor("cosine", settings.steps, warmup_steps=int(settings.warmup * settings.steps))
    device = next(network.parameters()).device
    state: dict[str, Any] = {"step": 0, "boxes": 0, "losses": [], "sums": {}}
    if resume.is_file():
        state = torch.load(resume, map_location=device, weights_only=True)
        network.load_state_dict(state.pop("network"))
        optimiser.load_state_dict(state.pop("optimiser"))
    sampler = list(data.draws(state["step"]))
    # a generator of its own: the loader draws from torch's default one else
    loader = DataLoader(
        data, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers, generator=torch.Generator()
    )
    network.train()
    with image_progress("corrector fit", len(sampler) * settings.batch_size) as progress:
        for batch in loader:
            step = state["step"]
            for group in optimiser.param_groups:
                group["lr"] = group["initial_lr"] * factor(step)
            terms = _losses(network, reader, batch, settings, step, device)
            if not torch.isfinite(terms["loss"]):
                raise NonFiniteLossError(
                    f"the loss became NaN or infinite at step {step}. Lower lr (now {settings.lr}), then repeat the "
                    "call in a new folder."
                )
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(terms["loss"])
            optimiser.step()
            state["step"], state["boxes"] = step + 1, state["boxes"] + int(terms.pop("boxes"))
            sums = state["sums"]
            state["sums"] = {name: sums.get(name, 0.0) + float(value.detach()) for name, value in terms.items()}
            if state["step"] % _LOGGED_EVERY == 0:
                means = {name: round(value / _LOGGED_EVERY, 5) for name, value in state["sums"].items()}
                state["losses"].append({"step": state["step"], **means})
                state["sums"] = {}
            if state["step"] % settings.checkpoint_every_steps == 0:
                with atomic_path(resume) as temporary:
                    kept = {"network": network.state_dict(), "optimiser": optimiser.state_dict()}
                    torch.save({**state, **kept}, temporary)
            progress(settings.batch_size)
    return state["losses"], state["boxes"]


def _losses(
    network: Corrector, reader: LevelReader, batch: Batch, settings: CorrectorFit, step: int, device: torch.device
) -> dict[str, Tensor]:
    """Losses of a step, and the number of its boxes."""
    truth, shaken, image = [], [], []
    sizes = torch.stack([target["size"] for target in batch.targets])
    for row, target in enumerate(batch.targets):
        size_hw = (int(sizes[row, 0]), int(sizes[row, 1]))
        boxes = box_ops.denormalise(target["boxes"], size_hw)
        generator = torch.Generator().manual_seed(item_seed(settings.seed, step, row))
        count = math.ceil(2 * settings.boxes_per_image / max(1, len(boxes)))
        own, _ = jitter_boxes(
            boxes,
            size_hw,
            count,
            generator,
            alpha=settings.alpha,
            beta=settings.beta,
            anchor=settings.anchor,
            gentle=settings.gentle,
        )
        own = own[torch.randperm(len(own), generator=generator)[: settings.boxes_per_image]]
        truth.append(boxes.to(device))
        shaken.append(own)
        image.append(torch.full((len(own),), row))
    boxes_in = Boxes(torch.cat(shaken).to(device), torch.cat(image).to(device), sizes.to(device))
    levels = reader(batch.images.to(device), batch.mask.to(device))
    return {**network.losses(levels, boxes_in, truth), "boxes": torch.tensor(len(boxes_in.xyxy))}


# ----------------------------------------------------------------------------------------------------------------------
# Correction.


@dataclass(frozen=True)
class Corrections:
    """What a corrector makes of the M boxes of some labels, row by row.

    Attributes:
        boxes_xyxy: float32 [M, 4] in pixels of the originals; the box as it was where ``uncorrected``.
        uncorrected: bool [M], boxes without a usable result: empty ones, results that are not finite or empty, images
            that cannot be read.
        refused: bool [M], boxes that stay as they were because too little was to be gained.
        shift_iou: float32 [M], overlap of the box before with the network's; 1 where ``uncorrected``.
        gain: float32 [M], by how much the network's box is thought to overlap the object more; 0 where ``uncorrected``.
    """

    boxes_xyxy: NDArray[np.float32]
    uncorrected: NDArray[np.bool_]
    refused: NDArray[np.bool_]
    shift_iou: NDArray[np.float32]
    gain: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.boxes_xyxy)

    def applied(self, labels: Labels) -> Labels:
        """The labels with the boxes after correction; masks, which would not fit them, are left out."""
        sides = self.boxes_xyxy[:, 2:] - self.boxes_xyxy[:, :2]
        areas = np.where(self.uncorrected | self.refused, labels.areas, sides.prod(axis=1))
        return replace(labels, boxes_xyxy=self.boxes_xyxy, areas=areas, masks=None)


@torch.inference_mode()
def correct_boxes(
    corrector: FittedCorrector,
    source: ImageSource,
    labels: Labels,
    *,
    device: str = "cpu",
    batch_size: int = 8,
    min_gain: float = MIN_GAIN,
) -> Corrections:
    """Correct every box of some labels, a batch of images at a time.

    A corrector that has seen few boxes makes good ones worse. So it also judges how well a box fits, before and after,
    and corrections that gain too little are refused. This is a departure: the published corrector moves every box.

    Args:
        corrector: As ``fit_corrector`` or ``load_corrector`` give it.
        source: The images; it may hold more than the labels.
        labels: Boxes in pixels of the upright originals.
        device: Torch device.
        batch_size: Images at a time.
        min_gain: Corrections that are judged to gain less overlap than this are refused; -1 takes all.

    Raises:
        LabelError: A labelled image is not in the source.
    """
    network, reader = corrector.network.to(device).eval(), corrector.reader.to(device)
    before = torch.from_numpy(labels.boxes_xyxy)
    after, good = before.clone(), torch.zeros(len(before), dtype=torch.bool)
    gain = torch.zeros(len(before))
    counts = np.diff(labels.offsets)
    images = np.flatnonzero(counts)
    names = ("short_side", "max_side", "mean", "std")
    settings = InferenceSettings(**{name: corrector.image_settings[name] for name in names})
    boxed = labels.select(labels.image_ids[i] for i in images)
    dataset = DetectionDataset(source, boxed, settings.transform())
    loader = DataLoader(dataset, batch_size, collate_fn=collate, generator=torch.Generator())
    with image_progress("correcting boxes", len(images)) as progress:
        for number, batch in enumerate(loader):
            progress(min(batch_size, len(images) - number * batch_size))
            if batch is None:
                continue
            levels = reader(batch.images.to(device), batch.mask.to(device))
            owners = images[[int(target["image_index"]) for target in batch.targets]]
            rows = torch.cat([torch.arange(int(labels.offsets[i]), int(labels.offsets[i + 1])) for i in owners])
            image = torch.arange(len(owners)).repeat_interleave(torch.from_numpy(counts[owners]))
            sizes, originals = (
                torch.stack([target[name] for target in batch.targets]) for name in ("size", "orig_size")
            )
            scales = (sizes / originals).flip(1).repeat(1, 2)
            starts = (before[rows] * scales[image]).to(device)
            moved, gained = _moved(network, levels, Boxes(starts, image.to(device), sizes.to(device)))
            found = moved.cpu() / scales[image]
            usable = box_ops.has_area(found) & box_ops.has_area(before[rows])
            kept = rows[usable]
            after[kept], good[kept], gain[kept] = found[usable], True, gained.cpu()[usable]
    shift = torch.where(good, box_ops.paired_iou(before, after).nan_to_num(1.0), 1.0)
    refused = good & ~(gain >= min_gain)
    after = torch.where(refused[:, None], before, after)
    return Corrections(after.numpy(), ~good.numpy(), refused.numpy(), shift.numpy(), gain.numpy())


def _moved(network: Corrector, levels: Sequence[Level], boxes: Boxes) -> tuple[Tensor, Tensor]:
    """Boxes [R, 4] after correction and what each is judged to gain [R]; a portion at a time, for memory's sake."""
    moved, gains = [], []
    for first in range(0, len(boxes.xyxy), _BOXES_AT_ONCE):
        part = slice(first, first + _BOXES_AT_ONCE)
        before = Boxes(boxes.xyxy[part], boxes.image[part], boxes.sizes_hw)
        after = before._replace(xyxy=before.clipped(network(levels, before)[-1]))
        judged = [network.overlap_logits(levels, each).sigmoid() for each in (before, after)]
        moved.append(after.xyxy)
        gains.append(judged[1] - judged[0])
    return torch.cat(moved), torch.cat(gains)

"""Detections of a detector over a set of images: the labels of the next stage, or predictions for a user.

In: a detector and an ImageSource. Out: ``Labels`` with scores. Long runs write their images part by part, and the
same call goes on where it stopped. Source: seed 003 [0040]: every query's best class is kept whatever its
confidence; of two boxes with IoU above 0.55 the more confident stays.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from simdetr import boxes as box_ops
from simdetr.data import masks as mask_codes
from simdetr.data.dataset import DetectionDataset, collate, pixel_boxes
from simdetr.data.images import ImageSource
from simdetr.data.labels import Category, ImageLabels, Labels, read_labels, write_labels
from simdetr.data.quarantine import Quarantine
from simdetr.data.transforms import eval_transforms
from simdetr.detectors.mask_vectors import decode_masks, portions
from simdetr.detectors.point_predictions import merge_points
from simdetr.machine import default_workers
from simdetr.training.inheritance import inherit

LOG = logging.getLogger(__name__)
Progress = Callable[[int], None]
PART_SIZE = 1024
"""Images per part of a resumable run."""


Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Throughput:
    """How fast images go through a trained detector; what is not set follows from the machine.

    Args:
        batch_size: Images per forward pass; 16 on a GPU, else 8.
        num_workers: Processes that decode images; on a GPU the cores of this process but one, at most 8 and no more
            than there are batches to read ahead; on a CPU none.
        precision: Of the forward pass. The default does not depend on the machine, so that results do not either; bf16
            halves the time on GPUs that have it, and moves boxes by a fraction of a pixel.
    """

    batch_size: int | None = None
    num_workers: int | None = None
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {self.batch_size}")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers: expected 0 or more, got {self.num_workers}")

    def on(self, device: str, num_images: int) -> dict[str, Any]:
        """The choices for so many images on a device, as ``InferenceSettings.of`` takes them."""
        batch_size = self.batch_size or (8 if torch.device(device).type == "cpu" else 16)
        num_workers = self.num_workers
        if num_workers is None:
            num_workers = min(default_workers(device), -(-num_images // batch_size) - 1)
        return {
            "device": device,
            "batch_size": batch_size,
            "num_workers": max(0, num_workers),
            "precision": self.precision,
        }


OF_THE_MACHINE = Throughput()


@dataclass(frozen=True)
class InferenceSettings:
    """How images are prepared and detections are kept.

    Args:
        short_side: Shorter side in pixels.
        max_side: Longest side in pixels.
        mean: Channel means of the normalisation.
        std: Channel deviations of the normalisation.
        iou_threshold: Overlap above which the less confident box goes; 1 keeps all.
        score_threshold: Boxes below it go; 0 keeps all, as self-training wants.
        max_boxes: Most confident boxes kept per image.
        batch_size: Images per forward pass.
        num_workers: Decoding processes.
        device: Torch device.
        precision: Of the forward pass.
        masks: Draw each object's mask too, with detectors that predict its vector.
        point_radius: Landmarks of one class closer than this part of the image's diagonal are one; 0 keeps all.
    """

    short_side: int
    max_side: int
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    iou_threshold: float = 1.0
    score_threshold: float = 0.0
    max_boxes: int = 100
    batch_size: int = 8
    num_workers: int = 0
    device: str = "cpu"
    precision: Precision = "fp32"
    masks: bool = False
    point_radius: float = 0.03

    @classmethod
    def of(cls, image_settings: Mapping[str, Any], **choices: Any) -> InferenceSettings:  # noqa: ANN401
        """The settings a detector was saved with, and the choices of this run."""
        return cls(**{**image_settings, **choices})

    def autocast(self) -> torch.autocast:
        """A block in which the network computes in this precision."""
        half = self.precision == "bf16"
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=half)


def relabel(
    detector: nn.Module,
    source: ImageSource,
    categories: tuple[Category, ...],
    settings: InferenceSettings,
    out: Path,
    *,
    stage: int,
    before: Labels | None = None,
    progress: Progress = lambda count: None,
) -> Labels:
    """Label every readable image with the detector and write ``out`` (Parquet); resumes part by part.

    Unreadable images go to ``quarantine.csv`` beside ``out``. Boxes get the lineage of those of ``before``, the labels
    that the detector was trained on. ``progress`` hears of every batch of images done.
    """
    parts = out.with_suffix(".parts")
    quarantine = Quarantine(out.with_name("quarantine.csv"), total=len(source))
    names = []
    for start in range(0, len(source), PART_SIZE):
        ids = source.ids[start : start + PART_SIZE]
        part = parts / f"part-{start // PART_SIZE:05d}.parquet"
        names.append(part)
        if part.is_file():
            progress(len(ids))
            continue
        labels = detect(
            detector, source.subset(ids), categories, settings, stage=stage, quarantine=quarantine, progress=progress
        )
        write_labels(labels, part)
    done = [read_labels(name) for name in names]
    rows = (part.image(i) for part in done for i in range(len(part)))
    labels = Labels.from_images(rows, categories, stage)
    if before is not None:
        labels = inherit(labels, before)
    write_labels(labels, out)
    shutil.rmtree(parts)
    if len(quarantine):
        LOG.warning("%d of %d images are unreadable, see %s", len(quarantine), len(source), quarantine.path)
    return labels


def detect(
    detector: nn.Module,
    source: ImageSource,
    categories: tuple[Category, ...],
    settings: InferenceSettings,
    *,
    stage: int = -1,
    quarantine: Quarantine | None = None,
    progress: Progress = lambda count: None,
) -> Labels:
    """Detections on every readable image, best first, in pixels of the upright original."""
    return Labels.from_images(detections(detector, source, settings, quarantine, progress), categories, stage)


@torch.inference_mode()
def detect_array(
    detector: nn.Module, image: Tensor, categories: tuple[Category, ...], settings: InferenceSettings
) -> Labels:
    """Detections on one image in memory, uint8 [3, H, W] RGB; its id is ``image``.

    Raises:
        ValueError: The array is of another type or shape.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"images: expected a uint8 array [3, H, W] in RGB, got {image.dtype} {tuple(image.shape)}; "
            "transpose [H, W, 3] with .permute(2, 0, 1), and BGR with .flip(0)."
        )
    size_hw = (image.shape[1], image.shape[2])
    transform = eval_transforms(settings.short_side, settings.max_side, mean=settings.mean, std=settings.std)
    target = {"boxes": pixel_boxes(torch.zeros(0, 4), size_hw), "labels": torch.zeros(0, dtype=torch.int64)}
    pixels, _ = transform(tv_tensors.Image(image), target)
    pixels = pixels[None].to(settings.device)
    with settings.autocast():
        outputs = detector.to(settings.device).eval()(pixels, torch.zeros_like(pixels[:, 0], dtype=torch.bool))
    return Labels.from_images([_image_labels("image", size_hw, _of_image(outputs, 0, settings), settings)], categories)


@torch.inference_mode()
def detections(
    detector: nn.Module,
    source: ImageSource,
    settings: InferenceSettings,
    quarantine: Quarantine | None = None,
    progress: Progress = lambda count: None,
) -> Iterator[ImageLabels]:
    """Detections image by image, in the order of the source, without the unreadable ones."""
    transform = eval_transforms(settings.short_side, settings.max_side, mean=settings.mean, std=settings.std)
    dataset = DetectionDataset(source, None, transform, quarantine=quarantine)
    loader = DataLoader(dataset, settings.batch_size, collate_fn=collate, num_workers=settings.num_workers)
    detector = detector.to(settings.device).eval()
    for index, batch in enumerate(loader):
        progress(min(settings.batch_size, len(source) - index * settings.batch_size))
        if batch is None:
            continue
        with settings.autocast():
            outputs = detector(batch.images.to(settings.device), batch.mask.to(settings.device))
        for row, target in enumerate(batch.targets):
            height, width = (int(side) for side in target["orig_size"])
            image_id = source.ids[int(target["image_index"])]
            yield _image_labels(image_id, (height, width), _of_image(outputs, row, settings), settings)


def _of_image(outputs: Mapping[str, Any], row: int, settings: InferenceSettings) -> dict[str, Tensor]:
    """The queries of one image: ``pred_boxes`` [Q, 4], ``pred_logits`` [Q, K], ``pred_vectors`` [Q, D] for masks.

    Those of landmark heads have ``pred_points`` [Q, 2] too, and their own ``point_logits`` in place of the detector's.

    Raises:
        ValueError: Masks are asked for and the detector draws none.
    """
    if settings.masks and "pred_vectors" not in outputs:
        raise ValueError("masks: this detector draws no masks; leave it out, or train ViDT with mask_vectors: true")
    names = ["pred_boxes", *(["pred_vectors"] if settings.masks else [])]
    if "pred_points" in outputs:
        names.append("pred_points")
    logits = outputs.get("point_logits", outputs["pred_logits"])
    return {"pred_logits": logits[row], **{name: outputs[name][row] for name in names}}


def _image_labels(
    image_id: str, size_hw: tuple[int, int], queries: Mapping[str, Tensor], settings: InferenceSettings
) -> ImageLabels:
    """Best class of every query, its mask if asked for and its point if it has one, as labels in pixels."""
    scores, classes = queries["pred_logits"].float().sigmoid().max(dim=-1)
    whole = box_ops.denormalise(queries["pred_boxes"].float(), size_hw)
    boxes = box_ops.clip(whole, size_hw)
    points = None
    if "pred_points" in queries:
        pixels = box_ops.denormalise_points(queries["pred_points"].float(), size_hw)
        kept, merged = keep_points(pixels, classes, scores, size_hw, settings)
        points = merged.cpu().numpy()
    else:
        kept = keep_boxes(boxes, scores, settings)
    columns = (column[kept].cpu().numpy() for column in (boxes, classes, scores))
    masks = _draw_masks(queries["pred_vectors"][kept], whole[kept], size_hw) if settings.masks else None
    return ImageLabels.build(image_id, size_hw, *columns, masks=masks, points=points)


def _draw_masks(vectors: Tensor, boxes_xyxy: Tensor, size_hw: tuple[int, int]) -> mask_codes.Masks:
    """Run lengths of the masks of vectors [N, D] in boxes [N, 4], a few at a time: pixels are N · H · W bytes."""
    codes = mask_codes.column([])
    for part in portions(len(vectors), *size_hw):
        pixels = decode_masks(vectors[part], boxes_xyxy[part], size_hw)
        codes = np.concatenate([codes, mask_codes.encode(pixels.cpu().numpy())])
    return codes


def keep_boxes(boxes_xyxy: Tensor, scores: Tensor, settings: InferenceSettings) -> Tensor:
    """Indices of the boxes to keep, best first: with area, above the threshold, not overlapping, at most max_boxes."""
    usable = torch.nonzero(box_ops.has_area(boxes_xyxy) & (scores >= settings.score_threshold)).flatten()
    kept = box_ops.suppress_overlaps(boxes_xyxy[usable], scores[usable], settings.iou_threshold)
    return usable[kept[: settings.max_boxes]]


def keep_points(
    points: Tensor, classes: Tensor, scores: Tensor, size_hw: tuple[int, int], settings: InferenceSettings
) -> tuple[Tensor, Tensor]:
    """Indices of the landmarks to keep, best first, and their points [M, 2]; close ones of a class become one.

    Args:
        points: [N, 2] in pixels.
        classes: [N].
        scores: [N]; 0 is none.
        size_hw: Height and width of the image in pixels.
        settings: Threshold, radius and largest number.
    """
    usable = torch.nonzero((scores >= settings.score_threshold) & (scores > 0)).flatten()
    radius = settings.point_radius * math.hypot(*size_hw)
    kept, merged = merge_points(points[usable], classes[usable], scores[usable], radius)
    return usable[kept[: settings.max_boxes]], merged[: settings.max_boxes]

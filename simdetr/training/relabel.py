"""Detections of a detector over a set of images: the labels of the next stage, or predictions for a user.

In: a detector and an ImageSource. Out: ``Labels`` with scores. Long runs write their images part by part, and the
same call goes on where it stopped. Self-training keeps every query's best class whatever its confidence, and of two
boxes with IoU above 0.55 the more confident; predictions and scores are the best pairs of query and class, as COCO's.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from simdetr import boxes as box_ops
from simdetr.data import masks as mask_codes
from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.augmentation import eval_transforms
from simdetr.data.dataset import DetectionDataset, collate, pixel_boxes
from simdetr.data.images import ImageSource
from simdetr.data.label_files import read_labels, write_labels
from simdetr.data.labels import Labels
from simdetr.data.quarantine import Quarantine
from simdetr.data.storage import write_json
from simdetr.detectors.mask_vectors import decode_masks, portions
from simdetr.detectors.predictions import Detections, best_per_query, postprocess
from simdetr.evaluation.class_agreement import class_agreement
from simdetr.exchange.weights import LoadedDetector
from simdetr.training.fusion import Fusion, fuse, inherit
from simdetr.training.progress import image_progress
from simdetr.training.throughput import Precision

LOG = logging.getLogger(__name__)
Progress = Callable[[int], None]
Reading = Callable[..., list[Detections]]
"""How a batch's outputs are read: ``postprocess`` for scores and users, ``best_per_query`` for self-training."""
PART_SIZE = 1024
"""Images per part of a resumable run."""
AGREEMENT = "agreement.json"
"""Beside the labels of a stage: what its detector says of those that it was trained on."""


@dataclass(frozen=True)
class InferenceSettings:
    """How images are prepared and detections are kept.

    Args:
        short_side: Shorter side in pixels; ``max_side`` is the longest.
        mean: Channel means of the normalisation; ``std`` are the deviations.
        iou_threshold: Overlap above which the less confident box goes, of one class, or of any where each query has
            one class; 1 keeps all.
        score_threshold: Boxes below it go; 0 keeps all, as self-training wants.
        max_boxes: Most confident boxes kept per image.
        batch_size: Images per forward pass; this and the next three as in ``Throughput``.
        masks: Draw each object's mask too, with detectors that predict its vector.
        point_radius: Of landmarks of one class closer than this part of the image's diagonal the less confident go; 0
            keeps all, None those that are no duplicates of a grid's.
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
    point_radius: float | None = None

    @classmethod
    def of(cls, image_settings: Mapping[str, Any], **choices: Any) -> InferenceSettings:  # noqa: ANN401
        """The settings a detector was saved with, and the choices of this run."""
        return cls(**{**image_settings, **choices})

    def prepared(self, source: ImageSource, quarantine: Quarantine | None = None) -> DataLoader[Any]:
        """Batches of images, in order; None in place of one of which no image can be read."""
        dataset = DetectionDataset(source, None, self.transform(), quarantine=quarantine)
        return DataLoader(dataset, self.batch_size, collate_fn=collate, num_workers=self.num_workers)

    def transform(self) -> nn.Module:
        """Image and target as read -> as the detector wants them."""
        return eval_transforms(self.short_side, self.max_side, mean=self.mean, std=self.std)

    def autocast(self) -> torch.autocast:
        """A block in which the network computes in this precision."""
        half = self.precision == "bf16"
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=half)


def relabel(
    loaded: LoadedDetector,
    source: ImageSource,
    settings: InferenceSettings,
    out: Path,
    *,
    stage: int,
    before: Labels | None = None,
    fusion: Fusion | None = None,
    min_certainty: float = 0.0,
    max_unreadable: float = 0.05,
) -> Labels:
    """Label every readable image with the detector and write ``out`` (Parquet); resumes part by part.

    Unreadable images go to ``quarantine.csv`` beside ``out``; more than ``max_unreadable`` of all stop it. Boxes
    get the lineage of those of ``before``, the labels that the detector was trained on; with a ``fusion`` both speak
    for the labels, see ``simdetr.training.fusion``. How well the detector knows their classes is kept beside ``out``,
    in ``agreement.json``; of ``before`` it was trained on boxes that are at least so certain.
    """
    parts = out.with_suffix(".parts")
    quarantine = Quarantine(out.with_name("quarantine.csv"), len(source), max_unreadable)
    names = []
    with image_progress("relabelling", len(source)) as progress:
        for start in range(0, len(source), PART_SIZE):
            ids = source.ids[start : start + PART_SIZE]
            part = parts / f"part-{start // PART_SIZE:05d}.parquet"
            names.append(part)
            if part.is_file():
                progress(len(ids))
                continue
            labels = detect(
                loaded.detector,
                source.subset(ids),
                loaded.categories,
                settings,
                reading=best_per_query,
                stage=stage,
                quarantine=quarantine,
                progress=progress,
            )
            write_labels(labels, part)
    rows = (part.image(i) for part in map(read_labels, names) for i in range(len(part)))
    labels = Labels.from_images(rows, loaded.categories, stage)
    if before is not None:
        agreement = class_agreement(before.sharpened(min_certainty, 1.0), labels)
        LOG.info("stage %d: %s", stage, agreement.summary())
        numbers = {"accuracy": agreement.accuracy, "proposals_per_image": agreement.proposals_per_image}
        write_json(out.with_name(AGREEMENT), {**numbers, **asdict(agreement)}, indent=1)
    if before is not None and fusion is not None:
        labels = fuse(labels, before, fusion, max_boxes=settings.max_boxes)
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
    reading: Reading = postprocess,
    stage: int = -1,
    quarantine: Quarantine | None = None,
    progress: Progress = lambda count: None,
) -> Labels:
    """Detections on every readable image, best first, in pixels of the upright original."""
    rows = detections(detector, source, settings, (reading,), quarantine, progress)
    return Labels.from_images((row for (row,) in rows), categories, stage)


def detect_for_scoring(
    detector: nn.Module,
    source: ImageSource,
    categories: tuple[Category, ...],
    settings: InferenceSettings,
    *,
    progress: Progress = lambda count: None,
) -> tuple[Labels, Labels]:
    """Both readings of every readable image, of one forward pass: pairs of query and class, and each query once."""
    rows = list(detections(detector, source, settings, (postprocess, best_per_query), None, progress))
    found, objects = (Labels.from_images((row[index] for row in rows), categories) for index in range(2))
    return found, objects


@torch.inference_mode()
def detect_array(
    detector: nn.Module,
    image: Tensor,
    categories: tuple[Category, ...],
    settings: InferenceSettings,
    *,
    reading: Reading = postprocess,
) -> Labels:
    """Detections on one image in memory, uint8 [3, H, W] RGB, else a ValueError; its id is ``image``."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"images: expected a uint8 array [3, H, W] in RGB, got {image.dtype} {tuple(image.shape)}; "
            "transpose [H, W, 3] with .permute(2, 0, 1), and BGR with .flip(0)."
        )
    size_hw = (image.shape[1], image.shape[2])
    target = {"boxes": pixel_boxes(torch.zeros(0, 4), size_hw), "labels": torch.zeros(0, dtype=torch.int64)}
    pixels, _ = settings.transform()(tv_tensors.Image(image), target)
    pixels = pixels[None].to(settings.device)
    with settings.autocast():
        outputs = detector.to(settings.device).eval()(pixels, torch.zeros_like(pixels[:, 0], dtype=torch.bool))
    return Labels.from_images(_image_labels(["image"], [size_hw], outputs, settings, reading), categories)


@torch.inference_mode()
def detections(
    detector: nn.Module,
    source: ImageSource,
    settings: InferenceSettings,
    readings: Sequence[Reading] = (postprocess,),
    quarantine: Quarantine | None = None,
    progress: Progress = lambda count: None,
) -> Iterator[tuple[ImageLabels, ...]]:
    """Each reading's detections image by image, in the order of the source, without the unreadable ones."""
    detector = detector.to(settings.device).eval()
    for index, batch in enumerate(settings.prepared(source, quarantine)):
        progress(min(settings.batch_size, len(source) - index * settings.batch_size))
        if batch is None:
            continue
        with settings.autocast():
            outputs = detector(batch.images.to(settings.device), batch.mask.to(settings.device))
        ids = [source.ids[int(target["image_index"])] for target in batch.targets]
        sizes = [(int(target["orig_size"][0]), int(target["orig_size"][1])) for target in batch.targets]
        yield from zip(*(_image_labels(ids, sizes, outputs, settings, reading) for reading in readings), strict=True)


def _image_labels(
    image_ids: Sequence[str],
    sizes_hw: Sequence[tuple[int, int]],
    outputs: Mapping[str, Any],
    settings: InferenceSettings,
    reading: Reading,
) -> list[ImageLabels]:
    """What a reading keeps of a batch's outputs, as labels in pixels, with masks if asked for."""
    if settings.masks and "pred_vectors" not in outputs:
        raise ValueError("masks: this detector draws no masks; leave it out, or train ViDT with mask_vectors: true")
    batch = reading(
        outputs,
        sizes_hw,
        settings.max_boxes,
        min_score=settings.score_threshold,
        iou_threshold=settings.iou_threshold,
        point_radius=settings.point_radius,
    )
    labels = []
    for row, (image_id, size_hw, found) in enumerate(zip(image_ids, sizes_hw, batch, strict=True)):
        masks = None
        if settings.masks:
            vectors, boxes = (outputs[name][row, found["queries"]] for name in ("pred_vectors", "pred_boxes"))
            masks = _draw_masks(vectors, box_ops.denormalise(boxes.float(), size_hw), size_hw)
        labels.append(as_image_labels(image_id, size_hw, found, masks))
    return labels


def as_image_labels(
    image_id: str, size_hw: tuple[int, int], found: Detections, masks: mask_codes.Masks | None = None
) -> ImageLabels:
    """The detections on one image as labels."""
    columns = (found[name].float().cpu().numpy() for name in ("boxes_xyxy", "labels", "scores"))
    points = found["points"].float().cpu().numpy() if "points" in found else None
    return ImageLabels.build(image_id, size_hw, *columns, masks=masks, points=points)


def _draw_masks(vectors: Tensor, boxes_xyxy: Tensor, size_hw: tuple[int, int]) -> mask_codes.Masks:
    """Run lengths of the masks of vectors [N, D] in boxes [N, 4], a few at a time: pixels are N · H · W bytes."""
    codes = mask_codes.column([])
    for part in portions(len(vectors), *size_hw):
        pixels = decode_masks(vectors[part], boxes_xyxy[part], size_hw)
        codes = np.concatenate([codes, mask_codes.encode(pixels.cpu().numpy())])
    return codes

"""A trained detector at work: images in, detections or COCO's numbers out."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from simdetr.data.images import ImageSource, open_images
from simdetr.data.labels import Labels, read_labels
from simdetr.data.quarantine import Quarantine
from simdetr.data.reference_points import ReferencePoints, with_reference_points
from simdetr.detectors.predictions import best_per_query, postprocess
from simdetr.evaluation.coco_metric import coco_metrics
from simdetr.evaluation.point_metric import point_metrics
from simdetr.evaluation.proposal_recall import proposal_recall
from simdetr.heads.localisation_results import localisation_head, localisation_scores, write_heat_maps
from simdetr.training.progress import image_progress
from simdetr.training.relabel import (
    OF_THE_MACHINE,
    InferenceSettings,
    Throughput,
    detect,
    detect_array,
    detect_for_scoring,
)
from simdetr.training.run_folder import detector_folder
from simdetr.training.weights import LoadedDetector, load_detector

LOG = logging.getLogger(__name__)


def predict(
    images: str | Path | ImageSource | torch.Tensor | NDArray[np.uint8],
    checkpoint: str | Path,
    *,
    min_score: float = 0.0,
    iou_threshold: float = 1.0,
    max_boxes: int = 100,
    device: str | None = None,
    quarantine: Path | None = None,
    masks: bool = False,
    point_radius: float | None = None,
    one_class: bool = False,
    throughput: Throughput = OF_THE_MACHINE,
) -> Labels:
    """Detections on a path, a folder, a list or one image array.

    They are the best pairs of query and class, which COCO's numbers are made of: a box may come several times, with
    several classes.

    Args:
        images: What ``open_images`` takes, or one RGB image: a uint8 tensor [3, H, W] or array [H, W, 3].
        checkpoint: Run folder, detector folder or checkpoint.
        min_score: Boxes with a lower score are left out.
        iou_threshold: Of two boxes of a class that overlap more, the less confident goes; 1 keeps both.
        max_boxes: Most confident boxes kept per image.
        device: Torch device; the GPU if there is one.
        quarantine: File that lists unreadable images; without it they are only logged.
        masks: Draw each object's mask too, with detectors that predict masks (ViDT+).
        point_radius: Of landmarks of a class closer than this part of the image's diagonal, the less confident go; 0
            keeps all, None those that are no duplicates of a grid's.
        one_class: Every box once, with its best class, and overlaps whatever the class: the labels of self-training.
        throughput: Batch size, decoding processes and precision; by default what suits the machine.

    Returns:
        Labels with scores, boxes in pixels, best first; categories as the training labels named them.

    Raises:
        ValueError: Masks are asked for and the detector draws none.
        TooManyUnreadableError: More than 5 % of the images cannot be read (with ``quarantine``).
    """
    source = open_images(images) if isinstance(images, str | Path) else images
    loaded = load_detector(detector_folder(checkpoint))
    settings = InferenceSettings.of(
        loaded.image_settings,
        score_threshold=min_score,
        iou_threshold=iou_threshold,
        max_boxes=max_boxes,
        masks=masks,
        **throughput.on(device or default_device(), len(source) if isinstance(source, ImageSource) else 1),
        point_radius=point_radius,
    )
    reading = best_per_query if one_class else postprocess
    if not isinstance(source, ImageSource):
        pixels = torch.from_numpy(source).permute(2, 0, 1) if isinstance(source, np.ndarray) else source
        return detect_array(loaded.detector, pixels, loaded.categories, settings, reading=reading)
    aside = Quarantine(quarantine, total=len(source)) if quarantine is not None else None
    with image_progress("predicting", len(source)) as progress:
        found = detect(
            loaded.detector,
            source,
            loaded.categories,
            settings,
            reading=reading,
            quarantine=aside,
            progress=progress,
        )
    if len(found) < len(source):
        LOG.warning("%d of %d images could not be read%s", len(source) - len(found), len(source), _listed(quarantine))
    return found


def _listed(quarantine: Path | None) -> str:
    return f", see {quarantine}" if quarantine is not None else ""


def evaluate(
    images: str | Path,
    labels: str | Path,
    checkpoint: str | Path,
    *,
    device: str | None = None,
    point_radius: float | None = None,
    throughput: Throughput = OF_THE_MACHINE,
) -> dict[str, float]:
    """COCO's AP family and class-agnostic recall of a detector, fractions in 0..1; of heads their own scores too.

    AP is of the 100 best pairs of query and class of each image, recall whatever the class (``AR@k``) of its 100 best
    queries; validation during training scores alike.

    Landmark heads add those of `simdetr.evaluation.point_metric`, localisation heads MaxBoxAcc and its like.

    Args:
        images: Images to evaluate on; those without labels are left out.
        labels: COCO JSON with their boxes; labelled images that are not there count as missed.
        checkpoint: Run folder, detector folder or checkpoint.
        device: Torch device; the GPU if there is one.
        point_radius: As for ``predict``.
        throughput: Batch size, decoding processes and precision; by default what suits the machine.

    Raises:
        ValueError: No image has labels.
    """
    truth, source, loaded = read_labels(Path(labels)), open_images(images), load_detector(detector_folder(checkpoint))
    shared = [image_id for image_id in source.ids if image_id in truth]
    if not shared:
        raise ValueError(
            f"images: none of the {len(source)} images of {images} is in {labels} (ids like {source.ids[0]!r} there, "
            f"{next(iter(truth.image_ids), None)!r} here); give the folder that the labels' file names are relative to."
        )
    if len(shared) < len(truth):
        LOG.warning("%d of %d labelled images are not in %s", len(truth) - len(shared), len(truth), images)
    settings = InferenceSettings.of(
        loaded.image_settings, point_radius=point_radius, **throughput.on(device or default_device(), len(shared))
    )
    return score(loaded, source.subset(shared), truth, settings)[1]


def score(
    loaded: LoadedDetector, source: ImageSource, truth: Labels, settings: InferenceSettings
) -> tuple[Labels, dict[str, float]]:
    """Detections on images, and all scores of them that ``evaluate`` knows.

    Args:
        loaded: The detector.
        source: Images, all of them labelled.
        truth: Their boxes, and those of images that are not there, which count as missed.
        settings: How images are prepared and detections are kept.
    """
    with image_progress("predicting", len(source)) as progress:
        found, objects = detect_for_scoring(loaded.detector, source, loaded.categories, settings, progress=progress)
    if loaded.reference_points is not None and truth.points is None:
        rules = ReferencePoints(loaded.reference_points, loaded.categories)
        truth = with_reference_points(truth, rules.of(truth.categories))
    scores = coco_metrics(truth, found) | proposal_recall(truth, objects)
    if truth.points is not None and found.points is not None:
        scores |= point_metrics(truth, found, objects)
    if localisation_head(loaded.detector) is not None:
        numbered = truth.with_categories(loaded.categories)
        scores |= localisation_scores(loaded.detector, source, numbered, settings)  # type: ignore[arg-type]
    return found, scores


def heat_maps(
    images: str | Path,
    checkpoint: str | Path,
    folder: Path,
    *,
    labels: Path | None = None,
    device: str | None = None,
    throughput: Throughput = OF_THE_MACHINE,
) -> int:
    """Write copies of images with what a localisation head looks at laid over them; returns how many.

    Args:
        images: What ``open_images`` takes.
        checkpoint: Run folder, detector folder or checkpoint of a detector with a localisation head.
        folder: Where the copies go.
        labels: COCO JSON with human boxes to draw beside the found ones.
        device: Torch device; the GPU if there is one.
        throughput: Batch size, decoding processes and precision; by default what suits the machine.

    Raises:
        ValueError: The detector has no localisation head.
    """
    loaded = load_detector(detector_folder(checkpoint))
    if localisation_head(loaded.detector) is None:
        raise ValueError(
            f"checkpoint: {checkpoint} has no simdetr.heads.LocalisationHead, so there are no score maps to draw"
        )
    source = open_images(images)
    settings = InferenceSettings.of(loaded.image_settings, **throughput.on(device or default_device(), len(source)))
    truth = read_labels(labels) if labels is not None else None
    return write_heat_maps(loaded.detector, source, settings, folder, truth)  # type: ignore[arg-type]


def default_device() -> str:
    """The GPU if there is one; of several processes on a machine (``LOCAL_RANK``) each takes its own."""
    if not torch.cuda.is_available():
        return "cpu"
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    return "cuda" if local_rank is None else f"cuda:{int(local_rank) % torch.cuda.device_count()}"

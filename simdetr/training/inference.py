"""A trained detector at work: images in, detections or COCO's numbers out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from simdetr.data.annotations import Category, LabelError
from simdetr.data.category_matching import are_pseudo_classes, check_comparable, match_categories
from simdetr.data.images import ImageSource, open_images
from simdetr.data.label_checks import check_has_boxes, say_match
from simdetr.data.label_files import read_with_report, say, write_labels
from simdetr.data.labels import Labels
from simdetr.data.machine import default_device
from simdetr.data.quarantine import Quarantine, check_share
from simdetr.data.reference_points import ReferencePoints, with_reference_points
from simdetr.detectors.detector import Detector
from simdetr.detectors.predictions import best_per_query, postprocess
from simdetr.evaluation.coco_metric import coco_metrics
from simdetr.evaluation.localisation_metric import LocalisationMetric, centre_gaussian_map
from simdetr.evaluation.point_metric import point_metrics
from simdetr.evaluation.recall import proposal_recall
from simdetr.exchange.weights import LoadedDetector, load_detector
from simdetr.heads.headed import HeadedBackbone, HeadedDetector
from simdetr.heads.localisation import LocalisationHead
from simdetr.heads.score_maps import MapSource
from simdetr.training.progress import image_progress
from simdetr.training.relabel import (
    InferenceSettings,
    Progress,
    detect,
    detect_array,
    detect_for_scoring,
)
from simdetr.training.run_folder import detector_folder
from simdetr.training.throughput import OF_THE_MACHINE, Throughput

LOG = logging.getLogger(__name__)
OPTION = "--max_unreadable"
"""Of the commands that only look at images."""


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
    max_unreadable: float = 1.0,
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
        max_unreadable: Share of unreadable images past which to stop; 1 goes on unless no image can be read.
        throughput: Batch size, decoding processes and precision; by default what suits the machine.

    Returns:
        Labels with scores, boxes in pixels, best first; categories as the training labels named them.

    Raises:
        ValueError: Masks are asked for and the detector draws none.
        TooManyUnreadableError: No image can be read, or fewer than ``max_unreadable`` allows.
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
    aside = Quarantine(quarantine, len(source), max_unreadable, OPTION) if quarantine is not None else None
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
    _say_unreadable(found, source, max_unreadable, f", see {quarantine}" if quarantine is not None else "")
    return found


def _say_unreadable(found: Labels, source: ImageSource, max_unreadable: float, more: str) -> None:
    """Tell how many images could not be read, or a TooManyUnreadableError."""
    count = len(source) - len(found)
    check_share(count, len(source), max_unreadable, OPTION)
    if count:
        LOG.warning("%d of %d images could not be read%s", count, len(source), more)


def evaluate(
    images: str | Path,
    labels: str | Path,
    checkpoint: str | Path,
    *,
    device: str | None = None,
    point_radius: float | None = None,
    max_unreadable: float = 1.0,
    throughput: Throughput = OF_THE_MACHINE,
    predictions: Path | None = None,
) -> dict[str, float]:
    """COCO's AP family and class-agnostic recall of a detector, fractions in 0..1; of heads their own scores too.

    AP is of the 100 best pairs of query and class of each image, recall whatever the class (``AR@k``) of its 100 best
    queries; validation during training scores alike.

    Landmark heads add those of `simdetr.evaluation.point_metric`, localisation heads MaxBoxAcc and its like.

    Args:
        images: Images to evaluate on; those without labels are left out.
        labels: COCO JSON with their boxes, whose classes are the detector's by name; labelled images that are not
            there, and boxes of classes that the detector does not know, count as missed.
        checkpoint: Run folder, detector folder or checkpoint.
        device: Torch device; the GPU if there is one.
        point_radius: As for ``predict``.
        max_unreadable: As for ``predict``; what is on unreadable images counts as missed.
        throughput: Batch size, decoding processes and precision; by default what suits the machine.
        predictions: Parquet file to keep the detections in that are scored.

    Raises:
        LabelError: No image has labels, no box is left to look for, or its classes are none of the detector's.
        TooManyUnreadableError: As for ``predict``.
    """
    source, loaded = open_images(images), load_detector(detector_folder(checkpoint))
    truth, report = read_with_report(labels, images=source)
    say(report)
    check_has_boxes(truth, labels, report)
    shared = [image_id for image_id in source.ids if image_id in truth]
    if not shared:
        raise LabelError(
            f"images: none of the {len(source)} images of {images} is in {labels} (ids like {source.ids[0]!r} there, "
            f"{next(iter(truth.image_ids), None)!r} here); give the folder that the labels' file names are relative to."
        )
    if len(shared) < len(truth):
        LOG.warning(
            "%d of %d labelled images are not in %s and count as missed", len(truth) - len(shared), len(truth), images
        )
    check_classes(truth, labels, loaded.categories, checkpoint)
    settings = InferenceSettings.of(
        loaded.image_settings, point_radius=point_radius, **throughput.on(device or default_device(), len(shared))
    )
    source = source.subset(shared)
    found, scores = score(loaded, source, truth, settings)
    _say_unreadable(found, source, max_unreadable, "; what is on them counts as missed")
    if predictions is not None:
        write_labels(found, predictions)
    return scores


def check_classes(truth: Labels, path: str | Path, known: Sequence[Category], checkpoint: str | Path) -> None:
    """Log which classes of a truth a detector does not know, and what is matched though it is spelt otherwise.

    Args:
        truth: Human labels.
        path: Their file.
        known: The detector's categories.
        checkpoint: Where it lies.

    Raises:
        LabelError: It knows none of them, and not because it knows pseudo-classes alone, which have recall still.
    """
    if are_pseudo_classes(known) and not match_categories(truth.categories, known):
        LOG.warning("%s knows pseudo-classes alone: only scores with an @, whatever the class, are given", checkpoint)
        return
    match = check_comparable(truth.categories, known, path, checkpoint)
    say_match(match, truth, path, f"the detector in {checkpoint}")


def score(
    loaded: LoadedDetector, source: ImageSource, truth: Labels, settings: InferenceSettings
) -> tuple[Labels, dict[str, float]]:
    """Detections on images, and all scores of them that ``evaluate`` knows.

    All images are labelled; ``truth`` may have boxes of more images, which count as missed.
    """
    with image_progress("predicting", len(source)) as progress:
        found, objects = detect_for_scoring(loaded.detector, source, loaded.categories, settings, progress=progress)
    if loaded.reference_points is not None and truth.points is None:
        rules = ReferencePoints(loaded.reference_points, loaded.categories)
        truth = with_reference_points(truth, rules.of(truth.categories))
    comparable = bool(match_categories(found.categories, truth.categories))
    scores = (coco_metrics(truth, found) if comparable else {}) | proposal_recall(truth, objects)
    if comparable and truth.points is not None and found.points is not None:
        scores |= point_metrics(truth, found, objects)
    if comparable and localisation_head(loaded.detector) is not None:
        numbered = truth.with_categories(loaded.categories)
        scores |= localisation_scores(loaded.detector, source, numbered, settings)  # type: ignore[arg-type]
    return found, scores


# ----------------------------------------------------------------------------------------------------------------------
# Score maps of a trained localisation head. In every scoring the class activation map of the same network and a
# Gaussian in the image's centre stand beside them: a method that does not beat these has learned nothing of where.


THRESHOLD_STEP = 0.01
"""Between the thresholds that are tried, as on the public code's command line; 0.001 takes three times as long."""


class Localised(NamedTuple):
    """What a head says of one image."""

    image_id: str
    size_hw: tuple[int, int]
    """Height and width of the original in pixels."""
    predicted_class: int
    score_map: NDArray[np.float32]
    """[S, S] in [0, 1] over the whole image, of the predicted class unless another was asked for."""


def localisation_head(detector: Detector) -> LocalisationHead | None:
    """The localisation head of a detector, None if it has none."""
    head = detector.head if isinstance(detector, HeadedBackbone | HeadedDetector) else None
    return head if isinstance(head, LocalisationHead) else None


@torch.inference_mode()
def localise(
    detector: HeadedBackbone | HeadedDetector,
    source: ImageSource,
    settings: InferenceSettings,
    *,
    wanted: Callable[[str], int] | None = None,
    map_source: MapSource | None = None,
    progress: Progress = lambda count: None,
) -> Iterator[Localised]:
    """Score maps of a detector with a localisation head image by image, without the unreadable ones.

    ``wanted`` gives the class to look for by the image's id (GT-known), else it is the predicted one; ``map_source`` is
    the head's own choice if left out; ``progress`` hears of every batch of images done.
    """
    head = localisation_head(detector)
    if head is None:
        raise ValueError("detector: expected one with a simdetr.heads.LocalisationHead, which draws score maps")
    detector.to(settings.device).eval()
    own, head.map_source = head.map_source, map_source or head.map_source
    try:
        for batch in settings.prepared(source):
            if batch is None:
                continue
            ids = [source.ids[int(target["image_index"])] for target in batch.targets]
            with settings.autocast():
                logits, features = detector.read(batch.images.to(settings.device), batch.mask.to(settings.device))
            classes = None if wanted is None else torch.tensor([wanted(name) for name in ids], device=logits.device)
            maps = head.score_map(logits, features, classes)[:, 0].float().cpu().numpy()
            for name, target, found, values in zip(ids, batch.targets, logits.argmax(dim=1), maps, strict=True):
                height, width = (int(side) for side in target["orig_size"])
                yield Localised(name, (height, width), int(found), values)
            progress(len(ids))
    finally:
        head.map_source = own


def localisation_scores(
    detector: HeadedBackbone | HeadedDetector, source: ImageSource, truth: Labels, settings: InferenceSettings
) -> dict[str, float]:
    """MaxBoxAcc, MaxBoxAccV2, GT-known and Top-1 localisation, and those of class activation and of the image's centre.

    The class whose map is read is that of the image's first box, and the boxes of this class are the truth; images
    without any are left out. All numbers are fractions in 0..1, ``threshold`` too.
    """
    boxed = source.subset([name for name in source.ids if len(truth.of(name))])
    own, cam, centre = (LocalisationMetric(step=THRESHOLD_STEP) for _ in range(3))
    gaussian = centre_gaussian_map()

    def wanted(image_id: str) -> int:
        return int(truth.of(image_id).classes[0])

    passes: tuple[tuple[LocalisationMetric, MapSource | None], ...] = ((own, None), (cam, "cam"))
    with image_progress("scoring maps", len(passes) * len(boxed)) as progress:
        for metric, shown in passes:
            for found in localise(detector, boxed, settings, wanted=wanted, map_source=shown, progress=progress):
                image = truth.of(found.image_id)
                boxes = image.boxes_xyxy[image.classes == image.classes[0]]
                right = found.predicted_class in image.classes
                metric.update(found.score_map, boxes, image.size_hw, class_correct=right)
                if metric is own:
                    centre.update(gaussian, boxes, image.size_hw)
    scores = {name: value for name, value in own.compute().items() if name not in ("images", "constant_maps")}
    for title, other in (("CAM", cam), ("centre", centre)):
        scores |= {f"{title} {name}": other.compute()[name] for name in ("MaxBoxAcc", "MaxBoxAccV2")}
    return scores

"""Score maps of a trained localisation head over a set of images: pictures, and the numbers of the field, out.

Beside the head's own map stand, in every scoring, the class activation map of the same network and a Gaussian in the
image's centre: a method that does not beat them has learned nothing of where. Source: specs/heads.md section 2.7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from simdetr.data.dataset import DetectionDataset, collate
from simdetr.data.images import ImageSource, read_image
from simdetr.data.labels import Labels
from simdetr.data.transforms import eval_transforms
from simdetr.detectors.detector import Detector
from simdetr.evaluation.drawing import picture_path
from simdetr.evaluation.heat_map_boxes import heat_map_boxes
from simdetr.evaluation.heat_map_drawing import draw_heat_map
from simdetr.evaluation.localisation_metric import LocalisationMetric, centre_gaussian_map
from simdetr.heads.headed_backbone import HeadedBackbone
from simdetr.heads.headed_detector import HeadedDetector
from simdetr.heads.localisation import LocalisationHead
from simdetr.heads.score_maps import MapSource
from simdetr.training.progress import image_progress
from simdetr.training.relabel import InferenceSettings, Progress

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
    """Score maps image by image, without the unreadable ones.

    Args:
        detector: With a localisation head.
        source: The images.
        settings: How they are prepared; batch size and device.
        wanted: The class to look for, by the image's id (GT-known); None for the predicted one.
        map_source: What the map shows; None for the head's own choice.
        progress: Hears of every batch of images done.
    """
    head = localisation_head(detector)
    if head is None:
        raise ValueError("detector: expected one with a simdetr.heads.LocalisationHead, which draws score maps")
    transform = eval_transforms(settings.short_side, settings.max_side, mean=settings.mean, std=settings.std)
    dataset = DetectionDataset(source, None, transform)
    detector.to(settings.device).eval()
    own, head.map_source = head.map_source, map_source or head.map_source
    try:
        for batch in DataLoader(dataset, settings.batch_size, collate_fn=collate, num_workers=settings.num_workers):
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

    The class whose map is read is that of the image's first box, and the boxes of this class are the truth.

    Args:
        detector: With a localisation head.
        source: Images with boxes.
        truth: Their boxes; images without any are left out.
        settings: How images are prepared.

    Returns:
        Fractions in 0..1; ``threshold`` too.
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


def write_heat_maps(
    detector: HeadedBackbone | HeadedDetector,
    source: ImageSource,
    settings: InferenceSettings,
    folder: Path,
    truth: Labels | None = None,
) -> int:
    """Write a copy of every image with its score map laid over it and the box that is read off it.

    Args:
        detector: With a localisation head.
        source: The images.
        settings: How they are prepared.
        folder: Where the copies go, under the images' relative paths.
        truth: Human boxes, drawn in red; none if left out.

    Returns:
        Number of pictures written.
    """
    head, written = localisation_head(detector), 0
    for found in localise(detector, source, settings):
        assert head is not None
        box = heat_map_boxes(found.score_map, head.box_threshold)[:1]
        side = found.score_map.shape[0]
        scale = np.array([found.size_hw[1], found.size_hw[0]] * 2) / side
        human = truth.of(found.image_id).boxes_xyxy if truth is not None and found.image_id in truth else None
        image = read_image(source.record(found.image_id))
        target = picture_path(folder, found.image_id)
        target.parent.mkdir(parents=True, exist_ok=True)
        draw_heat_map(image, found.score_map, (box * scale).astype(np.float32), human).save(target)
        written += 1
    return written

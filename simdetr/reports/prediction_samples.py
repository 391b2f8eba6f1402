"""What a trained head found on validation images: written at the end of ``simdetr fit``, read for the run's report.

The folder ``predictions`` of a run: ``labels.parquet`` (boxes, points, scores), ``scores.json`` and, of localisation
heads, ``heat_maps/``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from simdetr.data.images import ImageSource, open_images, read_image
from simdetr.data.label_files import read_labels, write_labels
from simdetr.data.labels import Labels
from simdetr.data.machine import default_device
from simdetr.data.reference_points import ReferencePoints
from simdetr.data.storage import write_scores
from simdetr.detectors.detector import Detector
from simdetr.evaluation.heat_map_boxes import heat_map_boxes
from simdetr.exchange.weights import LoadedDetector, load_detector
from simdetr.heads.headed import HeadedBackbone, HeadedDetector
from simdetr.mining.preview import evenly
from simdetr.reports.drawing import draw_heat_map, draw_labels, picture_path, readable
from simdetr.reports.page import Sample
from simdetr.reports.score_text import shown_score
from simdetr.training.datamodule import DetectionData
from simdetr.training.inference import localisation_head, localise, score
from simdetr.training.relabel import InferenceSettings
from simdetr.training.run_folder import detector_folder
from simdetr.training.throughput import OF_THE_MACHINE, Throughput

FOLDER, MIN_SCORE, MAX_BOXES = "predictions", 0.3, 15
LEFT_OUT = ("AR", "recall50", "AP7", "APs", "APm", "APl")
"""Beginnings of scores that the page leaves to the file; AR@100 is shown."""
NUM_HEAT_MAPS = 12
MAX_SCORED = 500
"""Validation images that are scored, spread evenly; `simdetr evaluate` takes them all."""


def prediction_scores(run_dir: Path) -> dict[str, str]:
    """Name and text of the scores of a run that its page shows; empty if it has none."""
    path = run_dir / FOLDER / "scores.json"
    if not path.is_file():
        return {}
    scores = json.loads(path.read_text(encoding="utf-8"))
    shown = {name: value for name, value in scores.items() if name == "AR@100" or not name.startswith(LEFT_OUT)}
    return {name: shown_score(name, math.nan if value is None else value).strip() for name, value in shown.items()}


def prediction_samples(run_dir: Path, source: ImageSource, truth: Labels | None, count: int) -> list[Sample]:
    """Images with what the run's detector found on them, beside what people labelled and the score map.

    They are spread evenly over the images of the source that have predictions.
    """
    path = run_dir / FOLDER / "labels.parquet"
    if not path.is_file():
        return []
    found = read_labels(path)
    ids = [name for name in found.image_ids if name in source]
    samples = []
    chosen = evenly(ids, count)
    for place, image in readable(source, chosen):
        name, own = chosen[place], found.of(chosen[place])
        good = int((own.scores >= MIN_SCORE).sum())
        shown = max(1, min(good, MAX_BOXES)) if len(own) else 0
        pictures = [(f"predicted: best {shown} of {len(own)}", draw_labels(image, own, found.categories, shown))]
        if truth is not None and name in truth:
            human = truth.of(name)
            drawn = draw_labels(image, human, truth.categories, MAX_BOXES)
            pictures.append((f"labelled by people: {len(human)}", drawn))
        heat_map = picture_path(run_dir / FOLDER / "heat_maps", name)
        if heat_map.is_file():
            with Image.open(heat_map) as picture:
                pictures.append(("what the head looks at", picture.convert("RGB")))
        samples.append(Sample(name, pictures))
    return samples


def write_fit_results(root: Path, detector: Detector, data: DetectionData) -> None:
    """Write ``predictions/`` below a run's folder: labels, scores and some heat maps of the validation images.

    Nothing is written for detectors without a head, or without validation images.
    """
    if not isinstance(detector, HeadedBackbone | HeadedDetector) or data.val_source is None or data.val_labels is None:
        return
    rules: ReferencePoints | None = data.reference_points
    table = dict(rules.table) if rules is not None else None
    loaded = LoadedDetector(detector.eval(), data.categories, dict(data.image_settings), table)
    labelled = [name for name in data.val_source.ids if name in data.val_labels]
    source = data.val_source.subset(evenly(labelled, MAX_SCORED))
    settings = InferenceSettings.of(loaded.image_settings, **OF_THE_MACHINE.on(default_device(), len(source)))
    found, scores = score(loaded, source, data.val_labels.select(source.ids), settings)
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_labels(found, folder / "labels.parquet")
    write_scores(scores, folder / "scores.json")
    if localisation_head(detector) is not None:
        chosen = source.subset(evenly(source.ids, NUM_HEAT_MAPS))
        write_heat_maps(detector, chosen, settings, folder / "heat_maps", data.val_labels)


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
    truth = read_labels(labels, images=source) if labels is not None else None
    return write_heat_maps(loaded.detector, source, settings, folder, truth)  # type: ignore[arg-type]


def write_heat_maps(
    detector: HeadedBackbone | HeadedDetector,
    source: ImageSource,
    settings: InferenceSettings,
    folder: Path,
    truth: Labels | None = None,
) -> int:
    """Write a copy of every image with its score map laid over it and the box that is read off it; returns how many.

    The detector has a localisation head. Copies go under the images' relative paths in ``folder``; the human boxes of
    ``truth`` are drawn in red.
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

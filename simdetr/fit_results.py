"""What ``simdetr fit`` leaves of a detector with a head: its finds on validation images, for store and report."""

from __future__ import annotations

from pathlib import Path

from simdetr.data.labels import write_labels
from simdetr.data.reference_points import ReferencePoints
from simdetr.detectors.detector import Detector
from simdetr.evaluation.prediction_samples import FOLDER
from simdetr.heads.headed_backbone import HeadedBackbone
from simdetr.heads.headed_detector import HeadedDetector
from simdetr.heads.localisation_results import localisation_head, write_heat_maps
from simdetr.inference import default_device, score
from simdetr.results import write_scores
from simdetr.training.datamodule import DetectionData
from simdetr.training.relabel import OF_THE_MACHINE, InferenceSettings
from simdetr.training.weights import LoadedDetector

NUM_HEAT_MAPS = 12
MAX_SCORED = 500
"""Validation images that are scored, spread evenly; `simdetr evaluate` takes them all."""


def write_fit_results(root: Path, detector: Detector, data: DetectionData) -> None:
    """Write ``predictions/`` below ``root``: labels, scores and some heat maps of the validation images.

    Nothing is written for detectors without a head, or without validation images.

    Args:
        root: The run's folder.
        detector: As trained.
        data: Its images and labels.
    """
    if not isinstance(detector, HeadedBackbone | HeadedDetector) or data.val_source is None or data.val_labels is None:
        return
    rules: ReferencePoints | None = data.reference_points
    table = dict(rules.table) if rules is not None else None
    loaded = LoadedDetector(detector.eval(), data.categories, dict(data.image_settings), table)
    labelled = [name for name in data.val_source.ids if name in data.val_labels]
    source = data.val_source.subset(labelled[:: max(1, -(-len(labelled) // MAX_SCORED))])
    settings = InferenceSettings.of(loaded.image_settings, **OF_THE_MACHINE.on(default_device(), len(source)))
    found, scores = score(loaded, source, data.val_labels.select(source.ids), settings)
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_labels(found, folder / "labels.parquet")
    write_scores(scores, folder / "scores.json")
    if localisation_head(detector) is not None:
        chosen = source.subset(source.ids[:: max(1, len(source) // NUM_HEAT_MAPS)][:NUM_HEAT_MAPS])
        write_heat_maps(detector, chosen, settings, folder / "heat_maps", data.val_labels)

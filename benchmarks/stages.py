"""What do the stages of a pretraining know before anybody labels? Recall on held-out images, and a linear probe.

    OMP_NUM_THREADS=1 python -m benchmarks.stages --runs runs/worth

For each set that benchmarks/label_curves.py has pretrained on, and each stage: the recall of its labels on validation
images that no stage saw, made as the run makes those of its own images, and of its detector alone; and, where images
have classes, the accuracy of a linear classifier on the frozen backbone, before pretraining and after each stage.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from benchmarks.environment import DATA, environment, write_result
from benchmarks.label_curves import PLAN, ImageSet
from simdetr import open_images, read_labels
from simdetr.data.images import ImageSource
from simdetr.data.labels import Labels
from simdetr.data.machine import default_device
from simdetr.detectors.predictions import best_per_query
from simdetr.encoder_training.probe import classed_images, linear_probe
from simdetr.evaluation.coco_metric import match_boxes
from simdetr.exchange.weights import load_detector
from simdetr.mining.clustering_config import ClusteringConfig
from simdetr.mining.encoders import Encoder, TimmEncoder
from simdetr.mining.miner import mine
from simdetr.mining.pseudo_labels import make_pseudo_labels
from simdetr.recipe import PipelineSections, Recipe, SelfTrainingConfig
from simdetr.training.detector_encoder import DetectorEncoder
from simdetr.training.fusion import fuse
from simdetr.training.relabel import InferenceSettings, detect
from simdetr.training.run_folder import RunFolder

NAME = "stages"
PROBED = ("fod", "neu_det")
"""Sets whose images have a class each."""
BOXES = (1, 10, 25, 100)
Row = dict[str, Any]


def stage_rows(own: ImageSet) -> Iterator[Row]:
    """Class-agnostic quality of the labels of every stage, and of its detector alone, on validation images."""
    truth = read_labels(own.val_labels()).class_agnostic()
    images = own.data / own.name / "val"
    sections = Recipe((str(own.run.config),), (f"--data.images={images}",)).sections()
    source, kept = open_images(images).subset(truth.image_ids), sections.self_training
    labels = mined(sections, source, own.out / f"{own.name}-val")
    yield quality(own, truth, labels, 0, "labels")
    for stage in filter(own.run.has_detector, own.run.stages()):
        found = detected(own.run, kept, source, stage)
        yield quality(own, truth, found, stage, "detector alone")
        labels = relabelled(labels, found, kept)
        yield quality(own, truth, labels, stage, "labels")


def mined(sections: PipelineSections, source: ImageSource, out: Path) -> Labels:
    """Boxes mined on validation images as on the training images; their scores are the certainty."""
    with FileLock(out.with_suffix(".lock")):
        store = mine(source, sections.encoder, sections.mining, out, default_device())
        return make_pseudo_labels(store, ClusteringConfig(num_classes=1))


def relabelled(before: Labels, found: Labels, kept: SelfTrainingConfig) -> Labels:
    """Labels of a stage as a run makes them, from those before and what its detector finds."""
    return found if kept.fusion is None else fuse(found, before, kept.fusion, max_boxes=kept.max_boxes)


def detected(run: RunFolder, kept: SelfTrainingConfig, source: ImageSource, stage: int) -> Labels:
    """What the detector of a stage finds on validation images, kept as relabelling keeps it."""
    loaded = load_detector(run.detector(stage))
    limits = {"iou_threshold": kept.iou_threshold, "max_boxes": kept.max_boxes, "device": default_device()}
    settings = InferenceSettings.of(loaded.image_settings, **limits)
    found = detect(loaded.detector, source, loaded.categories, settings, reading=best_per_query, stage=stage)
    return found.class_agnostic()


def quality(own: ImageSet, truth: Labels, labels: Labels, stage: int, what: str) -> Row:
    """Recall and precision of boxes whatever their class, 0..1."""
    scores = match_boxes(truth, labels, class_agnostic=True, max_boxes=BOXES)
    row: Row = {"set": own.name, "stage": stage, "what": what, "val_images": len(truth)}
    row["boxes_per_image"] = len(labels.boxes_xyxy) / len(truth)
    row |= {f"AR@{boxes}": scores.average_recall(boxes) for boxes in BOXES}
    return row | {"AP50": scores.average_precision(iou=50), "AP": scores.average_precision()}


def probe_rows(own: ImageSet) -> Iterator[Row]:
    """Accuracy of a linear classifier of images on the backbone before and after, 0..1."""
    folder = own.data / own.name
    train = classed_images(folder / "train", folder / "instances_train.json")
    val = classed_images(folder / "val", folder / "instances_val.json")
    encoders: dict[str, Encoder] = {"before": TimmEncoder("efficientnet-lite0", pretrained=True)}
    for stage in filter(own.run.has_detector, own.run.stages()):
        encoders[f"stage {stage}"] = DetectorEncoder(str(own.run.detector(stage)))
    for name, encoder in encoders.items():
        found = linear_probe(encoder, train, val, device=default_device())
        row = {"set": own.name, "backbone": name, "accuracy": found.accuracy, "low": found.low, "high": found.high}
        yield row | {"chance": found.chance, "classes": found.classes, "train_images": found.train_images}


def main() -> None:
    plan = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--runs", type=Path, required=True, help="of benchmarks/label_curves.py")
    parser.add_argument("--sets", nargs="+", choices=plan["sets"], default=list(plan["sets"]))
    arguments = parser.parse_args()
    rows: list[Row] = []
    probes: list[Row] = []
    for name in arguments.sets:
        own = ImageSet(name, arguments.data, arguments.runs, **plan["sets"][name])
        rows += stage_rows(own)
        probes += probe_rows(own) if name in PROBED else ()
        record = environment(("torch", "torchvision", "timm", "scikit-learn"))
        write_result(NAME, {"environment": record, "rows": rows, "probes": probes})
        print(*rows, *probes, sep="\n")


if __name__ == "__main__":
    main()

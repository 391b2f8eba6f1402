"""COCO's numbers from `Labels`: hotcoco against pycocotools, end to end, on as many boxes as COCO's validation set has.

5,000 images of 640 x 480, 36,000 objects of 80 classes of COCO's sizes, 100 scored boxes per image, two thirds of them
near an object. Both ways start from `Labels` in memory and end with the tables of precision and recall; pycocotools is
timed again from a COCO JSON and a results JSON on disk, as its users call it. They take turns in one process; the
ratios are medians of neighbours, by wall clock and by CPU time of all threads, and the tables must be equal.

    python -m benchmarks.coco_evaluation
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.environment import environment, write_result
from benchmarks.turns import compare_in_turns
from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.coco import write_coco, write_detections
from simdetr.data.labels import Labels
from simdetr.evaluation import coco_metric
from simdetr.evaluation.coco_metric import match_boxes

HEIGHT, WIDTH, CLASSES, OBJECTS_PER_IMAGE, BOXES_PER_IMAGE = 480, 640, 80, 7.2, 100
BAR = 50.0


def drawn(images: int) -> tuple[Labels, Labels]:
    """Truth and predictions of random images."""
    rng = np.random.default_rng(0)
    truth, found = [], []
    for index in range(images):
        objects = int(rng.poisson(OBJECTS_PER_IMAGE))
        boxes, classes = _boxes(rng, objects), rng.integers(0, CLASSES, objects)
        far = _boxes(rng, BOXES_PER_IMAGE)
        guessed = rng.integers(0, CLASSES, BOXES_PER_IMAGE)
        if objects:
            near = rng.integers(0, objects, BOXES_PER_IMAGE)
            like = rng.random(BOXES_PER_IMAGE) < 2 / 3
            sides = np.tile(boxes[near, 2:] - boxes[near, :2], 2)
            moved = boxes[near] + rng.normal(0, 0.1, sides.shape) * sides
            far[like], guessed[like] = moved[like], classes[near][like]
        corners = np.concatenate([np.minimum(far[:, :2], far[:, 2:]), np.maximum(far[:, :2], far[:, 2:])], axis=1)
        corners = corners.clip(0, [WIDTH, HEIGHT, WIDTH, HEIGHT])
        name, size, scores = f"{index:06d}.jpg", (HEIGHT, WIDTH), rng.random(BOXES_PER_IMAGE)
        truth.append(ImageLabels.build(name, size, boxes, classes, np.ones(objects)))
        found.append(ImageLabels.build(name, size, corners, guessed, scores))
    categories = [Category(index + 1, f"class {index + 1}") for index in range(CLASSES)]
    return Labels.from_images(truth, categories), Labels.from_images(found, categories)


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    sides = np.exp(rng.uniform(np.log(12), np.log(300), (count, 2)))
    corner = rng.random((count, 2)) * ([WIDTH, HEIGHT] - sides)
    return np.concatenate([corner, corner + sides], axis=1)


def with_pycocotools(truth: Labels, found: Labels) -> coco_metric.MatchScores:
    """`match_boxes` where hotcoco has no wheel."""
    fast, coco_metric.hotcoco = coco_metric.hotcoco, None
    try:
        return match_boxes(truth, found)
    finally:
        coco_metric.hotcoco = fast


def from_files(truth: Path, found: Path) -> COCOeval:
    """The usual way: two JSON files."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        evaluation = COCOeval(coco, coco.loadRes(str(found)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    truth, found = drawn(arguments.images)
    fast, usual = match_boxes(truth, found), with_pycocotools(truth, found)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "truth.json", Path(folder) / "found.json"
        write_coco(truth, files[0])
        write_detections(found, files[1], files[0])
        result = {
            "environment": environment(("torch", "hotcoco", "pycocotools", "numpy")),
            "images": len(truth),
            "objects": len(truth.boxes_xyxy),
            "boxes": len(found.boxes_xyxy),
            "classes": CLASSES,
            "bar": BAR,
            "equal": bool((fast.precision == usual.precision).all() and (fast.recall == usual.recall).all()),
            "AP": fast.average_precision(),
            "labels": compare_in_turns(
                lambda: match_boxes(truth, found), lambda: with_pycocotools(truth, found), "cpu", arguments.repeats
            ),
            "files": compare_in_turns(
                lambda: match_boxes(truth, found), lambda: from_files(*files), "cpu", arguments.repeats
            ),
        }
    print(json.dumps(result, indent=2))
    write_result("coco_evaluation", result)


if __name__ == "__main__":
    main()

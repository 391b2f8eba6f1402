#!/usr/bin/env bash
# An annotation whose id is 0 is never found, say pycocotools 2.0.11 and faster-coco-eval 1.8.0; hotcoco 1.3.0 finds it.
#
# COCO files whose annotation ids begin at 0 are common, and nothing in the format forbids them. The evaluators mark a
# detection as matched by writing the annotation's id into an array in which 0 means "no match", so that the object with
# id 0 counts as missed and its detection as wrong: of two perfect detections on two objects AP is 0.252 instead of 1.
# pycocotools says nothing, faster-coco-eval warns and gives the same number, hotcoco gives 1. A guess would be that
# three evaluators which call themselves equal agree on a perfect result.
#
# What simdetr does: annotations are numbered anew for either evaluator, whatever the file's ids
# (simdetr/evaluation/coco_metric.py; tests/evaluation/test_coco_metric.py).
#
# Seen on Linux x86_64 with Python 3.11. Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install \
    numpy==2.4.6 pycocotools==2.0.11 faster-coco-eval==1.8.0 hotcoco==1.3.0 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib
import importlib
import io
import json
import warnings
from importlib.metadata import version

EVALUATORS = {
    "pycocotools": ("pycocotools.coco", "pycocotools.cocoeval", "COCOeval", "loadRes"),
    "faster-coco-eval": ("faster_coco_eval", "faster_coco_eval", "COCOeval_faster", "loadRes"),
    "hotcoco": ("hotcoco", "hotcoco", "COCOeval", "load_res"),
}


def write(first_id: int) -> None:
    """Two images with an object each, and two detections that are exactly right."""
    images = [{"id": number, "width": 100, "height": 100, "file_name": f"{number}.jpg"} for number in (1, 2)]
    box = {"category_id": 1, "bbox": [10, 10, 40, 40]}
    objects = [box | {"id": first_id + n, "image_id": 1 + n, "area": 1600, "iscrowd": 0} for n in (0, 1)]
    truth = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "thing"}]}
    detections = [box | {"image_id": number, "score": 1 - number / 10} for number in (1, 2)]
    for name, content in (("truth.json", truth), ("detections.json", detections)):
        with open(name, "w") as file:
            json.dump(content, file)


def average_precision(package: str) -> float:
    files, evaluation, evaluator, load = EVALUATORS[package]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = importlib.import_module(files).COCO("truth.json")
        found = getattr(importlib.import_module(evaluation), evaluator)(
            truth, getattr(truth, load)("detections.json"), "bbox"
        )
        found.evaluate()
        found.accumulate()
        found.summarize()
    return round(float(found.stats[0]), 3)


seen = {}
for first_id in (1, 0):
    write(first_id)
    seen[first_id] = {package: average_precision(package) for package in EVALUATORS}
    print(f"ids from {first_id}: AP", {f"{package} {version(package)}": ap for package, ap in seen[first_id].items()})
perfect = dict.fromkeys(EVALUATORS, 1.0)
if seen != {1: perfect, 0: perfect | {"pycocotools": 0.252, "faster-coco-eval": 0.252}}:
    raise SystemExit("this has changed")
PYTHON

#!/usr/bin/env bash
# datumaro 1.13.12: COCO in, COCO out keeps the ids of images and annotations, and gives the categories other ids.
#
# Categories 3 and 7 come out as 1 and 2, while image 10 stays image 10 and annotation 5 annotation 5. The file looks as
# if it could replace the first one; detections made with the first one's category ids then score as other classes, or
# as none. A guess would be that either all ids are kept or none. Boxes are rounded to two decimals on the way
# (40.125 px to 40.12), and the area is no longer that of the box.
#
# What simdetr does: category ids stay as they are in every file that it writes, and files are compared by the
# categories' names (simdetr/data/labels.py; tests/data/test_labels.py).
#
# Seen on Linux x86_64 with Python 3.11. Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install datumaro==1.13.12 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import json
from importlib.metadata import version
from pathlib import Path

import datumaro as dm
from PIL import Image

Path("in/images/train").mkdir(parents=True)
Path("in/annotations").mkdir()
Image.new("RGB", (100, 80)).save("in/images/train/a.jpg")
box = {"id": 5, "image_id": 10, "category_id": 7, "bbox": [10.25, 20.5, 30.5, 40.125], "area": 1223.8125, "iscrowd": 0}
content = {
    "images": [{"id": 10, "file_name": "a.jpg", "width": 100, "height": 80}],
    "annotations": [{**box, "segmentation": []}],
    "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
}
Path("in/annotations/instances_train.json").write_text(json.dumps(content))
dm.Dataset.import_from("in", "coco_instances").export("out", "coco_instances")

out = json.loads(Path("out/annotations/instances_train.json").read_text())
ids = [(category["id"], category["name"]) for category in out["categories"]]
image, annotation = out["images"][0]["id"], out["annotations"][0]
print(f"datumaro {version('datumaro')}: image 10 -> {image}, annotation 5 -> {annotation['id']}, categories -> {ids}")
print(f"bbox {box['bbox']} -> {annotation['bbox']}, area {box['area']} -> {annotation['area']:.4f}")
kept = (image, annotation["id"]) == (10, 5)
if not (kept and ids == [(1, "cat"), (2, "dog")] and annotation["bbox"][3] == 40.12):
    raise SystemExit("this has changed")
PYTHON

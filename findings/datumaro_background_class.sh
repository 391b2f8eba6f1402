#!/usr/bin/env bash
# datumaro 1.13.12: labels that pass through Pascal VOC come out with a class more, and every class number one higher.
#
# Its VOC export puts a class "background" into labelmap.txt, before those of the data set. Its VOC import takes it for
# a class of objects. What is exported then as YOLO has "background" in obj.names at number 0 and 1, 2, ... for the
# classes that were 0, 1, ...: a detector trained on one of the files and scored on the other is wrong in every class. A
# guess would be that two classes in are two classes out.
# An image without boxes is also written without an XML file, so that nothing tells it from one nobody looked at.
#
# What simdetr does: it reads and writes Pascal VOC itself; classes are those of the objects, matched by name, never by
# number (simdetr/data/label_formats; tests/data/label_formats).
#
# Seen on Linux x86_64 with Python 3.11. Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install datumaro==1.13.12 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
from importlib.metadata import version
from pathlib import Path

import datumaro as dm
import numpy as np

image = dm.Image.from_numpy(np.zeros((80, 100, 3), np.uint8))
items = [
    dm.DatasetItem("a", subset="train", media=image, annotations=[dm.Bbox(10, 20, 30, 40, label=1)]),
    dm.DatasetItem("empty", subset="train", media=image),
]
dm.Dataset.from_iterable(items, categories=["cat", "dog"]).export("voc", "voc_detection", save_media=True)
dm.Dataset.import_from("voc", "voc_detection").export("yolo", "yolo", save_media=True)

names = Path("yolo/obj.names").read_text().split()
boxes = Path("yolo/obj_train_data/a.txt").read_text().split()
annotations = sorted(path.name for path in Path("voc/Annotations").iterdir())
print(f"datumaro {version('datumaro')}: classes cat, dog in; {', '.join(names)} out; the dog's number is {boxes[0]}")
print(f"Pascal VOC files of the images a and empty: {', '.join(annotations)}")
if (names, boxes[0], annotations) != (["background", "cat", "dog"], "2", ["a.xml"]):
    raise SystemExit("this has changed")
PYTHON

#!/usr/bin/env bash
# label-studio-sdk 2.1.2: one project exported as COCO, YOLO and Pascal VOC holds three different sets of boxes.
#
# - A rectangle that was turned by 30 degrees is enclosed by an upright box in COCO; YOLO and VOC get the same rectangle
#   unturned, which covers another part of the image. Nothing is said.
# - Two images of one name in different folders (sub/f.jpg, other/f.jpg) share one file f.txt or f.xml: the boxes of the
#   first are gone, while COCO has both.
# - An image that two people annotated stands twice in COCO, under two image ids and one file name.
# A guess would be that one project gives the same boxes in every format.
#
# What simdetr does: it reads Label Studio's own JSON, encloses turned shapes and says so, takes one annotation of each
# image, and keeps folders in the names of the files it writes (simdetr/data/label_formats/label_studio.py;
# tests/data/label_formats/test_label_studio.py).
#
# Seen on Linux x86_64 with Python 3.11. Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install label-studio-sdk==2.1.2 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import json
import xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path

from label_studio_sdk.converter import Converter

SCREEN = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="cat"/>'
    "</RectangleLabels></View>"
)


def annotation(number, x, rotation=0):
    value = {"x": x, "y": 40, "width": 20, "height": 20, "rotation": rotation, "rectanglelabels": ["cat"]}
    one = {"id": f"r{number}", "type": "rectanglelabels", "from_name": "label", "to_name": "image", "value": value}
    result = [{**one, "original_width": 200, "original_height": 100, "image_rotation": 0}]
    return {"id": number, "result": result, "was_cancelled": False, "completed_by": number}


files = {
    "/data/upload/1/turned.jpg": [annotation(1, 40, rotation=30)],
    "/data/local-files/?d=sub/f.jpg": [annotation(2, 10)],
    "/data/local-files/?d=other/f.jpg": [annotation(3, 60)],
    "/data/upload/1/two.jpg": [annotation(4, 10), annotation(5, 60)],
}
tasks = [
    {"id": number, "data": {"image": name}, "annotations": annotations, "predictions": []}
    for number, (name, annotations) in enumerate(files.items(), start=1)
]
Path("tasks.json").write_text(json.dumps(tasks))
converter = Converter(SCREEN, ".", download_resources=False)
for kind in ("COCO", "YOLO", "VOC"):
    converter.convert("tasks.json", kind, kind, is_dir=False)

coco = json.loads(Path("COCO/result.json").read_text())
names = [image["file_name"] for image in coco["images"]]
turned = [round(value) for value in coco["annotations"][0]["bbox"]]
yolo = {path.name: path.read_text().split() for path in Path("YOLO/labels").iterdir()}
voc = ET.parse("VOC/Annotations/turned.xml").findall(".//bndbox/*")
print(f"label-studio-sdk {version('label-studio-sdk')}")
print(f"turned rectangle: COCO x, y, width, height {turned}; YOLO {yolo['turned.txt']}; VOC {[c.text for c in voc]}")
print(f"label files of YOLO: {sorted(yolo)}; f.txt holds {yolo['f.txt']}")
print(f"images of COCO: {names}")
same = (
    turned == [60, 40, 55, 27]
    and yolo["turned.txt"] == ["0", "0.5", "0.5", "0.2", "0.2"]
    and [c.text for c in voc] == ["80", "40", "120", "60"]
    and sorted(yolo) == ["f.txt", "turned.txt", "two.txt"]
    and yolo["f.txt"][1] == "0.7"
    and len([name for name in names if name.endswith("two.jpg")]) == 2
)
if not same:
    raise SystemExit("this has changed")
PYTHON

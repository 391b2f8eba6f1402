#!/usr/bin/env bash
# ultralytics 8.4.190: convert_coco takes one off every category id, whatever the file's ids are.
#
# A COCO file whose categories are numbered from 0, as several tools write it, becomes YOLO labels of class -1; one
# whose ids have gaps becomes classes with gaps, and neither names nor a data.yaml are written that would tell them
# apart. The default, cls91to80=True, takes every file for COCO's own: it stops at a category 0 or 12 with "must be real
# number, not NoneType". A guess would be that classes are the positions of the file's own categories.
#
# What simdetr does: classes in YOLO files are the positions of the categories, whatever their ids, and the data.yaml
# has their names (simdetr/data/label_formats/yolo.py; tests/data/label_formats/test_yolo.py).
#
# Seen on Linux x86_64 with Python 3.11, torch 2.15.0. Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install \
    ultralytics==8.4.190 torch==2.15.0 torchvision==0.29.2 2>/dev/null
cd "$folder"
export YOLO_CONFIG_DIR="$folder/settings"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import contextlib
import io
import json
from importlib.metadata import version
from pathlib import Path

from ultralytics.data.converter import convert_coco


def classes(ids, **choice):
    """Class numbers that the boxes of categories with these ids get, or the error."""
    boxes = [
        {"id": row + 1, "image_id": 1, "category_id": own, "bbox": [10 * row, 5, 10, 10], "area": 100, "iscrowd": 0}
        for row, own in enumerate(ids)
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 80}],
        "annotations": boxes,
        "categories": [{"id": own, "name": f"kind {own}"} for own in ids],
    }
    name = "_".join(map(str, ids)) + "_".join(choice)
    Path(name).mkdir()
    Path(name, "instances.json").write_text(json.dumps(content))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            convert_coco(name, save_dir=f"{name}_out", **choice)
    except TypeError as error:
        return str(error)
    written = next(Path(f"{name}_out").rglob("a.txt")).read_text().splitlines()
    return [int(line.split()[0]) for line in written]


found = {
    "ids 0, 1": classes((0, 1), cls91to80=False),
    "ids 3, 7": classes((3, 7), cls91to80=False),
    "ids 0, 1 by default": classes((0, 1)),
}
print(f"ultralytics {version('ultralytics')}: classes of the boxes: {found}")
if list(found.values()) != [[-1, 0], [2, 6], "must be real number, not NoneType"]:
    raise SystemExit("this has changed")
PYTHON

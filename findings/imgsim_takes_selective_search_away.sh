#!/usr/bin/env bash
# imgsim 0.1.2 (a self-supervised ResNet-50 in a wheel) and OpenCV's Selective Search cannot be installed together by pip.
#
# imgsim requires the plain opencv-python. Beside opencv-contrib-python-headless that is a second package with the same
# module: it overwrites the contrib build's library and leaves its folders. `cv2.ximgproc` can still be imported, is
# empty, and createSelectiveSearchSegmentation is gone, while `pip check` finds nothing wrong. A guess would be that pip
# refuses, or that the import of cv2.ximgproc fails.
#
# What simdetr does: `make weights` installs imgsim with --no-deps and reads its file through the package's metadata
# (simdetr/data/pretrained_weights.py; tests/data/test_pretrained_weights.py).
#
# Seen on Linux x86_64 with Python 3.11, opencv-contrib-python-headless and opencv-python 5.0.0.93, imgsim 0.1.2.
# Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check "$@" 2>/dev/null; }
ask() {
    "$folder/venv/bin/python" - <<'PYTHON'
import cv2

segmentation = getattr(getattr(cv2, "ximgproc", None), "segmentation", None)
print(cv2.__version__, hasattr(cv2, "ximgproc"), hasattr(segmentation, "createSelectiveSearchSegmentation"))
PYTHON
}

pip download --no-deps --dest "$folder" imgsim==0.1.2
python3 -m zipfile -e "$folder"/imgsim-*.whl "$folder/wheel"
required=$(tr -d '\r' < "$folder"/wheel/imgsim-*.dist-info/METADATA | grep '^Requires-Dist: opencv')
echo "imgsim 0.1.2: $required"

pip install opencv-contrib-python-headless==5.0.0.93
before=$(ask)
echo "contrib alone: version, cv2.ximgproc, Selective Search: $before"

pip install opencv-python==5.0.0.93 # what imgsim asks for; without its other requirement, torch
after=$(ask)
echo "after opencv-python: $after"
checked=$("$folder/venv/bin/python" -m pip check 2>/dev/null || true)
echo "pip check: $checked"

[[ $required == "Requires-Dist: opencv-python" && $before == *"True True" && $after == *"True False" \
    && $checked == *"No broken requirements"* ]] || { echo "this has changed"; exit 1; }

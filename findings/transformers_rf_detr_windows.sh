#!/usr/bin/env bash
# transformers 5.23.0: RF-DETR's backbone mixes up the places of an image that is not square.
#
# With more than one window, RfDetrDinov2Backbone takes batches of any height and width whose patches the windows divide.
# On a square grid of patches, what is at patch (row, column) comes out at (row, column) of the feature map. On a grid of
# 4 x 8 half of the patches come out elsewhere, (0, 2) at (0, 4): windows are cut with rows and columns exchanged and put
# together again without. The map has the right shape and nothing warns. A guess would be that a model which accepts an
# image and a mask of padding places objects alike whatever the shape; its image processor makes squares, so that only
# those who batch images themselves meet it.
#
# What simdetr does: it pads images for RF-DETR to squares (simdetr/detectors/transformers_adapter.py; a test marks a
# patch and looks where it comes out, tests/detectors/test_transformers_adapter.py).
#
# Seen on Linux x86_64 with Python 3.11 and torch 2.15.0. Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.15.0 transformers==5.23.0 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
from importlib.metadata import version

import torch
from transformers import RfDetrDinov2Backbone, RfDetrDinov2Config

torch.manual_seed(0)
size = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 8, "image_size": 64}
config = RfDetrDinov2Config(**size, num_windows=2, window_block_indexes=[0], out_features=["stage1"])
backbone = RfDetrDinov2Backbone(config).eval()


def came_out_at(height: int, width: int, row: int, column: int) -> tuple[int, int]:
    """Cell of the feature map that changes most when one patch of a black image turns white."""
    black = torch.zeros(1, 3, 8 * height, 8 * width)
    marked = black.clone()
    marked[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 1
    with torch.no_grad():
        before, after = (backbone(pixels).feature_maps[0] for pixels in (black, marked))
    change = (after - before).norm(dim=1)[0]
    assert change.shape == (height, width)
    return divmod(int(change.argmax()), width)


def moved(height: int, width: int) -> int:
    places = [(row, column) for row in range(height) for column in range(width)]
    return sum(came_out_at(height, width, *place) != place for place in places)


counts = {f"{height} x {width}": moved(height, width) for height, width in ((8, 8), (4, 8), (8, 4))}
print(f"transformers {version('transformers')}: patches that come out elsewhere, by the grid's size: {counts}")
print("a patch at (0, 2) of a 4 x 8 grid comes out at", came_out_at(4, 8, 0, 2))
if counts != {"8 x 8": 0, "4 x 8": 16, "8 x 4": 16}:
    raise SystemExit("this has changed")
PYTHON

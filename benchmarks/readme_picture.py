"""The README's picture: the best mined boxes on two photographs that scikit-learn carries.

    python -m benchmarks.readme_picture

The photographs are china.jpg by danielbuechele (https://www.flickr.com/photos/danielbuechele/6061409035) and flower.jpg
by vultilion (https://www.flickr.com/photos/vultilion/6056698931), both CC BY 2.0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_sample_images

from simdetr.mining import MiningConfig, TimmEncoder, mine_batch
from simdetr.reports.drawing import contact_sheet, draw_boxes

BOXES = 6
OUT = Path(__file__).parents[1] / "docs" / "photographs.jpg"


def main() -> None:
    """Mine, draw, write."""
    images = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in load_sample_images().images]
    encoder = TimmEncoder("efficientnet-lite0", pretrained=True)
    pictures = []
    for image, regions in zip(images, mine_batch(images, encoder, MiningConfig()), strict=True):
        best = np.argsort(-regions.score, kind="stable")[:BOXES]
        pictures.append(draw_boxes(image, regions.boxes_xyxy[best], max_side_px=640))
    contact_sheet(pictures, columns=2).save(OUT, quality=88)
    print(OUT)


if __name__ == "__main__":
    main()

"""An image and its score map in, a picture with the map over the image and the boxes in two colours out.

As in the figures of the seed the found boxes are green and the human ones red.
Source: seed 002, figures 6 and 7.
"""

from __future__ import annotations

import matplotlib
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from simdetr.evaluation.drawing import Colour, draw_boxes
from simdetr.evaluation.heat_map_boxes import check_score_map

FOUND: Colour = (0, 230, 64)
HUMAN: Colour = (255, 32, 32)


def draw_heat_map(
    image: Tensor,
    score_map: ArrayLike,
    boxes: Tensor | NDArray[np.float32] | None = None,
    truth: Tensor | NDArray[np.float32] | None = None,
    *,
    opacity: float = 0.5,
    colour_map: str = "jet",
) -> Image.Image:
    """Lay a score map over its image, red where it is high and blue where it is low, and draw boxes on both.

    Args:
        image: uint8 [3, H, W]; a small one is enlarged as `draw_boxes` does.
        score_map: [h, w] in [0, 1] over the whole image, of any size.
        boxes: found boxes [n, 4] in pixels of the image, drawn green.
        truth: human boxes [m, 4], drawn red.
        opacity: share of the map in the picture; 0 leaves the image.
        colour_map: one of matplotlib's.

    Raises:
        ValueError: an image that is not uint8 [3, H, W], a map that is not 2-D or outside [0, 1], boxes that are
            upside down, an opacity outside [0, 1] or an unknown colour map.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image: expected uint8 [3, H, W], got {image.dtype} {list(image.shape)}")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity: expected 0 to 1, got {opacity}")
    if colour_map not in matplotlib.colormaps:
        raise ValueError(f"colour_map: matplotlib has no {colour_map!r}; try jet, turbo or viridis")
    values = torch.from_numpy(check_score_map(score_map))[None, None]
    smooth = functional.interpolate(values, tuple(image.shape[1:]), mode="bilinear")[0, 0].numpy()
    colours = torch.from_numpy(matplotlib.colormaps[colour_map](smooth)[..., :3]).permute(2, 0, 1)
    blended = (1 - opacity) * image + opacity * 255 * colours
    groups = [(truth, HUMAN), (boxes, FOUND)]
    given = [(np.asarray(own, np.float32).reshape(-1, 4), colour) for own, colour in groups if own is not None]
    corners = np.concatenate([np.zeros((0, 4), np.float32), *(own for own, _ in given)])
    outlines = [colour for own, colour in given for _ in own]
    return draw_boxes(blended.round().to(torch.uint8), corners, colours=outlines)

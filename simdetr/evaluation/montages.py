"""Pictures or boxes of a class in, one picture with all of them side by side out (report and notebooks share them)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import resize, to_pil_image

from simdetr.data.images import ImageSource, UnreadableImageError, read_image
from simdetr.data.labels import Labels
from simdetr.evaluation.drawing import PAPER


def contact_sheet(images: Sequence[Image.Image], columns: int, *, gap_px: int = 4) -> Image.Image:
    """Pictures side by side in rows, each in a cell of the largest one's size, in reading order.

    Raises:
        ValueError: no images, or ``columns`` below 1.
    """
    if not images or columns < 1:
        raise ValueError(f"expected at least one image and one column, got {len(images)} images, {columns} columns")
    columns = min(columns, len(images))
    cell_width, cell_height = max(i.width for i in images), max(i.height for i in images)
    rows = math.ceil(len(images) / columns)
    sheet_size = (columns * (cell_width + gap_px) - gap_px, rows * (cell_height + gap_px) - gap_px)
    sheet = Image.new("RGB", sheet_size, PAPER)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        x = column * (cell_width + gap_px) + (cell_width - image.width) // 2
        y = row * (cell_height + gap_px) + (cell_height - image.height) // 2
        sheet.paste(image, (x, y))
    return sheet


def class_montage(
    source: ImageSource, labels: Labels, class_index: int, count: int, seed: int, *, tile_px: int = 96, columns: int = 6
) -> Image.Image:
    """Crops of boxes of one (pseudo-)class, drawn at random, as one sheet of square tiles.

    Args:
        source: the images of the labels.
        labels: pseudo-labels or human labels.
        class_index: index into ``labels.categories``.
        count: most crops shown; all of the class if it has fewer. Images that cannot be read are passed over.
        seed: of the choice among the boxes of the class.
        tile_px: side of a tile; a crop keeps its aspect inside it.
        columns: tiles per row.

    Raises:
        ValueError: ``class_index`` outside the categories, a class without boxes, or without a readable image.
    """
    if not 0 <= class_index < labels.num_classes:
        raise ValueError(f"class_index: expected 0 .. {labels.num_classes - 1}, got {class_index}")
    members = np.flatnonzero(labels.classes == class_index)
    images_of_rows = np.searchsorted(labels.offsets, members, side="right") - 1
    tiles: list[Image.Image] = []
    for pick in np.random.default_rng(seed).permutation(len(members)):
        if len(tiles) == count:
            break
        image_id = labels.image_ids[images_of_rows[pick]]
        try:
            image = read_image(source.record(image_id))
        except UnreadableImageError:
            continue
        tiles.append(_tile(image, labels.boxes_xyxy[members[pick]], tile_px))
    if not tiles:
        raise ValueError(f"class_index: class {class_index} has {len(members)} boxes, none on a readable image")
    return contact_sheet(tiles, columns)


def _tile(image: Tensor, box_xyxy: NDArray[np.float32], tile_px: int) -> Image.Image:
    """The box's part of the image, its longer side scaled to the tile, on a square of the paper's colour."""
    height, width = image.shape[1:]
    x0, y0 = (
        int(max(0, min(math.floor(v), limit - 1))) for v, limit in zip(box_xyxy[:2], (width, height), strict=True)
    )
    x1, y1 = max(x0 + 1, math.ceil(box_xyxy[2])), max(y0 + 1, math.ceil(box_xyxy[3]))
    crop = image[:, y0:y1, x0:x1]
    scale = tile_px / max(crop.shape[1:])
    size = [max(1, round(side * scale)) for side in crop.shape[1:]]
    picture = to_pil_image(resize(crop, size, antialias=True))
    square = Image.new("RGB", (tile_px, tile_px), PAPER)
    square.paste(picture, ((tile_px - picture.width) // 2, (tile_px - picture.height) // 2))
    return square

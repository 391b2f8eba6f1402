"""Pictures for eyes: images and boxes in, PIL pictures out (predict, report and notebooks share them).

Boxes are drawn by torchvision; small images are enlarged first, so that lines and captions stay thin and readable.
A class has the same colour in every picture.
"""

from __future__ import annotations

import colorsys
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import resize, to_pil_image
from torchvision.utils import draw_bounding_boxes

from simdetr import boxes as box_maths
from simdetr.data.images import ImageSource, UnreadableImageError, read_image
from simdetr.data.labels import Labels

Colour = tuple[int, int, int]
GOLDEN_RATIO = 0.6180339887498949
PAPER: Colour = (214, 217, 222)  # ground of sheets and of tiles that a picture does not fill


def class_colour(class_index: int) -> Colour:
    """The colour of a class, RGB 0..255: hues a golden section apart, so that neighbouring classes differ most."""
    hue = (0.02 + class_index * GOLDEN_RATIO) % 1.0
    saturation = (0.95, 0.70, 0.80)[class_index % 3]
    return _rgb(colorsys.hsv_to_rgb(hue, saturation, 1.0))


def _rgb(fractions: tuple[float, float, float]) -> Colour:
    red, green, blue = (round(255 * value) for value in fractions)
    return red, green, blue


def draw_boxes(
    image: Tensor,
    boxes_xyxy: Tensor | NDArray[np.float32],
    captions: Sequence[str] | None = None,
    colours: Sequence[Colour] | None = None,
    *,
    min_side_px: int = 320,
    max_side_px: int | None = None,
) -> Image.Image:
    """Draw boxes, the largest first so that small ones stay visible.

    Args:
        image: uint8 [3, H, W].
        boxes_xyxy: [N, 4] pixels of ``image``; parts outside are cut off.
        captions: N short texts, put at the upper left corner of their boxes; none if left out.
        colours: N RGB triples, such as `class_colour` gives; the colours of classes 0 .. N-1 if left out.
        min_side_px: an image whose longer side is shorter is enlarged to it before drawing.
        max_side_px: an image whose longer side is longer is shrunk to it before drawing; None keeps it.

    Raises:
        ValueError: wrong type or shape of the image or boxes, boxes that are not finite or have x1 < x0 or y1 < y0,
            or other than N captions or colours.
    """
    boxes = torch.as_tensor(boxes_xyxy, dtype=torch.float32).reshape(-1, 4)
    _check_drawing(image, boxes, captions, colours)
    height, width = image.shape[1:]
    longer = max(height, width)
    wanted = max(longer, min_side_px) if max_side_px is None else min(max(longer, min_side_px), max_side_px)
    scale = wanted / longer
    if scale != 1:
        size = [max(1, round(height * scale)), max(1, round(width * scale))]
        image = resize(image, size, antialias=True)
        boxes = boxes * torch.tensor([size[1] / width, size[0] / height]).repeat(2)
    if not len(boxes):
        return to_pil_image(image)  # type: ignore[no-any-return]
    colours = colours or [class_colour(index) for index in range(len(boxes))]
    line_px = max(2, round(wanted / 320))
    # right and lower edges are exclusive, the last drawn pixel is one before them
    boxes = box_maths.clip(boxes, (image.shape[1], image.shape[2]))
    boxes[:, 2:] = torch.maximum(boxes[:, 2:] - 1, boxes[:, :2])
    order = box_maths.area(boxes).argsort(descending=True, stable=True).tolist()
    picture = to_pil_image(
        draw_bounding_boxes(image, boxes[order], colors=[colours[index] for index in order], width=line_px)
    )
    if captions is not None:
        for index in order:
            _write_caption(picture, boxes[index].tolist(), captions[index], colours[index])
    return picture  # type: ignore[no-any-return]


def _check_drawing(
    image: Tensor, boxes: Tensor, captions: Sequence[str] | None, colours: Sequence[Colour] | None
) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image: expected uint8 [3, H, W], got {image.dtype} {list(image.shape)}")
    if not torch.isfinite(boxes).all() or (boxes[:, 2:] < boxes[:, :2]).any():
        raise ValueError("boxes_xyxy: expected finite corners with x0 <= x1 and y0 <= y1; convert with simdetr.boxes")
    for name, given in (("captions", captions), ("colours", colours)):
        if given is not None and len(given) != len(boxes):
            raise ValueError(f"{name}: expected one per box ({len(boxes)}), got {len(given)}")


@functools.cache
def _font(size_px: int) -> ImageFont.FreeTypeFont:
    # matplotlib carries its own font files, so captions look alike on every machine and know more than Latin letters
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size_px)


def _write_caption(picture: Image.Image, box: Sequence[float], caption: str, colour: Colour) -> None:
    """A tag in the box's colour above its upper left corner, or inside where there is no room above."""
    draw = ImageDraw.Draw(picture)
    font = _font(max(11, round(max(picture.size) / 36)))
    left, top, right, bottom = draw.textbbox((0, 0), caption, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = max(0.0, min(box[0], picture.width - width))
    y = box[1] - height if box[1] >= height else box[1]
    red, green, blue = colour
    is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + 2 - left, y + 2 - top), caption, fill="black" if is_light else "white", font=font)


def write_pictures(source: ImageSource, labels: Labels, folder: str | Path, *, max_boxes: int = 25) -> int:
    """Write a copy of every labelled image with its boxes, class names and scores drawn on it.

    Args:
        source: the images of the labels.
        labels: predictions, pseudo-labels or truth.
        folder: where the copies go, under the images' relative paths; other formats than JPEG and PNG become PNG.
        max_boxes: the best-scored boxes drawn per image, so that a picture stays readable.

    Returns:
        Number of pictures written; images that cannot be read are passed over.

    Raises:
        ValueError: ``folder`` is the source's own root, where the copies would replace the images.
    """
    folder = Path(folder)
    if folder.resolve() == source.root.resolve():
        raise ValueError(f"folder: {folder} holds the images themselves; choose another one for their copies")
    written = 0
    for index, image_id in enumerate(labels.image_ids):
        try:
            image = read_image(source.record(image_id))
        except UnreadableImageError:
            continue
        found = labels.image(index)
        best = np.argsort(-found.scores, kind="stable")[:max_boxes]
        names = [labels.categories[label].name for label in found.classes[best]]
        picture = draw_boxes(
            image,
            found.boxes_xyxy[best],
            [f"{name} {score:.2f}" for name, score in zip(names, found.scores[best], strict=True)],
            [class_colour(int(label)) for label in found.classes[best]],
        )
        target = folder / image_id.lstrip("/")  # an absolute id must not lead back to the image itself
        if target.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            target = target.with_name(f"{target.name}.png")
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target)
        written += 1
    return written


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

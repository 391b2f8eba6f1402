"""Pictures for eyes: images, boxes and points in, PIL pictures out (predict, report and notebooks share them).

Boxes are drawn by torchvision; small images are enlarged first, so that lines and captions stay thin and readable.
A class has the same colour in every picture. Over a score map the found boxes are green and the human ones red, as in
figures 6 and 7 of KR 10-2022-0050617.
"""

from __future__ import annotations

import colorsys
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2.functional import resize, to_pil_image
from torchvision.utils import draw_bounding_boxes

from simdetr import boxes as box_maths
from simdetr.data import points as point_columns
from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.images import ImageSource, UnreadableImageError, read_image
from simdetr.data.labels import Labels
from simdetr.evaluation.heat_map_boxes import check_score_map

Colour = tuple[int, int, int]
GOLDEN_RATIO = 0.6180339887498949
INK: Colour = (16, 18, 22)
PAPER: Colour = (214, 217, 222)  # ground of sheets and of tiles that a picture does not fill
FOUND: Colour = (0, 230, 64)
HUMAN: Colour = (255, 32, 32)


def readable(source: ImageSource, image_ids: Iterable[str]) -> Iterator[tuple[int, Tensor]]:
    """Places in the list and pixels of the images that can be read, one by one."""
    for place, image_id in enumerate(image_ids):
        try:
            image = read_image(source.record(image_id))
        except UnreadableImageError:
            continue
        yield place, image


def class_colour(class_index: int) -> Colour:
    """The colour of a class, RGB 0..255: hues a golden section apart, so that neighbouring classes differ most."""
    hue = (0.02 + class_index * GOLDEN_RATIO) % 1.0
    saturation = (0.95, 0.70, 0.80)[class_index % 3]
    red, green, blue = (round(255 * value) for value in colorsys.hsv_to_rgb(hue, saturation, 1.0))
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
    _check_image(image)
    if not torch.isfinite(boxes).all() or (boxes[:, 2:] < boxes[:, :2]).any():
        raise ValueError("boxes_xyxy: expected finite corners with x0 <= x1 and y0 <= y1; convert with simdetr.boxes")
    _check_one_each("box", len(boxes), captions=captions, colours=colours)
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


def _check_image(image: Tensor) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image: expected uint8 [3, H, W], got {image.dtype} {list(image.shape)}")


def _check_one_each(what: str, count: int, **given: Sequence[object] | None) -> None:
    for name, values in given.items():
        if values is not None and len(values) != count:
            raise ValueError(f"{name}: expected one per {what} ({count}), got {len(values)}")


def draw_points(
    picture: Tensor | Image.Image,
    points_xy: Tensor | NDArray[np.float32],
    captions: Sequence[str] | None = None,
    colours: Sequence[Colour] | None = None,
    *,
    filled: bool = True,
    size_hw: tuple[int, int] | None = None,
) -> Image.Image:
    """Draw points, each a ring with a cross in it that is as large on a small image as on a large one.

    Args:
        picture: uint8 [3, H, W], enlarged as `draw_boxes` does; or a picture with boxes, of which a copy is drawn on.
        points_xy: [N, 2] pixels; those that are NaN are passed over, those outside the picture are cut off.
        captions: N short texts, put at the upper right of their points; none if left out or empty.
        colours: N RGB triples; the colours of classes 0 .. N-1 if left out.
        filled: fill the rings, as for predictions; hollow ones are for human points beside them.
        size_hw: height and width of the image whose pixels the points are in; the picture's own if left out.

    Raises:
        ValueError: wrong type or shape of the picture or points, or other than N captions or colours.
    """
    points = np.asarray(points_xy, dtype=np.float64).reshape(-1, 2)
    _check_one_each("point", len(points), captions=captions, colours=colours)
    if isinstance(picture, Tensor):
        size_hw = size_hw or (picture.shape[-2], picture.shape[-1])
        drawn = draw_boxes(picture, np.zeros((0, 4), np.float32))
    else:
        drawn = picture.copy()
    height, width = size_hw or (drawn.height, drawn.width)
    for index in np.flatnonzero(np.isfinite(points).all(1)).tolist():
        x, y = points[index] * (drawn.width / width, drawn.height / height)
        colour = class_colour(index) if colours is None else colours[index]
        radius = _draw_ring(ImageDraw.Draw(drawn), (math.floor(x), math.floor(y)), colour, filled=filled)
        if captions is not None and captions[index]:
            _write_caption(drawn, (x + radius, y - radius), captions[index], colour)
    return drawn


def _draw_ring(draw: ImageDraw.ImageDraw, centre: tuple[int, int], colour: Colour, *, filled: bool) -> int:
    """A ring between dark edges, which show it on any ground, and a cross through its centre; its outer radius."""
    x, y = centre
    line = max(2, round(max(draw.im.size) / 320))  # as thick as a box
    radius: int = 5 * line

    def ring(distance: int, colour: Colour, width: int, fill: Colour | None = None) -> None:
        draw.ellipse((x - distance, y - distance, x + distance, y + distance), fill, colour, width)

    ring(radius + 1, INK, line + 2)
    ring(radius, colour, line, colour if filled else None)
    cross = INK if filled else colour
    draw.line((x - radius, y, x + radius, y), cross, line // 2)
    draw.line((x, y - radius, x, y + radius), cross, line // 2)
    return radius


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


def write_pictures(
    source: ImageSource, labels: Labels, folder: str | Path, *, max_boxes: int = 25, truth: Labels | None = None
) -> int:
    """Write a copy of every labelled image with its boxes, points, class names and scores drawn on it.

    Args:
        source: the images of the labels.
        labels: predictions, pseudo-labels or truth.
        folder: where the copies go, under the images' relative paths; other formats than JPEG and PNG become PNG.
        max_boxes: the best-scored boxes drawn per image, so that a picture stays readable.
        truth: human labels whose points are drawn too, as hollow rings.

    Returns:
        Number of pictures written; images that cannot be read are passed over.

    Raises:
        ValueError: ``folder`` is the source's own root, where the copies would replace the images.
    """
    folder = Path(folder)
    if folder.resolve() == source.root.resolve():
        raise ValueError(f"folder: {folder} holds the images themselves; choose another one for their copies")
    colour_of = {category.id: class_colour(index) for index, category in enumerate(labels.categories)}
    truth_colours = [] if truth is None else [colour_of.get(category.id, PAPER) for category in truth.categories]
    written = 0
    for index, image in readable(source, labels.image_ids):
        image_id = labels.image_ids[index]
        picture = draw_labels(image, labels.image(index), labels.categories, max_boxes)
        own = truth.of(image_id) if truth is not None and image_id in truth else None
        if own is not None and own.points is not None:
            colours = [truth_colours[label] for label in own.classes]
            picture = draw_points(picture, own.points, None, colours, filled=False, size_hw=own.size_hw)
        target = picture_path(folder, image_id)
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target)
        written += 1
    return written


def picture_path(folder: Path, image_id: str) -> Path:
    """Where the picture of an image goes: under its relative path, as PNG unless it is a JPEG."""
    target = folder / image_id.lstrip("/")  # an absolute id must not lead back to the image itself
    is_writable = target.suffix.lower() in (".jpg", ".jpeg", ".png")
    return target if is_writable else target.with_name(f"{target.name}.png")


def draw_labels(image: Tensor, found: ImageLabels, categories: Sequence[Category], max_boxes: int) -> Image.Image:
    """The best-scored boxes and their points, each place once; a landmark without box has its caption at its point."""
    order = np.argsort(-found.scores, kind="stable")
    # one box may have come with several classes: the best is shown
    places = found.boxes_xyxy if found.points is None else np.hstack([found.boxes_xyxy, found.points])
    first = np.unique(places[order], axis=0, return_index=True)[1]
    best = order[np.sort(first)[:max_boxes]]
    captions = [f"{categories[found.classes[row]].name} {found.scores[row]:.2f}" for row in best]
    colours = [class_colour(int(label)) for label in found.classes[best]]
    points = point_columns.unknown(len(best)) if found.points is None else found.points[best]
    alone = point_columns.only_points(found.boxes_xyxy[best], points)
    boxed = np.flatnonzero(~alone)
    picture = draw_boxes(
        image, found.boxes_xyxy[best[boxed]], [captions[row] for row in boxed], [colours[row] for row in boxed]
    )
    texts = [caption if is_alone else "" for caption, is_alone in zip(captions, alone, strict=True)]
    return draw_points(picture, points, texts, colours, size_hw=(image.shape[1], image.shape[2]))


def contact_sheet(images: Sequence[Image.Image], columns: int, *, gap_px: int = 4) -> Image.Image:
    """Pictures side by side in rows, each in a cell of the largest one's size, in reading order.

    Raises:
        ValueError: no images, or ``columns`` below 1.
    """
    if not images or columns < 1:
        raise ValueError(f"expected at least one image and one column, got {len(images)} images, {columns} columns")
    columns = min(columns, len(images))
    cell_width, cell_height = max(i.width for i in images), max(i.height for i in images)
    rows, step = math.ceil(len(images) / columns), (cell_width + gap_px, cell_height + gap_px)
    sheet = Image.new("RGB", (columns * step[0] - gap_px, rows * step[1] - gap_px), PAPER)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        x, y = column * step[0] + (cell_width - image.width) // 2, row * step[1] + (cell_height - image.height) // 2
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
    picks = np.random.default_rng(seed).permutation(len(members))
    images = readable(source, (labels.image_ids[labels.owners[members[pick]]] for pick in picks))
    boxes = labels.boxes_xyxy[members[picks]]
    tiles = [_tile(image, boxes[place], tile_px) for place, image in islice(images, count)]
    if not tiles:
        raise ValueError(f"class_index: class {class_index} has {len(members)} boxes, none on a readable image")
    return contact_sheet(tiles, columns)


def _tile(image: Tensor, box_xyxy: NDArray[np.float32], tile_px: int) -> Image.Image:
    """The box's part of the image, its longer side scaled to the tile, on a square of the paper's colour."""
    height, width = image.shape[1:]
    x0, y0 = (max(0, min(math.floor(box_xyxy[axis]), side - 1)) for axis, side in enumerate((width, height)))
    x1, y1 = max(x0 + 1, math.ceil(box_xyxy[2])), max(y0 + 1, math.ceil(box_xyxy[3]))
    crop = to_pil_image(image[:, y0:y1, x0:x1])
    return ImageOps.pad(crop, (tile_px, tile_px), Image.Resampling.BILINEAR, PAPER)


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
    _check_image(image)
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

"""A seed and a number of images -> rendered scenes with exact boxes: ``images/*.jpg`` and a COCO ``instances.json``.

For the quickstart, the tests and anyone offline (design §8). An object's kind is a pair of shape and texture; both are
shared between kinds and colours are drawn at random, so none of them alone tells the kind. Backgrounds are textured,
clutter is no object (soft blobs, plain polygons, lines), objects of many sizes hide one another, the light is uneven
and there is noise. A box is the visible extent of its object; objects of which little shows carry no label. Plain
scenes, for a first run of minutes, have a few large objects that stand apart, and colours tell their kinds.

Letters: H, W image size in pixels; n labelled objects of one image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simdetr.data.scene_drawing import (
    SHAPES,
    TEXTURES,
    colours_of_kind,
    draw_background,
    draw_clutter,
    draw_lines,
    draw_object,
    light_and_noise,
)

_MIN_VISIBLE_FRACTION = 0.35  # of the whole object, parts outside the frame included
_MIN_VISIBLE_SIDE_PX = 4
_APART = 1.2  # radii; few objects reach further, and those not far


SCENE_CLASSES: tuple[str, ...] = (
    "striped_disc",
    "dotted_disc",
    "striped_box",
    "checked_box",
    "dotted_triangle",
    "checked_triangle",
    "speckled_star",
    "speckled_ring",
)
PLAIN_CLASSES: tuple[str, ...] = ("striped_disc", "checked_box", "dotted_triangle", "speckled_star")
"""Four kinds that differ in shape and in texture."""


@dataclass(frozen=True)
class SceneStyle:
    """How hard scenes are. Numbers are inclusive; radii are parts of half the shorter side.

    Attributes:
        objects: fewest and most objects.
        radii: smallest and largest radius.
        beside: probability that an object lies beside or over an earlier one.
        clutter: fewest and most things that are no objects.
        lines: most lines over everything.
        apart: objects lie within the picture and hardly hide each other, or are left out.
        coloured: every kind has colours of its own.
    """

    objects: tuple[int, int] = (1, 7)
    radii: tuple[float, float] = (0.09, 0.55)
    beside: float = 0.3
    clutter: tuple[int, int] = (3, 8)
    lines: int = 2
    apart: bool = False
    coloured: bool = False


StyleName = Literal["hard", "plain"]
STYLES: dict[str, SceneStyle] = {
    "hard": SceneStyle(),
    "plain": SceneStyle((2, 4), (0.22, 0.4), beside=0.0, clutter=(0, 1), lines=0, apart=True, coloured=True),
}


@dataclass(frozen=True)
class Scene:
    """One rendered picture and what is in it.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        boxes_xyxy: float32 [n, 4], visible extents in pixels.
        classes: int64 [n], index into the classes asked for.
        visible_areas: int64 [n], visible pixels of each object.
        owner: int16 [H, W], the label's row that shows at each pixel; -1 where no labelled object shows.
    """

    image: NDArray[np.uint8]
    boxes_xyxy: NDArray[np.float32]
    classes: NDArray[np.int64]
    visible_areas: NDArray[np.int64]
    owner: NDArray[np.int16]


def render_scenes(
    out: Path,
    num_images: int,
    size: tuple[int, int] = (160, 160),
    seed: int = 0,
    classes: Sequence[str] = SCENE_CLASSES,
    style: StyleName = "hard",
) -> Path:
    """Render images and their labels; the same arguments give the same scenes on any machine.

    Image i depends on the seed and on i only, so a longer set begins with the shorter one.

    Args:
        out: folder to write ``images/<number>.jpg`` and ``instances.json`` in; made if absent.
        num_images: how many, at least 1.
        size: (height, width) in pixels, each at least 32.
        seed: any non-negative number; take different ones for training and validation.
        classes: names ``<texture>_<shape>`` of :data:`simdetr.data.scene_drawing.TEXTURES` and ``SHAPES``.
        style: a name of :data:`STYLES`.

    Returns:
        The path of ``instances.json``, whose file names are relative to ``out``.

    Raises:
        ValueError: for a size, number or class name that cannot be drawn.
    """
    if num_images < 1:
        raise ValueError(f"num_images: expected at least 1, got {num_images}")
    (out / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for index in range(num_images):
        scene = draw_scene(np.random.default_rng((seed, index)), size, classes, style)
        name = f"images/{index:06d}.jpg"
        Image.fromarray(scene.image).save(out / name, quality=93, subsampling=0)
        images.append({"id": index + 1, "file_name": name, "height": size[0], "width": size[1]})
        for (x0, y0, x1, y1), kind, area in zip(
            scene.boxes_xyxy.tolist(), scene.classes.tolist(), scene.visible_areas.tolist(), strict=True
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": kind + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": area,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
    target = out / "instances.json"
    part = target.with_suffix(".json.part")
    part.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    part.replace(target)
    return target


def draw_scene(
    rng: np.random.Generator,
    size: tuple[int, int] = (160, 160),
    classes: Sequence[str] = SCENE_CLASSES,
    style: StyleName = "hard",
) -> Scene:
    """Draw one scene in memory.

    Args:
        rng: the source of all randomness.
        size: (height, width) in pixels, each at least 32.
        classes: names ``<texture>_<shape>``.
        style: a name of :data:`STYLES`.

    Raises:
        ValueError: for a size below 32, an unknown style or class name.
    """
    if min(size) < 32:
        raise ValueError(f"size: expected a height and width of at least 32 px, got {size}")
    if style not in STYLES:
        raise ValueError(f"style: expected one of {sorted(STYLES)}, got {style!r}")
    how = STYLES[style]
    kinds = [_parse_class(name) for name in classes]
    canvas = draw_background(rng, size)
    draw_clutter(canvas, rng, count=_draw_count(rng, how.clutter))
    owner = np.full(size, -1, dtype=np.int16)
    drawn: list[tuple[int, float]] = []
    placed: list[tuple[float, float, float]] = []
    for index in range(_draw_count(rng, how.objects)):
        radius = 0.5 * min(size) * float(np.exp(rng.uniform(*np.log(how.radii))))
        centre = _place(rng, size, radius, placed, how)
        if centre is None:
            break
        kind = int(rng.integers(len(kinds)))
        tones = colours_of_kind(kind / len(kinds), rng) if how.coloured else None
        whole_area = draw_object(canvas, owner, index, centre, radius, kinds[kind], rng, tones)
        drawn.append((kind, whole_area))
        placed.append((*centre, radius))
    draw_lines(canvas, rng, count=_draw_count(rng, (0, how.lines)))
    image = light_and_noise(canvas, rng)
    return _label_visible(image, owner, drawn)


def _draw_count(rng: np.random.Generator, limits: tuple[int, int]) -> int:
    return int(rng.integers(limits[0], limits[1] + 1))


def _place(
    rng: np.random.Generator,
    size: tuple[int, int],
    radius: float,
    placed: Sequence[tuple[float, float, float]],
    style: SceneStyle,
) -> tuple[float, float] | None:
    """Centre (x, y) of the next object beside those at (x, y, radius); None where it should lie apart and cannot."""
    height, width = size
    if not style.apart:
        centre = (float(rng.uniform(0, width)), float(rng.uniform(0, height)))
        if placed and rng.random() < style.beside:  # beside or over an earlier object, so that occlusion is common
            near = placed[int(rng.integers(len(placed)))]
            centre = (near[0] + float(rng.normal(0, radius)), near[1] + float(rng.normal(0, radius)))
        return centre
    inset = min(_APART * radius, 0.5 * min(size))
    for _ in range(50):
        x, y = float(rng.uniform(inset, width - inset)), float(rng.uniform(inset, height - inset))
        if all(np.hypot(x - other[0], y - other[1]) > _APART * (radius + other[2]) for other in placed):
            return x, y
    return None


def _parse_class(name: str) -> tuple[str, str]:
    texture, _, shape = name.partition("_")
    if texture not in TEXTURES or shape not in SHAPES:
        raise ValueError(
            f"classes: expected names '<texture>_<shape>' with a texture of {sorted(TEXTURES)} and a shape of "
            f"{sorted(SHAPES)}, got {name!r}"
        )
    return texture, shape


def _label_visible(image: NDArray[np.uint8], owner: NDArray[np.int16], drawn: list[tuple[int, float]]) -> Scene:
    """Boxes of what shows of each object; rows are renumbered without the nearly hidden ones."""
    rows = np.full_like(owner, -1)
    boxes: list[tuple[int, int, int, int]] = []
    kinds: list[int] = []
    areas: list[int] = []
    for index, (kind, whole_area) in enumerate(drawn):
        mask = owner == index
        visible = int(mask.sum())
        if visible < _MIN_VISIBLE_FRACTION * whole_area or visible == 0:
            continue
        ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1)
        if min(box[2] - box[0], box[3] - box[1]) < _MIN_VISIBLE_SIDE_PX:
            continue
        rows[mask] = len(boxes)
        boxes.append(box)
        kinds.append(kind)
        areas.append(visible)
    return Scene(
        image=image,
        boxes_xyxy=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        classes=np.array(kinds, dtype=np.int64),
        visible_areas=np.array(areas, dtype=np.int64),
        owner=rows,
    )

"""A seed and a number of images -> rendered scenes with exact boxes: ``images/*.jpg`` and a COCO ``instances.json``.

For the quickstart, the tests and anyone offline. An object's kind is a pair of shape and texture; both are shared
between kinds and colours are drawn at random, so none of them alone tells the kind. Backgrounds are textured, objects
of many sizes hide one another, and there is clutter, uneven light and noise. A box is the visible extent of its object;
objects of which little shows carry no label. Plain scenes have a few large objects apart, and colours tell their kinds.

A canvas is float32 [H, W, 3] RGB in 0..1, changed in place. Objects are drawn from a signed field for the shape and a
signed field for the texture, both evaluated on the object's own rotated axes in a window around it.
Letters: H, W image size in pixels; n labelled objects of one image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from colorsys import hsv_to_rgb
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.coco import write_coco
from simdetr.data.labels import Labels

Field = NDArray[np.float32]
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
        classes: names ``<texture>_<shape>`` of :data:`simdetr.data.scenes.TEXTURES` and ``SHAPES``.
        style: a name of :data:`STYLES`.

    Returns:
        The path of ``instances.json``, whose file names are relative to ``out``.

    Raises:
        ValueError: for a size, number or class name that cannot be drawn.
    """
    if num_images < 1:
        raise ValueError(f"num_images: expected at least 1, got {num_images}")
    (out / "images").mkdir(parents=True, exist_ok=True)
    images = []
    for index in range(num_images):
        scene = draw_scene(np.random.default_rng((seed, index)), size, classes, style)
        name = f"images/{index:06d}.jpg"
        Image.fromarray(scene.image).save(out / name, quality=93, subsampling=0)
        images.append(ImageLabels.build(name, size, scene.boxes_xyxy, scene.classes, areas=scene.visible_areas))
    categories = [Category(number, kind) for number, kind in enumerate(classes, start=1)]
    write_coco(Labels.from_images(images, categories), out / "instances.json")
    return out / "instances.json"


def draw_scene(
    rng: np.random.Generator,
    size: tuple[int, int] = (160, 160),
    classes: Sequence[str] = SCENE_CLASSES,
    style: StyleName = "hard",
) -> Scene:
    """Draw one scene in memory, all of it from ``rng``; else as :func:`render_scenes`."""
    if min(size) < 32:
        raise ValueError(f"size: expected a height and width of at least 32 px, got {size}")
    if style not in STYLES:
        raise ValueError(f"style: expected one of {sorted(STYLES)}, got {style!r}")
    how = STYLES[style]
    kinds = [_parse_class(name) for name in classes]
    canvas = draw_background(rng, size)
    draw_clutter(canvas, rng, count=int(rng.integers(*how.clutter, endpoint=True)))
    owner = np.full(size, -1, dtype=np.int16)
    drawn: list[tuple[int, float]] = []
    placed: list[tuple[float, float, float]] = []
    for index in range(rng.integers(*how.objects, endpoint=True)):
        radius = 0.5 * min(size) * float(np.exp(rng.uniform(*np.log(how.radii))))
        centre = _place(rng, size, radius, placed, how)
        if centre is None:
            break
        kind = int(rng.integers(len(kinds)))
        tones = colours_of_kind(kind / len(kinds), rng) if how.coloured else None
        whole_area = draw_object(canvas, owner, index, centre, radius, kinds[kind], rng, tones)
        drawn.append((kind, whole_area))
        placed.append((*centre, radius))
    draw_lines(canvas, rng, count=int(rng.integers(0, how.lines, endpoint=True)))
    image = light_and_noise(canvas, rng)
    return _label_visible(image, owner, drawn)


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
    kept: list[tuple[int, int]] = []
    windows = ndimage.find_objects(owner + 1, max_label=len(drawn))
    for index, ((kind, whole_area), window) in enumerate(zip(drawn, windows, strict=True)):
        visible = int((owner == index).sum())
        if window is None or visible < _MIN_VISIBLE_FRACTION * whole_area:
            continue
        y, x = window
        if min(y.stop - y.start, x.stop - x.start) < _MIN_VISIBLE_SIDE_PX:
            continue
        rows[owner == index] = len(boxes)
        boxes.append((x.start, y.start, x.stop, y.stop))
        kept.append((kind, visible))
    kinds, areas = np.array(kept, dtype=np.int64).reshape(-1, 2).T
    return Scene(image, np.array(boxes, dtype=np.float32).reshape(-1, 4), kinds, areas, rows)


# ----------------------------------------------------------------------------------------------------------------------
# The brushes


# Signed distance-like fields: below zero inside, in units of the object's radius.
SHAPES: dict[str, Callable[[Field, Field], Field]] = {
    "box": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - np.float32(0.82),
    "disc": lambda u, v: np.hypot(u, v) - np.float32(0.95),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - np.float32(0.72)) - np.float32(0.25),
    "star": lambda u, v: np.hypot(u, v) - np.float32(0.68) - np.float32(0.3) * np.cos(5 * np.arctan2(v, u)),
    "triangle": lambda u, v: np.maximum(v, np.abs(u) * np.float32(0.866) - v / 2) - np.float32(0.5),
}

# Fields over the object's own rotated axes, in radians of the texture's period; their sign picks one of two colours.
TEXTURES: dict[str, Callable[[Field, Field, np.random.Generator], Field]] = {
    "checked": lambda x, y, rng: 2 * np.sin(x * np.float32(0.7)) * np.sin(y * np.float32(0.7)),
    "dotted": lambda x, y, rng: np.cos(x * np.float32(0.8)) + np.cos(y * np.float32(0.8)) - np.float32(0.5),
    "speckled": lambda x, y, rng: rng.standard_normal(x.shape, dtype=np.float32),
    "striped": lambda x, y, rng: np.sin(x),
}


def _turned(x: Field, y: Field, angle: float) -> tuple[Field, Field]:
    """Positions along and across an axis that is turned by an angle."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * cos + y * sin, y * cos - x * sin


@contextmanager
def _pen(canvas: Field) -> Iterator[ImageDraw.ImageDraw]:
    """Draw into a canvas as into a picture of 8 bits."""
    picture = Image.fromarray((canvas * 255).astype(np.uint8))
    yield ImageDraw.Draw(picture)
    canvas[:] = np.asarray(picture, dtype=np.float32) / 255


def _two_tones(rng: np.random.Generator) -> tuple[Field, Field]:
    """A dark and a light colour of independent hues, in random order; each float32 [3] in 0..1."""
    dark = rng.random(3, dtype=np.float32) * np.float32(rng.uniform(0.2, 0.75))
    light = 1 - rng.random(3, dtype=np.float32) * np.float32(rng.uniform(0.2, 0.85))
    return (dark, light) if rng.random() < 0.5 else (light, dark)


def colours_of_kind(hue: float, rng: np.random.Generator) -> tuple[Field, Field]:
    """A dark and a light colour near a hue of 0..1, not twice the same; each float32 [3] in 0..1."""
    own = hue + rng.normal(0, 0.02)
    tones = [
        hsv_to_rgb(own % 1.0, rng.uniform(*saturation), rng.uniform(*value))
        for saturation, value in (((0.7, 1.0), (0.25, 0.5)), ((0.5, 0.8), (0.8, 1.0)))
    ]
    dark, light = (np.array(tone, dtype=np.float32) for tone in tones)
    return dark, light


def _smooth_noise(rng: np.random.Generator, size: tuple[int, int], cells: int) -> Field:
    """Random values on a coarse grid, interpolated; float32 [H, W] of about zero mean and unit deviation."""
    grid = Image.fromarray(rng.standard_normal((cells + 1, cells + 1), dtype=np.float32))
    return np.asarray(grid.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def draw_background(rng: np.random.Generator, size: tuple[int, int]) -> Field:
    """Two grounds with a wavy border, each of two near colours mixed by noise and a faint regular texture."""
    ys, xs = np.mgrid[: size[0], : size[1]].astype(np.float32)
    border = _smooth_noise(rng, size, 3) + np.float32(rng.normal(0, 1.5))
    canvas = np.zeros((*size, 3), dtype=np.float32)
    for ground in (border > 0, border <= 0):
        base = np.clip(rng.uniform(0.2, 0.8) + rng.normal(0, 0.16, 3), 0, 1).astype(np.float32)
        other = np.clip(base + rng.normal(0, 0.16, 3), 0, 1).astype(np.float32)
        mix = sum((_smooth_noise(rng, size, cells) * weight for cells, weight in ((4, 0.5), (12, 0.4), (40, 0.4))), 0.0)
        if rng.random() < 0.6:
            angle, period = rng.uniform(0, np.pi), rng.uniform(5, 18)
            wave = np.float32(2 * np.pi / period)
            along, across = (side * wave for side in _turned(xs, ys, angle))
            texture = TEXTURES[("striped", "checked")[int(rng.integers(2))]]
            mix = mix + np.float32(rng.uniform(0.2, 0.7)) * texture(along, across, rng)
        blend = np.clip(np.float32(0.5) + np.float32(0.5) * mix, 0, 1)[..., None]
        canvas = np.where(ground[..., None], base + blend * (other - base), canvas)
    return canvas


def draw_clutter(canvas: Field, rng: np.random.Generator, count: int) -> None:
    """Things that are no objects: soft-edged blobs, plain polygons and lines, drawn into ``canvas``."""
    height, width = canvas.shape[:2]
    blobs = 0
    with _pen(canvas) as pen:
        for _ in range(count):
            if rng.random() < 0.4:
                blobs += 1
                continue
            centre = rng.uniform((0, 0), (width, height))
            radius = 0.5 * min(height, width) * rng.uniform(0.06, 0.35)
            angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(4, 8))))
            corners = centre + radius * np.stack((np.cos(angles), np.sin(angles)), axis=1) * rng.uniform(0.5, 1, (1, 2))
            pen.polygon([(float(x), float(y)) for x, y in corners], fill=tuple(rng.integers(20, 235, 3).tolist()))
    ys, xs = np.ogrid[:height, :width]
    for _ in range(blobs):
        x, y = rng.uniform((0, 0), (width, height))
        spread = 0.5 * min(height, width) * rng.uniform(0.08, 0.4)
        distance = ((xs - x) ** 2 + (ys - y) ** 2) / spread**2
        alpha = (rng.uniform(0.3, 0.8) * np.exp(-distance)).astype(np.float32)[..., None]
        canvas += alpha * (rng.random(3, dtype=np.float32) - canvas)
    draw_lines(canvas, rng, count=int(rng.integers(0, 4)))


def draw_lines(canvas: Field, rng: np.random.Generator, count: int) -> None:
    """Thin straight lines across the picture; they may pass over objects and leave their boxes as they are."""
    height, width = canvas.shape[:2]
    if count == 0:
        return  # not even rounded to 8 bits
    with _pen(canvas) as pen:
        for _ in range(count):
            ends = rng.uniform((0, 0), (width, height), (2, 2))
            colour = tuple(rng.integers(20, 235, 3).tolist())
            pen.line([(float(x), float(y)) for x, y in ends], fill=colour, width=int(rng.integers(1, 3)))


def draw_object(
    canvas: Field,
    owner: NDArray[np.int16],
    index: int,
    centre: tuple[float, float],
    radius: float,
    kind: tuple[str, str],
    rng: np.random.Generator,
    tones: tuple[Field, Field] | None = None,
) -> float:
    """Draw one object over what is there and mark its pixels in ``owner``; returns its whole area in px².

    Its two colours are drawn at random, a dark and a light one, unless ``tones`` gives them.
    """
    height, width = owner.shape
    angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(1, 1.5)
    reach = int(np.ceil(radius * stretch)) + 2
    left, top = round(centre[0]) - reach, round(centre[1]) - reach
    ys, xs = np.mgrid[top : top + 2 * reach, left : left + 2 * reach].astype(np.float32)
    along, across = _turned(xs + np.float32(0.5 - centre[0]), ys + np.float32(0.5 - centre[1]), angle)
    field = SHAPES[kind[1]](along / np.float32(radius * stretch), across / np.float32(radius))
    alpha = np.clip(np.float32(0.5) - field * np.float32(radius), 0, 1)  # an edge about one pixel wide

    period = float(np.clip(radius * rng.uniform(0.35, 0.6), 3.0, 12.0))
    wave = np.float32(2 * np.pi / period)
    sign = TEXTURES[kind[0]](along * wave, across * wave, rng)
    first, second = _two_tones(rng) if tones is None else tones
    blend = np.clip(np.float32(0.5) + sign, 0, 1)[..., None]
    shade = np.float32(rng.uniform(0, 0.35)) * (along + across)[..., None] / np.float32(2 * radius)
    colour = np.clip((first + blend * (second - first)) * (1 + shade), 0, 1)

    window = (slice(max(top, 0), max(top + 2 * reach, 0)), slice(max(left, 0), max(left + 2 * reach, 0)))
    inside = (ys >= 0) & (ys < height) & (xs >= 0) & (xs < width)
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    whole_area = float(alpha.sum())
    if len(rows) == 0 or len(columns) == 0:
        return whole_area
    crop = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    canvas[window] += alpha[crop][..., None] * (colour[crop] - canvas[window])
    owner[window][alpha[crop] > 0.5] = index
    return whole_area


def light_and_noise(canvas: Field, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Light that falls off in one direction, and sensor noise; float 0..1 to uint8 [H, W, 3]."""
    height, width = canvas.shape[:2]
    angle, fall = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.45)
    ys, xs = np.linspace(-1, 1, height), np.linspace(-1, 1, width)
    light = 1 + fall * (ys[:, None] * np.sin(angle) + xs[None] * np.cos(angle)) / np.sqrt(2)
    noise = rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(0.01, 0.035))
    lit = canvas * light.astype(np.float32)[..., None] + noise
    return np.asarray(np.clip(lit * 255, 0, 255), dtype=np.uint8)

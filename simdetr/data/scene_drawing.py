"""Random generator and canvas -> the canvas with one more thing on it: the brushes of :mod:`simdetr.data.scenes`.

A canvas is float32 [H, W, 3] RGB in 0..1, changed in place. Objects are drawn from a signed field for the shape and a
signed field for the texture, both evaluated on the object's own rotated axes in a window around it.
"""

from __future__ import annotations

from collections.abc import Callable
from colorsys import hsv_to_rgb

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Field = NDArray[np.float32]


def _triangle(u: Field, v: Field) -> Field:
    return np.asarray(np.maximum(v, np.abs(u) * 0.866 - v / 2) - 0.5, dtype=np.float32)


def _star(u: Field, v: Field) -> Field:
    return np.asarray(np.hypot(u, v) - 0.68 - 0.3 * np.cos(5 * np.arctan2(v, u)), dtype=np.float32)


# Signed distance-like fields: below zero inside, in units of the object's radius.
SHAPES: dict[str, Callable[[Field, Field], Field]] = {
    "box": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - np.float32(0.82),
    "disc": lambda u, v: np.hypot(u, v) - np.float32(0.95),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - np.float32(0.72)) - np.float32(0.25),
    "star": _star,
    "triangle": _triangle,
}


def _stripes(x: Field, y: Field, rng: np.random.Generator) -> Field:
    return np.sin(x)


def _dots(x: Field, y: Field, rng: np.random.Generator) -> Field:
    return np.asarray(np.cos(x * 0.8) + np.cos(y * 0.8) - 0.5, dtype=np.float32)


def _checks(x: Field, y: Field, rng: np.random.Generator) -> Field:
    return np.asarray(2 * np.sin(x * 0.7) * np.sin(y * 0.7), dtype=np.float32)


def _speckles(x: Field, y: Field, rng: np.random.Generator) -> Field:
    return rng.standard_normal(x.shape, dtype=np.float32)


# Fields over the object's own rotated axes, in radians of the texture's period; their sign picks one of two colours.
TEXTURES: dict[str, Callable[[Field, Field, np.random.Generator], Field]] = {
    "checked": _checks,
    "dotted": _dots,
    "speckled": _speckles,
    "striped": _stripes,
}


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
            wave = 2 * np.pi / period
            along = (xs * np.float32(np.cos(angle)) + ys * np.float32(np.sin(angle))) * np.float32(wave)
            across = (ys * np.float32(np.cos(angle)) - xs * np.float32(np.sin(angle))) * np.float32(wave)
            texture = (_stripes, _checks)[int(rng.integers(2))]
            mix = mix + np.float32(rng.uniform(0.2, 0.7)) * texture(along, across, rng)
        blend = np.clip(np.float32(0.5) + np.float32(0.5) * mix, 0, 1)[..., None]
        canvas = np.where(ground[..., None], base + blend * (other - base), canvas)
    return canvas


def draw_clutter(canvas: Field, rng: np.random.Generator, count: int) -> None:
    """Things that are no objects: soft-edged blobs, plain polygons and lines, drawn into ``canvas``."""
    height, width = canvas.shape[:2]
    picture = Image.fromarray((canvas * 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    blobs = 0
    for _ in range(count):
        if rng.random() < 0.4:
            blobs += 1
            continue
        centre = rng.uniform((0, 0), (width, height))
        radius = 0.5 * min(height, width) * rng.uniform(0.06, 0.35)
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(4, 8))))
        corners = centre + radius * np.stack((np.cos(angles), np.sin(angles)), axis=1) * rng.uniform(0.5, 1, (1, 2))
        pen.polygon([(float(x), float(y)) for x, y in corners], fill=tuple(rng.integers(20, 235, 3).tolist()))
    canvas[:] = np.asarray(picture, dtype=np.float32) / 255
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
    if count == 0:
        return
    height, width = canvas.shape[:2]
    picture = Image.fromarray((canvas * 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(count):
        ends = rng.uniform((0, 0), (width, height), (2, 2))
        colour = tuple(rng.integers(20, 235, 3).tolist())
        pen.line([(float(x), float(y)) for x, y in ends], fill=colour, width=int(rng.integers(1, 3)))
    canvas[:] = np.asarray(picture, dtype=np.float32) / 255


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
    dx, dy = xs + np.float32(0.5 - centre[0]), ys + np.float32(0.5 - centre[1])
    along = dx * np.float32(np.cos(angle)) + dy * np.float32(np.sin(angle))
    across = dy * np.float32(np.cos(angle)) - dx * np.float32(np.sin(angle))
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

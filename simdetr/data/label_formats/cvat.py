"""CVAT's XML 1.1, of images and of videos: boxes, rotated ones, ellipses, polygons and masks.

An image without shapes shows no object, CVAT says nothing else of it. Of a track the frames count in which it is not
``outside``; frames of a video are named ``frame_000000`` and on, with the ending that the images have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import numpy as np

from simdetr.data import masks as mask_codes
from simdetr.data.annotations import Category, LabelError
from simdetr.data.images import MAX_PIXELS, ImageSource
from simdetr.data.label_formats import shapes
from simdetr.data.label_formats.known_images import KnownImages
from simdetr.data.label_formats.reading import Gathering, Reading, number, shown, size_hw
from simdetr.data.label_formats.xml_tree import number_at, read_xml, root_tag, text_at
from simdetr.data.labels import Labels
from simdetr.data.storage import atomic_path

_SHAPES = ("box", "ellipse", "polygon", "mask")
_WITHOUT_BOX = ("cuboid", "points", "polyline", "skeleton")
_MAX_FRAMES = 10_000_000
_SIDES = ("xtl", "ytl", "xbr", "ybr")


def recognises(path: Path) -> bool:
    """Whether a file is CVAT's XML."""
    return root_tag(path) == "annotations"


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class _Drawn:
    """One shape: around it, as a segmentation for its mask, and a note if it is no plain box."""

    box: shapes.Box
    polygon: list[float] | None = None
    run_lengths: tuple[tuple[int, int, int, int], list[int]] | None = None
    note: str = ""


def read(reading: Reading) -> Labels:
    """Read the XML of images or of a video."""
    root = read_xml(reading.path)
    if root.tag != "annotations":
        raise LabelError(f"{reading.path} is no file of CVAT: expected <annotations>, got <{shown(root.tag)[1:-1]}>")
    names = [text_at(label, "name") for label in root.iterfind("meta//labels/label")]
    names = list(dict.fromkeys(name for name in names if name))
    gathering = Gathering(reading.report, [Category(place, name) for place, name in enumerate(names, start=1)])
    if root.find("track") is not None or (root.find("image") is None and root.find("meta//original_size") is not None):
        _video(root, gathering, reading)
    else:
        _images(root, gathering, reading)
    return gathering.labels(reading.images.source)


def _images(root: Element, gathering: Gathering, reading: Reading) -> None:
    report, known = reading.report, reading.images
    entries = [(entry, (entry.get("name") or "").strip()) for entry in root.iterfind("image")]
    lacking = [name for entry, name in entries if size_hw(entry.get("height"), entry.get("width")) is None and name]
    found = [one for one in map(known.find, lacking) if one is not None]
    sizes = dict(zip(found, known.sizes(found), strict=True))
    for place, (entry, name) in enumerate(entries, start=1):
        if not name:
            report.add("image without name, dropped", f"image number {place}")
            continue
        image_id = known.find(name) or name
        size = size_hw(entry.get("height"), entry.get("width")) or sizes.get(image_id)
        if size is None:
            report.add("image without size that is not found, its boxes dropped", shown(name))
            report.unlabelled.append(image_id)
            continue
        image = gathering.begin(image_id, size)
        for row, shape in enumerate(entry, start=1):
            _gather(gathering, image, shape, shape.get("label"), f"image {shown(name)}: shape {row}", reading.masks)


def _video(root: Element, gathering: Gathering, reading: Reading) -> None:
    """Every frame of the video is an image, also those without shapes."""
    report = reading.report
    meta = root.find("meta")
    size = None
    if meta is not None:
        size = size_hw(meta.findtext(".//original_size/height"), meta.findtext(".//original_size/width"))
    if size is None:
        raise LabelError(f"{reading.path}: expected the size of the video's frames in meta/task/original_size")
    tracks = list(root.iterfind("track"))
    shown_frames = [number(shape.get("frame")) for track in tracks for shape in track]
    last = max((frame for frame in shown_frames if 0 <= frame < _MAX_FRAMES), default=-1)
    count = number_at(root, "meta/task/size")
    frames = max(last + 1, count if 0 <= count < _MAX_FRAMES else 0)
    numbers = range(int(frames))
    ids = _frame_ids(numbers, reading)
    images = {frame: gathering.begin(ids[frame], size) for frame in numbers if ids[frame]}
    for place, track in enumerate(tracks, start=1):
        for shape in track:
            frame = number(shape.get("frame"))
            where = f"track {shown(track.get('id') or place)}: frame {shown(shape.get('frame'))}"
            if shape.get("outside") == "1":
                continue
            if frame not in ids:
                report.add("shape without frame number, dropped", where)
            elif int(frame) in images:
                _gather(gathering, images[int(frame)], shape, track.get("label"), where, reading.masks)


def _frame_ids(numbers: range, reading: Reading) -> dict[int, str]:
    """Ids of frames; empty for those whose image is not among the known ones."""
    stems = {frame: f"frame_{frame:06d}" for frame in numbers}
    known = reading.images
    if not known:
        folder = reading.path.parent
        known = KnownImages.near(folder / "images" if (folder / "images").is_dir() else folder, [])
    found = {frame: known.find_stem(stem) or known.find(f"{stem}.png") for frame, stem in stems.items()}
    if not any(found.values()):
        reading.report.note("frames are named .png, since no images are known", stems.get(0, "no frame"))
        return {frame: f"{stem}.png" for frame, stem in stems.items()}
    for frame, image_id in found.items():
        if image_id is None:
            reading.report.add("frame whose image is not found, its boxes dropped", stems[frame])
            reading.report.unlabelled.append(stems[frame])
    return {frame: image_id or "" for frame, image_id in found.items()}


def _gather(gathering: Gathering, image: int, shape: Element, label: str | None, where: str, masks: bool) -> None:
    if shape.tag == "tag":
        gathering.report.note("class of a whole image, left out", where)
        return
    if shape.tag not in _SHAPES:
        kind = shape.tag if shape.tag in _WITHOUT_BOX else shown(shape.tag)
        gathering.drop(image, f"{kind}, which is no box, left out", where, fault=False)
        return
    if not (label or "").strip():
        gathering.drop(image, "shape without label, dropped", where)
        return
    drawn = _drawn(shape)
    if drawn.note:
        gathering.report.note(drawn.note, where)
    mask = None
    if masks and drawn.polygon is not None:
        mask = gathering.polygon_mask(image, drawn.polygon, where)
    elif masks and drawn.run_lengths is not None:
        code = _code(*drawn.run_lengths, gathering.size_of(image))
        if code is None:
            gathering.report.add("mask that does not fit its image, the box stands in", where)
        else:
            mask = gathering.mask_of(code, image, where)
    gathering.add(image, gathering.class_of((label or "").strip()), drawn.box, where, mask=mask)


def _drawn(shape: Element) -> _Drawn:
    degrees = number(shape.get("rotation", 0))
    if shape.tag == "box":
        x0, y0, x1, y1 = (number(shape.get(side)) for side in _SIDES)
        if degrees % 360 == 0:
            return _Drawn((x0, y0, x1, y1))
        corners = shapes.rotated_about_centre((x0, y0, x1, y1), degrees)
        return _Drawn(shapes.around(corners), corners, note="rotated box, the upright box around it taken")
    if shape.tag == "ellipse":
        centre = number(shape.get("cx")), number(shape.get("cy"))
        radii = number(shape.get("rx")), number(shape.get("ry"))
        polygon = shapes.ellipse_polygon(centre, radii, degrees)
        return _Drawn(shapes.around_ellipse(centre, radii, degrees), polygon, note="ellipse, the box around it taken")
    if shape.tag == "polygon":
        points = [number(value) for pair in (shape.get("points") or "").split(";") for value in pair.split(",")]
        points = points if len(points) >= 6 and len(points) % 2 == 0 else []
        return _Drawn(shapes.around(points), points, note="polygon, the box around it taken")
    return _drawn_mask(shape)


def _drawn_mask(shape: Element) -> _Drawn:
    """Run lengths row by row within a rectangle, background first; the box is around the pixels that are set."""
    note = "mask, the box around it taken"
    values = [number(shape.get(name)) for name in ("left", "top", "width", "height")]
    lengths = [number(value) for value in (shape.get("rle") or "").split(",")]
    nothing = _Drawn((math.nan,) * 4, note=note)
    if not all(0 <= value < 1e6 and value == int(value) for value in [*values, *lengths]):
        return nothing
    left, top, width, height = map(int, values)
    if width * height > MAX_PIXELS or sum(lengths) != width * height:
        return nothing
    pixels = _pixels(width, height, list(map(int, lengths)))
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    if not len(rows):
        return nothing
    box = left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1
    x0, y0, x1, y1 = map(float, box)
    return _Drawn((x0, y0, x1, y1), run_lengths=((left, top, width, height), list(map(int, lengths))), note=note)


def _pixels(width: int, height: int, lengths: list[int]) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    values = np.arange(len(lengths)) % 2 == 1
    return np.repeat(values, lengths).reshape(height, width)


def _code(
    rectangle: tuple[int, int, int, int], lengths: list[int], size: tuple[int, int]
) -> Mapping[str, object] | None:
    """Run lengths of the whole image as COCO has them."""
    left, top, width, height = rectangle
    if left + width > size[1] or top + height > size[0] or math.prod(size) > MAX_PIXELS:
        return None
    whole = np.zeros((1, *size), np.uint8)
    whole[0, top : top + height, left : left + width] = _pixels(width, height, lengths)
    return {"size": list(size), "counts": mask_codes.encode(whole)[0].decode()}


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def write(labels: Labels, out: Path, images: ImageSource | None) -> None:
    """Write the XML of images 1.1, with masks in place of boxes where labels have them; ids there are frame numbers."""
    root = Element("annotations")
    SubElement(root, "version").text = "1.1"
    known = SubElement(SubElement(SubElement(root, "meta"), "task"), "labels")
    for category in labels.categories:
        SubElement(SubElement(known, "label"), "name").text = category.name
    for place, image_id in enumerate(labels.image_ids):
        height, width = labels.sizes_hw[place].tolist()
        facts = {"id": str(place), "name": image_id, "width": str(width), "height": str(height)}
        entry = SubElement(root, "image", facts)
        for tag, values in _written(labels, place):
            SubElement(entry, tag, values)
    ElementTree.indent(root)
    with atomic_path(out) as temporary:
        temporary.write_bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")


def _written(labels: Labels, image: int) -> Iterator[tuple[str, dict[str, str]]]:
    one = labels.image(image)
    for row, (index, box) in enumerate(zip(one.classes.tolist(), one.boxes_xyxy, strict=True)):
        facts = {"label": labels.categories[index].name, "source": "manual", "occluded": "0"}
        code = None if one.masks is None else _written_mask(one.masks[row], one.size_hw)
        if code is not None:
            yield "mask", facts | code
        else:
            yield "box", facts | {side: str(value) for side, value in zip(_SIDES, box, strict=True)}


def _written_mask(code: bytes, size: tuple[int, int]) -> dict[str, str] | None:
    pixels = mask_codes.decode(mask_codes.column([code]), size)[0]
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    if not len(rows):
        return None
    part = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    flat = np.concatenate([[0], part.ravel()])
    starts = np.flatnonzero(np.diff(flat)) if part.any() else np.zeros(0, int)
    lengths = np.diff(np.concatenate([[0], starts, [part.size]]))
    height, width = part.shape
    return {
        "rle": ", ".join(map(str, lengths.tolist())),
        "left": str(columns[0]),
        "top": str(rows[0]),
        "width": str(width),
        "height": str(height),
    }

"""Pascal VOC: one XML file per image, with its name, its size and the corners of its objects.

Three ways to count corners are in use. ``voc``, as the VOC itself: pixels from 1, the last one included, so that
``xmin`` - 1 and ``xmax`` are the edges. ``zero``: edges from 0, as they are. ``shifted``: edges, all one more. The
files of a folder show it: a corner at 0, or most of them written with a decimal point, mean ``zero`` (VOC's own have
whole numbers but for a few); an ``xmax`` one beyond the width means ``shifted``; otherwise it is taken for ``voc``, and
that is noted.

simdetr writes ``zero`` with fractions of pixels, as CVAT does, and says so in ``source``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from simdetr.data.annotations import LabelError
from simdetr.data.images import IMAGE_SUFFIXES, ImageSource, find_images
from simdetr.data.label_formats.known_images import KnownImages
from simdetr.data.label_formats.reading import Corners, Gathering, Reading, number, shown, size_hw
from simdetr.data.label_formats.shapes import around
from simdetr.data.label_formats.xml_tree import number_at, read_xml, root_tag, text_at
from simdetr.data.labels import Labels
from simdetr.data.spellings import stem_of
from simdetr.data.storage import files_below

MARK = "simdetr: corners are edges, counted from 0"
_FOLDER = "Annotations"
_IMAGES = "JPEGImages"
_SIDES = ("xmin", "ymin", "xmax", "ymax")


def recognises(path: Path) -> bool:
    """Whether a file is the annotation of one image."""
    return root_tag(path) == "annotation"


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass
class _Object:
    """One object of a file, its corners as they stand there."""

    name: str
    corners: tuple[float, ...]
    polygon: list[float]
    where: str
    decimals: bool  # whether its corners are written with a point, as 12.0


@dataclass
class _File:
    """What the XML of one image says."""

    path: Path
    filename: str
    id: str  # by the file's place, with the ending of filename
    size: tuple[int, int] | None
    objects: list[_Object]
    marked: bool  # its tool is known to count corners from 0


def read(reading: Reading) -> Labels:
    """Read one XML file, or all in a folder and those below it."""
    report = reading.report
    files = []
    for path, stem in _paths(reading.path):
        try:
            root = read_xml(path)
        except LabelError as error:
            report.add("file that cannot be read, its image left out", shown(str(error)))
            report.unlabelled.append(stem)
            continue
        if root.tag != "annotation":
            report.note("XML file that is no annotation of an image, passed over", shown(path.name))
            continue
        files.append(_file(root, path, stem))
    if not files:
        raise LabelError(f"{reading.path}: expected XML files of Pascal VOC, one for each image, got none")
    corners = _corners(files, reading)
    gathering = Gathering(report)
    known = reading.images
    if not known and any(one.size is None for one in files):
        folder = reading.path if reading.path.is_dir() else reading.path.parent
        known = KnownImages.near(folder, [one.id for one in files])
    ids = _ids(files, reading.images)
    lacking = {name: known.find(name) for one, name in zip(files, ids, strict=True) if one.size is None}
    there = [found for found in lacking.values() if found is not None]
    sizes = dict(zip(there, known.sizes(there), strict=True))
    for one, image_id in zip(files, ids, strict=True):
        size = one.size or sizes.get(lacking[image_id] or "")
        if size is None:
            report.add("image without size that is not found, its boxes dropped", f"{one.path.name}: {shown(image_id)}")
            report.unlabelled.append(image_id)
        else:
            _gather(gathering, image_id, size, one, corners, reading.masks)
    beside = reading.path / _IMAGES
    listed = reading.images.ids or (find_images(beside) if beside.is_dir() else [])
    met = {*ids, *report.unlabelled}
    report.unlabelled += [image_id for image_id in listed if image_id not in met]
    return gathering.labels(reading.images.source)


def _paths(path: Path) -> list[tuple[Path, str]]:
    """The XML files, and what they are called in their folder without ending."""
    if path.is_file():
        return [(path, path.stem)]
    folder = path / _FOLDER if (path / _FOLDER).is_dir() else path
    names = sorted(name for name in files_below(folder) if name.lower().endswith(".xml"))
    return [(folder / name, name[:-4]) for name in names]


def _file(root: Element, path: Path, stem: str) -> _File:
    filename = text_at(root, "filename").replace("\\", "/")
    suffix = Path(filename.rpartition("/")[2]).suffix
    same = stem_of(filename).rpartition("/")[2] == stem.rpartition("/")[2]
    folder = stem.rpartition("/")[0]
    # a file's own place says more of folders than the bare name in it
    by_place = stem + suffix if same and suffix.lower() in IMAGE_SUFFIXES else ""
    by_name = f"{folder}/{filename}" if folder and "/" not in filename else filename
    return _File(
        path,
        filename,
        by_place or by_name or stem,
        size_hw(root.findtext("size/height"), root.findtext("size/width")),
        list(_objects(root, path.name)),
        text_at(root, "source/annotation") == MARK or text_at(root, "owner/name") == "Label Studio",
    )


def _objects(root: Element, file_name: str) -> Iterator[_Object]:
    for place, entry in enumerate(root.iterfind("object"), start=1):
        box = entry.find("bndbox")
        corners = (math.nan,) * 4 if box is None else tuple(number_at(box, side) for side in _SIDES)
        polygon = entry.find("polygon")
        points = [] if polygon is None else _points(polygon)
        decimals = box is not None and any("." in text_at(box, side) for side in _SIDES)
        yield _Object(text_at(entry, "name"), corners, points, f"{file_name}: object {place}", decimals)


def _points(polygon: Element) -> list[float]:
    """Of ``<x1>``, ``<y1>``, ``<x2>``, … or of ``<pt><x/><y/></pt>``."""
    numbered = {child.tag: number(child.text) for child in polygon}
    if "x1" in numbered:
        places = range(1, len(numbered) // 2 + 1)
        return [numbered.get(f"{axis}{place}", math.nan) for place in places for axis in "xy"]
    return [number_at(point, axis) for point in polygon.iterfind("pt") for axis in "xy"]


def _corners(files: list[_File], reading: Reading) -> Corners:
    """How corners are counted: as the user says, the files are marked, their values prove, or VOC's rule is."""
    if reading.corners is not None:
        return reading.corners
    if all(one.marked for one in files):
        return "zero"
    boxes = [(thing.corners, one.size, thing.where) for one in files for thing in one.objects]
    with_point = sum(thing.decimals for one in files for thing in one.objects)
    for values, _, where in boxes:
        if any(0 <= value < 1 for value in values) or with_point > len(boxes) / 2:
            reading.report.note("corners counted from 0, as they show", where)
            return "zero"
    for values, size, where in boxes:
        if size is not None and (values[2] == size[1] + 1 or values[3] == size[0] + 1):
            reading.report.note("corners that are all one more than the edges, as they show", where)
            return "shifted"
    if boxes:
        reading.report.note(
            "corners taken as VOC's, from 1 with the last pixel included, since nothing shows otherwise "
            "(--voc_corners zero or shifted, if they are not)",
            boxes[0][2],
        )
    return "voc"


def _ids(files: list[_File], known: KnownImages) -> list[str]:
    """Ids of the images: those that are known, else by the place of the file."""
    return [known.find(one.id) or (known.find(one.filename) if one.filename else None) or one.id for one in files]


def _gather(
    gathering: Gathering, image_id: str, size: tuple[int, int], one: _File, corners: Corners, masks: bool
) -> None:
    image = gathering.begin(image_id, size)
    near, far = {"voc": (1, 0), "zero": (0, 0), "shifted": (1, 1)}[corners]
    for thing in one.objects:
        if not thing.name:
            gathering.drop(image, "object without name, dropped", thing.where)
            continue
        x0, y0, x1, y1 = thing.corners
        box = (x0 - near, y0 - near, x1 - far, y1 - far)
        if thing.polygon and not all(map(math.isfinite, thing.corners)):
            gathering.report.note("polygon without box, the box around it taken", thing.where)
            box = around(thing.polygon)
        mask = gathering.polygon_mask(image, thing.polygon, thing.where) if masks and thing.polygon else None
        gathering.add(image, gathering.class_of(thing.name), box, thing.where, mask=mask)


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def write(labels: Labels, out: Path, images: ImageSource | None) -> None:
    """Write ``Annotations/``, one XML file per image under the path that is its id."""
    for place, image_id in enumerate(labels.image_ids):
        path = out / _FOLDER / f"{stem_of(image_id)}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        one = labels.image(place)
        root = Element("annotation")
        SubElement(root, "folder").text = image_id.rpartition("/")[0]
        SubElement(root, "filename").text = image_id.rpartition("/")[2]
        source = SubElement(root, "source")
        SubElement(source, "database").text = "unknown"
        SubElement(source, "annotation").text = MARK
        size = SubElement(root, "size")
        for name, value in (("width", one.size_hw[1]), ("height", one.size_hw[0]), ("depth", 3)):
            SubElement(size, name).text = str(value)
        SubElement(root, "segmented").text = "0"
        for index, box in zip(one.classes.tolist(), one.boxes_xyxy, strict=True):
            entry = SubElement(root, "object")
            SubElement(entry, "name").text = labels.categories[index].name
            SubElement(entry, "pose").text = "Unspecified"
            SubElement(entry, "truncated").text = "0"
            SubElement(entry, "difficult").text = "0"
            corners = SubElement(entry, "bndbox")
            for side, value in zip(_SIDES, box, strict=True):
                SubElement(corners, side).text = str(value).removesuffix(".0")  # many readers take whole numbers alone
        ElementTree.indent(root)
        path.write_bytes(ElementTree.tostring(root, encoding="utf-8") + b"\n")

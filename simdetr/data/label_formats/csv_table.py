"""CSV with one row per box: path, class and corners in pixels; a row without class and box is of an image without any.

Columns go by the names that other tools give them, in any order. Without a header six columns are taken as path, four
corners and class, or as path, class and four corners, if their values show it.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from simdetr.data.annotations import LabelError
from simdetr.data.images import IMAGE_SUFFIXES, ImageSource
from simdetr.data.label_formats.known_images import KnownImages
from simdetr.data.label_formats.reading import Gathering, Reading, number, shown, size_hw
from simdetr.data.labels import Labels
from simdetr.data.storage import atomic_path

_NAMES = {
    "path": ("path", "image", "filename", "file_name", "image_path", "image_id", "file", "imageid", "img"),
    "class": ("class", "label", "name", "class_name", "category", "label_name", "labelname"),
    "score": ("score", "confidence"),
    "width": ("width", "image_width", "img_width"),
    "height": ("height", "image_height", "img_height"),
}
_CORNERS = (
    ("x0", "y0", "x1", "y1"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("x1", "y1", "x2", "y2"),
    ("left", "top", "right", "bottom"),
)
_DELIMITERS = ",;\t"
_WITHOUT_HEADER = 6
_HEAD_CHARACTERS = 100_000
_MAX_BYTES = 1 << 30
_ENOUGH_TO_TELL = 10  # rows; fewer boxes may all lie in the first pixel

Columns = dict[str, int]
"""Where the columns path, class, x0, y0, x1, y1 stand, and score, width and height if they are there."""


def recognises(path: Path) -> bool:
    """Whether a file's first line names the columns of boxes, or its rows can be nothing else."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            head = stream.read(_HEAD_CHARACTERS)
    except (OSError, UnicodeDecodeError):
        return False
    try:
        first = next(_rows(head.splitlines(keepends=True)), [])
    except csv.Error:
        return False
    return _of_header(first) is not None or _of_values([first]) is not None


def _rows(lines: Sequence[str]) -> Iterator[list[str]]:
    """The cells of every line that has some, by the delimiter that the first line has most."""
    first = next((line for line in lines if line.strip()), "")
    delimiter = max(_DELIMITERS, key=first.count)
    for row in csv.reader(lines, delimiter=delimiter):
        if any(cell.strip() for cell in row):
            yield [cell.strip() for cell in row]


def _of_header(row: Sequence[str]) -> Columns | None:
    names = [cell.lower().replace(" ", "_") for cell in row]
    columns = {}
    for column, known in _NAMES.items():
        place = next((names.index(name) for name in known if name in names), None)
        if place is not None:
            columns[column] = place
    corners = next((four for four in _CORNERS if set(four) <= set(names)), None)
    if corners is None or not {"path", "class"} <= columns.keys():
        return None
    return columns | dict(zip(_CORNERS[0], map(names.index, corners), strict=True))


def _of_values(rows: Sequence[Sequence[str]]) -> Columns | None:
    """Columns of rows without header, if all of them can be read so."""
    if not all(len(row) == _WITHOUT_HEADER and Path(row[0]).suffix.lower() in IMAGE_SUFFIXES for row in rows):
        return None
    for first, class_column in ((1, 5), (2, 1)):
        places = range(first, first + 4)
        if all(_are_corners([row[place] for place in places]) and not _is_number(row[class_column]) for row in rows):
            return {"path": 0, "class": class_column, **dict(zip(_CORNERS[0], places, strict=True))}
    return None


def _are_corners(cells: Sequence[str]) -> bool:
    return all(map(_is_number, cells)) or not any(cells)


def _is_number(cell: str) -> bool:
    return math.isfinite(number(cell))


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read(reading: Reading) -> Labels:
    """Read a table of boxes; sizes are those of its columns, else those of the images."""
    rows, columns = _table(reading.path)
    report, known = reading.report, reading.images
    written = list(dict.fromkeys(cells[columns["path"]] for _, cells in rows))
    said = {} if not {"width", "height"} <= columns.keys() else _said_sizes(rows, columns)
    if not known and any(name not in said for name in written):
        known = KnownImages.near(reading.path.parent, written)
    ids = {name: reading.images.find(name) or name for name in written}
    lacking = {name: known.find(name) for name in written if name not in said}
    there = [found for found in lacking.values() if found is not None]
    sizes = dict(zip(there, known.sizes(there), strict=True))
    gathering = Gathering(report)
    images: dict[str, int] = {}
    for name in written:
        size = said.get(name) or sizes.get(lacking.get(name) or "")
        if size is None:
            report.add("image without size that is not found, its boxes dropped", shown(name))
            report.unlabelled.append(ids[name])
        elif ids[name] in gathering:
            images[name] = gathering.number_of(ids[name])
        else:
            images[name] = gathering.begin(ids[name], size)
    if len(rows) >= _ENOUGH_TO_TELL or not said:
        _check_pixels(rows, columns, reading.path)
    for line, cells in rows:
        if (image := images.get(cells[columns["path"]])) is not None:
            _gather(gathering, image, cells, columns, f"line {line}")
    return gathering.labels()


def _table(path: Path) -> tuple[list[tuple[int, list[str]]], Columns]:
    """Line numbers and cells of all rows, each as long as its columns reach; and where the columns are."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise LabelError(f"{path} has more than {_MAX_BYTES >> 20} MiB; split it")
        rows = list(_rows(path.read_text(encoding="utf-8-sig").splitlines(keepends=True)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LabelError(f"{path} cannot be read as CSV: {shown(str(error))}") from error
    columns = _of_header(rows[0]) if rows else None
    has_header = columns is not None
    if columns is None and rows:
        columns = _of_values(rows)
    if columns is None:
        got = ", ".join(map(shown, rows[0][:12])) if rows else "an empty file"
        raise LabelError(
            f"{path}: expected a first line with the columns path, class, x0, y0, x1, y1 (or filename, label, "
            f"xmin, …), got {got}"
        )
    length = max(columns.values()) + 1
    body = [(line, row + [""] * (length - len(row))) for line, row in enumerate(rows, start=1)][has_header:]
    nameless = [line for line, row in body if not row[columns["path"]]]
    if nameless:
        raise LabelError(f"{path}: row {nameless[0]} names no image")
    return body, columns


def _said_sizes(rows: Sequence[tuple[int, list[str]]], columns: Columns) -> dict[str, tuple[int, int]]:
    said: dict[str, tuple[int, int]] = {}
    for _, cells in rows:
        size = size_hw(cells[columns["height"]], cells[columns["width"]])
        if size is not None:
            said.setdefault(cells[columns["path"]], size)
    return said


def _check_pixels(rows: Sequence[tuple[int, list[str]]], columns: Columns, path: Path) -> None:
    values = [number(cells[columns[side]]) for _, cells in rows for side in _CORNERS[0]]
    finite = [value for value in values if math.isfinite(value)]
    if finite and max(finite) <= 1 and min(finite) >= 0 and any(value % 1 for value in finite):
        raise LabelError(f"{path}: all corners lie between 0 and 1: shares of the image; expected pixels")


def _gather(gathering: Gathering, image: int, cells: Sequence[str], columns: Columns, where: str) -> None:
    name, corners = cells[columns["class"]], [cells[columns[side]] for side in _CORNERS[0]]
    if not name and not any(corners):
        return
    if not any(corners):
        gathering.drop(image, "class without box, dropped", where)
    elif not name:
        gathering.drop(image, "box without class, dropped", where)
    else:
        score = cells[columns["score"]] if "score" in columns else ""
        box = [number(corner) for corner in corners]
        gathering.add(image, gathering.class_of(name), box, where, number(score) if score else 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def write(labels: Labels, out: Path, images: ImageSource | None) -> None:
    """Write one row per box, and one with empty cells for every image without."""
    with_scores = bool((labels.scores != 1).any())
    header = ["path", "class", *_CORNERS[0], *(["score"] if with_scores else []), "width", "height"]
    with atomic_path(out) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        for place, image_id in enumerate(labels.image_ids):
            one = labels.image(place)
            height, width = one.size_hw
            if not len(one):
                writer.writerow([image_id, *[""] * (len(header) - 3), width, height])
            for index, box, score in zip(one.classes.tolist(), one.boxes_xyxy, one.scores, strict=True):
                extra = [str(score)] if with_scores else []
                writer.writerow([image_id, labels.categories[index].name, *map(str, box), *extra, width, height])

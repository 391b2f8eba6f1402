"""Label Studio's exports, JSON and JSON-MIN: a list of tasks, whose shapes are in percents of the image.

A task that nobody has finished is unlabelled; what a model predicted is not read. Of several annotations of one task
the one marked as ground truth is taken, else the latest. A rectangle turns about its top left corner, in pixels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from simdetr.data.annotations import LabelError
from simdetr.data.images import IMAGE_SUFFIXES, ImageSource
from simdetr.data.label_formats import shapes
from simdetr.data.label_formats.known_images import KnownImages
from simdetr.data.label_formats.reading import Gathering, Reading, number, shown, size_hw
from simdetr.data.labels import Labels
from simdetr.data.storage import write_json

_LOCAL = "/data/local-files/?d="
_UPLOAD = re.compile(r"^/?(?:data/)?upload/(?:\d+/)?(.+)$")
_PREFIX = re.compile(r"^([0-9a-f]{8})-(.+)$")
_IMAGE_KEYS = ("image", "img", "url", "image_url", "picture")
_WITHOUT_BOX = ("brush", "keypoint", "vector", "magicwand", "bitmask")
_PERCENT_LIMIT = 1000.0
_FACTS = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement")


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass
class _Task:
    """One image: its name in the file, its size if that is said, and its results; None where nobody finished it."""

    name: str
    size: tuple[int, int] | None
    results: list[Mapping[str, Any]] | None
    where: str
    order: tuple[bool, str]


def read(reading: Reading) -> Labels:
    """Read tasks with their annotations."""
    path, report = reading.path, reading.report
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise LabelError(f"{path} cannot be read as JSON: {shown(str(error))}") from error
    if not isinstance(content, list):
        raise LabelError(f"{path} is no export of Label Studio: expected a list of tasks, got {shown(content)}")
    tasks = [task for place, entry in enumerate(content, start=1) if (task := _task(entry, place, reading)) is not None]
    ids = _ids(tasks, reading)
    one_each: dict[str, _Task] = {}
    for task in tasks:
        before = one_each.get(ids[task.name])
        if before is not None and before.results is not None and task.results is not None:
            report.note("annotation of another annotator, left out", task.where)
        if before is None or before.results is None or (task.results is not None and task.order >= before.order):
            one_each[ids[task.name]] = task
    return _gather_all(one_each, reading).labels(reading.images.source)


def _task(entry: object, place: int, reading: Reading) -> _Task | None:
    report = reading.report
    if not isinstance(entry, dict):
        report.add("task is no object, dropped", f"task number {place}")
        return None
    where = f"task {shown(entry.get('id', f'number {place}'))}"
    data = entry.get("data")
    is_plain = not isinstance(data, dict)
    facts: Mapping[str, Any] = data if isinstance(data, dict) else entry  # JSON-MIN has all in one
    name = _name(facts)
    if name is None:
        report.add("task without image, dropped", where)
        return None
    size = size_hw(facts.get("height"), facts.get("width"))
    if is_plain:
        untouched = all(entry.get(key) is None for key in ("annotation_id", "annotator"))
        return _Task(name, size, None if untouched else list(_plain_results(entry)), where, _order(entry))
    given = entry.get("annotations", entry.get("completions"))
    given = given if isinstance(given, list) else []
    finished = [one for one in given if isinstance(one, dict) and not one.get("was_cancelled")]
    for _ in range(len(given) - len(finished)):
        report.note("annotation that was skipped, left out", where)
    finished.sort(key=_order)
    for _ in finished[1:]:
        report.note("annotation of another annotator, left out", where)
    results: list[Mapping[str, Any]] | None = None
    if finished:
        listed = finished[-1].get("result")
        results = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    return _Task(name, size, results, where, _order(finished[-1]) if finished else (False, ""))


def _order(annotation: Mapping[str, Any]) -> tuple[bool, str]:
    """By which the last of several annotations is taken."""
    return annotation.get("ground_truth") is True, str(
        annotation.get("updated_at") or annotation.get("created_at") or ""
    )


def _plain_results(entry: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The shapes of JSON-MIN in the form of the full export."""
    for key, values in entry.items():
        if key in _FACTS or not isinstance(values, list):
            continue
        for value in values:
            if isinstance(value, dict):
                named = [name for name in value if name.endswith("labels")]
                kind = named[0] if named else "choices"
                sizes = {name: value.get(name) for name in ("original_width", "original_height")}
                yield {"type": kind, "value": value, **sizes}


def _name(facts: Mapping[str, Any]) -> str | None:
    """What the task calls its image."""
    texts = {key: value for key, value in facts.items() if isinstance(value, str) and value.strip()}
    for key in _IMAGE_KEYS:
        if key in texts:
            return texts[key].strip()
    for value in texts.values():
        if Path(_plain_path(value)).suffix.lower() in IMAGE_SUFFIXES:
            return value.strip()
    return None


def _plain_path(name: str) -> str:
    """The file that a URL, an upload or a local file of Label Studio is."""
    if "local-files/?d=" in name:
        return unquote(name.partition("?d=")[2]).replace("\\", "/").lstrip("/")
    if "://" in name:
        try:
            parts = urlsplit(name)
        except ValueError:
            return name
        name = unquote(parts.path).lstrip("/")
    elif name.startswith("/data/"):
        name = unquote(name)
    upload = _UPLOAD.match(name)
    return upload[1] if upload else name


def _ids(tasks: list[_Task], reading: Reading) -> dict[str, str]:
    """Ids of images by what tasks call them: those that are known, else the path without an upload's prefix."""
    known, ids = reading.images, {}
    bare: dict[str, str] = {}
    for task in tasks:
        path = _plain_path(task.name)
        folder, slash, last = path.rpartition("/")
        prefixed = _PREFIX.match(last) if "upload/" in task.name else None
        bare[task.name] = folder + slash + prefixed[2] if prefixed else path
    taken: dict[str, set[str]] = {}
    for name, path in bare.items():
        taken.setdefault(path, set()).add(_plain_path(name))
    for name, path in bare.items():
        full = _plain_path(name)
        found = name if name in known else known.find(full)
        if found is None and len(taken[path]) == 1:
            found = known.find(path) or path
            if path != full:
                reading.report.note("name of an upload, taken without what was put before it", shown(full))
        ids[name] = found or full
    return ids


def _gather_all(tasks: Mapping[str, _Task], reading: Reading) -> Gathering:
    report, known = reading.report, reading.images
    gathering = Gathering(report)
    sizes = {image_id: task.size or _size(task) for image_id, task in tasks.items()}
    lacking = [image_id for image_id, size in sizes.items() if size is None and tasks[image_id].results is not None]
    if lacking and not known:
        known = KnownImages.near(reading.path.parent, lacking)
    found = {image_id: known.find(image_id) for image_id in lacking}
    there = [name for name in found.values() if name is not None]
    measured = dict(zip(there, known.sizes(there), strict=True))
    for image_id, task in tasks.items():
        if task.results is None:
            report.unlabelled.append(image_id)
            continue
        size = sizes[image_id] or measured.get(found[image_id] or "")
        if size is None:
            report.add("image without size that is not found, left out", f"{task.where}: {shown(image_id)}")
            report.unlabelled.append(image_id)
        else:
            _gather(gathering, gathering.begin(image_id, size), task, size, reading.masks)
    return gathering


def _size(task: _Task) -> tuple[int, int] | None:
    """(height, width) as the first result has it."""
    for result in task.results or ():
        size = size_hw(result.get("original_height"), result.get("original_width"))
        if size is not None:
            return size
    return None


def _gather(gathering: Gathering, image: int, task: _Task, size: tuple[int, int], masks: bool) -> None:
    results = task.results or []
    names = {one.get("id"): _labels_of(one) for one in results if isinstance(one.get("id"), str) and _labels_of(one)}
    for place, result in enumerate(results, start=1):
        where = f"{task.where}: result {place}"
        value = result.get("value")
        kind = str(result.get("type", "")).removesuffix("labels")
        if kind in _WITHOUT_BOX:
            gathering.drop(image, f"{kind}, which is not read, left out", where, fault=False)
            continue
        if kind not in ("rectangle", "polygon", "ellipse") or not isinstance(value, dict):
            if kind != "":  # labels given apart from their shape are read with it
                gathering.report.note(f"{shown(result.get('type'))[1:-1]}, which is no shape, left out", where)
            continue
        labels = _labels_of(result) or names.get(result.get("id")) or []
        if not labels:
            gathering.drop(image, "shape without label, dropped", where)
            continue
        if number(result.get("image_rotation") or 0) % 360:
            gathering.report.note("image turned in Label Studio, the box is of the image as it lies", where)
        box, polygon, note = _drawn(kind, value, size)
        if note:
            gathering.report.note(note, where)
        mask = gathering.polygon_mask(image, polygon, where) if masks and polygon else None
        for name in labels:
            gathering.add(image, gathering.class_of(name), box, where, mask=mask)


def _labels_of(result: Mapping[str, Any]) -> list[str]:
    value = result.get("value")
    if not isinstance(value, dict):
        return []
    for key, names in value.items():
        if isinstance(key, str) and key.endswith("labels") and isinstance(names, list):
            return [name.strip() for name in names if isinstance(name, str) and name.strip()]
    return []


def _drawn(kind: str, value: Mapping[str, Any], size: tuple[int, int]) -> tuple[shapes.Box, list[float], str]:
    """The box around a shape in pixels, its outline, and a note if it is no plain box."""
    height, width = size

    def across(share: object) -> float:
        percent = number(share)
        return percent * width / 100 if abs(percent) <= _PERCENT_LIMIT else float("nan")

    def down(share: object) -> float:
        percent = number(share)
        return percent * height / 100 if abs(percent) <= _PERCENT_LIMIT else float("nan")

    degrees = number(value.get("rotation") or 0)
    if kind == "rectangle":
        x, y = across(value.get("x")), down(value.get("y"))
        w, h = across(value.get("width")), down(value.get("height"))
        if degrees % 360 == 0:
            return (x, y, x + w, y + h), [], ""
        corners = shapes.rotated_corners(x, y, w, h, degrees)
        return shapes.around(corners), corners, "rotated box, the upright box around it taken"
    if kind == "ellipse":
        centre = across(value.get("x")), down(value.get("y"))
        radii = across(value.get("radiusX")), down(value.get("radiusY"))
        outline = shapes.ellipse_polygon(centre, radii, degrees)
        return shapes.around_ellipse(centre, radii, degrees), outline, "ellipse, the box around it taken"
    given = value.get("points")
    pairs = [pair for pair in given if isinstance(pair, list) and len(pair) == 2] if isinstance(given, list) else []
    points = [side for x, y in pairs for side in (across(x), down(y))]
    return shapes.around(points), points, "polygon, the box around it taken"


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def write(labels: Labels, out: Path, images: ImageSource | None) -> None:
    """Write finished tasks with rectangles; images are local files of Label Studio, under the paths that are their ids.

    The image's size stands in ``data`` too, since a task without results says it nowhere else.
    """
    tasks = []
    for place, image_id in enumerate(labels.image_ids, start=1):
        one = labels.image(place - 1)
        height, width = one.size_hw
        results = [
            {
                "id": f"{place}-{row}",
                "type": "rectanglelabels",
                "from_name": "label",
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "value": {
                    "x": 100 * x0 / width,
                    "y": 100 * y0 / height,
                    "width": 100 * (x1 - x0) / width,
                    "height": 100 * (y1 - y0) / height,
                    "rotation": 0,
                    "rectanglelabels": [labels.categories[index].name],
                },
            }
            for row, (index, (x0, y0, x1, y1)) in enumerate(
                zip(one.classes.tolist(), one.boxes_xyxy.tolist(), strict=True), start=1
            )
        ]
        name = image_id if "://" in image_id else _LOCAL + quote(image_id)
        tasks.append(
            {
                "id": place,
                "data": {"image": name, "width": width, "height": height},
                "annotations": [{"id": place, "was_cancelled": False, "ground_truth": False, "result": results}],
                "predictions": [],
            }
        )
    write_json(out, tasks)

"""YOLO: a yaml with the class names and one text file per image, of lines ``class x y width height`` or polygons.

Coordinates are shares of the image. The text file of ``images/a.jpg`` is ``labels/a.txt``; where no folder is called
so, it lies beside the image. An image without one is unlabelled, one with an empty one shows no object.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from simdetr.data import masks as mask_codes
from simdetr.data.annotations import Category, LabelError
from simdetr.data.images import IMAGE_SUFFIXES, ImageSource
from simdetr.data.label_formats.known_images import KnownImages
from simdetr.data.label_formats.reading import Gathering, Reading, number, shown
from simdetr.data.label_formats.shapes import around, one_outline
from simdetr.data.labels import Labels
from simdetr.data.spellings import stem_of
from simdetr.data.storage import files_below

YAML_SUFFIXES = (".yaml", ".yml")
NAME_FILES = ("classes.txt", "obj.names", "labels.txt")
_YAML_BYTES = 10 << 20
_TEXT_BYTES = 50 << 20
_LEVELS_UP = 3
_LINE = re.compile(r"\s*\d+(\.0*)?(\s+[-+]?\d*\.?\d+(e[-+]?\d+)?){4,}\s*$", re.IGNORECASE)
_SHARE_LIMIT = 2.0  # a share of the image beyond it is in pixels, or nonsense
_ADVICE = "put a classes.txt with one name per line beside the labels, or give the data.yaml"
_DECIMALS = 9


def recognises(path: Path) -> bool:
    """Whether a file is a yaml with class names, or a text file of label lines."""
    if path.suffix.lower() in YAML_SUFFIXES:
        content = _load_yaml(path)
        return isinstance(content, dict) and isinstance(content.get("names"), list | dict)
    if path.suffix.lower() != ".txt" or path.name in NAME_FILES:
        return False
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            return _LINE.match(stream.readline(100_000)) is not None
    except OSError:
        return False


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class _Classes:
    """The class names by number, how many values a line's key points have, and the yaml if there is one."""

    names: dict[int, str]
    keypoint_values: int = 0
    yaml: Path | None = None


@dataclass(frozen=True)
class _Folders:
    """Images and their text files, absolute; either may be missing."""

    images: str | None
    labels: str | None


def read(reading: Reading) -> Labels:
    """Read a data set by its data.yaml, its folder, or the folder of one of its splits."""
    path = reading.path.absolute()
    if path.is_file() and path.suffix.lower() not in YAML_SUFFIXES:
        raise LabelError(f"{reading.path} is the label file of one image; give the folder of all, or the data.yaml")
    classes = _classes(path)
    folders = _folders(path, classes)
    return _labels(reading, classes, folders)


def _classes(path: Path) -> _Classes:
    """The classes named in a yaml, or in a list of names; looked for in the folder and in those above it."""
    if path.is_file():
        return _of_yaml(path)
    for folder in (path, *list(path.parents)[:_LEVELS_UP]):
        found = [one for one in sorted(folder.glob("*.y*ml")) if recognises(one)]
        if len(found) > 1:
            raise LabelError(
                f"{folder} has several yaml files of class names ({', '.join(p.name for p in found[:5])})"
                "; give the one that is meant"
            )
        if found:
            return _of_yaml(found[0])
        for name_file in (place / name for name in NAME_FILES for place in (folder, folder / "labels")):
            if name_file.is_file():
                lines = _text(name_file).splitlines()
                names = {row: line.strip() for row, line in enumerate(lines) if line.strip()}
                if names:
                    return _Classes(names)
    raise LabelError(f"class names: YOLO's text files have numbers alone, and {path} has no yaml with names; {_ADVICE}")


def _of_yaml(path: Path) -> _Classes:
    content = _load_yaml(path)
    given = content.get("names") if isinstance(content, dict) else None
    if isinstance(given, list):
        given = dict(enumerate(given))
    if not isinstance(given, dict):
        raise LabelError(f"{path}: expected 'names', a list or a mapping of class names; {_ADVICE}")
    names: dict[int, str] = {}
    for key, name in given.items():
        place = number(key)
        if place < 0 or place != int(place if place == place and abs(place) < 1e9 else -1):
            raise LabelError(f"{path}: names: expected class numbers from 0, got {shown(key)}")
        if isinstance(name, dict | list):
            raise LabelError(f"{path}: names: expected a name for class {int(place)}, got {shown(name)}")
        names[int(place)] = str(name)
    shape = content.get("kpt_shape")
    sides = [number(side) for side in shape] if isinstance(shape, list) else []
    values = int(sides[0] * sides[1]) if len(sides) == 2 and all(0 < side < 1000 for side in sides) else 0
    return _Classes(dict(sorted(names.items())), values, path)


def _load_yaml(path: Path) -> Any:  # noqa: ANN401
    try:
        if path.stat().st_size > _YAML_BYTES:
            return None
        return yaml.load(path.read_text(encoding="utf-8-sig"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, RecursionError, yaml.YAMLError, AttributeError, TypeError, KeyError):
        return None


def _text(path: str | Path) -> str:
    """The text of a file; a LabelError where it cannot be had."""
    try:
        with open(path, "rb") as stream:  # noqa: PTH123 (Path.open is slower, and there are many files)
            content = stream.read(_TEXT_BYTES + 1)
    except OSError as error:
        raise LabelError(f"cannot be read ({error.strerror})") from error
    if len(content) > _TEXT_BYTES:
        raise LabelError(f"has more than {_TEXT_BYTES} bytes")
    return content.decode("utf-8-sig", errors="replace")


def _folders(path: Path, classes: _Classes) -> list[_Folders]:
    """All folders of images and labels that are meant by a path."""
    found: list[_Folders] = []
    if classes.yaml is not None and path in (classes.yaml, classes.yaml.parent):
        for place in _splits(classes.yaml):
            found += _of_list(place) if place.is_file() else _of_images(place)
    if not found:
        found = _by_convention(path if path.is_dir() else path.parent)
    return list(dict.fromkeys(found))


def _splits(path: Path) -> Iterator[Path]:
    """The existing folders and lists that a yaml names; of a data set that was moved, those beside the yaml."""
    content = _load_yaml(path)
    root = content.get("path")
    roots = [path.parent / root] if isinstance(root, str) else []
    for split in ("train", "val", "valid", "test"):
        given = content.get(split)
        for entry in given if isinstance(given, list) else [given]:
            if not isinstance(entry, str) or not entry or "\0" in entry:
                continue
            below = re.sub(r"^(\.\./)+", "", entry)
            for place in (*(base / entry for base in roots), path.parent / entry, path.parent / below):
                if _exists(place) or _exists(_swapped(place, "images", "labels")):
                    yield place
                    break


def _exists(place: Path | None) -> bool:
    try:
        return place is not None and place.exists()
    except (OSError, ValueError):
        return False


def _swapped(place: Path, old: str, new: str) -> Path | None:
    """A path with the last folder of one name called otherwise; None if there is none."""
    parts = place.parts
    if old not in parts:
        return None
    at = len(parts) - 1 - parts[::-1].index(old)
    return Path(*parts[:at], new, *parts[at + 1 :])


def _of_images(folder: Path) -> list[_Folders]:
    """The folder of images that a yaml names, or one that holds ``images``."""
    folder = Path(os.path.normpath(folder))
    labels = _swapped(folder, "images", "labels")
    if labels is None or not labels.is_dir():
        return _by_convention(folder)
    return [_Folders(str(folder) if folder.is_dir() else None, str(labels))]


def _of_list(path: Path) -> list[_Folders]:
    """The folders in which the images of a list lie."""
    if path.suffix.lower() in IMAGE_SUFFIXES or path.stat().st_size > _TEXT_BYTES:
        return []
    names = [line.strip() for line in _text(path).splitlines() if line.strip() and "\0" not in line]
    folders = dict.fromkeys((path.parent / name).parent for name in names)
    return [pair for folder in folders if _exists(folder) for pair in _of_images(folder)]


def _by_convention(folder: Path) -> list[_Folders]:
    """The folder's own pair by its path, else all pairs below it, else images and text files side by side."""
    if (images := _swapped(folder, "labels", "images")) is not None and images.is_dir():
        return [_Folders(str(images), str(folder))]
    if (labels := _swapped(folder, "images", "labels")) is not None and labels.is_dir():
        return [_Folders(str(folder), str(labels))]
    found = []
    for directory, below, _ in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if "labels" in below:
            images = Path(directory, "images")
            found.append(_Folders(str(images) if images.is_dir() else None, str(Path(directory, "labels"))))
        elif "images" in below:
            found.append(_Folders(str(Path(directory, "images")), None))
        below[:] = [name for name in below if name not in ("labels", "images")]
    with_labels = [pair for pair in found if pair.labels is not None]
    return found if with_labels else [_Folders(str(folder), str(folder))]


def _labels(reading: Reading, classes: _Classes, folders: Sequence[_Folders]) -> Labels:
    report, known = reading.report, reading.images
    image_folders = [pair.images for pair in folders if pair.images is not None]
    root = os.path.commonpath(image_folders) if image_folders else ""
    own: dict[str, str | None] = {}  # images beside the labels: id from the root -> text file
    others: dict[str, str] = {}  # text files whose images are elsewhere, by the id of the image
    for pair in folders:
        texts = _texts(pair)
        if pair.images is not None:
            prefix = "" if pair.images == root else f"{os.path.relpath(pair.images, root)}/".replace(os.sep, "/")
            names = (name for name in files_below(Path(pair.images)) if name.lower().endswith(tuple(IMAGE_SUFFIXES)))
            taken: dict[str, str] = {}
            for name in sorted(names):
                stem = stem_of(name)
                if (first := taken.setdefault(stem, name)) != name:
                    report.add("image that shares its label file with another, left out", f"{shown(name)} and {first}")
                    report.unlabelled.append(prefix + name)
                else:
                    own[prefix + name] = texts.get(stem)
            for stem in taken:
                texts.pop(stem, None)
        for stem, text in texts.items():
            image_id = known.find_stem(stem)
            if image_id is None:
                if Path(text).name in NAME_FILES or (not recognises(Path(text)) and Path(text).stat().st_size):
                    continue  # a list of names, a readme
                report.add("label file without image, its boxes dropped", shown(text))
                report.unlabelled.append(stem)
            elif image_id in others:
                report.add("image with two label files, first taken", f"{shown(image_id)}: {shown(text)}")
            else:
                others[image_id] = text
    gathering = Gathering(report, [Category(place + 1, name) for place, name in classes.names.items()])
    untouched = any(pair.labels is not None and _is_label_studios(Path(pair.labels)) for pair in folders)
    lines = _Lines(gathering, classes, reading.masks, untouched)
    if own:
        beside = KnownImages(ImageSource(Path(root), tuple(own)))
        labelled = [name for name, text in own.items() if text is not None]
        report.unlabelled += [name for name, text in own.items() if text is None]
        ids = [known.id_of_file(f"{root}/{name}") or known.find(name) or name for name in labelled]
        _gather(lines, ids, beside.sizes(labelled), [own[name] or "" for name in labelled])
        if not known:
            report.note("image paths are relative to the folder", shown(root))
    if others:
        _gather(lines, list(others), known.sizes(list(others)), list(others.values()))
    if known and not own:
        report.unlabelled += [image_id for image_id in known.ids if image_id not in others]
    if not own and not others:
        at = ", ".join(str(pair.labels) for pair in folders[:3])
        raise LabelError(
            f"{reading.path}: no image of the label files in {at} was found, and YOLO's boxes need their sizes; give "
            "the folder of images too (`--images`)"
        )
    return gathering.labels()


def _is_label_studios(labels: Path) -> bool:
    """Whether Label Studio exported it, which writes an empty file for a task that nobody has touched."""
    try:
        content = json.loads((labels.parent / "notes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    info = content.get("info") if isinstance(content, dict) else None
    return isinstance(info, dict) and info.get("contributor") == "Label Studio"


def _texts(pair: _Folders) -> dict[str, str]:
    """All text files of a folder of labels, by their path in it without its ending."""
    if pair.labels is None:
        return {}
    names = sorted(name for name in files_below(Path(pair.labels)) if name.endswith(".txt"))
    return {name[:-4]: f"{pair.labels}/{name}" for name in names}


def _gather(lines: _Lines, ids: Sequence[str], sizes: Sequence[tuple[int, int] | None], texts: Sequence[str]) -> None:
    report = lines.gathering.report
    for image_id, size, text in zip(ids, sizes, texts, strict=True):
        if size is None:
            report.add("image that cannot be opened, its boxes dropped", shown(image_id))
            report.unlabelled.append(image_id)
        elif image_id in lines.gathering:
            report.add("image with two label files, first taken", f"{shown(image_id)}: {shown(text)}")
        else:
            lines.read(image_id, size, text)


class _Lines:
    """The lines of text files -> shapes; of ``untouched`` images there may be empty files."""

    def __init__(self, gathering: Gathering, classes: _Classes, masks: bool, untouched: bool) -> None:
        self.gathering = gathering
        self._untouched = untouched
        self._index = {place: index for index, place in enumerate(classes.names)}
        self._keypoint_values = classes.keypoint_values
        self._masks = masks

    def read(self, image_id: str, size: tuple[int, int], path: str) -> None:
        """All shapes of one image."""
        report = self.gathering.report
        try:
            text = _text(path)
        except LabelError as error:
            report.add("label file that cannot be read, its image left out", f"{shown(path)}: {error}")
            report.unlabelled.append(image_id)
            return
        if self._untouched and not text.strip():
            report.doubt(image_id)
            return
        image = self.gathering.begin(image_id, size)
        name = path.rpartition("/")[2]
        for row, line in enumerate(text.splitlines(), start=1):
            if parts := line.split():
                self._line(image, size, parts, f"{name}: line {row}")

    def _line(self, image: int, size: tuple[int, int], parts: list[str], where: str) -> None:
        gathering = self.gathering
        report = gathering.report
        height, width = size
        try:
            values = [float(part) for part in parts]
        except ValueError:
            gathering.drop(image, "line that is not of numbers, dropped", where)
            return
        index = self._index.get(values[0])  # type: ignore[call-overload]  # 2.0 finds 2
        if index is None:
            gathering.drop(image, "class number without name, dropped", f"{where} with {shown(parts[0])}")
            return
        count = len(values)
        if self._keypoint_values and count >= 5 + self._keypoint_values:
            report.note("key points, the box taken", where)
            count = 5
        if max(map(abs, values[1:count]), default=0) > _SHARE_LIMIT:
            gathering.drop(image, "coordinates that are no shares of the image, dropped", where)
        elif count in (5, 6):
            x, y, half_width, half_height = values[1], values[2], values[3] / 2, values[4] / 2
            box = (
                (x - half_width) * width,
                (y - half_height) * height,
                (x + half_width) * width,
                (y + half_height) * height,
            )
            gathering.add(image, index, box, where, values[5] if count == 6 else 1.0)
        elif count >= 7:
            end = count - (count % 2 == 0)  # a last value alone is a score
            points = [value * (width, height)[place % 2] for place, value in enumerate(values[1:end])]
            report.note("polygon, the box around it taken", where)
            mask = gathering.polygon_mask(image, points, where) if self._masks else None
            gathering.add(image, index, around(points), where, values[-1] if end < count else 1.0, mask)
        else:
            gathering.drop(image, "line with neither a box nor a polygon, dropped", where)


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def write(labels: Labels, out: Path, images: ImageSource | None) -> None:
    """Write ``data.yaml`` and ``labels/``; polygons where the labels have masks.

    The images belong in ``images/``, under the paths that are their ids.
    """
    names = {index: category.name for index, category in enumerate(labels.categories)}
    content = {"train": "images", "val": "images", "names": names}
    out.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
    (out / "data.yaml").write_text(text, encoding="utf-8")
    folder = out / "labels"
    folder.mkdir()
    made: set[Path] = set()
    for number_, image_id in enumerate(labels.image_ids):
        path = folder / f"{stem_of(image_id)}.txt"
        if path.parent not in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.add(path.parent)
        path.write_text("".join(f"{line}\n" for line in _written(labels, number_)), encoding="utf-8")


def _written(labels: Labels, image: int) -> Iterator[str]:
    one = labels.image(image)
    height, width = one.size_hw
    for row, (class_index, corners) in enumerate(zip(one.classes.tolist(), one.boxes_xyxy.tolist(), strict=True)):
        if one.masks is not None:
            points = _outline(one.masks[row], one.size_hw)
            if points:
                shares = (f"{value / (width, height)[at % 2]:.{_DECIMALS}f}" for at, value in enumerate(points))
                yield f"{class_index} {' '.join(shares)}"
                continue
        x0, y0, x1, y1 = corners
        shares_xywh = (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height
        yield f"{class_index} {' '.join(f'{share:.{_DECIMALS}f}' for share in shares_xywh)}"


def _outline(code: bytes, size_hw: tuple[int, int]) -> list[int]:
    return one_outline(mask_codes.decode(mask_codes.column([code]), size_hw)[0])[0]


def link_images(labels: Labels, out: Path, images: ImageSource) -> int:
    """Links in ``images/`` to the files of the source, beside the labels that were written; gives their number.

    Files that are there already stay, also where ``images`` is itself a link to the source.
    """
    linked = 0
    for image_id in labels.image_ids:
        if image_id not in images or images.members is not None or not isinstance(images.root, Path):
            continue
        link, target = out / "images" / image_id, Path(images.root, image_id).absolute()
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.resolve() != target.resolve() and (link.is_symlink() or not link.exists()):
            link.unlink(missing_ok=True)
            link.symlink_to(target)
        linked += link.resolve() == target.resolve()
    return linked

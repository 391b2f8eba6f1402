"""Labels of other tools in, labels for other tools out.

An import never touches what people left: boxes that lie on one of the same class are left out, and what was proposed
before gives way. A file that has problems changes nothing, unless it is asked to leave out what is wrong; a box that
stands in it twice is taken once, and is no problem.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import BinaryIO

import numpy as np
from sqlalchemy import Engine, select
from sqlmodel import Session, col

from simdetr.app import box_edits, box_life, snapshots
from simdetr.app.box_life import BoxState, Change
from simdetr.app.class_list import add_class
from simdetr.app.database import reading, writing
from simdetr.app.image_list import project_of
from simdetr.app.picture_files import path_of
from simdetr.app.refusals import Refusal
from simdetr.app.schemas import ImportOut
from simdetr.app.tables import BoxClass, BoxSource, BoxStatus, ClassKind, Image, ImageStatus
from simdetr.data.annotations import LabelError
from simdetr.data.coco import SAME_AGAIN
from simdetr.data.images import ImageSource
from simdetr.data.label_files import FORMATS, LabelFormat, format_named, read_with_report, write_labels
from simdetr.data.label_formats.conversion import convert
from simdetr.data.labels import Labels
from simdetr.data.storage import files_below, write_json

_FIRST = "coco"
"""What most tools read."""
NAME = "labels"
"""Of the file or folder of an export."""
_CHUNK = 200
_COPY = 1 << 20
_MOST_FILES = 500_000
_IDS = 500


def formats() -> tuple[list[str], list[str]]:
    """Names of the formats that are read, and of those that are written."""
    names = [kind.name for kind in FORMATS]
    return names, sorted(names, key=lambda name: name != _FIRST)


# ----------------------------------------------------------------------------------------------------------------------
# In


def received(name: str, stream: BinaryIO, folder: Path, max_bytes: int) -> Path:
    """Keep a file of labels in a folder; a zip is unpacked there, but for what is named to lie elsewhere.

    Raises:
        Refusal: 413, it is too large; 400, it is a damaged zip, or one that tries tricks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    suffix = PurePosixPath(name).suffix.lower()
    target = folder / f"labels{suffix if re.fullmatch(r'[.][a-z0-9]{1,8}', suffix) else ''}"
    size = 0
    with target.open("wb") as file:
        while chunk := stream.read(_COPY):
            size += len(chunk)
            if size > max_bytes:
                raise Refusal(413, f"the file is larger than {max_bytes >> 20} MB")
            file.write(chunk)
    if suffix != ".zip":
        return target
    unpacked = folder / "unpacked"
    try:
        with zipfile.ZipFile(target) as archive:
            members = archive.infolist()
            if len(members) > _MOST_FILES or sum(one.file_size for one in members) > 20 * max_bytes:
                raise Refusal(413, "the zip holds too much")
            for member in members:
                path = member.filename.replace("\\", "/")
                if path.startswith("/") or ".." in path.split("/") or re.match(r"^[a-zA-Z]:", path):
                    raise Refusal(400, f"the path {member.filename!r} leads out of the zip")
            archive.extractall(unpacked)  # links come out as plain files
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise Refusal(400, f"the zip cannot be read: {error}") from error
    return unpacked


@dataclass(frozen=True)
class Wish:
    """What an import is to do.

    Attributes:
        dry_run: only report.
        skip_bad: import what is right of a file that has problems.
        proposed: the boxes become proposals, else what people drew.
        keep_inspected: leave images alone that somebody has inspected.
    """

    dry_run: bool = False
    skip_bad: bool = False
    proposed: bool = False
    keep_inspected: bool = False


def import_labels(engine: Engine, project_id: int, path: Path, wish: Wish, author: str) -> ImportOut:
    """Read a file of labels, and put its boxes on the images that it names.

    Raises:
        Refusal: 400, it cannot be read as any format.
    """
    with reading(engine) as session:
        ids = dict(
            session.execute(select(col(Image.path), col(Image.id)).where(col(Image.project_id) == project_id)).all()
        )
        root = Path(project_of(session, project_id).folder)
    try:
        labels, report = read_with_report(path, images=ImageSource(root, tuple(ids)))
    except LabelError as error:
        raise Refusal(400, str(error).replace(str(path), "the file")) from error
    again = report.counts.pop(SAME_AGAIN, 0)
    if again:
        report.notes[SAME_AGAIN] = again
    known = [row for row, name in enumerate(labels.image_ids) if name in ids]
    strangers = len(labels) - len(known)
    problems = report.lines()
    if strangers:
        first = next(name for name in labels.image_ids if name not in ids)
        problems.append(f"{strangers} × image that the project does not have: {first}")
    goes_on = not wish.dry_run and bool(known) and (wish.skip_bad or not problems)
    if goes_on:
        _put(engine, project_id, labels, known, ids, wish, author)
    return ImportOut(
        format=report.format,
        images=len(known),
        boxes=int(np.diff(labels.offsets)[known].sum()) if known else 0,
        classes=[category.name for category in labels.categories],
        unknown_images=strangers,
        problems=problems,
        notes=report.note_lines(),
        imported=goes_on,
    )


def _put(
    engine: Engine,
    project_id: int,
    labels: Labels,
    rows: Sequence[int],
    ids: dict[str, int | None],
    wish: Wish,
    author: str,
) -> None:
    with writing(engine) as session:
        classes = _classes(session, project_id, labels)
    scored = wish.proposed and bool((labels.scores != 1).any())  # a file without scores reads as one of ones
    for start in range(0, len(rows), _CHUNK):
        with writing(engine) as session:
            for row in rows[start : start + _CHUNK]:
                image = session.get(Image, ids[labels.image_ids[row]])
                if image is not None and not (wish.keep_inspected and image.status == ImageStatus.INSPECTED):
                    _put_on(session, image, labels, row, classes, wish, author, scored=scored)


def _classes(session: Session, project_id: int, labels: Labels) -> list[int]:
    rows = session.scalars(select(BoxClass).where(col(BoxClass.project_id) == project_id, ~col(BoxClass.deleted))).all()
    by_name = {row.name: row for row in rows}
    found = []
    for category in labels.categories:
        name = category.name.strip()[:200] or f"class {category.id}"
        if name not in by_name:
            by_name[name] = add_class(session, project_id, name, kind=ClassKind.BASE)
        found.append(by_name[name].id or 0)
    return found


def _put_on(
    session: Session,
    image: Image,
    labels: Labels,
    row: int,
    classes: Sequence[int],
    wish: Wish,
    author: str,
    *,
    scored: bool,
) -> None:
    own = labels.image(row)
    image.height, image.width = own.size_hw
    status = BoxStatus.PROPOSED if wish.proposed else BoxStatus.MANUAL
    columns = zip(own.boxes_xyxy.tolist(), own.classes.tolist(), own.scores.tolist(), own.crowd.tolist(), strict=True)
    found = [
        BoxState(
            None,
            classes[class_],
            (box[0], box[1], box[2], box[3]),
            status,
            BoxSource.IMPORT,
            score=score if scored else None,
            ignore=crowd,
            author=author,
        )
        for box, class_, score, crowd in columns
        if box[2] > box[0] and box[3] > box[1]
    ]
    existing = [box_edits.state_of(box) for box in box_edits.boxes_of(session, image.id or 0)]
    dropped, added = box_life.proposed(existing, found)
    after = ImageStatus(image.status)
    if not wish.proposed:
        after = ImageStatus.INSPECTED
    else:
        after = box_life.after_detection(after, len(added))
    changes = [Change(box, None) for box in dropped] + [Change(None, box) for box in added]
    if changes or after != image.status:
        image.version += 1
        box_edits.write(session, image, changes, after, "import", author)


# ----------------------------------------------------------------------------------------------------------------------
# Out


@dataclass(frozen=True)
class Written:
    """What an export has written.

    Attributes:
        id: by which it is fetched.
        path: the file.
        images: how many.
        boxes: how many.
        notes: for people.
        labels: what was written.
    """

    id: str
    path: Path
    images: int
    boxes: int
    notes: list[str]
    labels: Labels


def export_labels(
    engine: Engine, project_id: int, kind: str, statuses: Sequence[BoxStatus], folder: Path, *, with_images: bool
) -> Written:
    """Write the labels of a project's inspected images as a file; with proposals those of others that have some too.

    Raises:
        Refusal: 400, the format is unknown; 409, there is nothing to write.
    """
    try:
        target = format_named(kind)
    except LabelError as error:
        raise Refusal(400, str(error)) from error
    asked = [ImageStatus.INSPECTED]
    if BoxStatus.PROPOSED in statuses:
        asked += [ImageStatus.PROPOSED, ImageStatus.IN_INSPECTION]
    boxes: list[BoxState] = []
    with reading(engine) as session:
        project = project_of(session, project_id)
        labels = snapshots.labels_of(
            session,
            project,
            snapshots.with_statuses(statuses),
            statuses=asked,
            name=lambda image: image.path,
            rows_of=boxes,
            with_unnamed=BoxStatus.PROPOSED in statuses,
        )
        labels = _without_unseen(session, project_id, labels)
        paths = _paths(session, project_id, labels) if with_images else {}
    if not len(labels):
        raise Refusal(409, "no image is inspected yet, so that there is nothing to write")
    name = secrets.token_hex(6)
    place = folder / name
    place.mkdir(parents=True)
    try:
        path, written, notes = _write(labels, target, place)
    except LabelError as error:
        shutil.rmtree(place)
        raise Refusal(409, str(error)) from error
    if kind == "coco":
        _say_origins(path, boxes)
    if with_images or path.is_dir():
        path, lost = _zipped(path, paths)
        notes += [f"{lost} images could not be read and are not in the zip"] if lost else []
    ignored = int(written.crowd.sum())
    if ignored:
        notes.append(f"{ignored} boxes are regions to ignore")
    return Written(name, path, len(written), len(written.boxes_xyxy), notes, labels)


def _without_unseen(session: Session, project_id: int, labels: Labels) -> Labels:
    """Labels without the images that have no box and that nobody has inspected: they would pass for empty ones."""
    bare = {name for name, count in zip(labels.image_ids, np.diff(labels.offsets), strict=True) if not count}
    unseen: set[str] = set()
    names = sorted(bare)
    for start in range(0, len(names), _IDS):
        query = select(col(Image.path)).where(
            col(Image.project_id) == project_id,
            col(Image.path).in_(names[start : start + _IDS]),
            col(Image.status) != ImageStatus.INSPECTED,
        )
        unseen |= set(session.scalars(query))
    return labels.select([name for name in labels.image_ids if name not in unseen]) if unseen else labels


def _write(labels: Labels, target: LabelFormat, place: Path) -> tuple[Path, Labels, list[str]]:
    """Write labels in a format and read them back: where they are, what of them, and what was lost on the way."""
    out = place / (NAME if target.is_folder else f"{NAME}{target.suffixes[0]}")
    with TemporaryDirectory(dir=place) as folder:
        source = Path(folder, f"{NAME}.parquet")
        write_labels(labels, source)
        made = convert(source, out, source_format="simdetr", target_format=target.name)
    return out, made.written, [f"changed or lost: {count:,} × {what}" for what, count in made.changes.items() if count]


def _say_origins(path: Path, boxes: Sequence[BoxState]) -> None:
    """Where each box comes from, as one more member of its annotation; regions to ignore are no crowds."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for annotation, box in zip(content["annotations"], boxes, strict=True):
        annotation["simdetr"] = {
            "id": box.id,
            "status": box.status.value,
            "source": box.source.value,
            "run_id": box.run_id,
            "score": box.score,
            "author": box.author,
        }
        if box.ignore:
            annotation |= {"ignore": 1, "iscrowd": 1}
        if box.status is not BoxStatus.PROPOSED:
            del annotation["score"]
    write_json(path, content)


def _paths(session: Session, project_id: int, labels: Labels) -> dict[str, Path]:
    project = project_of(session, project_id)
    found: dict[str, Path] = {}
    for start in range(0, len(labels), _IDS):
        names = labels.image_ids[start : start + _IDS]
        query = select(Image).where(col(Image.project_id) == project_id, col(Image.path).in_(names))
        found |= {image.path: path_of(project, image) for image in session.scalars(query)}
    return found


def _zipped(labels: Path, images: dict[str, Path]) -> tuple[Path, int]:
    """A file of labels, or all of a folder, and images in one zip; and how many images could not be read."""
    target, lost = labels.with_name(f"{NAME}.zip"), 0
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        root = labels if labels.is_dir() else labels.parent
        for name in files_below(labels) if labels.is_dir() else [labels.name]:
            archive.write(root / name, name)
        for name, path in images.items():
            try:
                with path.open("rb") as source, archive.open(f"images/{name.lstrip('/')}", "w") as place:
                    shutil.copyfileobj(source, place)
            except OSError:
                lost += 1
    return target, lost


def find_export(folder: Path, name: str) -> Path | None:
    """The file of an export: the zip if there is one."""
    place = folder / name
    if not re.fullmatch("[0-9a-f]{12}", name) or not place.is_dir():
        return None
    files = sorted(place.iterdir(), key=lambda path: path.suffix != ".zip")
    return next((path for path in files if path.is_file()), None)

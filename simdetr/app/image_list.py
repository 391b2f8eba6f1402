"""The images of a project: added in batches without being opened, listed page by page, handed out by priority.

Nothing here holds all images in memory: folders are walked, answers are pages by key, and counts come from indices.
"""

from __future__ import annotations

import heapq
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from sqlalchemy import ColumnElement, Engine, and_, bindparam, delete, exists, func, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, col

from simdetr.app.database import writing
from simdetr.app.refusals import FieldRefusal, missing
from simdetr.app.schemas import ImageOut, LeaseOut
from simdetr.app.settings import LEASE_S
from simdetr.app.tables import Box, BoxSource, BoxStatus, Image, ImageStatus, Lease, Project, Table, now
from simdetr.data.images import IMAGE_SUFFIXES, open_images
from simdetr.data.storage import files_below

LOG = logging.getLogger(__name__)
BATCH = 2000
"""Images that are added at a time."""
OPEN = (ImageStatus.NEW, ImageStatus.PROPOSED, ImageStatus.IN_INSPECTION)
"""Images that are still to be seen."""
_SQL_VARIABLES = 400


# ----------------------------------------------------------------------------------------------------------------------
# Adding


def paths_below(root: Path) -> Iterator[str]:
    """Image paths relative to a folder, as they are met; links that lead out of it are left out and counted."""
    real_root = os.path.realpath(root)
    folders: dict[str, bool] = {}
    outside = 0
    for name in files_below(root):
        if PurePosixPath(name).suffix.lower() not in IMAGE_SUFFIXES:
            continue
        folder = name.rpartition("/")[0]
        if folder not in folders:
            folders[folder] = _is_within(root / folder, real_root)
        path = root / name
        if folders[folder] and (not path.is_symlink() or _is_within(path, real_root)):
            yield name
        else:
            outside += 1
    if outside:
        LOG.warning(
            "%d images are left out, since links lead to them outside of %s; give a list file of their paths instead",
            outside,
            root,
        )


def _is_within(path: Path, real_root: str) -> bool:
    real = os.path.realpath(path)
    return real == real_root or real.startswith(real_root.rstrip(os.sep) + os.sep)


def paths_of(source: Path) -> tuple[Path, Iterator[str]]:
    """The folder that a folder or list of images speaks of, and its paths."""
    if source.is_dir():
        return source.absolute(), paths_below(source)
    images = open_images(source)
    if images.members is not None or not isinstance(images.root, Path):
        raise ValueError(f"images: expected files on this machine, got {source}; unpack tar files first")
    return images.root.absolute(), iter(images.ids)


def add_paths(engine: Engine, project_id: int, root: Path, paths: Iterable[str]) -> int:
    """Add the images that are not there yet, batch by batch, each by name; files are neither opened nor copied.

    Returns:
        How many paths there were, new and known.
    """
    met, source = 0, iter(paths)
    while batch := list(islice(source, BATCH)):
        rows = [{"project_id": project_id, "path": path, "bytes": _size(root / path)} for path in sorted(batch)]
        defaults = {"status": ImageStatus.NEW.value, "place": 0.0, "flags": "", "version": 0, "uploaded": False}
        with writing(engine) as session:
            statement = _insert_if_new(engine.dialect.name, Image, ["project_id", "path"])
            session.connection().execute(statement, [row | defaults for row in rows])
        met += len(batch)
    return met


def _insert_if_new(dialect: str, table: type[Table], unique: list[str]) -> Any:  # noqa: ANN401
    """An insertion that leaves rows alone that are there, also those of another process at the same moment."""
    make = postgresql.insert if dialect == "postgresql" else sqlite.insert
    return make(table).on_conflict_do_nothing(index_elements=unique)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


# ----------------------------------------------------------------------------------------------------------------------
# Looking


def image_of(session: Session, image_id: int) -> Image:
    """An image; Refusal 404 if it is not there."""
    found = session.get(Image, image_id)
    if found is None:
        raise missing("image", image_id)
    return found


def project_of(session: Session, project_id: int) -> Project:
    """A project; Refusal 404 if it is not there."""
    found = session.get(Project, project_id)
    if found is None:
        raise missing("project", project_id)
    return found


def counts_by_status(session: Session, project_id: int) -> dict[ImageStatus, int]:
    """How many images have each status, all of them named."""
    rows = session.execute(
        select(col(Image.status), func.count()).where(col(Image.project_id) == project_id).group_by(col(Image.status))
    )
    found = dict(rows.all())
    return {status: found.get(status, 0) for status in ImageStatus}


def at_least(min_score: float) -> ColumnElement[bool]:
    """Boxes that are no proposals of a lower score; what is mined counts whatever its score, as does what has none."""
    below = func.coalesce(col(Box.score), 1.0) < min_score
    return ~and_(col(Box.status) == BoxStatus.PROPOSED, col(Box.source) != BoxSource.MINED, below)


def shown(session: Session, images: Sequence[Image], min_score: float = 0.0) -> list[ImageOut]:
    """Images as answers have them, with the number of their boxes by status, without proposals below a score."""
    counts: dict[int, dict[BoxStatus, int]] = {image.id or 0: dict.fromkeys(BoxStatus, 0) for image in images}
    ids = list(counts)
    for start in range(0, len(ids), _SQL_VARIABLES):
        rows = session.execute(
            select(col(Box.image_id), col(Box.status), func.count())
            .where(col(Box.image_id).in_(ids[start : start + _SQL_VARIABLES]), col(Box.alive), at_least(min_score))
            .group_by(col(Box.image_id), col(Box.status))
        )
        for image_id, status, count in rows:
            counts[image_id][BoxStatus(status)] = count
    return [
        ImageOut(
            id=image.id or 0,
            project_id=image.project_id,
            name=image.path,
            width=image.width,
            height=image.height,
            status=ImageStatus(image.status),
            priority=None if image.reason is None or image.status == ImageStatus.UNREADABLE else -image.place,
            reason=image.reason,
            flags=image.flags.split(),
            split=image.split,
            version=image.version,
            uploaded=image.uploaded,
            counts=counts[image.id or 0],
        )
        for image in images
    ]


def page(
    session: Session,
    project_id: int,
    *,
    statuses: Sequence[ImageStatus] = (),
    class_id: int | None = None,
    source: str | None = None,
    box_status: BoxStatus | None = None,
    search: str | None = None,
    by_name: bool = False,
    limit: int = 50,
    after: str | None = None,
) -> tuple[list[Image], str | None]:
    """Some images of a project, and what asks for those after them.

    Args:
        session: of the database.
        project_id: whose images.
        statuses: of the images; any if left out.
        class_id: a box of this class is on them; ``source`` and ``box_status`` are of the same box.
        source: who found the box.
        box_status: what is known of it.
        search: a part of the path, whatever its case.
        by_name: in the order of the paths instead of the priorities.
        limit: how many at most.
        after: what the page before gave as its second value.

    Raises:
        FieldRefusal: ``after`` is none that a page gave.
    """
    query = select(Image).where(col(Image.project_id) == project_id)
    if class_id is not None or source is not None or box_status is not None:
        wanted: list[Any] = [col(Box.image_id) == col(Image.id), col(Box.alive)]
        if class_id is not None:
            wanted.append(col(Box.class_id) == class_id)
        if source is not None:
            wanted.append(col(Box.source) == source)
        wanted.append(col(Box.status) == box_status if box_status else col(Box.status) != BoxStatus.REJECTED)
        query = query.where(exists().where(*wanted))
    if search:
        query = query.where(col(Image.path).icontains(search, autoescape=True))
    if by_name:
        if after is not None:
            query = query.where(col(Image.path) > after)
        query = query.order_by(col(Image.path))
        if statuses:
            query = query.where(col(Image.status).in_(statuses))
        found = list(session.scalars(query.limit(limit + 1)))
        return found[:limit], found[limit - 1].path if len(found) > limit else None
    if after is not None:
        place, number = _cursor(after)
        query = query.where(or_(col(Image.place) > place, and_(col(Image.place) == place, col(Image.id) > number)))
    query = query.order_by(col(Image.place), col(Image.id)).limit(limit + 1)
    # one query per status: each walks the index in its order, so that none sorts what it does not return
    parts = [query.where(col(Image.status) == status) for status in statuses] or [query]
    merged = heapq.merge(*(session.scalars(part) for part in parts), key=lambda image: (image.place, image.id))
    found = list(islice(merged, limit + 1))
    last = found[limit - 1] if len(found) > limit else None
    return found[:limit], None if last is None else f"{last.place!r}:{last.id}"


def _cursor(after: str) -> tuple[float, int]:
    place, _, number = after.partition(":")
    try:
        if not number.isascii() or len(number) > 18:
            raise ValueError
        return float(place), int(number)
    except ValueError:
        raise FieldRefusal(("query", "after"), f"expected what a page before gave as next, got {after!r}") from None


def set_priorities(session: Session, project_id: int, rows: Sequence[tuple[int, float, str, str]]) -> None:
    """Give images priorities, reasons and flags: rows of id, priority, reason and flags.

    Those that were drawn for an audit keep theirs.
    """
    table = Image.__table__  # type: ignore[attr-defined]
    if rows:
        session.connection().execute(
            update(table)
            .where(table.c.id == bindparam("b_id"), table.c.project_id == project_id, table.c.audit.is_(None))
            .values(place=bindparam("b_place"), reason=bindparam("b_reason"), flags=bindparam("b_flags")),
            [{"b_id": i, "b_place": -p, "b_reason": reason, "b_flags": flags} for i, p, reason, flags in rows],
        )


# ----------------------------------------------------------------------------------------------------------------------
# Leases: who has an image open. They keep an image out of others' queues, and end by themselves.


def take(session: Session, image_id: int, holder: str) -> bool:
    """Take an image for a while, or for a while longer; False where another holds it."""
    until = now() + timedelta(seconds=LEASE_S)
    changed = session.execute(
        update(Lease)
        .where(col(Lease.image_id) == image_id, or_(col(Lease.holder) == holder, col(Lease.until) < now()))
        .values(holder=holder, until=until)
    )
    if changed.rowcount:  # type: ignore[attr-defined]
        return True
    made = session.execute(
        _insert_if_new(session.get_bind().dialect.name, Lease, ["image_id"]).values(
            image_id=image_id, holder=holder, until=until
        )
    )
    return bool(made.rowcount)  # type: ignore[attr-defined]


def give_up(session: Session, image_id: int, holder: str) -> None:
    """End a lease, if it is this holder's."""
    session.execute(delete(Lease).where(col(Lease.image_id) == image_id, col(Lease.holder) == holder))


def lease_of(session: Session, image_id: int) -> LeaseOut | None:
    """The lease on an image, None where nobody holds it."""
    found = session.get(Lease, image_id, populate_existing=True)
    if found is None or found.until < now():
        return None
    return LeaseOut(holder=found.holder, until=found.until)


def queue(session: Session, project_id: int, limit: int, holder: str | None = None) -> list[Image]:
    """The images to be seen next that nobody else has open, the most urgent first."""
    held = exists().where(
        col(Lease.image_id) == col(Image.id), col(Lease.until) >= now(), col(Lease.holder) != (holder or "")
    )
    parts = [
        session.scalars(
            select(Image)
            .where(col(Image.project_id) == project_id, col(Image.status) == status, ~held)
            .order_by(col(Image.place), col(Image.id))
            .limit(limit)
        )
        for status in OPEN
    ]
    return list(islice(heapq.merge(*parts, key=lambda image: (image.place, image.id)), limit))

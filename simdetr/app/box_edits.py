"""What people do with the boxes of an image, kept in the database with a log that undo and history read.

Every write names the version of the image that the person saw; one that is stale changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import select, update
from sqlmodel import Session, col

from simdetr.app import box_life
from simdetr.app.box_life import SHOWN_SCORE, BoxState, Change, SentBox, TransitionError, UndoStack
from simdetr.app.image_list import lease_of, shown
from simdetr.app.refusals import FieldRefusal, Refusal, missing
from simdetr.app.schemas import BoxOut, Sheet
from simdetr.app.tables import Box, BoxClass, BoxSource, BoxStatus, Event, EventKind, Image, ImageStatus, now

_KEPT = ("class_id", "x0", "y0", "x1", "y1", "score", "status", "source", "run_id", "parent_id", "ignore", "author")


def state_of(box: Box) -> BoxState:
    """A row of the table as the rules of a box's life know it."""
    return BoxState(
        id=box.id,
        class_id=box.class_id,
        xyxy=(box.x0, box.y0, box.x1, box.y1),
        status=BoxStatus(box.status),
        source=BoxSource(box.source),
        score=box.score,
        run_id=box.run_id,
        parent_id=box.parent_id,
        ignore=box.ignore,
        author=box.author,
    )


def values_of(state: BoxState) -> dict[str, Any]:
    """The columns of a row."""
    x0, y0, x1, y1 = state.xyxy
    return {
        "class_id": state.class_id,
        "x0": x0,
        "y0": y0,
        "x1": x1,
        "y1": y1,
        "score": state.score,
        "status": state.status.value,
        "source": state.source.value,
        "run_id": state.run_id,
        "parent_id": state.parent_id,
        "ignore": state.ignore,
        "author": state.author,
    }


def shown_box(box: Box) -> BoxOut:
    """A box as answers have it."""
    kept = box.model_dump(exclude={"x0", "y0", "x1", "y1", "alive"})
    return BoxOut(**kept, xyxy=[box.x0, box.y0, box.x1, box.y1])


def boxes_of(session: Session, image_id: int, *, rejected: bool = True) -> list[Box]:
    """The boxes of an image that count, in the order in which they came."""
    query = select(Box).where(col(Box.image_id) == image_id, col(Box.alive)).order_by(col(Box.id))
    if not rejected:
        query = query.where(col(Box.status) != BoxStatus.REJECTED)
    return list(session.scalars(query))


def sheet_of(session: Session, image: Image, *, rejected: bool = False) -> Sheet:
    """An image with its boxes, as an editor shows it."""
    assert image.id is not None
    session.flush()
    stack = _stack(session, image.id)
    return Sheet(
        image=shown(session, [image])[0],
        version=image.version,
        boxes=[shown_box(box) for box in boxes_of(session, image.id, rejected=rejected)],
        can_undo=bool(stack.undoable),
        can_redo=bool(stack.redoable),
        lease=lease_of(session, image.id),
    )


def _stack(session: Session, image_id: int) -> UndoStack:
    log = session.execute(
        select(col(Event.id), col(Event.kind))
        .where(col(Event.image_id) == image_id, col(Event.kind) != EventKind.NOTE)
        .order_by(col(Event.id))
    )
    return UndoStack.of(log)


def claim_version(session: Session, image: Image, version: int) -> None:
    """Count the image's version up by one, or refuse because another write was there before."""
    changed = session.execute(
        update(Image)
        .where(col(Image.id) == image.id, col(Image.version) == version)
        .values(version=version + 1)
        .execution_options(synchronize_session=False)
    )
    session.refresh(image)
    if not changed.rowcount:  # type: ignore[attr-defined]
        raise Refusal(
            409,
            f"the image was changed meanwhile: it is at version {image.version}, you saw {version}",
            current=sheet_of(session, image),
        )


def save(
    session: Session,
    image: Image,
    version: int,
    sent: Sequence[SentBox],
    author: str,
    *,
    inspected: bool,
    min_score: float = SHOWN_SCORE,
) -> None:
    """Put the boxes of an image as a person left them, who saw the proposals from a score on.

    Raises:
        Refusal: 409 for a stale version.
        FieldRefusal: a box that cannot be, with its place in the request.
    """
    claim_version(session, image, version)
    assert image.id is not None and image.width is not None and image.height is not None
    known = _classes(session, image.project_id)
    cut = []
    for place, own in enumerate(sent):
        if own.class_id not in known:
            raise FieldRefusal(("body", "boxes", place, "class_id"), f"there is no class {own.class_id} here")
        try:
            xyxy = box_life.within(own.xyxy, (image.width, image.height))
        except TransitionError as error:
            raise FieldRefusal(("body", "boxes", place, "xyxy"), str(error)) from error
        cut.append(SentBox(own.id, own.class_id, xyxy, own.ignore, own.accepted, own.rejected))
    existing = [state_of(box) for box in boxes_of(session, image.id)]
    try:
        changes = box_life.saved(existing, cut, author, inspected=inspected, min_score=min_score)
    except TransitionError as error:
        raise FieldRefusal(("body", *error.place), str(error)) from error
    status = box_life.after_saving(ImageStatus(image.status), inspected=inspected)
    write(session, image, changes, status, "save", author)


def _classes(session: Session, project_id: int) -> set[int]:
    query = select(col(BoxClass.id)).where(col(BoxClass.project_id) == project_id, ~col(BoxClass.deleted))
    return {found for found in session.scalars(query) if found is not None}


def accept(
    session: Session,
    image: Image,
    version: int,
    author: str,
    *,
    box_ids: Sequence[int] | None = None,
    min_score: float | None = None,
    inspected: bool = False,
) -> None:
    """Accept proposals: those named, of these the ones with at least a score; all if nothing is named.

    On an image that is inspected with it no proposal stays: those that were not shown are removed, others rejected.
    """
    claim_version(session, image, version)
    assert image.id is not None
    there = [state_of(box) for box in boxes_of(session, image.id)]
    chosen = _chosen(there, box_ids)
    if min_score is not None:
        chosen = [box for box in chosen if box.score is None or box.score >= min_score]
    try:
        changes = [Change(box, box_life.accept(box, author)) for box in chosen]
    except TransitionError as error:
        raise Refusal(409, str(error)) from error
    if inspected:
        shown_from = SHOWN_SCORE if min_score is None else min_score
        left = [box for box in there if box.status is BoxStatus.PROPOSED and box not in chosen]
        changes += [Change(box, box_life.left_over(box, shown_from, author)) for box in left]
    status = box_life.after_saving(ImageStatus(image.status), inspected=inspected)
    write(session, image, [one for one in changes if one.before != one.after], status, "accept", author)


def reject(session: Session, image: Image, version: int, author: str, box_ids: Sequence[int]) -> None:
    """Take boxes away: rejected if a machine found them, removed if a person drew them."""
    claim_version(session, image, version)
    assert image.id is not None
    there = [state_of(box) for box in boxes_of(session, image.id)]
    changes = [Change(box, box_life.reject(box, author)) for box in _chosen(there, box_ids)]
    changes = [one for one in changes if one.before != one.after]
    write(session, image, changes, ImageStatus(image.status), "reject", author)


def _chosen(there: Sequence[BoxState], box_ids: Sequence[int] | None) -> list[BoxState]:
    if box_ids is None:
        return [box for box in there if box.status is BoxStatus.PROPOSED]
    known = {box.id: box for box in there}
    for place, box_id in enumerate(box_ids):
        if box_id not in known:
            raise FieldRefusal(("body", "box_ids", place), f"box {box_id} is not on this image")
    return [known[box_id] for box_id in dict.fromkeys(box_ids)]


def set_status(
    session: Session,
    image: Image,
    version: int,
    status: ImageStatus,
    author: str,
    *,
    min_score: float = SHOWN_SCORE,
) -> None:
    """Mark an image as inspected, skipped, or to be seen again.

    Of what is proposed on one that is inspected, what has at least a score was seen and is accepted; the rest goes, as
    does what was mined and has no name.
    """
    claim_version(session, image, version)
    if image.status == ImageStatus.UNREADABLE:
        raise Refusal(409, "the image cannot be read, so that nobody can have looked at it")
    assert image.id is not None
    changes: list[Change] = []
    there = [state_of(box) for box in boxes_of(session, image.id)]
    if status is ImageStatus.INSPECTED:
        for box in _chosen(there, None):
            right = box_life.is_shown(box, min_score) and not box_life.is_hint(box)
            changes.append(Change(box, box_life.accept(box, author) if right else None))
    elif status is ImageStatus.NEW and any(box.status is BoxStatus.PROPOSED for box in there):
        status = ImageStatus.PROPOSED
    write(session, image, changes, status, status.value, author)


def write(
    session: Session, image: Image, changes: Iterable[Change], status: ImageStatus, what: str, author: str
) -> None:
    """Carry out changes, and log what was before and is after."""
    before: dict[str, Any] = {"boxes": {}, "status": image.status}
    after: dict[str, Any] = {"boxes": {}, "status": status.value}
    for change in changes:
        row = _carry_out(session, image, change)
        before["boxes"][str(row.id)] = None if change.before is None else values_of(change.before)
        after["boxes"][str(row.id)] = {name: getattr(row, name) for name in _KEPT} if row.alive else None
    if not before["boxes"] and before["status"] == after["status"]:
        return
    _move(image, status)
    session.add(
        Event(
            project_id=image.project_id,
            image_id=image.id,
            kind=EventKind.EDIT,
            what=what,
            before=before,
            after=after,
            author=author,
        )
    )


def _carry_out(session: Session, image: Image, change: Change) -> Box:
    if change.before is None:
        assert change.after is not None and image.id is not None
        row = Box(image_id=image.id, **values_of(change.after))
        session.add(row)
        session.flush()
        return row
    found = session.get(Box, change.before.id)
    assert found is not None
    if change.after is None:
        found.alive = False
        return found
    values = values_of(change.after)
    if change.keeps_version:
        kept = Box(image_id=found.image_id, alive=False, time=found.time, **values_of(change.before))
        session.add(kept)
        session.flush()
        values["parent_id"] = kept.id
    found.sqlmodel_update(values | {"time": now()})
    return found


def _move(image: Image, status: ImageStatus) -> None:
    if status is ImageStatus.INSPECTED and image.status != ImageStatus.INSPECTED:
        image.inspected_at = now()
    image.status = status.value


# ----------------------------------------------------------------------------------------------------------------------
# Undo and history


def undo(session: Session, image: Image, version: int, author: str) -> None:
    """Take the last edit of an image back; Refusal 409 where there is none, or the version is stale."""
    _step(session, image, version, author, EventKind.UNDO)


def redo(session: Session, image: Image, version: int, author: str) -> None:
    """Do again what was taken back last; Refusal 409 where there is nothing, or the version is stale."""
    _step(session, image, version, author, EventKind.REDO)


def _step(session: Session, image: Image, version: int, author: str, kind: EventKind) -> None:
    assert image.id is not None
    stack = _stack(session, image.id)
    ids = stack.undoable if kind is EventKind.UNDO else stack.redoable
    if not ids:
        raise Refusal(409, f"there is nothing to {kind.value}", current=sheet_of(session, image))
    claim_version(session, image, version)
    edit = session.get(Event, ids[-1])
    assert edit is not None
    side: Mapping[str, Any] = edit.before if kind is EventKind.UNDO else edit.after
    for box_id, values in side["boxes"].items():
        _restore(session, image.id, int(box_id), values)
    _move(image, ImageStatus(side["status"]))
    session.add(
        Event(
            project_id=image.project_id,
            image_id=image.id,
            kind=kind,
            what=edit.what,
            before={"of": edit.id},
            after={"boxes": dict.fromkeys(side["boxes"])},
            author=author,
        )
    )


def _restore(session: Session, image_id: int, box_id: int, values: Mapping[str, Any] | None) -> None:
    """Put a row as it was; a class that was deleted meanwhile is the one that took its boxes."""
    row = session.get(Box, box_id)
    if values is None:
        if row is not None:
            row.alive = False
        return
    class_id, gone = _standing_class(session, values["class_id"])
    kept = dict(values) | {"class_id": class_id, "alive": True, "time": now()}
    if gone:
        kept["status"] = BoxStatus.REJECTED.value
    if row is None:  # a proposal that another run's took the place of
        session.add(Box(id=box_id, image_id=image_id, **kept))
    else:
        row.sqlmodel_update(kept)


def _standing_class(session: Session, class_id: int) -> tuple[int, bool]:
    """The class that a class has become, and whether it has gone without another in its place."""
    found = session.get(BoxClass, class_id)
    while found is not None and found.deleted and found.merged_into is not None:
        found = session.get(BoxClass, found.merged_into)
    if found is None or found.id is None:
        raise missing("class", class_id)
    return found.id, found.deleted


def versions_of(session: Session, box_id: int) -> list[Box]:
    """A box and the versions before it, the newest first."""
    found = session.get(Box, box_id)
    if found is None:
        raise missing("box", box_id)
    rows = [found]
    while rows[-1].parent_id is not None:
        parent = session.get(Box, rows[-1].parent_id)
        if parent is None or parent in rows:
            break
        rows.append(parent)
    return rows

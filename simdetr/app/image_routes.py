"""Requests about images, and about the boxes on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, File, Query, Response, UploadFile
from fastapi.responses import FileResponse
from sqlalchemy import select
from sqlmodel import Session, col

from simdetr.app import box_edits, image_list, uploads
from simdetr.app.box_life import SentBox
from simdetr.app.database import reading, writing
from simdetr.app.desk import AtDesk, Author
from simdetr.app.image_list import image_of, project_of, shown
from simdetr.app.picture_files import crop, for_browser, look_at, record_of, thumbnail
from simdetr.app.refusals import Refusal, missing
from simdetr.app.schemas import (
    COMMON,
    AcceptAsked,
    BoxesAsked,
    BoxVersions,
    EventOut,
    EventPage,
    Holding,
    Id,
    ImageOut,
    ImagePage,
    NextAsked,
    OrderOut,
    Problem,
    Queue,
    RejectAsked,
    Score,
    Sheet,
    Stale,
    StatusAsked,
    Taken,
    Uploaded,
    VersionAsked,
)
from simdetr.app.tables import Box, BoxSource, BoxStatus, Event, Image, ImageStatus, Order, Project

router = APIRouter(prefix="/api", responses=COMMON)
Limit = Annotated[int, Query(ge=1, le=500)]
STALE: dict[int | str, dict[str, object]] = {409: {"model": Stale}}
UNREADABLE: dict[int | str, dict[str, object]] = {415: {"model": Problem}}


@router.get("/projects/{project_id}/images")
def list_images(
    desk: AtDesk,
    project_id: Id,
    status: Annotated[list[ImageStatus] | None, Query()] = None,
    class_id: Annotated[Id | None, Query()] = None,
    source: BoxSource | None = None,
    box_status: BoxStatus | None = None,
    search: Annotated[str | None, Query(max_length=200, pattern=r"^[^\x00]*$")] = None,
    order: Annotated[str, Query(pattern="^(priority|name)$")] = "priority",
    min_score: Score = 0.0,
    limit: Limit = 50,
    after: Annotated[str | None, Query(max_length=4000, pattern=r"^[^\x00]*$")] = None,
) -> ImagePage:
    """Images of a project, page by page; ``class_id``, ``source`` and ``box_status`` are of one and the same box.

    Proposals below ``min_score`` are not counted.
    """
    with reading(desk.engine) as session:
        project_of(session, project_id)
        found, following = image_list.page(
            session,
            project_id,
            statuses=list(dict.fromkeys(status or [])),
            class_id=class_id,
            source=source,
            box_status=box_status,
            search=search,
            by_name=order == "name",
            limit=limit,
            after=after,
        )
        return ImagePage(images=shown(session, found, min_score), next=following)


@router.post("/projects/{project_id}/images", responses={413: {"model": Problem}})
def upload(desk: AtDesk, project_id: Id, files: Annotated[list[UploadFile], File(max_length=10_000)]) -> Uploaded:
    """Take images, or zips of them; each file says for itself whether it was taken."""
    outcome = uploads.Outcome()
    for file in files:
        with writing(desk.engine) as session:
            uploads.take_file(
                session,
                project_of(session, project_id),
                file.filename or "image",
                file.file,
                outcome,
                max_bytes=desk.settings.max_upload_mb << 20,
                max_pixels=desk.settings.max_pixels,
            )
    with reading(desk.engine) as session:
        return Uploaded(added=shown(session, outcome.added), duplicates=outcome.duplicates, refused=outcome.refused)


@router.get("/projects/{project_id}/queue")
def look_at_queue(desk: AtDesk, project_id: Id, limit: Limit = 20, min_score: Score = 0.0) -> Queue:
    """The images to be seen next that nobody has open; proposals below a score are not counted."""
    with reading(desk.engine) as session:
        project_of(session, project_id)
        counts = image_list.counts_by_status(session, project_id)
        order = session.scalars(
            select(Order).where(col(Order.project_id) == project_id).order_by(col(Order.id).desc()).limit(1)
        ).first()
        return Queue(
            images=shown(session, image_list.queue(session, project_id, limit), min_score),
            left=sum(counts[status] for status in image_list.OPEN),
            order=None if order is None else OrderOut.model_validate(order),
        )


@router.post("/projects/{project_id}/next")
def next_image(desk: AtDesk, project_id: Id, asked: NextAsked) -> Sheet | None:
    """Open the image to be seen next; null where none is left."""
    with writing(desk.engine) as session:
        project = project_of(session, project_id)
        if asked.after is not None:
            image_list.give_up(session, asked.after, asked.holder)
        for image in image_list.queue(session, project_id, 50, asked.holder):
            if image.id == asked.after or not _open(session, project, image, asked.holder):
                continue
            return box_edits.sheet_of(session, image)
    return None


def _open(session: Session, project: Project, image: Image, holder: str) -> bool:
    """Look at an image and take it; False where it cannot be read, or another has it."""
    assert image.id is not None
    if not look_at(project, image) or not image_list.take(session, image.id, holder):
        return False
    if image.status in (ImageStatus.NEW, ImageStatus.PROPOSED):
        image.status = ImageStatus.IN_INSPECTION.value
    return True


@router.get("/images/{image_id}")
def get_image(desk: AtDesk, image_id: Id) -> ImageOut:
    """An image."""
    with reading(desk.engine) as session:
        return shown(session, [image_of(session, image_id)])[0]


@router.delete("/images/{image_id}", status_code=204)
def delete_image(desk: AtDesk, image_id: Id) -> None:
    """Forget an image and its boxes; the file stays unless it was uploaded."""
    with writing(desk.engine) as session:
        image = image_of(session, image_id)
        project = project_of(session, image.project_id)
        path = record_of(project, image).path if image.uploaded else None
        session.delete(image)
    if isinstance(path, Path):
        path.unlink(missing_ok=True)


@router.get("/images/{image_id}/file", response_class=Response, responses=UNREADABLE)
def get_file(desk: AtDesk, image_id: Id, original: bool = False) -> Response:
    """The picture as browsers show it, or the file as it is."""
    with reading(desk.engine) as session:
        image = image_of(session, image_id)
        record = record_of(project_of(session, image.project_id), image)
    content, kind = for_browser(record)
    assert isinstance(record.path, Path)
    if original:
        return FileResponse(record.path, media_type="application/octet-stream", filename=record.path.name)
    if isinstance(content, Path):
        return FileResponse(content, media_type=kind, headers={"cache-control": "private, max-age=60"})
    return Response(content, media_type=kind, headers={"cache-control": "private, max-age=60"})


@router.get("/images/{image_id}/thumbnail", response_class=Response, responses=UNREADABLE)
def get_thumbnail(desk: AtDesk, image_id: Id, size: Annotated[int, Query(ge=64, le=512)] = 256) -> Response:
    """A small picture, as a JPEG."""
    with reading(desk.engine) as session:
        image = image_of(session, image_id)
        record = record_of(project_of(session, image.project_id), image)
    kept = thumbnail(record, size, desk.settings.out / "thumbnails")
    return FileResponse(kept, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})


@router.post("/images/{image_id}/open", responses={409: {"model": Taken}, **UNREADABLE})
def open_image(desk: AtDesk, image_id: Id, asked: Holding) -> Sheet:
    """Open an image, and keep it out of others' queues for ten minutes; again to keep it longer."""
    with writing(desk.engine) as session:
        image = image_of(session, image_id)
        project = project_of(session, image.project_id)
        readable = look_at(project, image)
        if readable:
            if not _open(session, project, image, asked.holder):
                lease = image_list.lease_of(session, image_id)
                raise Refusal(409, "somebody else has the image open", lease=lease)
            return box_edits.sheet_of(session, image)
    raise Refusal(415, f"{image.path} cannot be read: {image.reason}")


@router.post("/images/{image_id}/release", status_code=204)
def release_image(desk: AtDesk, image_id: Id, asked: Holding) -> None:
    """Close an image again."""
    with writing(desk.engine) as session:
        image_of(session, image_id)
        image_list.give_up(session, image_id, asked.holder)


# ----------------------------------------------------------------------------------------------------------------------
# Boxes


def _to_write(session: Session, image_id: int) -> Image:
    """An image whose boxes can be written: its size is known."""
    image = image_of(session, image_id)
    if not look_at(project_of(session, image.project_id), image):
        raise Refusal(415, f"{image.path} cannot be read: {image.reason}")
    session.flush()
    return image


@router.put("/images/{image_id}/status", responses={**STALE, **UNREADABLE})
def set_status(desk: AtDesk, author: Author, image_id: Id, asked: StatusAsked) -> Sheet:
    """Mark an image as inspected, which accepts what is proposed and shown, as skipped, or as to be seen again."""
    with writing(desk.engine) as session:
        image = _to_write(session, image_id)
        status = ImageStatus(asked.status)
        box_edits.set_status(session, image, asked.version, status, author, min_score=asked.min_score)
        return box_edits.sheet_of(session, image)


@router.get("/images/{image_id}/boxes")
def get_boxes(desk: AtDesk, image_id: Id, rejected: bool = False) -> Sheet:
    """The boxes of an image."""
    with writing(desk.engine) as session:
        image = image_of(session, image_id)
        look_at(project_of(session, image.project_id), image)
        return box_edits.sheet_of(session, image, rejected=rejected)


@router.put("/images/{image_id}/boxes", responses={**STALE, **UNREADABLE})
def put_boxes(desk: AtDesk, author: Author, image_id: Id, asked: BoxesAsked) -> Sheet:
    """Save all boxes of an image, as the editor has them."""
    sent = [
        SentBox(
            box.id,
            box.class_id,
            (box.xyxy[0], box.xyxy[1], box.xyxy[2], box.xyxy[3]),
            box.ignore,
            accepted=box.status is BoxStatus.INSPECTED,
            rejected=box.status is BoxStatus.REJECTED,
        )
        for box in asked.boxes
    ]
    with writing(desk.engine) as session:
        image = _to_write(session, image_id)
        done, least = asked.inspected, asked.min_score
        box_edits.save(session, image, asked.version, sent, author, inspected=done, min_score=least)
        return box_edits.sheet_of(session, image)


@router.post("/images/{image_id}/accept", responses={**STALE, **UNREADABLE})
def accept(desk: AtDesk, author: Author, image_id: Id, asked: AcceptAsked) -> Sheet:
    """Accept proposals of an image: those named, those of at least a score, or all."""
    with writing(desk.engine) as session:
        image = _to_write(session, image_id)
        box_edits.accept(
            session,
            image,
            asked.version,
            author,
            box_ids=asked.box_ids,
            min_score=asked.min_score,
            inspected=asked.inspected,
        )
        return box_edits.sheet_of(session, image)


@router.post("/images/{image_id}/reject", responses={**STALE, **UNREADABLE})
def reject(desk: AtDesk, author: Author, image_id: Id, asked: RejectAsked) -> Sheet:
    """Take boxes off an image."""
    with writing(desk.engine) as session:
        image = _to_write(session, image_id)
        box_edits.reject(session, image, asked.version, author, asked.box_ids)
        return box_edits.sheet_of(session, image)


@router.post("/images/{image_id}/undo", responses=STALE)
def undo(desk: AtDesk, author: Author, image_id: Id, asked: VersionAsked) -> Sheet:
    """Take the last edit of an image back."""
    with writing(desk.engine) as session:
        image = image_of(session, image_id)
        box_edits.undo(session, image, asked.version, author)
        return box_edits.sheet_of(session, image)


@router.post("/images/{image_id}/redo", responses=STALE)
def redo(desk: AtDesk, author: Author, image_id: Id, asked: VersionAsked) -> Sheet:
    """Do again what was taken back last."""
    with writing(desk.engine) as session:
        image = image_of(session, image_id)
        box_edits.redo(session, image, asked.version, author)
        return box_edits.sheet_of(session, image)


@router.get("/images/{image_id}/history")
def history(desk: AtDesk, image_id: Id, limit: Limit = 50, after: Annotated[Id | None, Query()] = None) -> EventPage:
    """What was done to an image, the newest first."""
    with reading(desk.engine) as session:
        image_of(session, image_id)
        query = select(Event).where(col(Event.image_id) == image_id)
        if after is not None:
            query = query.where(col(Event.id) < after)
        rows = list(session.scalars(query.order_by(col(Event.id).desc()).limit(limit + 1)))
        events = [
            EventOut(**row.model_dump(exclude={"before", "after"}), boxes=len(row.after.get("boxes", ())))
            for row in rows[:limit]
        ]
        return EventPage(events=events, next=events[-1].id if len(rows) > limit else None)


@router.get("/boxes/{box_id}/crop", response_class=Response, responses=UNREADABLE)
def get_crop(desk: AtDesk, box_id: Id, size: Annotated[int, Query(ge=32, le=512)] = 128) -> Response:
    """A picture of a box with a little around it, as a JPEG."""
    with reading(desk.engine) as session:
        box = session.get(Box, box_id)
        if box is None:
            raise missing("box", box_id)
        image = image_of(session, box.image_id)
        record = record_of(project_of(session, image.project_id), image)
        xyxy = (box.x0, box.y0, box.x1, box.y1)
    headers = {"cache-control": "private, max-age=60"}
    return Response(crop(record, xyxy, size), media_type="image/jpeg", headers=headers)


@router.get("/boxes/{box_id}/versions")
def box_versions(desk: AtDesk, box_id: Id) -> BoxVersions:
    """A box and the versions before it, the newest first."""
    with reading(desk.engine) as session:
        return BoxVersions(boxes=[box_edits.shown_box(box) for box in box_edits.versions_of(session, box_id)])

"""What machines found in, proposals on the images out: the rules of a box's life say what may change.

Detections come with the detector's own classes. One that the app trained knows the project's by their ids; any other's
are found by name, a pseudo-class by the name that people gave to its cluster, and made where there is none. Boxes of a
pseudo-class without a name are no more than places to look at, as mined ones are: a few of each image are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from sqlalchemy import Engine, delete, select
from sqlmodel import Session, col

from simdetr.app import box_life
from simdetr.app.box_edits import state_of, values_of
from simdetr.app.box_life import BoxState
from simdetr.app.class_list import add_class
from simdetr.app.database import writing
from simdetr.app.tables import Box, BoxClass, BoxSource, BoxStatus, ClassKind, Cluster, Image, ImageStatus, Lease, now
from simdetr.data.annotations import Category
from simdetr.data.labels import Labels

UNNAMED = "object"
"""The class of what a pretrained detector finds before people gave its pseudo-classes names."""
_PSEUDO = ("cluster ", UNNAMED)
_CHUNK = 200
MOST_HINTS = 10
"""Boxes without a name that a detector or pretraining proposes on an image: the surest ones of different places."""


@dataclass
class Proposed:
    """How much came of detections.

    Attributes:
        images: that were changed.
        boxes: that were proposed.
        suppressed: detections on boxes that were rejected or are labelled.
        open: images that somebody had open, and that were left alone.
        seen: images that people had inspected or skipped, and that were left alone.
        shown: images that got boxes from the score on that people are shown; counted where there is one, as below.
        hints: images that got places to look at, of no name yet.
        hidden: images that got boxes below that score only.
        kept: images that keep the proposals they had, since these say more than what was found.
    """

    images: int = 0
    boxes: int = 0
    suppressed: int = 0
    open: int = 0
    seen: int = 0
    shown: int = 0
    hints: int = 0
    hidden: int = 0
    kept: int = 0

    def add(self, other: Proposed) -> None:
        """Count another part."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def text(self) -> str:
        """In words."""
        words = f"{self.boxes:,} boxes on {self.images:,} images"
        if self.suppressed:
            words += f", {self.suppressed:,} not proposed again"
        if self.open:
            words += f", {self.open:,} images left alone since somebody has them open"
        if self.seen:
            words += f", {self.seen:,} that were inspected meanwhile"
        return words

    def images_text(self, shown_score: float) -> str:
        """How many images got what, in words."""
        words = [f"{self.shown:,} with boxes at or above {shown_score:.2f}"]
        others = {
            "with boxes of no name yet": self.hints,
            f"with boxes below {shown_score:.2f} only": self.hidden,
            "keep the proposals they had": self.kept,
            "left alone since somebody has them open": self.open,
            "inspected meanwhile": self.seen,
        }
        if self.hints and not self.shown:
            words = []
        return "; ".join([*words, *(f"{count:,} {what}" for what, count in others.items() if count)])


def classes_for(session: Session, project_id: int, categories: Sequence[Category], *, own: bool) -> dict[int, int]:
    """The project's class of each of a detector's, by its row.

    Args:
        session: of the database.
        project_id: whose classes.
        categories: the detector's.
        own: the app trained it, so that its ids are the project's.
    """
    rows = list(session.scalars(select(BoxClass).where(col(BoxClass.project_id) == project_id)))
    by_id, by_name = {row.id: row for row in rows}, {row.name: row for row in rows if not row.deleted}
    named = _named_clusters(session, project_id)
    found = {}
    for row, category in enumerate(categories):
        standing = by_id.get(category.id) if own and isinstance(category.id, int) else None
        while standing is not None and standing.deleted:
            standing = by_id.get(standing.merged_into)
        if standing is not None and standing.id is not None:
            found[row] = standing.id
        elif own:
            continue  # its class was deleted
        elif category.name.startswith(_PSEUDO[0]) or category.name == UNNAMED:
            number = category.id if isinstance(category.id, int) else 0
            found[row] = named.get(number) or _made(session, project_id, UNNAMED, ClassKind.PSEUDO, by_name)
        else:
            found[row] = _made(session, project_id, category.name.strip()[:200] or UNNAMED, ClassKind.BASE, by_name)
    return found


def _named_clusters(session: Session, project_id: int) -> dict[int, int]:
    """Classes of the pseudo-classes that people named, by the ids that their categories have."""
    rows = session.scalars(
        select(Cluster).where(col(Cluster.project_id) == project_id, col(Cluster.class_id).is_not(None))
    )
    return {member: row.class_id for row in rows for member in row.members if row.class_id is not None}


def _made(session: Session, project_id: int, name: str, kind: ClassKind, by_name: dict[str, BoxClass]) -> int:
    if name not in by_name:
        by_name[name] = add_class(session, project_id, name, kind=kind)
    made = by_name[name].id
    assert made is not None
    return made


def propose(
    session: Session,
    labels: Labels,
    image_ids: Mapping[str, int],
    class_ids: Mapping[int, int],
    *,
    source: BoxSource = BoxSource.DETECTOR,
    run_id: int | None = None,
    even_open: bool = False,
    even_bare: bool = False,
    shown_score: float | None = None,
) -> Proposed:
    """Put detections on their images as proposals, in place of the proposals before.

    Of a class that has no name yet the surest boxes are hints, as if they were mined.

    Args:
        session: of the database.
        labels: detections; images without any lose their proposals too.
        image_ids: the project's images by the labels' ids.
        class_ids: its classes by the rows of the labels' categories; boxes of others are left out.
        source: who found them.
        run_id: the run that did.
        even_open: also on images that somebody has open.
        even_bare: also on those that somebody has open while they have no box. What is mined comes on them anyway, and
            on no image that has proposals of anything else.
        shown_score: people are shown proposals from this score on. Where nothing that is found reaches it, and
            something of what was proposed before does or was mined, that stays. All gives way if left out.
    """
    outcome, even_bare = Proposed(), even_bare or source is BoxSource.MINED
    unnamed = set(
        session.scalars(
            select(col(BoxClass.id)).where(
                col(BoxClass.id).in_(set(class_ids.values())), col(BoxClass.kind) == ClassKind.PSEUDO
            )
        )
    )
    wanted = {image_ids[name]: row for row, name in enumerate(labels.image_ids) if name in image_ids}
    if not wanted:
        return outcome
    images = session.scalars(select(Image).where(col(Image.id).in_(wanted))).all()
    held = set(
        session.scalars(select(col(Lease.image_id)).where(col(Lease.image_id).in_(wanted), col(Lease.until) >= now()))
    )
    there: dict[int, list[BoxState]] = {}
    for box in session.scalars(select(Box).where(col(Box.image_id).in_(wanted), col(Box.alive)).order_by(col(Box.id))):
        there.setdefault(box.image_id, []).append(state_of(box))
    for image in images:
        assert image.id is not None
        if image.status in (ImageStatus.INSPECTED, ImageStatus.SKIPPED) and not even_open:
            outcome.seen += 1
            continue
        standing = there.get(image.id, [])
        if image.id in held and not even_open and (standing or not even_bare):
            outcome.open += 1
            continue
        if source is BoxSource.MINED and any(
            b.status is BoxStatus.PROPOSED and not box_life.is_hint(b) for b in standing
        ):
            outcome.suppressed += len(labels.of(labels.image_ids[wanted[image.id]]))
            continue
        own = labels.image(wanted[image.id])
        image.height, image.width = own.size_hw
        found = [
            BoxState(
                None,
                class_ids[int(class_)],
                (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
                BoxStatus.PROPOSED,
                BoxSource.MINED if class_ids[int(class_)] in unnamed else source,
                score=round(float(score), 6),
                run_id=run_id,
                author=source.value,
            )
            for box, class_, score in zip(own.boxes_xyxy, own.classes, own.scores, strict=True)
            if int(class_) in class_ids and box[2] > box[0] and box[3] > box[1]
        ]
        if source is not BoxSource.MINED:
            found = _few_hints(found)
        dropped, added = box_life.proposed(standing, found)
        outcome.suppressed += len(found) - len(added)
        if shown_score is not None:
            worth = box_life.worth(added, shown_score)
            if worth < box_life.worth(dropped, shown_score):
                outcome.kept += 1
                continue
            outcome.shown += worth == box_life.Worth.SHOWN
            outcome.hints += worth == box_life.Worth.HINTS
            outcome.hidden += worth == box_life.Worth.HIDDEN
        image.status = box_life.after_detection(ImageStatus(image.status), len(added)).value
        if not dropped and not added:
            continue
        if dropped:
            session.execute(delete(Box).where(col(Box.id).in_([box.id for box in dropped])))
        session.add_all(Box(image_id=image.id, **values_of(box)) for box in added)
        image.version += 1
        outcome.images += 1
        outcome.boxes += len(added)
    return outcome


def _few_hints(found: Sequence[BoxState]) -> list[BoxState]:
    """Boxes without all but the surest hints; of two hints on the same place, of whatever pseudo-class, one stays."""
    hints: list[BoxState] = []
    for box in sorted(filter(box_life.is_hint, found), key=lambda box: -(box.score or 0.0)):
        if len(hints) < MOST_HINTS and all(box_life.iou(box.xyxy, one.xyxy) <= box_life.SAME_IOU for one in hints):
            hints.append(box)
    return [box for box in found if not box_life.is_hint(box)] + hints


def propose_labels(
    engine: Engine,
    project_id: int,
    labels: Labels,
    class_ids: Mapping[int, int] | None = None,
    *,
    even_bare: bool = False,
    shown_score: float | None = None,
) -> Proposed:
    """Put the boxes of a pretraining, by the names of its images, on those of a project that nobody has seen.

    Arguments as of ``propose``; without ``class_ids`` the labels' classes are those of the project that have no name.
    """
    outcome = Proposed()
    for start in range(0, len(labels), _CHUNK):
        part = labels.select(labels.image_ids[start : start + _CHUNK])
        with writing(engine) as session:
            query = select(col(Image.path), col(Image.id)).where(
                col(Image.project_id) == project_id, col(Image.path).in_(part.image_ids)
            )
            ids = {path: image_id for path, image_id in session.execute(query) if image_id is not None}
            if not ids:
                continue
            classes = class_ids or classes_for(session, project_id, part.categories, own=False)
            outcome.add(propose(session, part, ids, classes, even_bare=even_bare, shown_score=shown_score))
    return outcome

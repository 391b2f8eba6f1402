"""What people did in, whether to go on out: verdicts so far, errors left with an interval, what more images would buy.

The errors left are estimated from images that were drawn at random and inspected like all others, see
`simdetr.labelling.stopping`; those that an order chose say nothing about the rest. An audit speaks of the detection
whose proposals it judged, and is drawn anew after another. Proposals below the score that people are shown are no part
of it: nobody judges them, and nobody would take them for labels.
"""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from sqlalchemy import ColumnElement, func, select, update
from sqlmodel import Session, col

from simdetr.app.box_life import SHOWN_SCORE, TRUTH
from simdetr.app.image_list import OPEN
from simdetr.app.refusals import Refusal
from simdetr.app.schemas import ErrorsLeft, Estimate, NextBatch
from simdetr.app.tables import Box, BoxSource, BoxStatus, Image, ImageStatus, Project, Run, RunKind, RunState
from simdetr.data.annotations import Category
from simdetr.data.labels import Labels

if TYPE_CHECKING:
    from simdetr.labelling.stopping import Audit

FIRST = -1e9
"""Place of the images of an audit: before all others."""
REASON = "drawn at random, to tell how many errors are left"
_RECENT, _NEXT = 50, 20
_BREAK = timedelta(minutes=10)


def last_detection(session: Session, project_id: int) -> int | None:
    """The last detection over all images of a project that is done."""
    runs = session.scalars(
        select(Run)
        .where(col(Run.project_id) == project_id, col(Run.kind) == RunKind.DETECT, col(Run.state) == RunState.DONE)
        .order_by(col(Run.id).desc())
    )
    return next((r.id for r in runs if not r.parameters.get("image_ids") and r.parameters.get("propose", True)), None)


def draw(session: Session, project: Project, count: int) -> int:
    """Draw images for an audit, and put them first in the queue; Refusal 409 where there is nothing to judge."""
    assert project.id is not None
    detection = last_detection(session, project.id)
    if detection is None:
        raise Refusal(409, "there are no proposals to judge; detect on all images first")
    ids = session.scalars(
        select(col(Image.id)).where(
            col(Image.project_id) == project.id,
            col(Image.status).in_((ImageStatus.NEW, ImageStatus.PROPOSED)),
            func.coalesce(col(Image.audit), -1) != detection,
        )
    )
    from simdetr.labelling.stopping import draw_audit  # here and below: scipy takes a moment to load

    drawn = [int(name) for name in draw_audit([str(own) for own in ids], count, seed=detection)]
    session.execute(
        update(Image).where(col(Image.id).in_(drawn)).values(audit=detection, place=FIRST, reason=REASON),
        execution_options={"synchronize_session": False},
    )
    return len(drawn)


def estimate_of(session: Session, project: Project, confidence: float, min_score: float = SHOWN_SCORE) -> Estimate:
    """How far a project is, where people are shown the proposals from a score on."""
    assert project.id is not None
    own = col(Image.project_id) == project.id
    verdicts = _verdicts(session, own)
    left_images = session.scalar(select(func.count()).select_from(Image).where(own, col(Image.status).in_(OPEN))) or 0
    detection = last_detection(session, project.id)
    audit = None if detection is None else _audit(session, own, detection, min_score)
    scores = _scores_left(session, own, min_score)
    errors, why = None, "detect on all images, then draw some at random to judge (audit)"
    if audit is not None and len(audit) >= 2:
        from simdetr.labelling.stopping import errors_left

        found = errors_left(audit, _as_labels(scores, left_images), confidence)
        errors = ErrorsLeft(**{name: getattr(found, name) for name in ErrorsLeft.model_fields})
        why = f"between {found.low:.0f} and {found.high:.0f} errors are left on {left_images:,} images: {found.basis}"
    elif detection is not None:
        count = 0 if audit is None else len(audit)
        why = f"{count} images of the audit are inspected, at least 2 are needed and 20 are of use"
    inspected = session.scalar(
        select(func.count()).select_from(Image).where(own, col(Image.status) == ImageStatus.INSPECTED)
    )
    return Estimate(
        inspected=inspected or 0,
        accepted=verdicts["accepted"],
        corrected=verdicts["corrected"],
        rejected=verdicts["rejected"],
        drawn=verdicts["drawn"],
        audited=0 if audit is None else len(audit),
        left_images=left_images,
        left_detections=len(scores),
        errors_left=errors,
        next_20=_next_batch(session, own, left_images, errors),
        why=why,
    )


def _verdicts(session: Session, own: ColumnElement[bool]) -> Counter[str]:
    """What became of what was proposed on images that were inspected, and what was drawn there."""
    rows = session.execute(
        select(col(Box.status), col(Box.source), func.count())
        .join(Image, col(Image.id) == col(Box.image_id))
        .where(own, col(Image.status) == ImageStatus.INSPECTED, col(Box.alive))
        .group_by(col(Box.status), col(Box.source))
    )
    found: Counter[str] = Counter()
    for status, source, count in rows:
        found[_verdict(status, source)] += count
    return found


def _verdict(status: str, source: str) -> str:
    if source == BoxSource.USER:
        return "drawn"
    return {BoxStatus.INSPECTED: "accepted", BoxStatus.CORRECTED: "corrected", BoxStatus.REJECTED: "rejected"}.get(
        BoxStatus(status), "left"
    )


def _audit(session: Session, own: ColumnElement[bool], detection: int, min_score: float) -> Audit | None:
    """What people found on the images of an audit that they have inspected; None where these are less than two.

    Boxes that were mined and named are as good as drawn: the detector had missed them.
    """
    ids = session.scalars(
        select(col(Image.id)).where(own, col(Image.audit) == detection, col(Image.status) == ImageStatus.INSPECTED)
    ).all()
    if len(ids) < 2:
        return None
    places = {image_id: place for place, image_id in enumerate(ids)}
    missed, owner, scores, wrong = np.zeros(len(ids), np.int64), [], [], []
    for box in session.scalars(select(Box).where(col(Box.image_id).in_(ids), col(Box.alive))):
        if box.source in (BoxSource.USER, BoxSource.MINED):
            missed[places[box.image_id]] += box.status in TRUTH
        elif box.score is not None and box.score >= min_score and box.status != BoxStatus.PROPOSED:
            owner.append(places[box.image_id])
            scores.append(min(box.score, 1.0))
            wrong.append(box.status != BoxStatus.INSPECTED)
    from simdetr.labelling.stopping import Audit

    return Audit(np.array(owner, np.int64), np.array(scores, np.float32), np.array(wrong, np.bool_), missed)


def _scores_left(session: Session, own: ColumnElement[bool], min_score: float) -> list[float]:
    """Scores of the proposals on images that are still to be seen, of those that people are shown."""
    rows = session.scalars(
        select(col(Box.score))
        .join(Image, col(Image.id) == col(Box.image_id))
        .where(own, col(Image.status).in_(OPEN), col(Box.alive), col(Box.status) == BoxStatus.PROPOSED)
        .where(col(Box.source) != BoxSource.MINED, col(Box.score) >= min_score)
    )
    return [min(max(score, 0.0), 1.0) for score in rows if score is not None]


def _as_labels(scores: list[float], images: int) -> Labels:
    """As many images and scores as labels; which box is on which image does not matter to an estimate."""
    count = len(scores) if images else 0
    offsets = np.full(images + 1, count, np.int64)
    offsets[0] = 0
    return Labels(
        image_ids=tuple(map(str, range(images))),
        sizes_hw=np.ones((images, 2), np.int64),
        offsets=offsets,
        boxes_xyxy=np.zeros((count, 4), np.float32),
        classes=np.zeros(count, np.int64),
        scores=np.array(scores[:count], np.float32),
        categories=(Category(1, "any"),),
        areas=np.zeros(count, np.float32),
        crowd=np.zeros(count, np.bool_),
    )


def _next_batch(session: Session, own: ColumnElement[bool], left: int, errors: ErrorsLeft | None) -> NextBatch | None:
    """Errors that twenty more images would find, by the estimate or else as on the last ones, and their time."""
    rows = session.execute(
        select(col(Image.id), col(Image.inspected_at))
        .where(own, col(Image.status) == ImageStatus.INSPECTED, col(Image.inspected_at).is_not(None))
        .order_by(col(Image.inspected_at).desc())
        .limit(_RECENT)
    ).all()
    if not left or not rows:
        return None
    times = [row[1] for row in rows if row[1] is not None]
    gaps = [before - after for before, after in pairwise(times) if before - after < _BREAK]
    minutes = None
    count = min(_NEXT, left)
    if gaps:
        minutes = median(gap.total_seconds() for gap in gaps) * count / 60
    if errors is not None:
        return NextBatch(errors_found=errors.total * count / left, minutes=minutes)
    ids = [row[0] for row in rows[:_NEXT]]
    found: Counter[str] = Counter()
    boxes = select(col(Box.status), col(Box.source)).where(col(Box.image_id).in_(ids), col(Box.alive))
    for status, source in session.execute(boxes):
        found[_verdict(status, source)] += 1
    per_image = (found["corrected"] + found["rejected"] + found["drawn"]) / len(ids)
    return NextBatch(errors_found=per_image * count, minutes=minutes)

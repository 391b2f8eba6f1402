"""What may become of a box, as pure functions: drawn, proposed, accepted, corrected, rejected, removed, undone.

    (none) -> manual        drawn by a person
    (none) -> proposed      found by a machine
    proposed -> inspected   accepted as it is
    proposed, mined -> inspected    given its class, at its place
    any but rejected -> corrected   class, place or flag changed; the version before is kept
    found by a machine -> rejected  also after it was accepted or corrected; back by undo alone
    drawn by a person -> removed    as if it had never been
    proposed, mined -> removed      not taken up
    proposed -> removed             below the score that was shown when its image was inspected: nobody saw it

Only what people looked at is truth: inspected, corrected, manual. No run touches these, nor what was rejected.
Letters: E existing boxes, N new ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

from simdetr.app.tables import BoxSource, BoxStatus, EventKind, ImageStatus

TRUTH = (BoxStatus.INSPECTED, BoxStatus.CORRECTED, BoxStatus.MANUAL)
"""What people have seen and left standing."""
SAME_IOU = 0.5
"""Overlap above which a new proposal of the same class is taken for a box that is there."""
SHOWN_SCORE = 0.3
"""Proposals below it are not shown to people unless they ask for them."""
OUTSIDE_PX = 1.0
"""A box may leave its image by so much, and is cut there; more is an error."""
Corners = tuple[float, float, float, float]


class TransitionError(ValueError):
    """A box cannot become what was asked for; ``place`` is where in the request it stands, if anywhere."""

    def __init__(self, message: str, place: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.place = place


@dataclass(frozen=True)
class BoxState:
    """A box as it stands, by the columns of the table.

    Attributes:
        id: None until it is stored.
        class_id: its class.
        xyxy: corners in pixels.
        status: see `BoxStatus`.
        source: who found it first.
        score: of the machine that did.
        run_id: the run of that machine.
        parent_id: the version before.
        ignore: it stands for a region where nothing is to be learned.
        author: who left it so.
    """

    id: int | None
    class_id: int
    xyxy: Corners
    status: BoxStatus = BoxStatus.MANUAL
    source: BoxSource = BoxSource.USER
    score: float | None = None
    run_id: int | None = None
    parent_id: int | None = None
    ignore: bool = False
    author: str = ""


@dataclass(frozen=True)
class SentBox:
    """A box as a person leaves it in the editor; ``id`` None for one that is new, ``accepted`` for a proposal."""

    id: int | None
    class_id: int
    xyxy: Corners
    ignore: bool = False
    accepted: bool = False
    rejected: bool = False


@dataclass(frozen=True)
class Change:
    """One box before and after; ``before`` None for a new one, ``after`` None for one that is removed.

    ``keeps_version`` says that the state before is to be kept as the parent of the one after.
    """

    before: BoxState | None
    after: BoxState | None
    keeps_version: bool = False


def accept(box: BoxState, author: str) -> BoxState:
    """A proposal that a person leaves as it is; what is truth already stays."""
    if box.status is BoxStatus.REJECTED:
        raise TransitionError(f"box {box.id} was rejected; undo that, or draw it anew")
    if box.status is not BoxStatus.PROPOSED:
        return box
    return replace(box, status=BoxStatus.INSPECTED, author=author)


def is_hint(box: BoxState) -> bool:
    """Whether a box is no more than a place to look at: mined, of no class that anybody or anything named."""
    return box.source is BoxSource.MINED and box.status is BoxStatus.PROPOSED


def is_shown(box: BoxState, min_score: float) -> bool:
    """Whether people see a box where proposals below a score are hidden; what is mined or has no score never is."""
    return box.status is not BoxStatus.PROPOSED or is_hint(box) or box.score is None or box.score >= min_score


class Worth(IntEnum):
    """How much proposals on an image tell a person."""

    NOTHING = 0
    HIDDEN = 1
    HINTS = 2
    SHOWN = 3


def worth(boxes: Iterable[BoxState], min_score: float) -> Worth:
    """The worth of the best of some proposals, where those below a score are hidden."""
    return max((_worth(box, min_score) for box in boxes), default=Worth.NOTHING)


def _worth(box: BoxState, min_score: float) -> Worth:
    if is_hint(box):
        return Worth.HINTS
    return Worth.SHOWN if is_shown(box, min_score) else Worth.HIDDEN


def left_over(box: BoxState, min_score: float, author: str) -> BoxState | None:
    """What becomes of a box that a person did not leave on an image that is inspected now.

    A proposal below the score that was shown is removed: nobody saw it, so that nobody has said that it is wrong.
    """
    return reject(box, author) if is_shown(box, min_score) else None


def correct(box: BoxState, class_id: int, xyxy: Corners, ignore: bool, author: str) -> BoxState:
    """A box of another class, place or flag; the same box where nothing changes.

    A mined one that is given its class is as it was proposed: nothing had named it.
    """
    if (class_id, xyxy, ignore) == (box.class_id, box.xyxy, box.ignore):
        return box
    if box.status is BoxStatus.REJECTED:
        raise TransitionError(f"box {box.id} was rejected; undo that, or draw it anew")
    if is_hint(box) and (xyxy, ignore) == (box.xyxy, box.ignore):
        return replace(box, class_id=class_id, status=BoxStatus.INSPECTED, author=author)
    return replace(
        box, class_id=class_id, xyxy=xyxy, ignore=ignore, status=BoxStatus.CORRECTED, parent_id=box.id, author=author
    )


def reject(box: BoxState, author: str) -> BoxState | None:
    """A box that a person takes away: rejected if a machine found it, None (removed) if a person drew it.

    One that was mined and not taken up is removed too: it had claimed nothing.
    """
    if box.status is BoxStatus.REJECTED:
        return box
    if box.source is BoxSource.USER or is_hint(box):
        return None
    return replace(box, status=BoxStatus.REJECTED, author=author)


def saved(
    existing: Sequence[BoxState], sent: Sequence[SentBox], author: str, *, inspected: bool, min_score: float = 0.0
) -> list[Change]:
    """What changes when a person saves an image.

    Args:
        existing: the boxes that are on it; rejected ones may be among them.
        sent: all boxes that are to be on it, the rejected ones left out.
        author: who saves.
        inspected: the person has looked at all of it, so that proposals that were sent are accepted.
        min_score: of the proposals that were shown to a person who has inspected the image.

    Raises:
        TransitionError: a box that is not on the image or comes twice, or cannot become what was sent.
    """
    there = {box.id: box for box in existing}
    changes, met = [], set()
    for place, own in enumerate(sent):
        if own.id is None:
            changes.append(Change(None, BoxState(None, own.class_id, own.xyxy, ignore=own.ignore, author=author)))
            continue
        if own.id not in there or own.id in met:
            what = "comes twice" if own.id in met else "is not on this image"
            raise TransitionError(f"box {own.id} {what}; leave the id out to draw a new one", ("boxes", place, "id"))
        met.add(own.id)
        box = there[own.id]
        try:
            after = reject(box, author) if own.rejected else correct(box, own.class_id, own.xyxy, own.ignore, author)
            if after is not None and not own.rejected and (own.accepted or inspected):
                after = accept(after, author)
        except TransitionError as error:
            raise TransitionError(str(error), ("boxes", place)) from error
        if after != box:
            changes.append(Change(box, after, keeps_version=after is not None and after.status is BoxStatus.CORRECTED))
    for box in existing:
        if box.id not in met and box.status is not BoxStatus.REJECTED:
            changes.append(Change(box, left_over(box, min_score, author) if inspected else reject(box, author)))
    return changes


def proposed(existing: Sequence[BoxState], found: Sequence[BoxState]) -> tuple[list[BoxState], list[BoxState]]:
    """What a new detection changes on an image: E boxes there and N found -> those to drop, those to add.

    Proposals of before give way. Nothing else does; and what is found of a class where a rejected box of it, or one
    that people left, overlaps by more than ``SAME_IOU`` is not proposed again.
    """
    dropped = [box for box in existing if box.status is BoxStatus.PROPOSED]
    standing = [box for box in existing if box.status is not BoxStatus.PROPOSED]
    added = [
        box
        for box in found
        if not any(box.class_id == old.class_id and iou(box.xyxy, old.xyxy) > SAME_IOU for old in standing)
    ]
    return dropped, added


def truth(boxes: Iterable[BoxState], *, with_proposed: bool = False, min_score: float = 0.0) -> list[BoxState]:
    """The boxes that a training takes for objects: what people left, and proposals above a score if it is asked for."""
    return [
        box
        for box in boxes
        if box.status in TRUTH
        or (with_proposed and box.status is BoxStatus.PROPOSED and (box.score is None or box.score >= min_score))
    ]


def is_labelled(status: ImageStatus) -> bool:
    """Whether an image says something to a training, were it that it shows no object: only once a person saved it."""
    return status is ImageStatus.INSPECTED


def after_saving(status: ImageStatus, *, inspected: bool) -> ImageStatus:
    """The status of an image whose boxes a person has saved."""
    return ImageStatus.INSPECTED if inspected else status


def after_detection(status: ImageStatus, proposals: int) -> ImageStatus:
    """The status of an image that a detection has looked at; it changes only those that nobody has."""
    if status in (ImageStatus.NEW, ImageStatus.PROPOSED):
        return ImageStatus.PROPOSED if proposals else ImageStatus.NEW
    return status


def iou(a: Corners, b: Corners) -> float:
    """Overlap of two boxes as a part of what they cover together; 0 where neither covers anything."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    common = width * height
    together = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / together if together > 0 else 0.0


def within(xyxy: Sequence[float], size_wh: tuple[int, int]) -> Corners:
    """A box cut at the edges of its image.

    Raises:
        TransitionError: not four finite numbers, of no width or height, or further outside than ``OUTSIDE_PX``.
    """
    x0, y0, x1, y1 = map(float, xyxy)
    width, height = size_wh
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        raise TransitionError(f"expected finite numbers, got {list(xyxy)}")
    if min(x0, y0) < -OUTSIDE_PX or x1 > width + OUTSIDE_PX or y1 > height + OUTSIDE_PX:
        raise TransitionError(f"expected a box within {width} × {height} pixels, got {list(xyxy)}")
    cut = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
    if cut[0] >= cut[2] or cut[1] >= cut[3]:
        raise TransitionError(f"expected x0 < x1 and y0 < y1, got {list(xyxy)}")
    return cut


# ----------------------------------------------------------------------------------------------------------------------
# Undo: a log that only grows in, what can be undone and redone out.


@dataclass
class UndoStack:
    """Ids of the edits of an image, the last one at the end, that can be undone and redone."""

    undoable: list[int] = field(default_factory=list)
    redoable: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, log: Iterable[tuple[int, str]]) -> UndoStack:
        """From pairs of an event's id and its kind, in their order; a new edit ends what could be redone."""
        stack = cls()
        for event_id, kind in log:
            if kind == EventKind.EDIT:
                stack.undoable.append(event_id)
                stack.redoable.clear()
            elif kind == EventKind.UNDO and stack.undoable:
                stack.redoable.append(stack.undoable.pop())
            elif kind == EventKind.REDO and stack.redoable:
                stack.undoable.append(stack.redoable.pop())
        return stack

"""The classes of a project: found, shown with how often they occur, made."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select
from sqlmodel import Session, col

from simdetr.app.image_list import at_least
from simdetr.app.refusals import Refusal, missing
from simdetr.app.schemas import ClassOut
from simdetr.app.tables import Box, BoxClass, BoxStatus, ClassKind

COLOURS = (
    "#e6194b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000", "#f032e6", "#000075", "#3cb44b",
)  # fmt: skip
"""Given to classes in turn; all stand out from photographs."""
UNNAMED_COLOUR = "#6e6e6e"
"""Of the class of what has no name yet."""


def class_of(session: Session, class_id: int) -> BoxClass:
    """A class that is in use; Refusal 404 if there is none."""
    found = session.get(BoxClass, class_id)
    if found is None or found.deleted:
        raise missing("class", class_id)
    return found


def shown_classes(session: Session, project_id: int, min_score: float = 0.0) -> list[ClassOut]:
    """The classes of a project with the number of their boxes, without proposals below a score, by id."""
    rows = session.execute(
        select(BoxClass, func.count(col(Box.id)))
        .outerjoin(
            Box,
            (col(Box.class_id) == col(BoxClass.id))
            & col(Box.alive)
            & (col(Box.status) != BoxStatus.REJECTED)
            & at_least(min_score),
        )
        .where(col(BoxClass.project_id) == project_id, ~col(BoxClass.deleted))
        .group_by(col(BoxClass.id))
        .order_by(col(BoxClass.id))
    )
    return [ClassOut.model_validate(row.model_dump() | {"boxes": count}) for row, count in rows]


def add_class(session: Session, project_id: int, name: str, **chosen: Any) -> BoxClass:  # noqa: ANN401
    """A new class, with the next colour and, up to nine, the next digit as its shortcut unless others are chosen."""
    rows = session.scalars(select(BoxClass).where(col(BoxClass.project_id) == project_id)).all()
    alive = [row for row in rows if not row.deleted]
    if any(row.name == name for row in alive):
        raise Refusal(409, f"there is a class {name!r} already")
    taken = {row.shortcut for row in alive}
    if chosen.get("shortcut") in taken - {None}:
        raise Refusal(409, f"another class has the shortcut {chosen['shortcut']!r}")
    free = next((digit for digit in "123456789" if digit not in taken), None)
    values: dict[str, Any] = {"colour": COLOURS[len(rows) % len(COLOURS)], "shortcut": free, "kind": ClassKind.NOVEL}
    if chosen.get("kind") == ClassKind.PSEUDO:  # nobody gives it to a box
        values |= {"colour": UNNAMED_COLOUR, "shortcut": None}
    values |= {key: value for key, value in chosen.items() if value is not None}
    made = BoxClass(project_id=project_id, name=name, **values)
    session.add(made)
    session.flush()
    return made

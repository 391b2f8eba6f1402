"""The tables of the app: projects, images, classes, boxes, runs, orders, shots, clusters, events, leases.

Images are kept by their path below the project's folder and are served from there. What is slow to know of them (size,
hash of their content) is filled in when it is first needed. Of a box the row that is alive is the one that counts; the
versions before it are rows too, that nothing but their descendant points to.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, BigInteger, Column, DateTime, Index, MetaData, TypeDecorator, UniqueConstraint
from sqlalchemy.engine import Dialect
from sqlmodel import Field, SQLModel

NAMING = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class ImageStatus(StrEnum):
    """How far an image is."""

    NEW = "new"
    PROPOSED = "proposed"
    IN_INSPECTION = "in_inspection"
    INSPECTED = "inspected"
    SKIPPED = "skipped"
    UNREADABLE = "unreadable"


class BoxStatus(StrEnum):
    """What is known of a box."""

    PROPOSED = "proposed"
    INSPECTED = "inspected"
    CORRECTED = "corrected"
    REJECTED = "rejected"
    MANUAL = "manual"


class BoxSource(StrEnum):
    """Who found a box first."""

    USER = "user"
    DETECTOR = "detector"
    LVC = "lvc"
    WSOL = "wsol"
    IMPORT = "import"
    MINED = "mined"


class ClassKind(StrEnum):
    """Whether a class was known before the labelling, is new, or is a cluster's."""

    BASE = "base"
    NOVEL = "novel"
    PSEUDO = "pseudo"


class RunKind(StrEnum):
    """What a run does."""

    TRAIN = "train"
    DETECT = "detect"
    ORDER = "order"
    EMBED = "embed"
    AUTOLABEL = "autolabel"
    MINE = "mine"


class RunState(StrEnum):
    """How far a run is."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class EventKind(StrEnum):
    """What an event does to the stack of what can be undone."""

    EDIT = "edit"
    UNDO = "undo"
    REDO = "redo"
    NOTE = "note"


class RejectedAs(StrEnum):
    """What a rejected box is in training."""

    IGNORE = "ignore"
    BACKGROUND = "background"


class _Utc(TypeDecorator[datetime]):
    """Times in UTC; SQLite forgets the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


class Table(SQLModel):
    """What all tables share: their own metadata, so that other users of SQLModel in a process do not meet."""

    metadata = MetaData(naming_convention=NAMING)


class Project(Table, table=True):
    """A set of images with classes and boxes."""

    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(unique=True, max_length=200)
    folder: str
    """Where its images lie; those that were uploaded lie below ``own_folder``."""
    own_folder: str = ""
    rejected_as: str = RejectedAs.IGNORE
    active_model: str | None = None
    created: datetime = Field(default_factory=now, sa_type=_Utc)
    __table_args__: Any = {"sqlite_autoincrement": True}


class Image(Table, table=True):
    """An image: a path below the project's folder, or an absolute one where a list named it so."""

    id: int | None = Field(default=None, primary_key=True)
    project_id: int = Field(foreign_key="project.id", ondelete="CASCADE")
    path: str
    bytes: int = 0
    digest: str | None = None
    width: int | None = None
    height: int | None = None
    status: str = ImageStatus.NEW
    place: float = 0.0
    """Minus the priority: the least comes first."""
    reason: str | None = None
    flags: str = ""
    split: str | None = None
    version: int = 0
    uploaded: bool = False
    inspected_at: datetime | None = Field(default=None, sa_type=_Utc)
    audit: int | None = Field(default=None, index=True)
    """The detection whose proposals it was drawn at random to judge."""
    __table_args__: Any = (
        UniqueConstraint("project_id", "path"),
        Index("ix_image_queue", "project_id", "status", "place", "id"),
        Index("ix_image_place", "project_id", "place", "id"),
        Index("ix_image_bytes", "project_id", "bytes"),
        {"sqlite_autoincrement": True},
    )


class BoxClass(Table, table=True):
    """A class of objects; its id is never used again."""

    __tablename__ = "class"
    id: int | None = Field(default=None, primary_key=True)
    project_id: int = Field(foreign_key="project.id", ondelete="CASCADE")
    name: str = Field(max_length=200)
    colour: str = "#4363d8"
    shortcut: str | None = None
    kind: str = ClassKind.NOVEL
    deleted: bool = False
    merged_into: int | None = None
    __table_args__: Any = (UniqueConstraint("project_id", "name"), {"sqlite_autoincrement": True})


class Box(Table, table=True):
    """A box in pixels of the upright image."""

    id: int | None = Field(default=None, primary_key=True)
    image_id: int = Field(foreign_key="image.id", ondelete="CASCADE")
    class_id: int = Field(foreign_key="class.id", ondelete="CASCADE", index=True)
    x0: float
    y0: float
    x1: float
    y1: float
    score: float | None = None
    status: str = BoxStatus.MANUAL
    source: str = BoxSource.USER
    run_id: int | None = Field(default=None, index=True)
    parent_id: int | None = None
    ignore: bool = False
    alive: bool = True
    author: str = ""
    time: datetime = Field(default_factory=now, sa_type=_Utc)
    __table_args__: Any = (Index("ix_box_image", "image_id", "alive", "status"), {"sqlite_autoincrement": True})


class Run(Table, table=True):
    """A piece of work that takes minutes to days."""

    id: int | None = Field(default=None, primary_key=True)
    project_id: int = Field(foreign_key="project.id", ondelete="CASCADE")
    kind: str
    state: str = RunState.QUEUED
    parameters: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    snapshot: str | None = None
    turn: int = Field(default=0, sa_type=BigInteger)
    """Of the queued ones the least is next."""
    done: int = 0
    total: int = 0
    unit: str = ""
    message: str = ""
    error: str | None = None
    ingested: int = 0
    created: datetime = Field(default_factory=now, sa_type=_Utc)
    started: datetime | None = Field(default=None, sa_type=_Utc)
    ended: datetime | None = Field(default=None, sa_type=_Utc)
    __table_args__: Any = (
        Index("ix_run_state", "state", "turn"),
        Index("ix_run_project", "project_id", "id"),
        {"sqlite_autoincrement": True},
    )


class Order(Table, table=True):
    """Where the priorities of a project's images come from; the last one counts."""

    __tablename__ = "image_order"
    id: int | None = Field(default=None, primary_key=True)
    project_id: int = Field(foreign_key="project.id", ondelete="CASCADE", index=True)
    run_id: int | None = None
    strategy: str
    images: int = 0
    time: datetime = Field(default_factory=now, sa_type=_Utc)


class Shot(Table, table=True):
    """A box that stands for its class, or looks like it and is none."""

    id: int | None = Field(default=None, primary_key=True)
    project_id: int = Field(foreign_key="project.id", ondelete="CASCADE", index=True)
    box_id: int = Field(foreign_key="box.id", ondelete="CASCADE", unique=True)
    negative: bool = False


class Cluster(Table, table=True):
    """Pseudo-classes of a pretraining that people took to be one kind, and what they call it.

    ``picked`` are boxes of other pseudo-classes that people moved here: image, x0, y0, x1, y1 of each.
    """

    id: int | None = Field(default=None, primary_key=True)
    project_id: int = Field(foreign_key="project.id", ondelete="CASCADE", index=True)
    class_id: int | None = Field(default=None, foreign_key="class.id", ondelete="SET NULL")
    members: list[int] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    picked: list[list[Any]] = Field(default_factory=list, sa_column=Column(JSON, nullable=False, server_default="[]"))
    boxes: int = 0


class Event(Table, table=True):
    """What somebody did, with the rows before and after; never changed, only added to."""

    id: int | None = Field(default=None, primary_key=True)
    project_id: int = Field(foreign_key="project.id", ondelete="CASCADE", index=True)
    image_id: int | None = Field(default=None, foreign_key="image.id", ondelete="CASCADE")
    kind: str
    what: str
    before: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    after: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    author: str = ""
    time: datetime = Field(default_factory=now, sa_type=_Utc)
    __table_args__: Any = (Index("ix_event_image", "image_id", "id"), {"sqlite_autoincrement": True})


class Lease(Table, table=True):
    """Who has an image open, and until when others' queues pass it over."""

    image_id: int = Field(primary_key=True, foreign_key="image.id", ondelete="CASCADE")
    holder: str
    until: datetime = Field(sa_type=_Utc)

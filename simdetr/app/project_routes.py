"""Requests about projects, their classes, and the machine."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import psutil
from fastapi import APIRouter, Query
from sqlalchemy import func, select, update
from sqlmodel import Session, col

from simdetr.app.class_list import add_class, class_of, shown_classes
from simdetr.app.database import reading, writing
from simdetr.app.desk import AtDesk, Author
from simdetr.app.image_list import project_of
from simdetr.app.refusals import FieldRefusal, Refusal
from simdetr.app.schemas import (
    COMMON,
    ClassEdit,
    ClassInUse,
    ClassList,
    ClassNew,
    ClassOut,
    Device,
    Id,
    Problem,
    ProjectEdit,
    ProjectList,
    ProjectNew,
    ProjectOut,
    Score,
    SystemOut,
)
from simdetr.app.tables import (
    Box,
    BoxClass,
    BoxSource,
    BoxStatus,
    ClassKind,
    Event,
    EventKind,
    Image,
    Project,
    RunState,
)
from simdetr.app.tables import Run as RunRow
from simdetr.data.machine import cores, gpus, may_have_gpu

router = APIRouter(prefix="/api", responses=COMMON)


@router.get("/system")
def system(desk: AtDesk) -> SystemOut:
    """The machine: cores, memory, devices."""
    memory = psutil.virtual_memory()
    return SystemOut(
        version=version("simdetr"),
        cores=cores(),
        cpu_percent=psutil.cpu_percent(interval=None),
        memory_total=memory.total,
        memory_used=memory.total - memory.available,
        server_memory=psutil.Process().memory_info().rss,
        disk_free=shutil.disk_usage(desk.settings.out).free,
        devices=[Device(**vars(gpu)) for gpu in desk.aside.ask(gpus)] if may_have_gpu() else [],
        database=desk.engine.dialect.name,
        needs_token=desk.settings.token is not None,
    )


@router.get("/projects")
def list_projects(desk: AtDesk) -> ProjectList:
    """All projects."""
    with reading(desk.engine) as session:
        rows = session.scalars(select(Project).order_by(col(Project.id))).all()
        return ProjectList(projects=[desk.shown_project(session, row) for row in rows])


@router.post("/projects", status_code=201, responses={409: {"model": Problem}})
def add_project(desk: AtDesk, asked: ProjectNew) -> ProjectOut:
    """Make a project, of a folder below the app's images or for uploads."""
    folder = None if asked.folder is None else _folder_below(desk.settings.images, asked.folder)
    with writing(desk.engine) as session:
        _refuse_taken(session, asked.name)
        project = desk.add_project(session, asked.name, folder)
        session.flush()
        shown = desk.shown_project(session, project)
    if folder is not None:
        desk.index(shown.id, folder)
        shown.indexing = True
    return shown


def _folder_below(images: Path | None, name: str) -> Path:
    place = ("body", "folder")
    if images is None or not images.is_dir():
        raise FieldRefusal(place, "the app was started without a folder of images; leave it out to upload some")
    try:
        folder = (images / name).resolve()
        inside = folder.is_relative_to(images.resolve()) and folder.is_dir()
    except (OSError, ValueError):
        inside = False
    if not inside:
        raise FieldRefusal(place, f"expected the name of a folder below the app's images, got {name!r}")
    return folder


def _refuse_taken(session: Session, name: str, own: int | None = None) -> None:
    other = session.scalar(select(col(Project.id)).where(col(Project.name) == name))
    if other is not None and other != own:
        raise Refusal(409, f"there is a project {name!r} already; choose another name")


@router.get("/projects/{project_id}")
def get_project(desk: AtDesk, project_id: Id) -> ProjectOut:
    """A project, with how far it is."""
    with reading(desk.engine) as session:
        return desk.shown_project(session, project_of(session, project_id))


@router.patch("/projects/{project_id}", responses={409: {"model": Problem}})
def edit_project(desk: AtDesk, project_id: Id, asked: ProjectEdit) -> ProjectOut:
    """Rename a project, or choose what rejected boxes are in training."""
    with writing(desk.engine) as session:
        project = project_of(session, project_id)
        if asked.name is not None:
            _refuse_taken(session, asked.name, project_id)
            project.name = asked.name
        if asked.rejected_as is not None:
            project.rejected_as = asked.rejected_as
        session.flush()
        return desk.shown_project(session, project)


@router.delete("/projects/{project_id}", status_code=204, responses={409: {"model": Problem}})
def delete_project(desk: AtDesk, project_id: Id, confirm: Annotated[str, Query(max_length=200)]) -> None:
    """Delete a project with its labels, uploads and runs; its name confirms it. Images of a folder stay."""
    with writing(desk.engine) as session:
        project = project_of(session, project_id)
        if confirm != project.name:
            raise Refusal(409, f"to delete the project, give its name {project.name!r} as confirm")
        at_work = session.scalar(
            select(col(RunRow.id)).where(col(RunRow.project_id) == project_id, col(RunRow.state) == RunState.RUNNING)
        )
        if at_work is not None or project_id in desk.indexing:
            raise Refusal(409, "a run is at work in this project; cancel it first")
        own = Path(project.own_folder)
        session.delete(project)
    shutil.rmtree(own, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------------
# Classes


@router.get("/projects/{project_id}/classes")
def list_classes(desk: AtDesk, project_id: Id, min_score: Score = 0.0) -> ClassList:
    """The classes of a project; proposals below a score are not counted."""
    with reading(desk.engine) as session:
        project_of(session, project_id)
        return ClassList(classes=shown_classes(session, project_id, min_score))


@router.post("/projects/{project_id}/classes", status_code=201, responses={409: {"model": Problem}})
def make_class(desk: AtDesk, project_id: Id, asked: ClassNew) -> ClassOut:
    """Make a class."""
    with writing(desk.engine) as session:
        project_of(session, project_id)
        chosen = {"colour": asked.colour, "shortcut": asked.shortcut, "kind": asked.kind}
        return ClassOut.model_validate(add_class(session, project_id, asked.name, **chosen).model_dump())


@router.patch("/classes/{class_id}", responses={409: {"model": Problem}})
def edit_class(desk: AtDesk, class_id: Id, asked: ClassEdit) -> ClassOut:
    """Change a class; its id stays."""
    with writing(desk.engine) as session:
        found = class_of(session, class_id)
        given = asked.model_dump(exclude_unset=True)
        for name in ("name", "shortcut"):
            if given.get(name) is None:
                continue
            other = session.scalar(
                select(col(BoxClass.id)).where(
                    col(BoxClass.project_id) == found.project_id,
                    col(getattr(BoxClass, name)) == given[name],
                    ~col(BoxClass.deleted),
                )
            )
            if other is not None and other != class_id:
                raise Refusal(409, f"another class has the {name} {given[name]!r}")
        if given.get("name") not in (None, found.name) and found.kind == ClassKind.PSEUDO:
            found.kind = ClassKind.NOVEL.value  # it has a name now
        found.sqlmodel_update({k: v for k, v in given.items() if v is not None or k == "shortcut"})
        session.flush()
        return next(row for row in shown_classes(session, found.project_id) if row.id == class_id)


@router.delete("/classes/{class_id}", status_code=204, responses={409: {"model": ClassInUse}})
def delete_class(
    desk: AtDesk, author: Author, class_id: Id, target: Annotated[Id | None, Query()] = None, reject: bool = False
) -> None:
    """Delete a class; where it has boxes, say which class takes them, or that they are rejected."""
    with writing(desk.engine) as session:
        found = class_of(session, class_id)
        used = session.scalar(
            select(func.count())
            .select_from(Box)
            .where(col(Box.class_id) == class_id, col(Box.alive), col(Box.status) != BoxStatus.REJECTED)
        )
        if target is not None:
            other = class_of(session, target)
            if target == class_id or other.project_id != found.project_id:
                raise FieldRefusal(("query", "target"), "expected another class of the same project")
        elif used and not reject:
            raise Refusal(
                409, f"the class has {used:,} boxes; give another class as target, or reject them", boxes=used
            )
        touched = select(col(Box.image_id)).where(col(Box.class_id) == class_id, col(Box.alive))
        session.execute(
            update(Image).where(col(Image.id).in_(touched)).values(version=col(Image.version) + 1),
            execution_options={"synchronize_session": False},
        )
        own = update(Box).where(col(Box.class_id) == class_id)
        if target is not None:
            session.execute(own.values(class_id=target), execution_options={"synchronize_session": False})
        else:
            machine = col(Box.source) != BoxSource.USER
            for rows, values in ((machine, {"status": BoxStatus.REJECTED.value}), (~machine, {"alive": False})):
                session.execute(
                    own.where(col(Box.alive), rows).values(**values), execution_options={"synchronize_session": False}
                )
        before = {"class_id": class_id, "name": found.name}
        found.deleted, found.merged_into, found.shortcut = True, target, None
        found.name = f"#{class_id} {found.name}"[:200]
        session.add(
            Event(
                project_id=found.project_id,
                kind=EventKind.NOTE,
                what="delete class",
                before=before,
                after={"target": target},
                author=author,
            )
        )

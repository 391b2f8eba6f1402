"""What all requests share: settings, database, the queue of runs, and which projects are being read in."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

from fastapi import Depends, Header, Request
from sqlalchemy import Engine, func, select
from sqlmodel import Session, col

from simdetr.app.aside import Aside
from simdetr.app.database import open_database, writing
from simdetr.app.image_list import OPEN, add_paths, counts_by_status, paths_of
from simdetr.app.label_exchange import Wish, import_labels
from simdetr.app.run_queue import RunQueue
from simdetr.app.schemas import ProjectOut
from simdetr.app.settings import AppSettings
from simdetr.app.tables import Box, BoxStatus, Image, Project, RejectedAs, Run, RunKind

LOG = logging.getLogger(__name__)
ANONYMOUS, IMPORTER = "person", "import"
_LONGEST_AUTHOR = 100


@dataclass
class Desk:
    """The app at work.

    Attributes:
        settings: what it was started with.
        engine: its database.
        runs: what computes.
        aside: what answers where torch is needed.
        indexing: projects whose folder is being read.
    """

    settings: AppSettings
    engine: Engine
    runs: RunQueue
    aside: Aside
    indexing: set[int] = field(default_factory=set)
    _threads: list[threading.Thread] = field(default_factory=list)
    _closing: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def open(cls, settings: AppSettings) -> Desk:
        """Open the database, and begin to read in the images of the settings."""
        settings.out.mkdir(parents=True, exist_ok=True)
        engine = open_database(settings.database_url)
        aside = Aside(settings.out / "aside.log")
        desk = cls(settings, engine, RunQueue(settings, engine, aside), aside)
        if settings.images is not None:
            root, _ = paths_of(settings.images) if not settings.images.is_dir() else (settings.images.absolute(), None)
            with writing(engine) as session:
                project = session.scalar(select(Project).where(col(Project.folder) == str(root)))
                if project is None:
                    project = desk.add_project(session, _free_name(session, root.name or "images"), root)
                assert project.id is not None
                project_id = project.id
            desk.index(project_id, settings.images)
        return desk

    def add_project(self, session: Session, name: str, folder: Path | None) -> Project:
        """A new project, of a folder or of uploads alone."""
        project = Project(name=name, folder="" if folder is None else str(folder))
        if self.settings.run is not None:
            project.active_model = "start"
        session.add(project)
        session.flush()
        own = (self.settings.out / "projects" / str(project.id)).absolute()
        project.own_folder, project.folder = str(own), project.folder or str(own)
        return project

    def index(self, project_id: int, source: Path) -> None:
        """Read a folder or list in, beside the answering of requests."""
        self.indexing.add(project_id)
        thread = threading.Thread(target=self._index, args=(project_id, source), name="index", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _index(self, project_id: int, source: Path) -> None:
        try:
            root, paths = paths_of(source)
            going_on = (path for path in paths if not self._closing.is_set())
            count = add_paths(self.engine, project_id, root, going_on)
            LOG.info("%s: %s images", source, f"{count:,}")
            if source == self.settings.images and self.settings.labels is not None and not self._closing.is_set():
                self._begin_with(project_id, self.settings.labels)
            if not self._closing.is_set():
                self._propose_first(project_id)
        except Exception:
            LOG.exception("%s could not be read in", source)
        finally:
            self.indexing.discard(project_id)

    def _begin_with(self, project_id: int, labels: Path) -> None:
        """Put the labels of the settings on images, but for those that somebody has inspected."""
        wish = Wish(skip_bad=True, keep_inspected=True)
        found = import_labels(self.engine, project_id, labels, wish, IMPORTER)
        LOG.info("%s: %s boxes on %s images", labels, f"{found.boxes:,}", f"{found.images:,}")
        for line in found.problems:
            LOG.warning("%s: %s", labels, line)

    def _propose_first(self, project_id: int) -> None:
        """Let boxes be mined where there is neither a detector nor a proposal, nor ever was such a run."""
        with writing(self.engine) as session:
            project = session.get(Project, project_id)
            if project is None or not self.settings.propose or project.active_model is not None:
                return
            begun = session.scalar(
                select(col(Run.id)).where(col(Run.project_id) == project_id, col(Run.kind) == RunKind.MINE).limit(1)
            )
            images = select(col(Image.id)).where(col(Image.project_id) == project_id, col(Image.status).in_(OPEN))
            proposed = select(col(Box.id)).where(col(Box.image_id).in_(images), col(Box.status) == BoxStatus.PROPOSED)
            if begun is None and session.scalar(images.limit(1)) and session.scalar(proposed.limit(1)) is None:
                self.runs.ask(session, project_id, RunKind.MINE, {})
        self.runs.wake()

    def wait_for_index(self, timeout_s: float = 60.0) -> None:
        """Wait until all folders are read in."""
        for thread in self._threads:
            thread.join(timeout_s)

    def close(self) -> None:
        """Stop what computes and let go of the database."""
        self._closing.set()
        self.aside.stop()
        self.runs.close()
        self.wait_for_index(10.0)
        self.engine.dispose()

    def shown_project(self, session: Session, project: Project) -> ProjectOut:
        """A project as answers have it."""
        assert project.id is not None
        by_status = counts_by_status(session, project.id)
        boxes = session.scalar(
            select(func.count())
            .select_from(Box)
            .join(Image, col(Image.id) == col(Box.image_id))
            .where(col(Image.project_id) == project.id, col(Box.alive), col(Box.status) != BoxStatus.REJECTED)
        )
        return ProjectOut(
            id=project.id,
            name=project.name,
            folder=project.folder,
            images=sum(by_status.values()),
            by_status=by_status,
            boxes=boxes or 0,
            indexing=project.id in self.indexing,
            active_model=project.active_model,
            rejected_as=RejectedAs(project.rejected_as),
            default_device=self.settings.device or next(iter(self.runs.devices()), "cpu"),
            created=project.created,
        )


def _free_name(session: Session, name: str) -> str:
    number, found = 1, name
    while session.scalar(select(col(Project.id)).where(col(Project.name) == found)) is not None:
        number += 1
        found = f"{name} {number}"
    return found


def desk_of(request: Request) -> Desk:
    """The desk of the app that a request came to."""
    desk: Desk = request.app.state.desk
    return desk


def author_of(x_author: Annotated[str | None, Header(max_length=600)] = None) -> str:
    """Who asks, by the header ``X-Author``, whose bytes are UTF-8 as addresses have them (``%EA%B9%80``)."""
    name = "".join(letter for letter in unquote(x_author or "") if letter.isprintable()).strip()
    return name[:_LONGEST_AUTHOR] or ANONYMOUS


AtDesk = Annotated[Desk, Depends(desk_of)]
Author = Annotated[str, Depends(author_of)]

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

from simdetr.app import pseudo_classes
from simdetr.app.aside import Aside
from simdetr.app.database import open_database, reading, writing
from simdetr.app.detectors_at_hand import START
from simdetr.app.image_list import OPEN, add_paths, counts_by_status, paths_of
from simdetr.app.label_exchange import Wish, import_labels
from simdetr.app.proposals import propose_labels
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
        if self.settings.start is not None:
            project.active_model = START
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
        """Propose boxes where nobody has trained, nothing is proposed, and nothing that proposes was ever run.

        By the detector to start from; without one those of a pretraining that made none; else by what is mined.
        """
        with reading(self.engine) as session:
            project = session.get(Project, project_id)
            if project is None or not self.settings.propose or not self._lacks_proposals(session, project):
                return
            detects = project.active_model is not None
        labels = None if detects else pseudo_classes.labels_of_run(self.settings.run)
        if labels is not None and (found := propose_labels(self.engine, project_id, labels, even_bare=True)).boxes:
            LOG.info("%s: %s", self.settings.run, found.text())
            return
        with writing(self.engine) as session:
            if detects:
                self.runs.ask(session, project_id, RunKind.DETECT, {"first": True})
            else:
                self.runs.ask(session, project_id, RunKind.MINE, {})
        self.runs.wake()

    def _lacks_proposals(self, session: Session, project: Project) -> bool:
        """Whether a project has images to be seen, and neither proposals nor anything that made or will make them."""
        if project.active_model not in (None, START) or (project.active_model and self.settings.start is None):
            return False
        kinds = (RunKind.MINE, RunKind.DETECT)
        begun = select(col(Run.id)).where(col(Run.project_id) == project.id, col(Run.kind).in_(kinds))
        images = select(col(Image.id)).where(col(Image.project_id) == project.id, col(Image.status).in_(OPEN))
        proposed = select(col(Box.id)).where(col(Box.image_id).in_(images), col(Box.status) == BoxStatus.PROPOSED)
        there, *others = (session.scalar(query.limit(1)) is not None for query in (images, begun, proposed))
        return there and not any(others)

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

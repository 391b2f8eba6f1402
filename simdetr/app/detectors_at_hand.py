"""The detectors that a project can use: the one that the app was started with, and those that its runs trained."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import select
from sqlmodel import Session, col

from simdetr.app.refusals import Refusal, missing
from simdetr.app.run_files import RunFiles
from simdetr.app.settings import AppSettings
from simdetr.app.tables import Project, Run, RunKind, RunState

START = "start"


@dataclass(frozen=True)
class DetectorAtHand:
    """A detector.

    Attributes:
        id: ``start``, or ``run-`` and the number of the run that trained it.
        folder: its files.
        run: the run.
    """

    id: str
    folder: Path
    run: Run | None = None

    @property
    def title(self) -> str:
        """What it is called."""
        if self.run is None:
            return f"{self.folder.parent.name}/{self.folder.name}"
        return f"{'Few-shot' if self.run.kind == RunKind.AUTOLABEL else 'Training'} {self.run.id}"

    @property
    def created(self) -> datetime | None:
        """When it was done."""
        return None if self.run is None else self.run.ended

    def classes(self) -> list[str]:
        """Names of the classes that it knows."""
        config = self.folder / "config.json"
        if not config.is_file():
            return []
        found = json.loads(config.read_text(encoding="utf-8"))
        return [category["name"] for category in found.get("categories", [])]


def files_of(settings: AppSettings, project_id: int, run_id: int) -> RunFiles:
    """The folder of a run."""
    return RunFiles((settings.out / "projects" / str(project_id) / "runs" / str(run_id)).absolute())


def all_at_hand(session: Session, settings: AppSettings, project: Project) -> list[DetectorAtHand]:
    """The detectors of a project, the newest first and the one to start from last."""
    assert project.id is not None
    query = select(Run).where(
        col(Run.project_id) == project.id,
        col(Run.state) == RunState.DONE,
        col(Run.kind).in_([RunKind.TRAIN, RunKind.AUTOLABEL]),
    )
    found = []
    for run in session.scalars(query.order_by(col(Run.id).desc())):
        folder = files_of(settings, project.id, run.id or 0).detector()
        if folder is not None:
            found.append(DetectorAtHand(f"run-{run.id}", folder, run))
    if settings.start is not None:
        found.append(DetectorAtHand(START, settings.start))
    return found


def at_hand(session: Session, settings: AppSettings, project: Project, model: str | None) -> DetectorAtHand:
    """The detector of an id, or the active one.

    Raises:
        Refusal: 404 there is none of this id; 409 none is active.
    """
    name = model or project.active_model
    if name is None:
        raise Refusal(409, "there is no detector yet; train one, or start the app with --run")
    if name == START:
        if settings.start is None:
            without = "without --run" if settings.run is None else "with a --run that has none"
            raise missing("detector", f"{START}: the app was started {without}")
        return DetectorAtHand(START, settings.start)
    run = session.get(Run, int(name.removeprefix("run-")))
    if run is None or run.project_id != project.id:
        raise missing("detector", name)
    folder = files_of(settings, run.project_id, run.id or 0).detector()
    if folder is None:
        raise missing("detector", f"{name}: the run has not trained one")
    return DetectorAtHand(name, folder, run)

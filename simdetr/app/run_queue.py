"""The runs of all projects, one at a time: asked for, prepared, handed to the worker, watched, and taken in.

A thread of the app looks several times a second at what the worker leaves in the folder of the run. Detections become
proposals while the run goes on. A worker that dies, or an app that was stopped, leaves a run that failed and can be
resumed; what was finished is kept.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from sqlalchemy import Engine, func, select, update
from sqlmodel import Session, col

from simdetr.app import snapshots
from simdetr.app.aside import Aside
from simdetr.app.database import reading, writing
from simdetr.app.detectors_at_hand import at_hand, files_of
from simdetr.app.image_list import OPEN, project_of, set_priorities
from simdetr.app.picture_files import path_of
from simdetr.app.proposals import Proposed, classes_for, propose
from simdetr.app.refusals import FieldRefusal, Refusal, missing
from simdetr.app.run_files import STEPS, RunFiles, read_order, write_image_list
from simdetr.app.run_parameters import TrainParameters, checked
from simdetr.app.schemas import RunOut
from simdetr.app.settings import AppSettings
from simdetr.app.tables import BoxSource, Image, ImageStatus, Order, Project, Run, RunKind, RunState, now
from simdetr.app.worker import Worker
from simdetr.data.coco import write_coco
from simdetr.data.label_files import read_labels, write_labels
from simdetr.data.machine import gpus, may_have_gpu
from simdetr.data.storage import write_json

LOG = logging.getLogger(__name__)
POLL_S = 0.2
GONE = "the worker has ended in the middle of the run"
STOPPED = "the app was stopped in the middle of the run"
PAUSE_S = 60.0
"""So long a training that is to pause may take to come to the end of its step."""
_ROWS = 500
_LAST_LINES = 20


class RunQueue:
    """The runs.

    Args:
        settings: Of the app.
        engine: Its database.
        aside: What answers where torch is needed.
    """

    def __init__(self, settings: AppSettings, engine: Engine, aside: Aside) -> None:
        self.settings, self.engine, self.aside = settings, engine, aside
        self._devices: list[str] | None = None
        self.worker = Worker(settings.out / "worker.log")
        self._news, self._closing = threading.Event(), threading.Event()
        self._cancelled: set[int] = set()
        self._thread: threading.Thread | None = None
        self._lock = FileLock(settings.out / ".app.lock", thread_local=False)

    def start(self) -> None:
        """Begin to work on what is queued; what a former app left at work has failed.

        Raises:
            RuntimeError: Another app works in this folder.
        """
        try:
            self._lock.acquire(timeout=1)
        except Timeout:
            raise RuntimeError(
                f"out: another `simdetr label` works in {self.settings.out}; stop it, or choose another --out"
            ) from None
        with writing(self.engine) as session:
            for run in session.scalars(select(Run).where(col(Run.state) == RunState.RUNNING)):
                if _gives_way(run):
                    run.state = RunState.QUEUED.value  # nobody asked for it: it goes on by itself
                else:
                    self._fail(run, STOPPED)
        self._thread = threading.Thread(target=self._work, name="runs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop working; a run at work stays where it is, and can be resumed."""
        self._closing.set()
        self._news.set()
        if self._thread is not None:
            self._thread.join(30)
        self.worker.stop()
        self._lock.release()

    # ------------------------------------------------------------------------------------------------------------------
    # What people ask for

    def ask(
        self, session: Session, project_id: int, kind: RunKind, parameters: dict[str, Any], *, first: bool = False
    ) -> Run:
        """Queue a run, once it is known that it can be done.

        Raises:
            FieldRefusal: A parameter is unknown or out of range.
            Refusal: 409, what it needs is not there.
        """
        project, asked = project_of(session, project_id), checked(kind, parameters)
        values = asked.model_dump()
        self._check(session, project, kind, values)
        turn = 0
        if first:
            turn = (session.scalar(select(func.min(Run.turn)).where(col(Run.state) == RunState.QUEUED)) or 0) - 1
        else:
            turn = (session.scalar(select(func.max(Run.turn))) or 0) + 1
        run = Run(project_id=project_id, kind=kind, parameters=values, turn=turn)
        session.add(run)
        session.flush()
        return run

    def _check(self, session: Session, project: Project, kind: RunKind, asked: dict[str, Any]) -> None:
        if asked.get("device") not in (None, "cpu") and asked["device"] not in self.devices():
            known = ", ".join(("cpu", *self.devices()))
            raise FieldRefusal(("body", "parameters", "device"), f"expected one of {known}, got {asked['device']}")
        if kind is RunKind.TRAIN:
            statuses = [ImageStatus.INSPECTED] + ([ImageStatus.PROPOSED] if asked["with_proposed"] else [])
            count = session.scalar(
                select(func.count())
                .select_from(Image)
                .where(col(Image.project_id) == project.id, col(Image.status).in_(statuses))
            )
            if not count:
                raise Refusal(409, "no image is inspected yet; inspect some, then train")
            if asked["init"] not in (None, "active"):
                at_hand(session, self.settings, project, asked["init"])
        elif kind is not RunKind.MINE:
            at_hand(session, self.settings, project, asked.get("model") or asked.get("init"))
        if kind is RunKind.AUTOLABEL and not len(snapshots.shots_of(session, project, negative=False)):
            raise Refusal(409, "there is no shot; make boxes stand for their classes first")

    def devices(self) -> list[str]:
        """Names of the GPUs, the one that is taken where nobody chooses first; looked for once."""
        if self._devices is None:
            names = [gpu.name for gpu in self.aside.ask(gpus)] if may_have_gpu() else []
            self._devices = ["cuda", *names] if names else []
        return self._devices

    def wake(self) -> None:
        """Look at the queue now: a run was asked for, and is in the database."""
        self._news.set()

    def cancel(self, session: Session, run: Run) -> None:
        """Take a run out of the queue, or stop it, a training at its step; Refusal 409 if it has ended."""
        assert run.id is not None
        if run.state == RunState.QUEUED:
            run.state, run.ended, run.message = RunState.CANCELLED, now(), "cancelled before it began"
        elif run.state == RunState.RUNNING:
            self._cancelled.add(run.id)
            if run.kind == RunKind.TRAIN:
                run.message = "pausing: the step at work is finished and kept first"
            self._news.set()
        else:
            raise Refusal(409, f"the run is {run.state} already")

    def resume(self, session: Session, run: Run) -> None:
        """Queue a run again that has failed or was cancelled; Refusal 409 if it is neither."""
        if run.state not in (RunState.FAILED, RunState.CANCELLED):
            raise Refusal(409, f"only a run that has failed or was cancelled can be resumed; this one is {run.state}")
        run.turn = (session.scalar(select(func.max(Run.turn))) or 0) + 1
        run.state, run.error, run.ended, run.message = RunState.QUEUED, None, None, "goes on from what is finished"

    def shown(self, session: Session, run: Run) -> RunOut:
        """A run as answers have it."""
        assert run.id is not None
        files = files_of(self.settings, run.project_id, run.id)
        position = None
        if run.state == RunState.QUEUED:
            before = (
                select(func.count())
                .select_from(Run)
                .where(col(Run.state) == RunState.QUEUED, (col(Run.turn) < run.turn))
            )
            position = (session.scalar(before) or 0) + 1
        resumable = run.state in (RunState.FAILED, RunState.CANCELLED)
        checkpoint = files.checkpoint() if resumable else None
        done = run.total if run.state == RunState.DONE else run.done
        return RunOut(
            **run.model_dump(exclude={"turn", "ingested", "done"}),
            done=done,
            progress=1.0 if run.state == RunState.DONE else min(1.0, run.done / run.total) if run.total else 0.0,
            resumable=resumable,
            checkpoint=None if checkpoint is None else checkpoint.relative_to(files.path).as_posix(),
            position=position,
            artefacts=list(artefacts(files)),
        )

    # ------------------------------------------------------------------------------------------------------------------
    # The thread

    def _work(self) -> None:
        while not self._closing.is_set():
            self._news.wait(1.0)
            self._news.clear()
            try:
                while not self._closing.is_set() and (run_id := self._next()) is not None:
                    self._do(run_id)
            except Exception:  # the thread must not end: other runs wait
                LOG.exception("runs")
                time.sleep(1.0)

    def _next(self) -> int | None:
        with reading(self.engine) as session:
            query = select(col(Run.id)).where(col(Run.state) == RunState.QUEUED)
            return session.scalar(query.order_by(col(Run.turn), col(Run.id)).limit(1))

    def _do(self, run_id: int) -> None:
        try:
            files = self._prepare(run_id)
        except (Refusal, FieldRefusal, ValueError, OSError) as error:
            self._end(run_id, RunState.FAILED, error=str(error))
            return
        if files is None:
            return
        files.outcome.unlink(missing_ok=True)
        files.make_way.unlink(missing_ok=True)
        files.pause.unlink(missing_ok=True)
        pauses_until: float | None = None
        read = len(files.told())
        try:
            self.worker.begin(files.path)
        except OSError as error:
            self.worker.stop()
            self._end(run_id, RunState.FAILED, error=f"the worker cannot be started: {error}")
            return
        while True:
            ended, alive = files.ended(), self.worker.is_alive()
            read = self._take_in(run_id, files, read)
            if pauses_until is not None and ended is not None:
                self._cancelled.discard(run_id)  # it was done before it could pause
            if run_id in self._cancelled:
                if pauses_until is None:
                    pauses_until = time.monotonic() + (PAUSE_S if self._begin_pause(files) else 0)
                if alive and files.pause.is_file() and time.monotonic() < pauses_until:
                    self._closing.wait(POLL_S)
                    continue
                self._take_in(run_id, files, read)
                self._cancelled.discard(run_id)
                self.worker.stop()
                files.pause.unlink(missing_ok=True)
                self._end(run_id, RunState.CANCELLED, message=_go_on(self._stopped_as(run_id), files))
                return
            if ended is not None:
                self._finish(run_id, files, ended)
                return
            if not alive:
                self._end(run_id, RunState.FAILED, error=_go_on(f"{GONE} (status {self.worker.status()})", files))
                self.worker.stop()
                return
            if self._closing.is_set():
                self.worker.stop()
                if not self._can_wait(run_id):
                    self._end(run_id, RunState.FAILED, error=_go_on(STOPPED, files))
                return
            if self._next() is not None and not files.make_way.is_file() and self._can_wait(run_id):
                files.make_way.touch()
            self._closing.wait(POLL_S)

    def _begin_pause(self, files: RunFiles) -> bool:
        """Ask a training that has begun its steps to keep the one at work; False where there is none."""
        if not any(row.get("unit") == STEPS for row in files.told()):
            return False
        files.pause.touch()
        return True

    def _stopped_as(self, run_id: int) -> str:
        """What became of a run that was cancelled."""
        with reading(self.engine) as session:
            run = session.get(Run, run_id)
            if run is not None and run.kind == RunKind.TRAIN and run.done:
                return f"paused at step {run.done:,}"
        return "cancelled"

    def _can_wait(self, run_id: int) -> bool:
        """Whether a run lets others through, and goes on by itself when the app does."""
        with reading(self.engine) as session:
            run = session.get(Run, run_id)
            return run is not None and _gives_way(run)

    def _prepare(self, run_id: int) -> RunFiles | None:
        with writing(self.engine) as session:
            run = session.get(Run, run_id)
            if run is None or run.state != RunState.QUEUED:
                return None
            project = project_of(session, run.project_id)
            files = files_of(self.settings, run.project_id, run_id)
            run.state, run.started, run.message = RunState.RUNNING, run.started or now(), "being prepared"
        if not files.job.is_file():
            with reading(self.engine) as session:
                job, snapshot = self._job(session, project, run, files)
            write_json(files.job, job, indent=1)  # the last: a run without it is prepared anew
            with writing(self.engine) as session:
                session.execute(update(Run).where(col(Run.id) == run_id).values(snapshot=snapshot))
        return files

    def _job(self, session: Session, project: Project, run: Run, files: RunFiles) -> tuple[dict[str, Any], str | None]:
        """What the worker is told, once the lists and labels that it needs are written."""
        asked, kind = run.parameters, RunKind(run.kind)
        files.path.mkdir(parents=True, exist_ok=True)
        job: dict[str, Any] = {
            "kind": kind.value,
            "parameters": asked,
            "device": asked.get("device") or self.settings.device,
            "config": list(map(str, self.settings.config)),
        }
        if kind is RunKind.TRAIN:
            return self._training_job(session, project, TrainParameters(**asked), files, job)
        if kind is RunKind.MINE:
            _list_images(session, project, files, asked["image_ids"], OPEN, from_head=asked["max_images"])
            return job, None
        model = at_hand(session, self.settings, project, asked.get("model") or asked.get("init"))
        job |= {"model": str(model.folder), "model_id": model.id}
        if kind is RunKind.DETECT:
            _list_images(session, project, files, asked["image_ids"], OPEN)
            return job, None
        _list_images(session, project, files, (), [s for s in ImageStatus if s is not ImageStatus.UNREADABLE])
        snapshot = None
        people = snapshots.labels_of(session, project, snapshots.as_trained(project))
        if kind is RunKind.AUTOLABEL:
            shots = snapshots.shots_of(session, project, negative=False)
            denied = snapshots.shots_of(session, project, negative=True)
            write_labels(shots, files.labels)
            for labels, name in ((denied, "negatives"), (people, "people")):
                if len(labels):
                    write_labels(labels, files.path / f"{name}.parquet")
            snapshot = snapshots.fingerprint(shots)
        elif len(people):
            write_labels(people, files.labels)
            snapshot = snapshots.fingerprint(people)
        return job, snapshot

    def _training_job(
        self, session: Session, project: Project, asked: TrainParameters, files: RunFiles, job: dict[str, Any]
    ) -> tuple[dict[str, Any], str]:
        statuses = [ImageStatus.INSPECTED] + ([ImageStatus.PROPOSED] if asked.with_proposed else [])
        choice = snapshots.as_trained(project, with_proposed=asked.with_proposed, min_score=asked.min_score)
        labels = snapshots.labels_of(session, project, choice, statuses=statuses)
        if not labels.num_classes or not (~labels.crowd).any():
            raise Refusal(409, "no box is labelled yet; label some objects, then train")
        train, validation = snapshots.held_out(labels, asked.validate_on, asked.seed)
        write_labels(train, files.labels)
        write_image_list(train.image_ids, files.images)
        if validation is not None:
            write_labels(validation, files.path / "val_labels.parquet")
            write_image_list(validation.image_ids, files.path / "val_images.parquet")
        write_coco(labels, files.path / "snapshot.json")
        init = None
        if asked.init == "active":
            init = at_hand(session, self.settings, project, None).folder if project.active_model else None
        elif asked.init is not None:
            init = at_hand(session, self.settings, project, asked.init).folder
        job |= {
            "init": None if init is None else str(init),
            "validated": validation is not None,
            "images": len(train),
            "boxes": int((~train.crowd).sum()),
            "held_out": 0 if validation is None else len(validation),
        }
        return job, snapshots.fingerprint(labels)

    def _take_in(self, run_id: int, files: RunFiles, read: int) -> int:
        """Progress and, of a detection, the parts that are done; returns how many lines were read so far."""
        rows = files.told(read)
        if rows:
            latest: dict[str, Any] = {}
            for row in rows:
                latest |= {name: row[name] for name in ("done", "total", "unit", "message") if name in row}
            if latest:
                with writing(self.engine) as session:
                    session.execute(update(Run).where(col(Run.id) == run_id).values(**latest))
        self._ingest_parts(run_id, files)
        return read + len(rows)

    def _ingest_parts(self, run_id: int, files: RunFiles) -> None:
        """Proposals of the parts of a detection that are there and were not taken in yet."""
        if not files.parts.is_dir():
            return
        with reading(self.engine) as session:
            run = session.get(Run, run_id)
            if run is None or not run.parameters.get("propose", True):
                return
            taken = run.ingested
        source = BoxSource.MINED if run.kind == RunKind.MINE else BoxSource.DETECTOR
        while (part := files.part(taken)).is_file():
            labels = read_labels(part)
            with writing(self.engine) as session:
                run = session.get(Run, run_id)
                assert run is not None
                outcome = self._propose(session, run, files, labels, source)
                taken += 1
                run.ingested = taken
                files.tell(proposed=outcome.boxes, kept_away=outcome.suppressed + outcome.open, **asdict(outcome))

    def _propose(self, session: Session, run: Run, files: RunFiles, labels: Any, source: BoxSource) -> Proposed:  # noqa: ANN401
        job = json.loads(files.job.read_text(encoding="utf-8"))
        own = str(job.get("model_id", "")).startswith("run-") or source is BoxSource.LVC
        classes = classes_for(session, run.project_id, labels.categories, own=own)
        project = project_of(session, run.project_id)
        asked = run.parameters.get("image_ids") or []
        ids = ids_of_paths(session, project, labels.image_ids)
        return propose(
            session,
            labels,
            ids,
            classes,
            source=source,
            run_id=run.id,
            even_open=len(asked) == 1,
            even_bare=bool(run.parameters.get("first")),
            shown_score=run.parameters.get("shown_score") if run.kind == RunKind.DETECT else None,
        )

    def _finish(self, run_id: int, files: RunFiles, ended: dict[str, Any]) -> None:
        if not ended.get("ok"):
            self._end(run_id, RunState.FAILED, error=ended.get("error") or "the run has failed; see its log")
            return
        message = str(ended.get("message", ""))
        with writing(self.engine) as session:
            run = session.get(Run, run_id)
            if run is None:
                return
            if ended.get("unfinished"):
                run.turn = (session.scalar(select(func.max(Run.turn))) or 0) + 1
                run.state, run.message = RunState.QUEUED, f"{message}; goes on after the other runs"
                return
            project = project_of(session, run.project_id)
            if run.kind == RunKind.ORDER:
                self._take_order(session, project, run, files, str(ended.get("strategy", "")))
            elif run.kind == RunKind.AUTOLABEL:
                labels = read_labels(files.autolabel / "labels.json")
                message += "; " + self._propose(session, run, files, labels, BoxSource.LVC).text()
            elif run.kind in (RunKind.DETECT, RunKind.MINE) and run.parameters.get("propose", True):
                message += f": {_images_text(run, files)}"
            if run.kind in (RunKind.TRAIN, RunKind.AUTOLABEL) and project.active_model is None:
                project.active_model = f"run-{run.id}"
            if run.kind in (RunKind.TRAIN, RunKind.AUTOLABEL):
                _end_first(session, run.project_id)
        self._end(run_id, RunState.DONE, message=message)

    def _take_order(self, session: Session, project: Project, run: Run, files: RunFiles, strategy: str) -> None:
        rows, count = iter(read_order(files.order)), 0
        while batch := list(islice(rows, _ROWS)):
            ids = ids_of_paths(session, project, [row["image"] for row in batch])
            known = [row for row in batch if row["image"] in ids]
            set_priorities(
                session,
                run.project_id,
                [(ids[r["image"]], float(r["priority"]), r["reason"], r["flags"]) for r in known],
            )
            count += len(known)
        session.add(Order(project_id=run.project_id, run_id=run.id, strategy=strategy, images=count))

    def _end(self, run_id: int, state: RunState, *, message: str | None = None, error: str | None = None) -> None:
        values: dict[str, Any] = {"state": state.value, "ended": now(), "error": error}
        if message is not None:
            values["message"] = message
        with writing(self.engine) as session:
            session.execute(update(Run).where(col(Run.id) == run_id).values(**values))
        if error is not None:
            LOG.warning("run %d: %s", run_id, error)

    def _fail(self, run: Run, why: str) -> None:
        files = files_of(self.settings, run.project_id, run.id or 0)
        run.state, run.error, run.ended = RunState.FAILED, _go_on(why, files), now()


def _gives_way(run: Run) -> bool:
    """Whether nobody asked for a run: it lets others through, and goes on by itself when the app does."""
    return run.kind == RunKind.MINE or bool(run.parameters.get("first"))


def _go_on(why: str, files: RunFiles) -> str:
    """Why a run has ended early, and from where it can be resumed."""
    checkpoint = files.checkpoint()
    if checkpoint is not None:
        return f"{why}; resume goes on from {checkpoint.relative_to(files.path).as_posix()}"
    return f"{why}; resume goes on with what is finished"


def _images_text(run: Run, files: RunFiles) -> str:
    """What came of the parts of a detection or mining."""
    came = Proposed()
    for row in files.told():
        if "proposed" in row:
            came.add(Proposed(**{one.name: row.get(one.name, 0) for one in fields(Proposed)}))
    shown_score = run.parameters.get("shown_score")
    return f"{came.boxes:,} proposals" if shown_score is None else came.images_text(shown_score)


def artefacts(files: RunFiles) -> dict[str, Path]:
    """What a run has left, by its name."""
    found = {
        "job": files.job,
        "log": files.log,
        "progress": files.progress,
        "snapshot": files.path / "snapshot.json",
        "scores": files.path / "scores.json",
        "order": files.order,
        "labels": files.autolabel / "labels.json",
        "report": files.autolabel / "report" / "index.html",
        "configuration": files.training / "config.yaml",
    }
    kept = {name: path for name, path in found.items() if path.is_file()}
    detector = files.detector()
    return kept if detector is None else kept | {"detector": detector}


def _end_first(session: Session, project_id: int) -> None:
    """First proposals that wait are not made any more: there is a detector now, whose detections say more."""
    query = select(Run).where(col(Run.project_id) == project_id, col(Run.state) == RunState.QUEUED)
    for run in filter(_gives_way, session.scalars(query)):
        run.state, run.ended = RunState.CANCELLED.value, now()
        run.message = "there is a detector now: let it detect"


def _list_images(
    session: Session,
    project: Project,
    files: RunFiles,
    image_ids: Sequence[int],
    statuses: Sequence[ImageStatus],
    *,
    from_head: int | None = None,
) -> None:
    """Write the list of the images of a run: those named, or of some statuses all by id or the first of the queue."""
    assert project.id is not None
    if image_ids:
        images: list[Image] = []
        for start in range(0, len(image_ids), _ROWS):
            query = select(Image).where(
                col(Image.project_id) == project.id, col(Image.id).in_(image_ids[start : start + _ROWS])
            )
            images += session.scalars(query.order_by(col(Image.id)))
        paths = [path_of(project, image).as_posix() for image in images]
    elif from_head is not None:
        query = select(Image).where(col(Image.project_id) == project.id, col(Image.status).in_(statuses))
        ordered = session.scalars(query.order_by(col(Image.place), col(Image.id)).limit(from_head))
        paths = [path_of(project, image).as_posix() for image in ordered]
    else:
        paths = [path_of(project, image).as_posix() for image in snapshots.images_with(session, project.id, statuses)]
    if not paths:
        raise Refusal(409, "there is no image to look at: all are inspected, skipped or unreadable")
    write_image_list(paths, files.images)


def ids_of_paths(session: Session, project: Project, paths: Sequence[str]) -> dict[str, int]:
    """The images of a project by their paths on this machine."""
    wanted: dict[str, list[str]] = {}
    for path in paths:
        for root in (project.own_folder, project.folder):
            if root and Path(path).is_relative_to(root):
                wanted.setdefault(Path(path).relative_to(root).as_posix(), []).append(path)
        wanted.setdefault(path, []).append(path)
    found = {}
    names = list(wanted)
    for start in range(0, len(names), _ROWS):
        rows = session.scalars(
            select(Image).where(col(Image.project_id) == project.id, col(Image.path).in_(names[start : start + _ROWS]))
        )
        for image in rows:
            full = path_of(project, image).as_posix()
            if full in wanted[image.path] and image.id is not None:
                found[full] = image.id
    return found


def run_of(session: Session, run_id: int) -> Run:
    """A run; Refusal 404 if there is none."""
    found = session.get(Run, run_id)
    if found is None:
        raise missing("run", run_id)
    return found

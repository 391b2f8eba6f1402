"""Requests about runs, the detectors that they trained, and whether to go on labelling."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi import Path as InPath
from fastapi.responses import FileResponse
from sqlalchemy import select
from sqlmodel import col
from starlette.background import BackgroundTask

from simdetr.app.box_life import SHOWN_SCORE
from simdetr.app.database import reading, writing
from simdetr.app.desk import AtDesk, Desk
from simdetr.app.detectors_at_hand import DetectorAtHand, all_at_hand, at_hand, files_of
from simdetr.app.found_boxes import drawn_on, found_by, found_on, held_out_of
from simdetr.app.image_list import image_of, project_of
from simdetr.app.image_list import shown as shown_images
from simdetr.app.picture_files import path_of
from simdetr.app.progress_made import draw, estimate_of
from simdetr.app.refusals import missing
from simdetr.app.run_parameters import DeviceName
from simdetr.app.run_queue import artefacts, run_of
from simdetr.app.schemas import (
    COMMON,
    AuditAsked,
    AuditOut,
    DetectAsked,
    Detected,
    DetectedBox,
    DetectedPage,
    Estimate,
    Id,
    ImagePage,
    MemoryOut,
    ModelId,
    ModelList,
    ModelOut,
    ModelSummary,
    Problem,
    RunNew,
    RunNews,
    RunOut,
    RunPage,
    Score,
)
from simdetr.app.summaries import process_bytes, summary_of
from simdetr.app.tables import Project, Run, RunKind

router = APIRouter(prefix="/api", responses=COMMON)
CANNOT: dict[int | str, dict[str, object]] = {409: {"model": Problem}}
Model = Annotated[ModelId, InPath()]
Device = Annotated[DeviceName, Query()]


@router.get("/projects/{project_id}/runs")
def list_runs(
    desk: AtDesk,
    project_id: Id,
    kind: RunKind | None = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    after: Annotated[Id | None, Query()] = None,
) -> RunPage:
    """Runs of a project, the newest first."""
    with reading(desk.engine) as session:
        project_of(session, project_id)
        query = select(Run).where(col(Run.project_id) == project_id)
        if kind is not None:
            query = query.where(col(Run.kind) == kind)
        if after is not None:
            query = query.where(col(Run.id) < after)
        rows = list(session.scalars(query.order_by(col(Run.id).desc()).limit(limit + 1)))
        runs = [desk.runs.shown(session, row) for row in rows[:limit]]
        return RunPage(runs=runs, next=runs[-1].id if len(rows) > limit else None)


@router.post("/projects/{project_id}/runs", status_code=201, responses=CANNOT)
def start_run(desk: AtDesk, project_id: Id, asked: RunNew) -> RunOut:
    """Queue a run."""
    with writing(desk.engine) as session:
        run = desk.runs.ask(session, project_id, asked.kind, asked.parameters)
        shown = desk.runs.shown(session, run)
    desk.runs.wake()
    return shown


@router.post("/images/{image_id}/detect", status_code=201, responses=CANNOT)
def detect_one(desk: AtDesk, image_id: Id, asked: DetectAsked) -> RunOut:
    """Queue a detection on one image, before all others; without a detector its boxes are mined."""
    with writing(desk.engine) as session:
        image = image_of(session, image_id)
        kind, values = RunKind.DETECT, dict[str, object](image_ids=[image_id])
        if asked.model is None and project_of(session, image.project_id).active_model is None:
            kind = RunKind.MINE
        else:
            values |= {"model": asked.model, "min_score": asked.min_score}
        run = desk.runs.ask(session, image.project_id, kind, values, first=True)
        shown = desk.runs.shown(session, run)
    desk.runs.wake()
    return shown


@router.get("/runs/{run_id}")
def get_run(desk: AtDesk, run_id: Id, since: Annotated[int, Query(ge=0, le=2**31)] = 0) -> RunNews:
    """A run, and what it has told from a line on."""
    with reading(desk.engine) as session:
        run = run_of(session, run_id)
        shown = desk.runs.shown(session, run)
    rows = files_of(desk.settings, run.project_id, run_id).told(since)
    return RunNews(run=shown, metrics=rows, next=rows[-1]["n"] + 1 if rows else since)


@router.post("/runs/{run_id}/cancel", responses=CANNOT)
def cancel_run(desk: AtDesk, run_id: Id) -> RunOut:
    """Stop a run, or take it out of the queue; what it has finished is kept."""
    with writing(desk.engine) as session:
        run = run_of(session, run_id)
        desk.runs.cancel(session, run)
        session.flush()
        return desk.runs.shown(session, run)


@router.post("/runs/{run_id}/resume", responses=CANNOT)
def resume_run(desk: AtDesk, run_id: Id) -> RunOut:
    """Queue a run again that has failed or was cancelled; it goes on from what is finished."""
    with writing(desk.engine) as session:
        run = run_of(session, run_id)
        desk.runs.resume(session, run)
        session.flush()
        shown = desk.runs.shown(session, run)
    desk.runs.wake()
    return shown


@router.get("/runs/{run_id}/detections")
def get_detections(
    desk: AtDesk,
    run_id: Id,
    min_score: Score = 0.0,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    after: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> DetectedPage:
    """What a detection found, whether it became proposals or not."""
    with reading(desk.engine) as session:
        run = run_of(session, run_id)
        page, more = found_by(session, desk.settings, run, after, limit)
    shown = [
        Detected(
            image_id=image_id,
            name=name,
            boxes=[
                DetectedBox(class_name=labels.categories[int(class_)].name, xyxy=box.tolist(), score=float(score))
                for box, class_, score in zip(own.boxes_xyxy, own.classes, own.scores, strict=True)
                if score >= min_score
            ],
        )
        for image_id, name, own, labels in page
    ]
    return DetectedPage(images=shown, next=after + limit if more else None)


@router.get(
    "/runs/{run_id}/pictures/{image_id}", response_class=Response, responses={**CANNOT, 415: {"model": Problem}}
)
def picture_of_detections(desk: AtDesk, run_id: Id, image_id: Id, min_score: Score = 0.3) -> Response:
    """An image with the boxes that a detection found on it, as a JPEG."""
    with reading(desk.engine) as session:
        run = run_of(session, run_id)
        image = image_of(session, image_id)
        project = project_of(session, run.project_id)
        path = path_of(project, image)
        found = found_on(desk.settings, run, path)
    if found is None:
        raise missing("detection on image", f"{image_id} in run {run_id}")
    headers = {"cache-control": "private, max-age=3600"}
    rows = zip(found.boxes_xyxy.tolist(), found.classes.tolist(), found.scores.tolist(), strict=True)
    content = desk.aside.ask(drawn_on, path, [(xyxy, class_) for xyxy, class_, score in rows if score >= min_score])
    return Response(content, media_type="image/jpeg", headers=headers)


@router.get("/runs/{run_id}/artefacts/{name}", response_class=Response)
def get_artefact(desk: AtDesk, run_id: Id, name: Annotated[str, InPath(pattern="^[a-z]+$", max_length=40)]) -> Response:
    """A file that a run has left; a detector as a zip."""
    with reading(desk.engine) as session:
        run = run_of(session, run_id)
    found = artefacts(files_of(desk.settings, run.project_id, run_id)).get(name)
    if found is None:
        raise missing("artefact", f"{name} of run {run_id}")
    if found.is_dir():
        return _zipped(found, f"run-{run_id}-{name}.zip")
    return FileResponse(found, filename=f"run-{run_id}-{found.name}", media_type="application/octet-stream")


def _zipped(folder: Path, name: str) -> FileResponse:
    """The files of a folder in a zip, which is gone once it was sent."""
    with NamedTemporaryFile(suffix=".zip", delete=False) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for path in sorted(folder.iterdir()):
                if path.is_file():
                    archive.write(path, path.name)
    target = Path(file.name)
    task = BackgroundTask(target.unlink, missing_ok=True)
    return FileResponse(target, filename=name, media_type="application/zip", background=task)


# ----------------------------------------------------------------------------------------------------------------------
# Detectors


def _shown(desk: Desk, project: Project, model: DetectorAtHand) -> ModelOut:
    scores = None
    if model.run is not None:
        path = files_of(desk.settings, project.id or 0, model.run.id or 0).path / "scores.json"
        scores = json.loads(path.read_text(encoding="utf-8"))["scores"] if path.is_file() else None
    return ModelOut(
        id=model.id,
        title=model.title,
        run_id=None if model.run is None else model.run.id,
        active=project.active_model == model.id,
        classes=model.classes(),
        scores=scores,
        created=model.created,
    )


@router.get("/projects/{project_id}/models")
def list_models(desk: AtDesk, project_id: Id) -> ModelList:
    """The detectors of a project."""
    with reading(desk.engine) as session:
        project = project_of(session, project_id)
        found = all_at_hand(session, desk.settings, project)
        return ModelList(models=[_shown(desk, project, model) for model in found])


@router.get("/projects/{project_id}/models/{model_id}", responses=CANNOT)
def summarise_model(desk: AtDesk, project_id: Id, model_id: Model) -> ModelSummary:
    """What a detector is made of, counted and measured."""
    with reading(desk.engine) as session:
        project = project_of(session, project_id)
        model = at_hand(session, desk.settings, project, model_id)
        shown = _shown(desk, project, model)
    found = desk.aside.ask(summary_of, model.folder)
    configuration = None
    if model.run is not None:
        path = files_of(desk.settings, project_id, model.run.id or 0).training / "config.yaml"
        configuration = path.read_text(encoding="utf-8") if path.is_file() else None
    return ModelSummary(
        model=shown,
        detector=found.detector,
        parameters=found.parameters,
        trainable=found.trainable,
        layers=found.layers,
        gflops=found.gflops,
        image_size=list(found.image_size_hw),
        configuration=configuration,
        snapshot=None if model.run is None else model.run.snapshot,
    )


@router.get("/projects/{project_id}/models/{model_id}/memory", responses=CANNOT)
def estimate_memory(
    desk: AtDesk,
    project_id: Id,
    model_id: Model,
    batch_size: Annotated[int, Query(ge=1, le=1024)] = 8,
    device: Device | None = None,
) -> MemoryOut:
    """What a training from this detector takes, about: on a CPU with the process itself, on a GPU of its memory."""
    with reading(desk.engine) as session:
        model = at_hand(session, desk.settings, project_of(session, project_id), model_id)
    on_cpu = (device or desk.settings.device or next(iter(desk.runs.devices()), "cpu")) == "cpu"
    own = desk.aside.ask(process_bytes) if on_cpu else 0
    facts = desk.aside.ask(summary_of, model.folder)
    training, (height, width) = facts.training_bytes(batch_size), facts.image_size_hw
    basis = (
        f"an estimate: weights, gradients and two moments, and what {batch_size} images of {width} × {height} pixels "
        "leave for the gradients; larger crops, masks and the loss take more"
    )
    if on_cpu:
        basis += f"; {own >> 20:,} MiB of it are the process itself"
    return MemoryOut(bytes=None if training is None else training + own, basis=basis)


@router.get("/projects/{project_id}/models/{model_id}/held_out", responses=CANNOT)
def list_held_out(
    desk: AtDesk, project_id: Id, model_id: Model, limit: Annotated[int, Query(ge=1, le=100)] = 4
) -> ImagePage:
    """Images that a detector did not learn from: those that it was measured on, else some that nobody inspected."""
    with reading(desk.engine) as session:
        project = project_of(session, project_id)
        model = at_hand(session, desk.settings, project, model_id)
        images = held_out_of(session, desk.settings, project, model, limit)
        return ImagePage(images=shown_images(session, images))


@router.post("/projects/{project_id}/models/{model_id}/activate", responses=CANNOT)
def activate_model(desk: AtDesk, project_id: Id, model_id: Model) -> ModelOut:
    """Use a detector from now on."""
    with writing(desk.engine) as session:
        project = project_of(session, project_id)
        model = at_hand(session, desk.settings, project, model_id)
        project.active_model = model.id
        return _shown(desk, project, model)


@router.get("/projects/{project_id}/models/{model_id}/download", response_class=Response, responses=CANNOT)
def download_model(desk: AtDesk, project_id: Id, model_id: Model) -> Response:
    """The weights and their configuration, as a zip."""
    with reading(desk.engine) as session:
        project = project_of(session, project_id)
        model = at_hand(session, desk.settings, project, model_id)
    if not model.folder.is_dir():
        return FileResponse(model.folder, filename=model.folder.name, media_type="application/octet-stream")
    return _zipped(model.folder, f"{model_id}.zip")


# ----------------------------------------------------------------------------------------------------------------------
# Whether to go on


@router.get("/projects/{project_id}/estimate")
def estimate(
    desk: AtDesk,
    project_id: Id,
    confidence: Annotated[float, Query(gt=0, lt=1)] = 0.95,
    min_score: Score = SHOWN_SCORE,
) -> Estimate:
    """What was found so far, the errors left with their interval, and what twenty more images would find.

    Proposals below ``min_score`` are shown to nobody, and do not count.
    """
    with reading(desk.engine) as session:
        return estimate_of(session, project_of(session, project_id), confidence, min_score)


@router.post("/projects/{project_id}/audit", status_code=201, responses=CANNOT)
def draw_images_to_audit(desk: AtDesk, project_id: Id, asked: AuditAsked) -> AuditOut:
    """Draw images at random from those that nobody has seen; the errors left are estimated from them."""
    with writing(desk.engine) as session:
        return AuditOut(images=draw(session, project_of(session, project_id), asked.images))

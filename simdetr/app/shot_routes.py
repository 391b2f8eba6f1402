"""Requests about few labels to many: shots, and what a run made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query
from sqlalchemy import select
from sqlmodel import col

from simdetr.app.box_edits import shown_box
from simdetr.app.database import reading, writing
from simdetr.app.desk import AtDesk
from simdetr.app.detectors_at_hand import files_of
from simdetr.app.image_list import image_of, project_of
from simdetr.app.refusals import Refusal, missing
from simdetr.app.run_queue import ids_of_paths, run_of
from simdetr.app.schemas import (
    COMMON,
    CandidateOut,
    CandidatePage,
    Id,
    Neighbour,
    Problem,
    ShotList,
    ShotNew,
    ShotOut,
    StageList,
    StageRow,
)
from simdetr.app.tables import Box, BoxStatus, RunKind, Shot

router = APIRouter(prefix="/api", responses=COMMON)
STAGES = ("correct", "verify", "source")
"""The last one first, which knows most."""
_ABSTAINED = -1


@router.get("/projects/{project_id}/shots")
def list_shots(desk: AtDesk, project_id: Id) -> ShotList:
    """The boxes that stand for their classes, or against them."""
    with reading(desk.engine) as session:
        project_of(session, project_id)
        rows = session.execute(
            select(Shot, Box)
            .join(Box, col(Box.id) == col(Shot.box_id))
            .where(col(Shot.project_id) == project_id, col(Box.alive))
            .order_by(col(Box.class_id), col(Shot.id))
        )
        return ShotList(
            shots=[ShotOut(id=shot.id or 0, box=shown_box(box), negative=shot.negative) for shot, box in rows]
        )


@router.post("/projects/{project_id}/shots", status_code=201, responses={409: {"model": Problem}})
def add_shot(desk: AtDesk, project_id: Id, asked: ShotNew) -> ShotOut:
    """Make a box that people have seen stand for its class; a negative one looks like it and is none."""
    with writing(desk.engine) as session:
        project_of(session, project_id)
        box = session.get(Box, asked.box_id)
        if box is None or not box.alive or image_of(session, box.image_id).project_id != project_id:
            raise missing("box", asked.box_id)
        if box.status == BoxStatus.PROPOSED or (box.status == BoxStatus.REJECTED and not asked.negative):
            raise Refusal(409, f"a box that is {box.status} cannot be a shot; accept or correct it first")
        shot = session.scalar(select(Shot).where(col(Shot.box_id) == box.id))
        if shot is None:
            shot = Shot(project_id=project_id, box_id=asked.box_id)
            session.add(shot)
        shot.negative = asked.negative
        session.flush()
        return ShotOut(id=shot.id or 0, box=shown_box(box), negative=shot.negative)


@router.delete("/shots/{shot_id}", status_code=204)
def remove_shot(desk: AtDesk, shot_id: Id) -> None:
    """Let a box be none of the shots; it stays a box."""
    with writing(desk.engine) as session:
        shot = session.get(Shot, shot_id)
        if shot is None:
            raise missing("shot", shot_id)
        session.delete(shot)


def _folder(desk: AtDesk, run_id: int) -> tuple[int, Path]:
    with reading(desk.engine) as session:
        run = run_of(session, run_id)
        if run.kind != RunKind.AUTOLABEL:
            raise missing("labelling from few labels in run", run_id)
        return run.project_id, files_of(desk.settings, run.project_id, run_id).autolabel


@router.get("/runs/{run_id}/stages")
def list_stages(desk: AtDesk, run_id: Id) -> StageList:
    """The stages that are done, each with how many boxes had which fate."""
    from simdetr.labelling.candidates import read_candidates, stage_rows

    folder = _folder(desk, run_id)[1]
    kept = folder / "stages.json"
    if kept.is_file():
        rows: list[dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8"))
    else:  # still at work: as far as it is
        latest = next((folder / f"{stage}.parquet" for stage in STAGES if (folder / f"{stage}.json").is_file()), None)
        rows = [] if latest is None else stage_rows(read_candidates(latest))
    return StageList(
        stages=[StageRow(**{name: row[name] for name in StageRow.model_fields if name in row}) for row in rows]
    )


@router.get("/runs/{run_id}/candidates")
def list_candidates(
    desk: AtDesk,
    run_id: Id,
    reason: Annotated[str | None, Query(max_length=40)] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    after: Annotated[int | None, Query(ge=-1, le=2**31)] = None,
) -> CandidatePage:
    """Detections that may become labels, with the votes of the nearest shots and why they were kept or rejected.

    ``reason`` is a code such as ``outvoted``; an empty one asks for those that were kept.
    """
    from simdetr.labelling.candidates import REASONS, read_candidates

    project_id, folder = _folder(desk, run_id)
    latest = next((folder / f"{stage}.parquet" for stage in STAGES if (folder / f"{stage}.json").is_file()), None)
    if latest is None:
        return CandidatePage(candidates=[])
    found = read_candidates(latest)
    labels, evidence = found.labels, found.evidence
    wanted = np.ones(len(found.reason), bool) if reason is None else found.reason == reason
    rows = [int(row) for row in np.flatnonzero(wanted) if after is None or row > after][: limit + 1]
    names = [category.name for category in labels.categories]
    images = [labels.image_ids[labels.owners[row]] for row in rows]
    with reading(desk.engine) as session:
        ids = ids_of_paths(session, project_of(session, project_id), list(dict.fromkeys(images)))
    shown = []
    for row, image in zip(rows[:limit], images, strict=False):
        vote = int(evidence["vote"][row]) if "vote" in evidence else _ABSTAINED
        margin = float(evidence["margin"][row]) if "margin" in evidence else float("nan")
        shown.append(
            CandidateOut(
                row=row,
                image=image,
                image_id=ids.get(image),
                class_name=names[labels.classes[row]],
                xyxy=[float(value) for value in labels.boxes_xyxy[row]],
                score=float(labels.scores[row]),
                reason=str(found.reason[row]),
                why=REASONS.get(str(found.reason[row]), "") or "kept",
                vote=names[vote] if 0 <= vote < len(names) else None,
                margin=margin if np.isfinite(margin) else None,
                nearest=_nearest(evidence, row),
            )
        )
    return CandidatePage(candidates=shown, next=rows[limit - 1] if len(rows) > limit else None)


def _nearest(evidence: Any, row: int) -> list[Neighbour]:  # noqa: ANN401
    found: list[Neighbour] = []
    while f"nearest_{len(found)}" in evidence and (shot := int(evidence[f"nearest_{len(found)}"][row])) >= 0:
        found.append(Neighbour(shot=shot, similarity=float(evidence[f"similarity_{len(found)}"][row])))
    return found

"""Few labels to many over the interface."""

from __future__ import annotations

import numpy as np
import pytest

from simdetr.app.database import writing
from simdetr.app.detectors_at_hand import files_of
from simdetr.app.tables import Run, RunKind, RunState
from simdetr.data.storage import write_json
from simdetr.labelling.candidates import Candidates, write_candidates


def test_shots_are_boxes_that_people_have_seen(person):
    class_id = person.make_class()
    box = person.draw(1, (class_id, [0, 0, 9, 9]))["boxes"][0]
    shot = person.ask("POST", "/projects/1/shots", {"box_id": box["id"]}, 201)
    again = person.ask("POST", "/projects/1/shots", {"box_id": box["id"], "negative": True}, 201)
    assert again["id"] == shot["id"] and again["negative"]
    assert [row["box"]["id"] for row in person.get("/projects/1/shots")["shots"]] == [box["id"]]
    person.ask("DELETE", f"/shots/{shot['id']}", status=204)
    assert person.get("/projects/1/shots")["shots"] == []
    person.ask("POST", "/projects/1/shots", {"box_id": 99}, 404)


@pytest.fixture
def candidates(person, make_labels):
    """What a run has found on the first image, after its votes."""
    name = person.images()[0]["name"]
    path = str(person.settings.images / name)
    labels = make_labels({path: [(0, 0, 9, 9, 0, 0.9), (20, 0, 29, 9, 1, 0.8), (40, 0, 49, 9, 0, 0.3)]}, (1, 2))
    evidence = {
        "vote": np.array([0, 0, -1]),
        "margin": np.array([0.4, 0.1, np.nan]),
        "nearest_0": np.array([2, 1, -1]),
        "similarity_0": np.array([0.9, 0.5, 0.0]),
        "corrected_xyxy": labels.boxes_xyxy,
    }
    reason = np.array(["", "other_class", "low_score"], object)
    with writing(person.desk.engine) as session:
        session.add(Run(project_id=1, kind=RunKind.AUTOLABEL, state=RunState.RUNNING))
        session.add(Run(project_id=1, kind=RunKind.TRAIN, state=RunState.DONE))
    folder = files_of(person.settings, 1, 1).autolabel
    write_candidates(Candidates(labels, reason, evidence), folder / "correct.parquet")
    write_json(folder / "correct.json", {})
    return person


def test_votes_and_reasons_are_shown(candidates):
    person = candidates
    first = person.get("/runs/1/candidates", limit=2)
    second = person.get("/runs/1/candidates", limit=2, after=first["next"])
    rows = first["candidates"] + second["candidates"]
    assert [row["reason"] for row in rows] == ["", "other_class", "low_score"] and second["next"] is None
    kept, outvoted, unsure = rows
    assert kept["image_id"] == person.images()[0]["id"] and kept["nearest"] == [{"shot": 2, "similarity": 0.9}]
    assert (outvoted["class_name"], outvoted["vote"]) == ("kind 2", "kind 1") and "of another class" in outvoted["why"]
    assert (unsure["vote"], unsure["margin"], unsure["nearest"]) == (None, None, [])
    assert [row["row"] for row in person.get("/runs/1/candidates", reason="")["candidates"]] == [0]


def test_stages_are_counted(candidates):
    stages = candidates.get("/runs/1/stages")["stages"]
    assert [row["stage"] for row in stages] == ["source", "verify", "correct"]
    assert stages[0]["counts"]["kept"] == 2 and stages[2]["counts"]["kept"] == 1
    candidates.ask("GET", "/runs/2/stages", status=404)

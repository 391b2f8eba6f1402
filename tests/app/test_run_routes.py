"""Runs and detectors over the interface."""

from __future__ import annotations

import io
import zipfile

from simdetr.app.database import writing
from simdetr.app.detectors_at_hand import files_of
from simdetr.app.tables import Run, RunKind, RunState


def test_runs_come_in_pages_the_newest_first(person):
    with writing(person.desk.engine) as session:
        session.add_all(Run(project_id=1, kind=RunKind.DETECT, state=RunState.DONE) for _ in range(3))
        session.add(Run(project_id=1, kind=RunKind.ORDER, state=RunState.DONE))
    first = person.get("/projects/1/runs", limit=2)
    second = person.get("/projects/1/runs", limit=2, after=first["next"])
    assert [run["id"] for run in first["runs"] + second["runs"]] == [4, 3, 2, 1] and second["next"] is None
    assert [run["id"] for run in person.get("/projects/1/runs", kind="order")["runs"]] == [4]


def test_what_was_told_comes_from_a_line_on(person):
    with writing(person.desk.engine) as session:
        session.add(Run(project_id=1, kind=RunKind.TRAIN, state=RunState.DONE, done=3, total=4))
    files = files_of(person.settings, 1, 1)
    for step in range(3):
        files.tell(step=step)
    news = person.get("/runs/1", since=1)
    assert [(row["n"], row["step"]) for row in news["metrics"]] == [(1, 1), (2, 2)] and news["next"] == 3
    assert person.get("/runs/1", since=3)["next"] == 3
    assert news["run"]["artefacts"] == ["progress"] and news["run"]["progress"] == 1.0
    assert person.client.get("/api/runs/1/artefacts/progress").content.count(b"\n") == 3
    for name in ("detector", "nothing"):
        person.ask("GET", f"/runs/1/artefacts/{name}", status=404)


def test_a_detector_is_activated_and_fetched(serve, small_detector):
    person = serve(run=small_detector)
    assert person.get("/projects/1")["active_model"] == "start"
    assert person.ask("POST", "/projects/1/models/start/activate")["active"]
    person.ask("POST", "/projects/1/models/run-5/activate", status=404)
    person.ask("POST", "/projects/1/models/..%2f/activate", status=404)
    content = person.client.get("/api/projects/1/models/start/download").content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.read("model.safetensors") == (small_detector / "model.safetensors").read_bytes()


def test_memory_of_a_training_is_told_before_it_begins_and_said_to_be_an_estimate(serve, small_detector):
    person = serve(run=small_detector)
    four, eight = (person.get("/projects/1/models/start/memory", batch_size=size) for size in (4, 8))
    assert 0 < four["bytes"] < eight["bytes"] < 2 * four["bytes"]
    assert "an estimate" in four["basis"] and "4 images of 80 × 64 pixels" in four["basis"]

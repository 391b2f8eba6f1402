"""Whether to go on: what was found, and errors left by a random audit."""

from __future__ import annotations

import pytest

from simdetr.app import snapshots
from simdetr.app.database import reading, writing
from simdetr.app.proposals import propose
from simdetr.app.tables import Project, Run, RunKind, RunState
from simdetr.labelling.stopping import Audit, errors_left


@pytest.fixture
def proposed(person, make_labels):
    """Two proposals on each of six images, by a detection that is done."""
    person.make_class()
    images = person.images()
    with writing(person.desk.engine) as session:
        run = Run(project_id=1, kind=RunKind.DETECT, state=RunState.DONE, parameters={"image_ids": []})
        session.add(run)
        session.flush()
        labels = make_labels({image["name"]: [(0, 0, 9, 9, 0, 0.9), (20, 0, 29, 9, 0, 0.2)] for image in images})
        propose(session, labels, {image["name"]: image["id"] for image in images}, {0: 1}, run_id=run.id)
    return person


def test_without_an_audit_nothing_is_said_of_the_errors_left(person):
    found = person.get("/projects/1/estimate")
    assert found["errors_left"] is None and "audit" in found["why"]
    assert "detect on all images first" in person.ask("POST", "/projects/1/audit", {"images": 3}, 409)["detail"]


def test_an_audit_comes_first_and_gives_the_estimate_of_the_engine(proposed, make_labels):
    person = proposed
    assert person.ask("POST", "/projects/1/audit", {"images": 3}, 201) == {"images": 3}
    seen = {"inspected": True, "min_score": 0.0}
    first = [image["id"] for image in person.get("/projects/1/queue", limit=3)["images"]]
    assert all("at random" in image["reason"] for image in person.get("/projects/1/queue", limit=3)["images"])
    for place, image in enumerate(first):
        sheet = person.get(f"/images/{image}/boxes")
        sure, unsure = sheet["boxes"]
        sent = [{"id": sure["id"], "class_id": 1, "xyxy": sure["xyxy"]}]
        if place:  # a rejected proposal on each of two images, an object drawn on one
            sent += [{"class_id": 1, "xyxy": [40, 40, 50, 50]}] if place == 1 else []
        else:
            sent += [{"id": unsure["id"], "class_id": 1, "xyxy": unsure["xyxy"]}]
        person.ask("PUT", f"/images/{image}/boxes", {"version": sheet["version"], "boxes": sent, **seen})
    found = person.get("/projects/1/estimate", min_score=0.0)
    assert [found[name] for name in ("inspected", "accepted", "rejected", "drawn", "audited")] == [3, 4, 2, 1, 3]
    assert (found["left_images"], found["left_detections"]) == (3, 6)
    left = make_labels({str(n): [(0, 0, 9, 9, 0, 0.9), (20, 0, 29, 9, 0, 0.2)] for n in range(3)})
    wanted = errors_left(Audit([0, 0, 1, 1, 2, 2], [0.9, 0.2] * 3, [0, 0, 0, 1, 0, 1], [0, 1, 0]), left)
    for name in ("total", "low", "high", "wrong", "missed"):
        assert found["errors_left"][name] == pytest.approx(getattr(wanted, name))
    assert found["next_20"]["errors_found"] == pytest.approx(wanted.total)  # three images are left


def test_images_that_were_chosen_say_nothing_of_the_rest(proposed):
    person = proposed
    for image in person.images()[:3]:
        sheet = person.get(f"/images/{image['id']}/boxes")
        body = {"version": sheet["version"], "min_score": 0.0, "inspected": True}
        person.ask("POST", f"/images/{image['id']}/accept", body)
    found = person.get("/projects/1/estimate")
    assert found["accepted"] == 6 and found["errors_left"] is None
    assert found["next_20"]["errors_found"] == 0


def test_proposals_that_nobody_saw_are_in_no_estimate_and_no_training(proposed):
    """The page sends what it shows: of two boxes on each image the one at 0.2 is hidden."""
    person = proposed
    person.ask("POST", "/projects/1/audit", {"images": 3}, 201)
    for image in person.get("/projects/1/queue", limit=3)["images"]:
        sheet = person.get(f"/images/{image['id']}/boxes")
        sent = [{name: sheet["boxes"][0][name] for name in ("id", "class_id", "xyxy")}]
        body = {"version": sheet["version"], "boxes": sent, "inspected": True}
        counts = person.ask("PUT", f"/images/{image['id']}/boxes", body)["image"]["counts"]
        assert (counts["inspected"], counts["rejected"], counts["proposed"]) == (1, 0, 0)
    found = person.get("/projects/1/estimate")
    assert [found[name] for name in ("accepted", "rejected", "audited", "left_detections")] == [3, 0, 3, 3]
    assert found["errors_left"]["wrong"] < 3
    with reading(person.desk.engine) as session:
        project = session.get(Project, 1)
        labels = snapshots.labels_of(session, project, snapshots.as_trained(project))
    assert len(labels.boxes_xyxy) == 3 and not labels.crowd.any()

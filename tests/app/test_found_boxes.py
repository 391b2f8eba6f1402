"""What a detection found can be looked at without becoming proposals."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.float64)


@pytest.fixture
def looked(serve, small_detector):
    person = serve(run=small_detector, device="cpu")
    ids = sorted(image["id"] for image in person.images()[:3])
    run = person.run("detect", image_ids=ids, min_score=0.0, max_boxes=3, propose=False)
    assert run["state"] == "done", run["error"]
    return person, run, ids


def test_nothing_is_proposed_and_boxes_are_told_page_by_page(looked):
    person, run, ids = looked
    assert run["message"] == "looked at 3 images"
    assert {image["status"] for image in person.images()} == {"new"} and person.get("/projects/1")["boxes"] == 0
    assert person.get("/projects/1/classes")["classes"] == []
    found = person.get(f"/runs/{run['id']}/detections")
    assert [image["image_id"] for image in found["images"]] == ids and found["next"] is None
    names = {image["id"]: image["name"] for image in person.images()}
    assert [image["name"] for image in found["images"]] == [names[image_id] for image_id in ids]
    boxes = [box for image in found["images"] for box in image["boxes"]]
    assert boxes and {box["class_name"] for box in boxes} <= {"disc", "square"}
    first = person.get(f"/runs/{run['id']}/detections", limit=2)
    rest = person.get(f"/runs/{run['id']}/detections", limit=2, after=first["next"])
    assert first["images"] + rest["images"] == found["images"] and rest["next"] is None
    least = sorted(box["score"] for box in boxes)[len(boxes) // 2]
    some = person.get(f"/runs/{run['id']}/detections", min_score=least)
    assert sum(len(image["boxes"]) for image in some["images"]) < len(boxes)


def test_pictures_have_the_boxes_above_a_score(looked):
    person, run, ids = looked
    plain, drawn = (pixels(person.get(f"/runs/{run['id']}/pictures/{ids[0]}", min_score=score)) for score in (1, 0))
    assert plain.shape == drawn.shape and np.abs(plain - drawn).max() > 60
    missing = person.images()[4]["id"]
    assert "no detection" in person.ask("GET", f"/runs/{run['id']}/pictures/{missing}", status=404)["detail"]


def test_a_look_is_no_detection_to_judge_errors_by(looked):
    person, _, _ = looked
    person.run("detect", propose=False)
    assert "detect on all images first" in person.ask("POST", "/projects/1/audit", {}, 409)["detail"]


def test_held_out_images_are_those_that_a_training_was_measured_on(looked):
    from simdetr.app.database import reading, writing
    from simdetr.app.detectors_at_hand import DetectorAtHand, files_of
    from simdetr.app.found_boxes import held_out_of
    from simdetr.app.image_list import project_of
    from simdetr.app.run_files import write_image_list
    from simdetr.app.tables import Run

    person, _, _ = looked
    images = person.get("/projects/1/models/start/held_out", limit=2)["images"]
    assert [image["id"] for image in images] == [1, 2]  # nobody has inspected them
    with writing(person.desk.engine) as session:
        run = Run(project_id=1, kind="train", state="done")
        session.add(run)
        session.flush()
        files = files_of(person.settings, 1, run.id)
        files.path.mkdir(parents=True)
        write_image_list([person.settings.images / person.images()[5]["name"]], files.path / "val_images.parquet")
        number = run.id
    with reading(person.desk.engine) as session:
        model = DetectorAtHand(f"run-{number}", files.path, session.get(Run, number))
        kept = held_out_of(session, person.settings, project_of(session, 1), model, 4)
        assert [image.id for image in kept] == [person.images()[5]["id"]]

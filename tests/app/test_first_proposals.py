"""Boxes are mined from the images alone, part by part, while there is no detector."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from simdetr.app import first_proposals, run_files, run_queue
from simdetr.app.database import reading, writing
from simdetr.app.first_proposals import PART, best_of, propose_first
from simdetr.app.jobs import LoadedOnce, carry_out
from simdetr.app.run_files import RunFiles, parts_of, write_image_list
from simdetr.app.run_queue import RunQueue
from simdetr.app.tables import Run
from simdetr.data.annotations import Category
from simdetr.data.label_files import read_labels, write_labels
from simdetr.mining.regions import Regions
from simdetr.mining.store import ProposalRow


@pytest.fixture
def mining(own_scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(run_files, "FIRST", 2)
    monkeypatch.setattr(first_proposals, "PART", 3)
    files = RunFiles(tmp_path / "run")
    write_image_list(sorted((own_scenes / "images").iterdir()), files.images)
    job = {"kind": "mine", "parameters": {"max_boxes": 4, "image_ids": []}, "device": "cpu", "config": []}
    files.job.write_text(json.dumps(job))
    return files, job


def test_the_first_part_is_small_and_no_image_is_left_out():
    assert parts_of(3, PART) == [range(3)]
    assert [len(part) for part in parts_of(50, PART)] == [4, 16, 16, 14]
    assert [place for part in parts_of(21, PART) for place in part] == list(range(21))


def test_parts_are_kept_and_other_runs_are_let_through_between_them(mining, truth_of):
    files, job = mining
    files.make_way.touch()
    assert propose_first(files, job)["unfinished"] and not files.make_way.exists() and not files.parts.exists()
    assert propose_first(files, job)["message"] == "mined 6 images"
    parts = sorted(files.parts.iterdir())
    found = [read_labels(part) for part in parts]
    assert [len(labels) for labels in found] == [2, 3, 1]
    assert [category.name for category in found[0].categories] == ["object"]
    assert all(len(labels.of(name)) <= 4 for labels in found for name in labels.image_ids)
    scores = np.concatenate([labels.scores for labels in found])
    assert len(scores) and (scores > 0).all() and (scores <= 1).all()
    stamps = [part.stat().st_mtime_ns for part in parts[:2]]
    parts[2].unlink()
    propose_first(files, job)
    assert [part.stat().st_mtime_ns for part in parts[:2]] == stamps and parts[2].is_file()
    assert [row["done"] for row in files.told()][-3:] == [2, 5, 6]


def test_the_surest_boxes_of_each_image_are_kept_and_none_twice():
    def row(name, scores, step=10):
        count = len(scores)
        boxes = np.array([[step * i, 0, step * i + 9, 9] for i in range(count)], np.float32).reshape(-1, 4)
        zeros = np.zeros(count, np.int16)
        regions = Regions(boxes, np.zeros((count, 2), np.float32), boxes[:, 2], zeros, zeros, zeros, np.float32(scores))
        return ProposalRow(name, 100, 100, regions)

    labels = best_of([row("a", [0.1, 0.9, 0.4]), row("none", []), row("b", [0.2])], 2)
    assert [len(labels.of(name)) for name in ("a", "none", "b")] == [2, 0, 1]
    assert labels.of("a").boxes_xyxy[:, 0].tolist() == [10, 20]
    assert len(best_of([], 2)) == 0
    close = best_of([row("c", [0.1, 0.9, 0.4, 0.2, 0.3], step=2)], 5)  # neighbours overlap by 0.64, others by 0.39
    assert close.of("c").boxes_xyxy[:, 0].tolist() == [2, 8]


def test_an_app_without_a_detector_proposes_by_itself_and_names_are_given_with_one_save(serve, monkeypatch):
    asked = []
    monkeypatch.setattr(RunQueue, "start", lambda queue: asked.append(queue))  # first look at what is queued
    person = serve(propose=True)
    (run,) = person.get("/projects/1/runs")["runs"]
    assert (run["kind"], run["state"]) == ("mine", "queued")
    monkeypatch.undo()
    first = person.images()[0]
    person.ask("POST", f"/images/{first['id']}/open", {"holder": "a tab"})

    person = serve(propose=True, device="cpu")
    done = person.wait(run["id"])
    assert done["state"] == "done", done["error"]
    assert len(person.get("/projects/1/runs")["runs"]) == 1
    (kind,) = person.get("/projects/1/classes")["classes"]
    assert (kind["name"], kind["kind"], kind["shortcut"]) == ("object", "pseudo", None)
    sheet = person.get(f"/images/{first['id']}/boxes")  # open, but nobody had drawn on it
    assert 1 < len(sheet["boxes"]) <= 10
    assert {(box["status"], box["source"]) for box in sheet["boxes"]} == {("proposed", "mined")}

    cell = person.make_class("cell")
    named, left = sheet["boxes"][:2]
    boxes = [{"id": named["id"], "class_id": cell, "xyxy": named["xyxy"]}]
    saved = person.ask(
        "PUT", f"/images/{first['id']}/boxes", {"version": sheet["version"], "boxes": boxes, "inspected": True}
    )
    assert [(box["id"], box["status"], box["class_id"]) for box in saved["boxes"]] == [(named["id"], "inspected", cell)]
    assert saved["image"]["counts"]["rejected"] == 0
    estimate = person.get("/projects/1/estimate")
    assert (estimate["accepted"], estimate["corrected"], estimate["left_detections"]) == (1, 0, 0)
    undone = person.ask("POST", f"/images/{first['id']}/undo", {"version": saved["version"]})
    assert left["id"] in [box["id"] for box in undone["boxes"]]


def test_mining_leaves_the_proposals_of_a_detector_and_waits_for_other_runs(serve, small_detector):
    person = serve(run=small_detector, device="cpu")
    detection = person.run("detect", min_score=0.0, max_boxes=2)
    mine = person.ask("POST", "/projects/1/runs", {"kind": "mine", "parameters": {}}, 201)
    other = person.ask("POST", "/projects/1/runs", {"kind": "detect", "parameters": {"min_score": 0.0}}, 201)
    assert person.wait(mine["id"])["state"] == person.wait(other["id"])["state"] == "done"
    sources = {
        box["source"] for image in person.images() for box in person.get(f"/images/{image['id']}/boxes")["boxes"]
    }
    assert sources == {"detector"} and detection["state"] == "done"


def test_a_stopped_app_goes_on_mining_by_itself(serve):
    person = serve(propose=True, device="cpu")
    person.wait(1, "running", "done")
    person = serve(propose=True, device="cpu")
    assert person.wait(1)["state"] == "done"
    with reading(person.desk.engine) as session:
        run = session.get(Run, 1)
        assert run is not None and run.ingested == len(parts_of(6, PART))


def test_an_unnamed_class_is_no_class_of_a_training_until_it_is_used_or_renamed(serve):
    from simdetr.app.snapshots import categories_of

    person = serve(propose=True, device="cpu")
    person.wait(1)
    cell = person.make_class("cell")
    with reading(person.desk.engine) as session:
        assert [category.id for category in categories_of(session, 1)] == [cell]
    (unnamed,) = [row for row in person.get("/projects/1/classes")["classes"] if row["name"] == "object"]
    renamed = person.ask("PATCH", f"/classes/{unnamed['id']}", {"name": "leaf"})
    assert renamed["kind"] == "novel"
    with reading(person.desk.engine) as session:
        assert {category.name for category in categories_of(session, 1)} == {"cell", "leaf"}


def test_the_head_of_the_queue_is_mined_first_and_no_more_than_was_asked_for(serve):
    from simdetr.app.database import writing
    from simdetr.app.image_list import set_priorities

    person = serve(device="cpu")
    with writing(person.desk.engine) as session:
        set_priorities(session, 1, [(4, 0.9, "look", ""), (2, 0.5, "look", "")])
    done = person.run("mine", max_images=2, max_boxes=3)
    assert (done["state"], done["total"]) == ("done", 2), done["error"]
    counts = {image["id"]: image["counts"]["proposed"] for image in person.images()}
    assert {image_id for image_id, count in counts.items() if count} == {2, 4} and max(counts.values()) <= 3


def test_one_image_without_a_detector_is_mined_when_somebody_asks(serve):
    person = serve(device="cpu")
    image = person.images()[1]["id"]
    run = person.ask("POST", f"/images/{image}/detect", {}, 201)
    assert run["kind"] == "mine" and person.wait(run["id"])["state"] == "done"
    assert person.get(f"/images/{image}/boxes")["boxes"]
    assert person.get(f"/images/{person.images()[0]['id']}/boxes")["boxes"] == []


def test_a_detector_to_start_from_proposes_first_by_itself_and_once(serve, small_detector):
    person = serve(propose=True, run=small_detector, device="cpu")
    (run,) = person.get("/projects/1/runs")["runs"]
    assert run["kind"] == "detect" and run["parameters"]["first"]
    done = person.wait(run["id"])
    assert (done["state"], done["total"]) == ("done", 6), done["error"]
    assert [row["done"] for row in person.get(f"/runs/{run['id']}")["metrics"] if "done" in row] == [4, 6]
    person = serve(propose=True, run=small_detector, device="cpu")
    assert len(person.get("/projects/1/runs")["runs"]) == 1


def test_first_detections_let_other_runs_through_and_end_once_a_detector_is_trained(serve, small_detector):
    person = serve(run=small_detector, device="cpu")
    person.desk.runs._closing.set()  # what follows is done by hand
    first = person.ask("POST", "/projects/1/runs", {"kind": "detect", "parameters": {"first": True}}, 201)
    files = person.desk.runs._prepare(first["id"])
    job = json.loads(files.job.read_text())
    files.make_way.touch()
    assert carry_out(files, LoadedOnce())["unfinished"] and not files.make_way.exists() and not files.parts.exists()
    assert carry_out(files, LoadedOnce())["message"] == "looked at 6 images" and job["parameters"]["first"]
    with writing(person.desk.engine) as session:
        session.get(Run, first["id"]).state = "queued"
        asked = Run(project_id=1, kind="detect", parameters={})
        session.add(asked)
        session.flush()
        run_queue._end_first(session, 1)
        assert (session.get(Run, first["id"]).state, asked.state) == ("cancelled", "queued")


def test_a_pretrained_detector_proposes_boxes_without_a_name(serve, small_detector, tmp_path):
    folder = tmp_path / "pretrained"
    shutil.copytree(small_detector, folder)
    config = json.loads((folder / "config.json").read_text())
    config["categories"] = [{"id": n + 1, "name": f"cluster {n:04d} of ab12"} for n in range(2)]
    (folder / "config.json").write_text(json.dumps(config))
    person = serve(run=folder, device="cpu")
    done = person.run("detect", first=True, min_score=0.0)
    assert done["state"] == "done" and done["message"] == "looked at 6 images: 6 with boxes of no name yet"
    sheet = person.get("/images/1/boxes")
    assert 0 < len(sheet["boxes"]) <= 10 and {box["source"] for box in sheet["boxes"]} == {"mined"}
    (kind,) = person.get("/projects/1/classes")["classes"]
    assert kind["kind"] == "pseudo"
    body = {"version": sheet["version"], "boxes": [], "inspected": True}
    assert person.ask("PUT", "/images/1/boxes", body)["image"]["counts"]["rejected"] == 0


def test_a_run_that_was_mined_and_clustered_gives_its_boxes_and_no_detector(serve, own_scenes, tmp_path):
    truth = read_labels(own_scenes / "instances.json")
    names = tuple(name.removeprefix("images/") for name in truth.image_ids)
    categories = tuple(Category(n + 1, f"cluster {n:04d} of ab12") for n in range(truth.num_classes))
    run = tmp_path / "clustered"
    write_labels(replace(truth, image_ids=names, categories=categories, stage=0), run / "stage0" / "labels.parquet")
    person = serve(propose=True, run=run, device="cpu")
    assert person.get("/projects/1/runs")["runs"] == [] and person.get("/projects/1")["active_model"] is None
    assert person.get("/projects/1/models")["models"] == [] and person.get("/projects/1/clusters")["clusters"]
    counts = {image["name"]: image["counts"]["proposed"] for image in person.images()}
    assert counts == {name: len(truth.of(f"images/{name}")) for name in counts} and sum(counts.values())
    assert {box["source"] for box in person.get("/images/1/boxes")["boxes"]} <= {"mined"}
    assert "a --run that has none" in person.ask("GET", "/projects/1/models/start", status=404)["detail"]
    person = serve(propose=True, run=run, device="cpu")
    assert person.get("/projects/1")["boxes"] == sum(counts.values())

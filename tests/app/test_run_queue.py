"""Runs in a worker of their own: trained, detected, killed, cancelled, resumed."""

from __future__ import annotations

import os
import signal
import time

import pytest

from simdetr.app.detectors_at_hand import files_of


def label_all(person, truth_of, count=6):
    class_id = person.make_class()
    for image in person.images()[:count]:
        person.draw(image["id"], *[(class_id, box) for box in truth_of(image["name"])])
    return class_id


def kill_worker(person, run_id):
    while (pid := person.desk.runs.worker.pid) is None:
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    return person.wait(run_id, "failed")


@pytest.mark.slow
def test_a_training_can_be_killed_resumed_activated_and_its_detector_proposes(serve, tiny_config, truth_of):
    person = serve(config=(str(tiny_config),), device="cpu")
    class_id = label_all(person, truth_of, 4)
    options = ["--self_training.checkpoint_every_steps=2"]
    parameters = {"max_steps": 60, "options": options}
    run = person.ask("POST", "/projects/1/runs", {"kind": "train", "parameters": parameters}, 201)
    files = files_of(person.settings, 1, run["id"])
    while files.checkpoint() is None:
        assert person.get(f"/runs/{run['id']}")["run"]["state"] in ("queued", "running")
        time.sleep(0.05)

    failed = kill_worker(person, run["id"])
    assert failed["resumable"] and failed["checkpoint"] == "training/checkpoints/resume.ckpt"
    assert "resume goes on from training/checkpoints/resume.ckpt" in failed["error"]
    assert 0 < failed["progress"] < 1

    resumed = person.ask("POST", f"/runs/{run['id']}/resume")
    assert resumed["state"] in ("queued", "running") and resumed["error"] is None
    done = person.wait(run["id"])
    assert done["state"] == "done", done["error"]
    assert (done["done"], done["total"], done["progress"]) == (60, 60, 1.0)
    assert done["snapshot"] and {"detector", "snapshot", "configuration", "log"} <= set(done["artefacts"])
    news = person.get(f"/runs/{run['id']}")
    steps = [row["step"] for row in news["metrics"] if row.get("loss") is not None]
    begun_again = [row["done"] for row in news["metrics"] if row.get("message") == "training"]
    assert steps[-1] == 60 and begun_again[0] == 0 and 2 <= begun_again[1] < 60
    assert person.get(f"/runs/{run['id']}", since=news["next"])["metrics"] == []

    assert person.get("/projects/1")["active_model"] == f"run-{run['id']}"
    summary = person.get(f"/projects/1/models/run-{run['id']}")
    assert summary["parameters"] >= summary["trainable"] > 1000 and summary["gflops"] > 0
    assert summary["model"]["classes"] == ["thing"] and summary["snapshot"] == done["snapshot"]

    found = person.run("detect", min_score=0.0, max_boxes=5)
    assert found["state"] == "done" and (found["done"], found["total"], found["unit"]) == (2, 2, "images")
    counts = {image["name"]: image["counts"]["proposed"] for image in person.images()}
    assert [count > 0 for count in counts.values()] == [False] * 4 + [True] * 2
    proposed = person.get(f"/images/{person.images()[5]['id']}/boxes")["boxes"]
    assert {box["class_id"] for box in proposed} == {class_id}
    assert {box["run_id"] for box in proposed} == {found["id"]}


@pytest.mark.slow
def test_a_paused_training_goes_on_from_the_very_step(serve, tiny_config, truth_of):
    person = serve(config=(str(tiny_config),), device="cpu")
    label_all(person, truth_of, 4)
    options = ["--self_training.checkpoint_every_steps=100000"]
    run = person.ask(
        "POST", "/projects/1/runs", {"kind": "train", "parameters": {"max_steps": 4000, "options": options}}, 201
    )
    while not person.get(f"/runs/{run['id']}")["run"]["done"]:
        time.sleep(0.1)
    person.ask("POST", f"/runs/{run['id']}/cancel")
    paused = person.wait(run["id"], "cancelled", "failed")
    step = paused["done"]
    assert paused["state"] == "cancelled" and 0 < step < 4000
    assert paused["message"] == f"paused at step {step:,}; resume goes on from training/checkpoints/resume.ckpt"
    assert paused["checkpoint"] and paused["resumable"] and person.desk.runs.worker.pid is None

    person.ask("POST", f"/runs/{run['id']}/resume")
    began: list[int] = []
    while len(began) < 2:
        time.sleep(0.1)
        rows = person.get(f"/runs/{run['id']}")["metrics"]
        began = [row["done"] for row in rows if row.get("message") == "training"]
    assert began == [0, step]
    person.ask("POST", f"/runs/{run['id']}/cancel")
    assert person.wait(run["id"], "cancelled", "failed")["done"] > step


def test_a_detector_proposes_streams_and_its_classes_are_made(serve, small_detector):
    person = serve(run=small_detector, device="cpu")
    assert [model["id"] for model in person.get("/projects/1/models")["models"]] == ["start"]
    first, second = person.images()[:2]
    class_id = person.make_class("disc")
    person.draw(first["id"], (class_id, [1, 1, 20, 20]))
    person.ask("POST", f"/images/{second['id']}/open", {"holder": "a tab"})
    run = person.run("detect", min_score=0.0, max_boxes=4)
    assert run["state"] == "done", run["error"]
    names = {row["name"]: row for row in person.get("/projects/1/classes")["classes"]}
    assert names["disc"]["id"] == class_id and "square" in names
    after = {image["id"]: image for image in person.images()}
    assert after[first["id"]]["counts"] == first["counts"] | {"manual": 1}
    assert after[second["id"]]["counts"]["proposed"] == 0  # somebody has it open
    assert all(image["status"] == "proposed" for image in person.images()[2:])

    pid = person.desk.runs.worker.pid
    one = person.ask("POST", f"/images/{second['id']}/detect", {"min_score": 0.0}, 201)
    assert person.wait(one["id"])["state"] == "done"
    assert person.desk.runs.worker.pid == pid  # the same process, with the detector loaded
    sheet = person.get(f"/images/{second['id']}/boxes")
    assert sheet["boxes"] and sheet["image"]["status"] == "in_inspection"

    rejected = sheet["boxes"][0]
    person.ask("POST", f"/images/{second['id']}/reject", {"version": sheet["version"], "box_ids": [rejected["id"]]})
    again = person.ask("POST", f"/images/{second['id']}/detect", {"min_score": 0.0}, 201)
    person.wait(again["id"])
    boxes = person.get(f"/images/{second['id']}/boxes", rejected=True)["boxes"]
    assert [box["id"] for box in boxes if box["status"] == "rejected"] == [rejected["id"]]
    assert rejected["xyxy"] not in [box["xyxy"] for box in boxes if box["status"] == "proposed"]


def test_runs_wait_for_each_other_and_can_be_cancelled(serve, small_detector):
    person = serve(run=small_detector, device="cpu")
    ask = {"kind": "detect", "parameters": {}}
    runs = [person.ask("POST", "/projects/1/runs", ask, 201) for _ in range(3)]
    last = person.ask("POST", f"/runs/{runs[2]['id']}/cancel")
    assert (last["state"], last["position"]) == ("cancelled", None)
    first = person.ask("POST", f"/runs/{runs[0]['id']}/cancel")
    assert first["state"] in ("running", "cancelled")
    assert person.wait(runs[0]["id"])["state"] == "cancelled"
    assert person.wait(runs[1]["id"])["state"] == "done"
    person.ask("POST", f"/runs/{runs[1]['id']}/cancel", status=409)
    person.ask("POST", f"/runs/{runs[1]['id']}/resume", status=409)
    assert person.ask("POST", f"/runs/{runs[0]['id']}/resume")["state"] in ("queued", "running")
    assert person.wait(runs[0]["id"])["state"] == "done"


def test_a_run_that_was_at_work_when_the_app_stopped_has_failed_and_goes_on(serve, small_detector):
    person = serve(run=small_detector, device="cpu")
    run = person.ask("POST", "/projects/1/runs", {"kind": "detect", "parameters": {"min_score": 0.0}}, 201)
    person.wait(run["id"], "running")
    person = serve(run=small_detector, device="cpu")
    found = person.get(f"/runs/{run['id']}")["run"]
    if found["state"] == "failed":  # else it was quicker
        assert "the app was stopped" in found["error"] and found["resumable"]
        person.ask("POST", f"/runs/{run['id']}/resume")
    assert person.wait(run["id"])["state"] == "done"


def test_a_run_that_cannot_be_done_says_so_before_it_begins(person):
    ask = {"kind": "train", "parameters": {}}
    assert "no image is inspected" in person.ask("POST", "/projects/1/runs", ask, 409)["detail"]
    assert "no detector" in person.ask("POST", "/projects/1/runs", {"kind": "detect"}, 409)["detail"]
    elsewhere = person.ask("POST", "/projects/1/runs", {"kind": "mine", "parameters": {"device": "cuda:99"}}, 422)
    assert "expected one of cpu" in elsewhere["detail"][0]["msg"]
    wrong = person.ask("POST", "/projects/1/runs", {"kind": "train", "parameters": {"epochs": 3}}, 422)
    assert wrong["detail"][0]["loc"] == ["body", "parameters", "epochs"]


def test_two_apps_do_not_work_in_one_folder(serve, own_scenes, tmp_path):
    from fastapi.testclient import TestClient

    from simdetr.app.server import create_app
    from simdetr.app.settings import AppSettings

    serve()
    other = create_app(AppSettings(images=own_scenes / "images", out=tmp_path / "out", propose=False))
    with pytest.raises(RuntimeError, match="another `simdetr label` works"), TestClient(other):
        pass
    other.state.desk.close()


@pytest.mark.slow
def test_an_order_reaches_the_queue_and_shots_become_labels(serve, tiny_config, truth_of):
    person = serve(config=(str(tiny_config),), device="cpu")
    label_all(person, truth_of, 3)
    trained = person.run("train", max_steps=2)
    assert trained["state"] == "done", trained["error"]

    ordered = person.run("order", strategy="box_size")
    assert ordered["state"] == "done", ordered["error"]
    queue = person.get("/projects/1/queue")
    assert (queue["order"]["run_id"], queue["order"]["strategy"]) == (ordered["id"], "box_size")
    assert len(queue["images"]) == 3 and all(image["reason"] for image in queue["images"])
    priorities = [image["priority"] for image in queue["images"]]
    assert priorities == sorted(priorities, reverse=True)

    for image in person.images()[:2]:
        for box in person.get(f"/images/{image['id']}/boxes")["boxes"]:
            person.ask("POST", "/projects/1/shots", {"box_id": box["id"]}, 201)
    options = {"score_rule": "absolute", "min_score": 0.0, "max_steps": 40, "background_shots": 0, "corrector": "none"}
    run = person.run("autolabel", **options)
    if run["state"] == "failed":  # two steps may have learned nothing that the votes agree with
        assert "was kept" in run["error"]
    assert run["state"] in ("done", "failed")
    stages = person.get(f"/runs/{run['id']}/stages")["stages"]
    assert [row["stage"] for row in stages] == ["source", "verify", "correct"]
    candidates = person.get(f"/runs/{run['id']}/candidates", limit=5)["candidates"]
    assert candidates and all(row["why"] for row in candidates)

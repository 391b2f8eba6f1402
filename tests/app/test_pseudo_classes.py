"""Pseudo-classes are looked at, joined, named, and become proposals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from simdetr.data.annotations import Category
from simdetr.data.label_files import read_labels, write_labels


@pytest.fixture
def pretrained(serve, own_scenes, tmp_path, small_detector):
    """An app over the run of a pretraining with three pseudo-classes."""
    run = tmp_path / "run"
    truth = read_labels(own_scenes / "instances.json")
    names = tuple(name.removeprefix("images/") for name in truth.image_ids)
    categories = [Category(n + 1, f"cluster {n:04d} of ab12") for n in range(3)]
    classes = np.arange(len(truth.boxes_xyxy)) % 3
    labels = replace(truth, image_ids=names, categories=tuple(categories), classes=classes, stage=1)
    write_labels(labels, run / "stage1" / "labels.parquet")
    (run / "stage1" / "detector").symlink_to(small_detector)
    person = serve(run=run, device="cpu")
    person.truth = labels
    return person


def test_clusters_are_listed_joined_taken_apart_and_named(pretrained):
    person = pretrained
    clusters = person.get("/projects/1/clusters")["clusters"]
    counts = np.bincount(person.truth.classes)
    assert sorted((c["members"][0], c["boxes"]) for c in clusters) == [(n + 1, counts[n]) for n in range(3)]
    one, two, three = (next(c["id"] for c in clusters if c["members"] == [n]) for n in (1, 2, 3))
    joined = person.ask("POST", "/clusters/merge", {"cluster_ids": [one, two]})
    assert (joined["id"], joined["members"], joined["boxes"]) == (one, [1, 2], counts[0] + counts[1])
    named = person.ask("PATCH", f"/clusters/{one}", {"name": " 원 "})
    assert named["name"] == "원"
    assert [row["name"] for row in person.get("/projects/1/classes")["classes"]] == ["원"]
    parts = person.ask("POST", f"/clusters/{one}/split")["clusters"]
    assert [(part["members"], part["name"]) for part in parts] == [([1], "원"), ([2], "원")]
    assert person.ask("PATCH", f"/clusters/{one}", {"name": ""})["class_id"] is None
    person.ask("POST", f"/clusters/{three}/split", status=409)
    person.ask("POST", "/clusters/merge", {"cluster_ids": [three, three]}, 409)
    assert person.get(f"/clusters/{three}/montage", rows=2, columns=2)[:2] == b"\xff\xd8"


def test_crops_that_are_another_kind_are_moved_to_a_new_cluster_and_their_proposals_go_there(pretrained):
    person, truth = pretrained, pretrained.truth
    listed = person.get("/projects/1/clusters")
    one, two = (next(c for c in listed["clusters"] if c["members"] == [n]) for n in (1, 2))
    assert not listed["can_undo"]
    crops = person.get(f"/clusters/{one['id']}/crops")["crops"]
    assert sorted(crop["row"] for crop in crops) == np.flatnonzero(truth.classes == 0).tolist()
    assert all(crop["xyxy"] == truth.boxes_xyxy[crop["row"]].tolist() for crop in crops)
    assert person.get(f"/clusters/{one['id']}/crops/{crops[0]['row']}", size=64)[:2] == b"\xff\xd8"
    rows = [crop["row"] for crop in crops]
    moved = person.ask("POST", f"/clusters/{one['id']}/move", {"rows": rows[:2]})
    assert (moved["members"], moved["picked"], moved["boxes"], moved["name"]) == ([], 2, 2, None)
    left = person.get(f"/clusters/{one['id']}/crops")["crops"]
    assert [crop["row"] for crop in left] == rows[2:] and len(left) == one["boxes"] - 2  # in the order they had
    assert person.get(f"/clusters/{moved['id']}/montage")[:2] == b"\xff\xd8"
    grown = person.ask("POST", f"/clusters/{one['id']}/move", {"rows": rows[2:3], "target": two["id"]})
    assert (grown["id"], grown["picked"], grown["boxes"]) == (two["id"], 1, two["boxes"] + 1)

    for cluster, name in ((one, "first"), (two, "second"), (moved, "third")):
        person.ask("PATCH", f"/clusters/{cluster['id']}", {"name": name})
    person.ask("POST", "/projects/1/clusters/propose")
    names = {row["id"]: row["name"] for row in person.get("/projects/1/classes")["classes"]}
    images = {image["name"]: image["id"] for image in person.images()}
    proposed = {
        (name, tuple(box["xyxy"])): names[box["class_id"]]
        for name, image in images.items()
        for box in person.get(f"/images/{image}/boxes")["boxes"]
    }
    wanted = dict.fromkeys(np.flatnonzero(truth.classes == 0).tolist(), "first")
    wanted |= dict.fromkeys(np.flatnonzero(truth.classes == 1).tolist(), "second")
    wanted |= {rows[0]: "third", rows[1]: "third", rows[2]: "second"}
    where = {row: (truth.image_ids[truth.owners[row]], tuple(truth.boxes_xyxy[row].tolist())) for row in wanted}
    assert proposed == {where[row]: name for row, name in wanted.items()}


def test_every_change_of_clusters_is_undone_and_redone_in_its_order(pretrained):
    person = pretrained
    start = person.get("/projects/1/clusters")["clusters"]
    one, two, three = (next(c["id"] for c in start if c["members"] == [n]) for n in (1, 2, 3))
    rows = [crop["row"] for crop in person.get(f"/clusters/{one}/crops")["crops"]]
    states = [start]

    def done(method, path, body):
        person.ask(method, path, body)
        states.append(person.get("/projects/1/clusters")["clusters"])

    done("POST", f"/clusters/{one}/move", {"rows": rows[:1]})
    done("PATCH", f"/clusters/{one}", {"name": "own"})
    done("POST", "/clusters/merge", {"cluster_ids": [one, three]})
    done("POST", f"/clusters/{one}/move", {"rows": rows[1:2], "target": two})
    for state in reversed(states[:-1]):
        answer = person.ask("POST", "/projects/1/clusters/undo")
        assert answer["clusters"] == state
    assert (answer["can_undo"], answer["can_redo"]) == (False, True)
    person.ask("POST", "/projects/1/clusters/undo", status=409)
    for state in states[1:]:
        assert person.ask("POST", "/projects/1/clusters/redo")["clusters"] == state


def test_what_was_moved_comes_apart_again_and_goes_home(pretrained):
    person = pretrained
    one, two, three = (
        next(c for c in person.get("/projects/1/clusters")["clusters"] if c["members"] == [n]) for n in (1, 2, 3)
    )
    rows = [crop["row"] for crop in person.get(f"/clusters/{one['id']}/crops")["crops"]]
    move = f"/clusters/{one['id']}/move"
    person.ask("POST", move, {"rows": rows[:1], "target": two["id"]})
    parts = person.ask("POST", f"/clusters/{two['id']}/split")["clusters"]
    assert [(part["members"], part["picked"], part["boxes"]) for part in parts] == [([2], 0, two["boxes"]), ([], 1, 1)]
    home = person.ask("POST", "/clusters/merge", {"cluster_ids": [one["id"], parts[1]["id"]]})
    assert (home["members"], home["picked"], home["boxes"]) == ([1], 0, one["boxes"])

    assert "not in this cluster" in person.ask("POST", move, {"rows": [10_000]}, 409)["detail"]
    assert "all crops" in person.ask("POST", move, {"rows": rows}, 409)["detail"]
    person.ask("POST", move, {"rows": rows[:1], "target": one["id"]}, 409)
    person.ask("POST", move, {"rows": rows[:1], "target": 999}, 404)
    person.ask("GET", f"/clusters/{three['id']}/crops/100000", status=404)


def test_named_clusters_become_proposals_and_detections_take_their_names(pretrained):
    person = pretrained
    assert "no cluster has a name" in person.ask("POST", "/projects/1/clusters/propose", status=409)["detail"]
    cluster = next(c for c in person.get("/projects/1/clusters")["clusters"] if c["members"] == [1])
    person.ask("PATCH", f"/clusters/{cluster['id']}", {"name": "first"})
    assert person.ask("POST", "/projects/1/clusters/propose")["boxes"] == cluster["boxes"]
    counts = sum(image["counts"]["proposed"] for image in person.images())
    assert counts == cluster["boxes"]


def test_without_a_pretraining_there_are_none(person):
    assert person.get("/projects/1/clusters") == {"clusters": [], "can_undo": False, "can_redo": False}
    person.ask("POST", "/projects/1/clusters/propose", status=409)

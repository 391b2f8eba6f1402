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


def test_named_clusters_become_proposals_and_detections_take_their_names(pretrained):
    person = pretrained
    assert "no cluster has a name" in person.ask("POST", "/projects/1/clusters/propose", status=409)["detail"]
    cluster = next(c for c in person.get("/projects/1/clusters")["clusters"] if c["members"] == [1])
    person.ask("PATCH", f"/clusters/{cluster['id']}", {"name": "first"})
    assert person.ask("POST", "/projects/1/clusters/propose")["boxes"] == cluster["boxes"]
    counts = sum(image["counts"]["proposed"] for image in person.images())
    assert counts == cluster["boxes"]


def test_without_a_pretraining_there_are_none(person):
    assert person.get("/projects/1/clusters") == {"clusters": []}
    person.ask("POST", "/projects/1/clusters/propose", status=409)

"""Detections become proposals by the classes and images of the project."""

from __future__ import annotations

import pytest

from simdetr.app.database import writing
from simdetr.app.proposals import classes_for, propose
from simdetr.data.annotations import Category


@pytest.fixture
def put(person, make_labels):
    def make(boxes, **options):
        labels = make_labels(boxes, category_ids=(1, 2))
        ids = {image["name"]: image["id"] for image in person.images()}
        with writing(person.desk.engine) as session:
            return propose(session, labels, ids, {0: 1}, **options)

    return make


def test_classes_are_found_by_id_name_or_cluster_and_made(person):
    one = person.make_class("one")
    categories = [Category(one, "called otherwise"), Category(77, "gone")]
    with writing(person.desk.engine) as session:
        assert classes_for(session, 1, categories, own=True) == {0: one}
    foreign = [Category(5, "one"), Category(6, "new"), Category(1, "cluster 0000 of ab12")]
    with writing(person.desk.engine) as session:
        found = classes_for(session, 1, foreign, own=False)
    rows = {row["id"]: row for row in person.get("/projects/1/classes")["classes"]}
    assert found[0] == one and rows[found[1]]["name"] == "new"
    assert (rows[found[2]]["name"], rows[found[2]]["kind"]) == ("object", "pseudo")


def test_a_class_that_was_merged_goes_on_as_the_other(person):
    one, two = person.make_class("one"), person.make_class("two")
    person.draw(1, (one, [0, 0, 9, 9]))
    person.ask("DELETE", f"/classes/{one}?target={two}", status=204)
    with writing(person.desk.engine) as session:
        assert classes_for(session, 1, [Category(one, "one")], own=True) == {0: two}


def test_new_proposals_take_the_place_of_old_ones_and_of_nothing_else(person, put):
    person.make_class()
    name, image = person.images()[0]["name"], person.images()[0]["id"]
    put({name: [(0, 0, 9, 9, 0, 0.5), (30, 0, 39, 9, 0, 0.4)]})
    sheet = person.get(f"/images/{image}/boxes")
    assert (sheet["image"]["status"], sheet["version"]) == ("proposed", 1)
    person.ask("POST", f"/images/{image}/reject", {"version": 1, "box_ids": [sheet["boxes"][0]["id"]]})
    outcome = put({name: [(0, 0, 9, 8, 0, 0.9), (50, 0, 59, 9, 0, 0.8), (60, 0, 69, 9, 1, 0.8)], "stranger": []})
    assert (outcome.images, outcome.boxes, outcome.suppressed) == (1, 1, 1)
    boxes = person.get(f"/images/{image}/boxes", rejected=True)["boxes"]
    assert [(box["xyxy"][0], box["status"]) for box in boxes] == [(0, "rejected"), (50, "proposed")]
    undone = person.ask("POST", f"/images/{image}/undo", {"version": 3})
    assert [box["status"] for box in undone["boxes"]] == ["proposed", "proposed"]


def test_images_that_are_inspected_or_open_are_left_alone_and_counted(person, put):
    person.make_class()
    first, second = person.images()[:2]
    person.draw(first["id"])
    person.ask("POST", f"/images/{second['id']}/open", {"holder": "tab"})
    boxes = {first["name"]: [(0, 0, 9, 9, 0, 0.5)], second["name"]: [(0, 0, 9, 9, 0, 0.5)]}
    outcome = put(boxes)
    assert (outcome.images, outcome.seen, outcome.open) == (0, 1, 1) and "left alone" in outcome.text()
    assert put(boxes, even_open=True).images == 2


def test_an_image_that_loses_its_proposals_is_new_again(person, put):
    person.make_class()
    name, image = person.images()[0]["name"], person.images()[0]["id"]
    put({name: [(0, 0, 9, 9, 0, 0.5)]})
    put({name: []})
    assert person.get(f"/images/{image}")["status"] == "new"

"""Detections become proposals by the classes and images of the project."""

from __future__ import annotations

import pytest

from simdetr.app.database import writing
from simdetr.app.proposals import classes_for, propose
from simdetr.app.tables import BoxSource
from simdetr.data.annotations import Category


@pytest.fixture
def put(person, make_labels):
    def make(boxes, **options):
        labels = make_labels(boxes, category_ids=(1, 2))
        ids = {image["name"]: image["id"] for image in person.images()}
        with writing(person.desk.engine) as session:
            return propose(session, labels, ids, options.pop("class_ids", {0: 1}), **options)

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


def boxes_on(person, image):
    return [(box["xyxy"][0], box["source"]) for box in person.get(f"/images/{image['id']}/boxes")["boxes"]]


def test_a_weak_detection_leaves_what_people_are_shown_and_says_so(person, put):
    person.make_class()
    mined, strong, weak, bare, good = person.images()[:5]
    put({mined["name"]: [(0, 0, 9, 9, 0, 0.1)]}, source=BoxSource.MINED)
    put({strong["name"]: [(0, 0, 9, 9, 0, 0.8)], weak["name"]: [(0, 0, 9, 9, 0, 0.2)]})
    low, high = (30, 0, 39, 9, 0, 0.29), (30, 0, 39, 9, 0, 0.3)
    found = {one["name"]: [low] for one in (mined, strong, weak, bare)} | {good["name"]: [low, high]}
    outcome = put(found, shown_score=0.3)
    assert (outcome.kept, outcome.hidden, outcome.shown, outcome.hints, outcome.images) == (2, 2, 1, 0, 3)
    assert boxes_on(person, mined) == [(0, "mined")] and boxes_on(person, strong) == [(0, "detector")]
    assert boxes_on(person, weak) == boxes_on(person, bare) == [(30, "detector")]
    text = outcome.images_text(0.3)
    assert text == "1 with boxes at or above 0.30; 2 with boxes below 0.30 only; 2 keep the proposals they had"
    outcome = put({mined["name"]: [high], strong["name"]: []}, shown_score=0.3)
    assert boxes_on(person, mined) == [(30, "detector")] and boxes_on(person, strong) == [(0, "detector")]
    assert (outcome.shown, outcome.kept) == (1, 1)


def test_boxes_without_a_name_are_few_hints_of_different_places(person, put):
    unnamed = person.ask("POST", "/projects/1/classes", {"name": "object", "kind": "pseudo"}, 201)["id"]
    thing = person.make_class()
    image, other = person.images()[:2]
    places = [(20 * n, 0, 20 * n + 9, 9, n % 2, 0.05 + n / 100) for n in range(14)]
    again = (260, 0, 269, 8, 0, 0.9)  # another pseudo-class on the place of the surest
    outcome = put({image["name"]: [*places, again]}, class_ids={0: unnamed, 1: unnamed}, shown_score=0.3)
    assert (outcome.boxes, outcome.hints) == (10, 1)
    assert outcome.images_text(0.3) == "1 with boxes of no name yet"
    assert sorted(boxes_on(person, image)) == [(20.0 * n, "mined") for n in range(4, 14)]
    put({other["name"]: [(0, 0, 9, 9, 1, 0.9)]}, class_ids={1: thing})
    outcome = put({other["name"]: [again]}, class_ids={0: unnamed}, shown_score=0.3)
    assert outcome.kept == 1 and boxes_on(person, other) == [(0, "detector")]


def test_first_proposals_come_on_an_open_image_while_it_has_no_box(person, put):
    person.make_class()
    image = person.images()[0]
    person.ask("POST", f"/images/{image['id']}/open", {"holder": "tab"})
    assert put({image["name"]: [(0, 0, 9, 9, 0, 0.5)]}, even_bare=True).images == 1
    assert put({image["name"]: [(5, 0, 9, 9, 0, 0.5)]}, even_bare=True).open == 1

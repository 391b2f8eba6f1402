"""The labels of a project as trainings and exports read them."""

from __future__ import annotations

import numpy as np
import pytest
from sqlmodel import select

from simdetr.app import snapshots
from simdetr.app.database import reading, writing
from simdetr.app.image_list import project_of
from simdetr.app.tables import Box, BoxSource, BoxStatus, ImageStatus, RejectedAs


def put(person, image_id, class_id, xyxy, status, **more):
    with writing(person.desk.engine) as session:
        x0, y0, x1, y1 = xyxy
        machine = {"source": BoxSource.DETECTOR, "score": 0.6} | more
        session.add(
            Box(image_id=image_id, class_id=class_id, x0=x0, y0=y0, x1=x1, y1=y1, status=status.value, **machine)
        )


def labels(person, **chosen):
    with reading(person.desk.engine) as session:
        project = project_of(session, 1)
        rejected_as = chosen.pop("rejected_as", None)
        if rejected_as:
            project.rejected_as = rejected_as
        statuses = chosen.pop("statuses", (ImageStatus.INSPECTED,))
        choice = snapshots.as_trained(project, **chosen)
        return snapshots.labels_of(session, project, choice, statuses=statuses, name=lambda image: image.path)


def test_an_image_without_boxes_is_empty_once_inspected_and_nothing_before(person):
    class_id = person.make_class()
    first, second, third = person.images()[:3]
    person.draw(first["id"])
    person.draw(second["id"], (class_id, [0, 0, 9, 9]), inspected=False)
    put(person, third["id"], class_id, (0, 0, 9, 9), BoxStatus.PROPOSED)
    found = labels(person)
    assert found.image_ids == (first["name"],) and len(found.boxes_xyxy) == 0


def test_rejected_and_flagged_boxes_are_ignored_or_background(person):
    class_id, image = person.make_class(), person.images()[0]
    person.draw(image["id"], (class_id, [0, 0, 20, 20]))
    put(person, image["id"], class_id, (30, 30, 50, 50), BoxStatus.REJECTED)
    put(person, image["id"], class_id, (1, 0, 21, 20), BoxStatus.REJECTED)  # on the object: it says nothing of the rest
    put(person, image["id"], class_id, (50, 0, 60, 9), BoxStatus.INSPECTED, ignore=True)
    found = labels(person)
    assert [box[:2].tolist() for box in found.boxes_xyxy] == [[0, 0], [50, 0], [30, 30]]
    assert found.crowd.tolist() == [False, True, True]
    background = labels(person, rejected_as=RejectedAs.BACKGROUND)
    assert background.crowd.tolist() == [False, True]


def test_proposals_count_only_where_they_are_asked_for_and_keep_their_scores(person):
    class_id, image = person.make_class(), person.images()[0]
    put(person, image["id"], class_id, (0, 0, 9, 9), BoxStatus.PROPOSED, score=0.7)
    put(person, image["id"], class_id, (20, 0, 29, 9), BoxStatus.PROPOSED, score=0.3)
    with writing(person.desk.engine) as session:
        from simdetr.app.tables import Image

        session.scalars(select(Image).where(Image.id == image["id"])).one().status = ImageStatus.PROPOSED.value
    both = (ImageStatus.INSPECTED, ImageStatus.PROPOSED)
    assert len(labels(person, statuses=both).boxes_xyxy) == 0
    found = labels(person, statuses=both, with_proposed=True, min_score=0.5)
    assert found.scores.tolist() == [np.float32(0.7)]


def test_classes_keep_their_ids_when_others_go(person):
    one, two = person.make_class("one"), person.make_class("two")
    person.draw(person.images()[0]["id"], (two, [0, 0, 9, 9]))
    person.ask("DELETE", f"/classes/{one}", status=204)
    found = labels(person)
    assert [(c.id, c.name) for c in found.categories] == [(two, "two")] and found.classes.tolist() == [0]


def test_the_images_held_out_are_the_same_ones_and_none_of_few(make_labels):
    few = make_labels({f"{n}": [] for n in range(20)})
    assert snapshots.held_out(few, 0.2, 0) == (few, None)
    many = make_labels({f"{n}": [] for n in range(40)})
    train, validation = snapshots.held_out(many, 0.2, 0)
    assert len(validation) == 8 and not set(train.image_ids) & set(validation.image_ids)
    assert snapshots.held_out(many, 0.2, 0)[1].image_ids == validation.image_ids


def test_a_fingerprint_is_of_the_data(make_labels):
    one = make_labels({"a": [(0, 0, 5, 5, 0)]})
    assert snapshots.fingerprint(one) == snapshots.fingerprint(make_labels({"a": [(0, 0, 5, 5, 0)]}))
    for other in ({"b": [(0, 0, 5, 5, 0)]}, {"a": [(0, 0, 5, 6, 0)]}, {"a": []}):
        assert snapshots.fingerprint(one) != snapshots.fingerprint(make_labels(other))


@pytest.mark.parametrize("negative", [False, True])
def test_shots_are_boxes_by_images(person, negative):
    class_id, image = person.make_class(), person.images()[0]
    box = person.draw(image["id"], (class_id, [0, 0, 9, 9]), (class_id, [20, 20, 30, 30]))["boxes"][0]
    person.ask("POST", "/projects/1/shots", {"box_id": box["id"], "negative": negative}, 201)
    with reading(person.desk.engine) as session:
        project = project_of(session, 1)
        found = snapshots.shots_of(session, project, negative=negative)
        other = snapshots.shots_of(session, project, negative=not negative)
    assert found.boxes_xyxy.tolist() == [[0, 0, 9, 9]] and found.image_ids[0].endswith(image["name"])
    assert len(other) == 0

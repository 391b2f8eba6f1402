"""Edits and their log: any mix of writes can be taken back to the start and done again."""

from __future__ import annotations

from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simdetr.app import box_edits
from simdetr.app.box_life import SentBox
from simdetr.app.database import open_database, writing
from simdetr.app.refusals import Refusal
from simdetr.app.tables import Box, BoxClass, BoxSource, BoxStatus, Image, ImageStatus, Project


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    engine = open_database(f"sqlite:///{tmp_path_factory.mktemp('edits') / 'labels.sqlite'}")
    with writing(engine) as session:
        session.add(Project(name="p", folder="/a"))
        session.flush()
        session.add_all(BoxClass(project_id=1, name=name) for name in ("one", "two"))
    yield engine
    engine.dispose()


def seen(session, image):
    rows = box_edits.boxes_of(session, image.id)
    return image.status, [(b.id, b.class_id, b.x0, b.status, b.source) for b in rows]


@given(st.lists(st.sampled_from(["draw", "move", "drop", "accept", "reject", "skip", "inspect", "done"]), max_size=8))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_everything_can_be_taken_back_and_done_again(engine, words):
    with writing(engine) as session:
        image = Image(project_id=1, path=f"{uuid4()}.png", width=100, height=100)
        session.add(image)
        session.flush()
        place = {"x0": 50.0, "y0": 0.0, "x1": 60.0, "y1": 9.0}
        for score in (0.2, 0.8):
            session.add(
                Box(image_id=image.id, class_id=1, **place, status="proposed", source=BoxSource.DETECTOR, score=score)
            )
        session.flush()
        states = [seen(session, image)]
        for word in words:
            rows = box_edits.boxes_of(session, image.id, rejected=False)
            sent = [SentBox(b.id, b.class_id, (b.x0, b.y0, b.x1, b.y1)) for b in rows]
            version = image.version
            if word == "draw":
                sent.append(SentBox(None, 2, (0.0, 0.0, 9.0, 9.0)))
            elif word == "move" and sent:
                sent[-1] = SentBox(sent[-1].id, 2, (sent[-1].xyxy[0] + 1, *sent[-1].xyxy[1:3], 8.0))
            elif word == "drop" and sent:
                sent.pop()
            if word == "accept":
                box_edits.accept(session, image, version, "me", min_score=0.5)
            elif word == "reject":
                box_edits.reject(session, image, version, "me", [row.id for row in rows[:1]])
            elif word in ("skip", "inspect"):
                status = ImageStatus.SKIPPED if word == "skip" else ImageStatus.INSPECTED
                box_edits.set_status(session, image, version, status, "me")
            else:
                done = word == "done"  # as the page ends an image: what it hides is not among what it sends
                shown = [own for own, row in zip(sent, rows, strict=False) if (row.score or 1) >= 0.5] if done else sent
                box_edits.save(session, image, version, shown, "me", inspected=done, min_score=0.5)
            session.flush()
            if image.status == ImageStatus.INSPECTED and word in ("done", "inspect"):
                left = box_edits.boxes_of(session, image.id)
                assert BoxStatus.PROPOSED not in {box.status for box in left}
                before = {row[0]: row[3] for row in states[-1][1]}
                rejected = [box for box in left if box.status == BoxStatus.REJECTED]
                assert all(before[box.id] == BoxStatus.REJECTED for box in rejected)  # none of what was hidden
            if seen(session, image) != states[-1]:
                states.append(seen(session, image))
        for state in reversed(states[:-1]):
            box_edits.undo(session, image, image.version, "me")
            session.flush()
            assert seen(session, image) == state
        with pytest.raises(Refusal, match="nothing to undo"):
            box_edits.undo(session, image, image.version, "me")
        for state in states[1:]:
            box_edits.redo(session, image, image.version, "me")
            session.flush()
            assert seen(session, image) == state


def test_accepting_goes_by_score_and_by_name(engine):
    with writing(engine) as session:
        image = Image(project_id=1, path="scores.png", width=100, height=100)
        session.add(image)
        session.flush()
        for number, score in enumerate((0.2, 0.8, 0.9)):
            place = {"x0": 10.0 * number, "y0": 0.0, "x1": 10.0 * number + 9, "y1": 9.0}
            session.add(Box(image_id=image.id, class_id=1, **place, status="proposed", source="detector", score=score))
        session.flush()
        rows = box_edits.boxes_of(session, image.id)
        box_edits.accept(session, image, 0, "me", box_ids=[row.id for row in rows[:2]], min_score=0.5)
        assert [row.status for row in rows] == [BoxStatus.PROPOSED, BoxStatus.INSPECTED, BoxStatus.PROPOSED]
        with pytest.raises(Refusal, match="you saw 0") as error:
            box_edits.accept(session, image, 0, "me")
        assert error.value.more["current"].version == 1


@pytest.mark.parametrize("way", ["save", "accept", "status"])
def test_what_was_hidden_when_an_image_was_inspected_is_gone_without_a_verdict_until_it_is_undone(engine, way):
    with writing(engine) as session:
        image = Image(project_id=1, path=f"hidden-{way}.png", width=100, height=100)
        session.add(image)
        session.flush()
        for number, score in enumerate((0.05, 0.29, 0.3)):
            place = {"x0": 10.0 * number, "y0": 0.0, "x1": 10.0 * number + 9, "y1": 9.0}
            session.add(Box(image_id=image.id, class_id=1, **place, status="proposed", source="detector", score=score))
        session.flush()
        before = seen(session, image)
        if way == "save":
            box_edits.save(session, image, 0, [], "me", inspected=True)
        elif way == "accept":
            box_edits.accept(session, image, 0, "me", min_score=0.3, inspected=True)
        else:
            box_edits.set_status(session, image, 0, ImageStatus.INSPECTED, "me")
        (left,) = box_edits.boxes_of(session, image.id)
        assert (left.score, left.status) == (0.3, BoxStatus.REJECTED if way == "save" else BoxStatus.INSPECTED)
        box_edits.undo(session, image, 1, "me")
        session.flush()
        assert seen(session, image) == before

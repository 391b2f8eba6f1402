"""Whatever people and machines do in whatever order, the rules of a box's life hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simdetr.app.box_life import (
    TRUTH,
    BoxState,
    SentBox,
    TransitionError,
    UndoStack,
    accept,
    after_detection,
    correct,
    iou,
    is_labelled,
    is_shown,
    proposed,
    reject,
    saved,
    truth,
    within,
)
from simdetr.app.tables import BoxSource, BoxStatus, EventKind, ImageStatus

sides = st.integers(1, 40)


@st.composite
def corners(draw):
    x, y = draw(st.integers(0, 50)), draw(st.integers(0, 50))
    return (float(x), float(y), float(x + draw(sides)), float(y + draw(sides)))


@st.composite
def states(draw, number):
    status = draw(st.sampled_from(list(BoxStatus)))
    machine = status in (BoxStatus.PROPOSED, BoxStatus.INSPECTED, BoxStatus.REJECTED) or draw(st.booleans())
    machines = [BoxSource.DETECTOR, BoxSource.IMPORT, BoxSource.MINED]
    source = draw(st.sampled_from(machines)) if machine else BoxSource.USER
    return BoxState(number, draw(st.integers(1, 2)), draw(corners()), status, source, draw(st.floats(0, 1)))


@st.composite
def sheets(draw):
    return [draw(states(number)) for number in range(1, 1 + draw(st.integers(0, 6)))]


def detections():
    found = st.builds(
        lambda own, xyxy, score: BoxState(None, own, xyxy, BoxStatus.PROPOSED, BoxSource.DETECTOR, score),
        st.integers(1, 2),
        corners(),
        st.floats(0, 1),
    )
    return st.lists(found, max_size=6)


@given(sheets(), detections())
def test_a_detection_run_touches_nothing_that_people_touched(existing, found):
    dropped, added = proposed(existing, found)
    assert {box.status for box in dropped} <= {BoxStatus.PROPOSED}
    assert [box for box in existing if box not in dropped] == [b for b in existing if b.status != BoxStatus.PROPOSED]
    assert set(added) <= set(found)


@given(sheets(), detections())
def test_what_was_rejected_is_not_proposed_again_and_other_places_are(existing, found):
    _, added = proposed(existing, found)
    standing = [box for box in existing if box.status != BoxStatus.PROPOSED]
    for box in found:
        known = any(old.class_id == box.class_id and iou(old.xyxy, box.xyxy) > 0.5 for old in standing)
        assert (box in added) is not known


def test_a_rejected_box_of_another_class_or_place_suppresses_nothing():
    old = BoxState(1, 1, (0, 0, 10, 10), BoxStatus.REJECTED, BoxSource.DETECTOR)
    new = BoxState(None, 1, (0, 0, 10, 10), BoxStatus.PROPOSED, BoxSource.DETECTOR)
    half = replace(new, xyxy=(0.0, 0.0, 10.0, 5.0))  # an overlap of one half exactly is another place
    assert proposed([old], [new, replace(new, class_id=2), half])[1] == [replace(new, class_id=2), half]


@given(sheets(), st.booleans(), st.floats(0, 1))
def test_only_what_people_left_is_truth_unless_proposals_are_asked_for(boxes, with_proposed, least):
    kept = truth(boxes, with_proposed=with_proposed, min_score=least)
    for box in boxes:
        wanted = box.status in TRUTH or (with_proposed and box.status == BoxStatus.PROPOSED and box.score >= least)
        assert (box in kept) is wanted


def test_only_inspected_images_say_anything():
    assert [status for status in ImageStatus if is_labelled(status)] == [ImageStatus.INSPECTED]


@given(st.sampled_from(list(ImageStatus)), st.integers(0, 3))
def test_a_detection_changes_the_status_of_images_that_nobody_has_seen(status, count):
    after = after_detection(status, count)
    if status in (ImageStatus.NEW, ImageStatus.PROPOSED):
        assert after == (ImageStatus.PROPOSED if count else ImageStatus.NEW)
    else:
        assert after == status


@given(states(1), st.integers(1, 2), corners())
def test_a_corrected_box_remembers_the_one_before(box, class_id, xyxy):
    changed = (class_id, xyxy) != (box.class_id, box.xyxy)
    if changed and box.status == BoxStatus.REJECTED:
        with pytest.raises(TransitionError, match="was rejected"):
            correct(box, class_id, xyxy, box.ignore, "me")
        return
    after = correct(box, class_id, xyxy, box.ignore, "me")
    if not changed:
        assert after == box
        return
    if (box.source, box.status, xyxy) == (BoxSource.MINED, BoxStatus.PROPOSED, box.xyxy):
        assert (after.status, after.class_id) == (BoxStatus.INSPECTED, class_id)  # it was given its class
        return
    assert (after.status, after.parent_id, after.id) == (BoxStatus.CORRECTED, box.id, box.id)
    assert (after.source, after.score, after.run_id) == (box.source, box.score, box.run_id)


@given(states(1))
def test_accepting_changes_proposals_alone_and_rejecting_keeps_what_a_machine_found(box):
    if box.status == BoxStatus.REJECTED:
        with pytest.raises(TransitionError):
            accept(box, "me")
    elif box.status == BoxStatus.PROPOSED:
        assert accept(box, "me") == replace(box, status=BoxStatus.INSPECTED, author="me")
    else:
        assert accept(box, "me") == box
    after = reject(box, "me")
    hint = (box.source, box.status) == (BoxSource.MINED, BoxStatus.PROPOSED)
    assert (after is None) is (hint or (box.source == BoxSource.USER and box.status != BoxStatus.REJECTED))
    assert after is None or after.status == BoxStatus.REJECTED


@given(sheets(), st.data())
def test_saving_leaves_what_was_sent(existing, data):
    live = [box for box in existing if box.status != BoxStatus.REJECTED]
    kept = [box for box in live if data.draw(st.booleans())]
    sent = [SentBox(box.id, data.draw(st.integers(1, 2)), box.xyxy, box.ignore) for box in kept]
    sent += [SentBox(None, 1, xyxy) for xyxy in data.draw(st.lists(corners(), max_size=3))]
    inspected, least = data.draw(st.booleans()), data.draw(st.floats(0, 1))
    after = {box.id: box for box in existing}
    new = []
    for change in saved(existing, sent, "me", inspected=inspected, min_score=least):
        assert change.before != change.after
        if change.before is None:
            new.append(change.after)
        else:
            after[change.before.id] = change.after
    visible = [box for box in after.values() if box is not None and box.status != BoxStatus.REJECTED] + new
    assert [(b.class_id, b.xyxy) for b in visible] == [(s.class_id, s.xyxy) for s in sent]
    assert all(box.status == BoxStatus.MANUAL for box in new)
    if inspected:
        assert all(box.status in TRUTH for box in visible)
    for box in live:
        if box not in kept:
            gone = after[box.id]
            hint = (box.source, box.status) == (BoxSource.MINED, BoxStatus.PROPOSED)
            unseen = inspected and box.status == BoxStatus.PROPOSED and box.score < least
            if box.source == BoxSource.USER or hint or unseen:
                assert gone is None  # no verdict on what nobody saw
            else:
                assert gone.status == BoxStatus.REJECTED


@given(states(1), st.floats(0, 1))
def test_only_proposals_of_a_detector_below_the_score_are_hidden(box, least):
    hidden = box.status == BoxStatus.PROPOSED and box.source != BoxSource.MINED and box.score < least
    assert is_shown(box, least) is not hidden
    assert is_shown(replace(box, score=None), least)


def test_saving_what_is_not_there_names_its_place():
    box = BoxState(1, 1, (0, 0, 10, 10))
    for sent in ([SentBox(2, 1, box.xyxy)], [SentBox(1, 1, box.xyxy), SentBox(1, 1, box.xyxy)]):
        with pytest.raises(TransitionError) as error:
            saved([box], sent, "me", inspected=False)
        assert error.value.place == ("boxes", len(sent) - 1, "id")


@given(st.lists(st.sampled_from(["edit", "undo", "redo"]), max_size=40))
def test_undo_and_redo_are_those_of_an_editor(words):
    """Held against an editor that keeps whole states."""
    past, future, state = [], [], 0
    log = []
    for number, word in enumerate(words, start=1):
        if word == "edit":
            past, future, state = [*past, state], [], number
        elif word == "undo" and past:
            future, state, past = [*future, state], past[-1], past[:-1]
        elif word == "redo" and future:
            past, state, future = [*past, state], future[-1], future[:-1]
        else:
            continue  # nothing to undo is no event
        log.append((number, EventKind(word)))
    stack = UndoStack.of(log)
    assert (len(stack.undoable), len(stack.redoable)) == (len(past), len(future))
    assert (stack.undoable or [0])[-1] == state


@pytest.mark.parametrize(
    ("xyxy", "message"),
    [
        ((0, 0, 5, float("nan")), "finite"),
        ((5, 0, 5, 4), "x0 < x1"),
        ((6, 0, 5, 4), "x0 < x1"),
        ((-3, 0, 5, 4), "within 10 × 8"),
        ((0, 0, 5, 9.5), "within 10 × 8"),
        ((10, 0, 11, 4), "x0 < x1"),
    ],
)
def test_impossible_boxes_are_refused(xyxy, message):
    with pytest.raises(TransitionError, match=message):
        within(xyxy, (10, 8))


def test_a_box_that_leaves_its_image_by_a_hair_is_cut():
    assert within((-0.5, 0, 10.5, 8), (10, 8)) == (0, 0, 10, 8)


def test_overlaps_known_by_hand():
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0

"""What a person does with proposals: by hand, without errors, and at the rates that were asked for."""

from __future__ import annotations

import numpy as np
import pytest

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.labels import Labels
from simdetr.labelling.annotator import SimulatedAnnotator, Verdict, greedy_pairs

A, C, R = Verdict.ACCEPTED, Verdict.CORRECTED, Verdict.REJECTED


def image(boxes, classes=None, crowd=None, image_id="a", points=None, areas=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    classes = np.zeros(len(boxes)) if classes is None else classes
    return ImageLabels.build(image_id, (100, 200), boxes, classes, None, crowd, areas, points=points)


def same(one, two):
    for name in ("boxes_xyxy", "classes", "scores", "crowd", "areas"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


def test_every_kind_of_proposal_by_hand():
    truth = image(
        [(0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10), (60, 0, 70, 10), (80, 0, 100, 20)],
        [0, 0, 1, 1, 0],
        crowd=[False, False, False, False, True],
    )
    proposals = image(
        [
            (0, 0, 10, 9),  # right
            (20, 0, 30, 6),  # IoU .6: too loose for .7
            (40, 0, 50, 10),  # of another class
            (0, 0, 10, 8),  # a second one on the first object
            (150, 50, 160, 60),  # nothing there
            (80, 0, 90, 20),  # on the crowd
        ],
        [0, 0, 0, 0, 1, 0],
    )
    person = SimulatedAnnotator(accept_iou=0.7, draw_seconds=(5, 5), rename_seconds=2)
    found = person.inspect(truth, proposals)
    assert found.verdicts == (A, C, C, R, R, R)
    assert found.rows.tolist() == [0, 1, 2, -1, -1, -1]
    assert found.drawn.tolist() == [3]
    assert found.seconds == pytest.approx(6 * 1.6 + 5 + 2 + 5)  # six looks, one box, one name, one new box
    assert [found.count(verdict) for verdict in (A, C, R)] == [1, 2, 3]
    same(found.labels, truth)
    keeps = SimulatedAnnotator(accept_iou=0.7, keeps_boxes=True).inspect(truth, proposals)
    expected = truth.boxes_xyxy.copy()
    expected[0] = (0, 0, 10, 9)
    np.testing.assert_array_equal(keeps.labels.boxes_xyxy, expected)
    assert keeps.labels.areas.tolist() == [90, 100, 100, 100, 400]
    assert keeps.labels.classes.tolist() == truth.classes.tolist()


def test_the_tighter_of_two_proposals_means_the_object():
    truth = image([(0, 0, 10, 10)])
    for boxes, verdicts in (
        ([(0, 0, 10, 6), (0, 0, 10, 9)], (R, A)),
        ([(0, 0, 10, 9), (0, 0, 10, 6)], (A, R)),
        ([(0, 0, 10, 9), (0, 0, 10, 9)], (A, R)),
        ([(0, 0, 10, 5)], (A,)),  # exactly half
        ([(0, 0, 10, 4.99)], (R,)),
    ):
        assert SimulatedAnnotator().inspect(truth, image(boxes)).verdicts == verdicts
    # a tighter box of another class does not take the place of one of the class
    found = SimulatedAnnotator().inspect(truth, image([(0, 0, 10, 10), (0, 0, 10, 6)], [1, 0]))
    assert found.verdicts == (R, A)


def random_image(rng, image_id):
    """Truth of up to nine objects, and proposals: most of them near, some of another class, some invented."""
    count = int(rng.integers(0, 10))
    corners = rng.uniform(0, (150, 50), (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 50, (count, 2))], axis=1)
    classes = rng.integers(0, 3, count)
    truth = image(boxes, classes, rng.random(count) < 0.2, image_id, rng.random((count, 2)), rng.random(count))
    near = np.abs(boxes + rng.normal(0, 3, boxes.shape))
    near = np.concatenate([np.minimum(near[:, :2], near[:, 2:]), np.maximum(near[:, :2], near[:, 2:])], axis=1)
    invented = rng.uniform(0, 50, (3, 4)) + np.array([0, 0, 50, 50])
    proposals = np.concatenate([near[rng.random(count) < 0.8], invented])
    return truth, image(proposals, rng.integers(0, 3, len(proposals)), image_id=image_id)


def test_without_errors_the_truth_is_left():
    rng = np.random.default_rng(0)
    said = set()
    for index in range(50):
        truth, proposals = random_image(rng, str(index))
        found = SimulatedAnnotator(accept_iou=0.75).inspect(truth, proposals)
        same(found.labels, truth)
        np.testing.assert_array_equal(found.labels.points, truth.points)
        said |= set(found.verdicts)
        kept = [row for row in found.rows.tolist() if row >= 0]
        assert sorted([*kept, *found.drawn.tolist()]) == np.flatnonzero(~truth.crowd).tolist()
        assert all((row < 0) == (v is R) for row, v in zip(found.rows, found.verdicts, strict=True))
    assert said == {A, C, R}


def test_rates_are_those_that_were_asked_for():
    truth = image([(10 * i, 0, 10 * i + 8, 8) for i in range(10)])
    wrong = image([(10 * i, 50, 10 * i + 8, 58) for i in range(10)])
    person = SimulatedAnnotator(accepts_wrong=0.3, rejects_right=0.2, misses=0.1)
    counts = np.zeros(3)
    for index in range(300):
        images = [ImageLabels(**{**vars(x), "image_id": str(index)}) for x in (truth, wrong)]
        blank = person.inspect(*images)
        assert len(blank.labels) == len(blank.drawn) + blank.count(A)
        right = person.inspect(images[0], images[0])
        assert len(right.labels) == 10 - right.count(R)  # who rejects a right one does not draw it either
        assert len(right.drawn) == 0
        counts += blank.count(A), right.count(R), 10 - len(blank.drawn)
    np.testing.assert_allclose(counts / 3000, [0.3, 0.2, 0.1], atol=0.025)  # three standard errors


def test_what_is_accepted_by_mistake_stays_as_proposed():
    truth, careless = image([(0, 0, 10, 10)], points=[(3, 4)]), SimulatedAnnotator(accept_iou=0.9, accepts_wrong=1.0)
    found = careless.inspect(truth, image([(0, 0, 10, 8), (0, 0, 10, 7), (50, 50, 60, 60)], [1, 1, 2]))
    assert found.verdicts == (A, A, A)
    assert found.labels.boxes_xyxy.tolist() == [[0, 0, 10, 8], [0, 0, 10, 7], [50, 50, 60, 60]]
    assert found.labels.classes.tolist() == [1, 1, 2]
    assert found.labels.areas.tolist() == [80, 70, 100]
    assert found.rows.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(found.labels.points, [(3, 4), (np.nan, np.nan), (np.nan, np.nan)])
    Labels.from_images([found.labels], [Category(i, str(i)) for i in range(3)])
    named = SimulatedAnnotator(accepts_wrong=1.0).inspect(truth, image([(0, 0, 10, 9)], [1]))
    assert (named.verdicts, named.labels.classes.tolist(), named.seconds) == ((A,), [1], 1.6)
    assert named.labels.boxes_xyxy.tolist() == [[0, 0, 10, 10]]


def test_drawn_boxes_lie_beside_the_object():
    truth = image([(100, 50, 120, 60)])
    person = SimulatedAnnotator(box_noise=0.05)
    moved = []
    for index in range(500):
        truth_of = ImageLabels(**{**vars(truth), "image_id": str(index)})
        moved.append(person.inspect(truth_of, image([], image_id=str(index))).labels.boxes_xyxy[0])
    off = (np.array(moved) - truth.boxes_xyxy) / [20, 10, 20, 10]
    np.testing.assert_allclose(off.std(axis=0), 0.05, rtol=0.12)
    np.testing.assert_allclose(off.mean(axis=0), 0, atol=0.01)
    wild = SimulatedAnnotator(box_noise=3.0).inspect(truth, image([])).labels
    Labels.from_images([wild], [Category(1, "object")])  # upside down nowhere
    assert (wild.boxes_xyxy >= 0).all()
    assert (wild.boxes_xyxy <= [200, 100, 200, 100]).all()


def test_times_of_drawing_lie_between_the_two():
    truth = image([(0, 0, 10, 10)])
    times = [SimulatedAnnotator(seed).inspect(truth, image([])).seconds for seed in range(300)]
    assert 3.7 <= min(times) < 3.8
    assert 5.8 < max(times) <= 5.9
    assert np.mean(times) == pytest.approx(4.8, abs=0.12)


def test_an_image_is_inspected_alike_whatever_came_before():
    rng = np.random.default_rng(1)
    images = [random_image(rng, str(index)) for index in range(8)]
    options = {"accepts_wrong": 0.3, "rejects_right": 0.3, "misses": 0.3, "box_noise": 0.1}

    def run(order, seed=0):
        person = SimulatedAnnotator(seed, **options)
        found = {index: person.inspect(*images[index]) for index in order}
        return [(found[i].verdicts, found[i].seconds, found[i].labels.boxes_xyxy.tolist()) for i in range(8)]

    assert run(range(8)) == run(reversed(range(8)))
    assert run(range(8)) != run(range(8), seed=1)
    # what is proposed does not change how an object is drawn
    truth, proposals = images[next(i for i, (t, _) in enumerate(images) if len(t) > 3)]
    person = SimulatedAnnotator(box_noise=0.1)
    alone = person.inspect(truth, image([], image_id=truth.image_id)).labels
    helped = person.inspect(truth, proposals)
    np.testing.assert_array_equal(helped.labels.boxes_xyxy[helped.drawn], alone.boxes_xyxy[helped.drawn])


def test_images_without_objects_or_proposals():
    nothing = SimulatedAnnotator().inspect(image([]), image([]))
    assert (len(nothing.labels), nothing.verdicts, nothing.seconds) == (0, (), 0)
    invented = SimulatedAnnotator().inspect(image([]), image([(0, 0, 9, 9)]))
    assert (len(invented.labels), invented.verdicts, invented.seconds) == (0, (R,), 1.6)


def test_pairs_go_by_overlap():
    overlaps = np.array([[0.6, 0.9], [0.0, 0.8], [0.6, 0.5]])
    assert greedy_pairs(overlaps, 0.5) == [(0, 1), (2, 0)]
    assert greedy_pairs(overlaps, 0.7) == [(0, 1)]
    assert greedy_pairs(np.full((2, 2), 0.7), 0.7) == [(0, 0), (1, 1)]
    assert greedy_pairs(np.zeros((0, 3)), 0.5) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accepts_wrong": 1.2}, "accepts_wrong: expected a rate from 0 to 1, got 1.2"),
        ({"rejects_right": -0.1}, "rejects_right: expected a rate from 0 to 1, got -0.1"),
        ({"misses": float("nan")}, "misses: expected a rate from 0 to 1, got nan"),
        (
            {"accept_iou": 0.4},
            "accept_iou: expected 0 < match_iou <= accept_iou <= 1, got match_iou 0.5 and accept_iou 0.4",
        ),
        ({"match_iou": 0.0}, "accept_iou: expected 0 < match_iou"),
        ({"box_noise": -1.0}, "box_noise: expected a number of at least 0, got -1.0"),
        ({"verify_seconds": float("inf")}, "verify_seconds: expected a number of at least 0, got inf"),
        (
            {"draw_seconds": (5.9, 3.7)},
            r"draw_seconds: expected the least, then the most, at least 0, got \(5.9, 3.7\)",
        ),
    ],
)
def test_people_of_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        SimulatedAnnotator(**options)


def test_proposals_of_another_image():
    with pytest.raises(ValueError, match=r"proposals: expected those of image 'a' of \(100, 200\) pixels, got 'b'"):
        SimulatedAnnotator().inspect(image([]), image([], image_id="b"))

"""Every rule by hand, tables that do not fit, and points of whole label sets."""

import pickle
import re

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.labels import Labels
from simdetr.data.reference_points import BOX_RULES, ReferencePoints, SharedCount, with_reference_points

NAN = float("nan")
CATEGORIES = (Category(4, "sign"), Category(9, "mark"))
BOX = np.array([[10, 20, 30, 60]], np.float32)
BY_HAND = {
    "center": [20, 40],
    "bottom_right": [30, 60],
    "bottom_left": [10, 60],
    "top_left": [10, 20],
    "top_right": [30, 20],
    "bottom_center": [20, 60],
}


def rules(sign="center", mark="bottom_right", margin=0.0):
    return ReferencePoints({"sign": sign, "mark": mark}, CATEGORIES, margin)


@pytest.mark.parametrize("rule", BY_HAND)
@pytest.mark.parametrize("ending", ["", "|given"])
def test_rules_by_hand(rule, ending):
    classes, given = np.array([1]), np.array([[11, 12]], np.float32)
    points = rules(mark=rule + ending).points_of(BOX, classes, given)  # the box is there, so it is read
    assert points.dtype == np.float32 and points.tolist() == [BY_HAND[rule]]
    assert set(BY_HAND) == set(BOX_RULES)


def test_each_object_has_its_class_rule():
    boxes = np.repeat(BOX, 3, axis=0)
    points = rules().points_of(boxes, np.array([0, 1, 0]))
    assert points.tolist() == [[20, 40], [30, 60], [20, 40]]
    assert rules().points_of(np.zeros((0, 4), np.float32), np.zeros(0, np.int64)).shape == (0, 2)


def test_given_points_are_taken_as_they_are():
    boxes = np.array([[10, 20, 30, 60], [5, 6, 5, 6], [10, 20, 30, 60]], np.float32)
    given = np.array([[1, 2], [5, 6], [NAN, NAN]], np.float32)
    made = ReferencePoints({"default": "given"}, CATEGORIES)
    np.testing.assert_array_equal(made.points_of(boxes, np.array([0, 1, 1]), given), given)
    assert np.isnan(made.points_of(boxes, np.array([0, 1, 1]))).all()
    either = ReferencePoints({"default": "bottom_right|given"}, CATEGORIES)
    np.testing.assert_array_equal(either.points_of(boxes, np.array([0, 1, 1]), given), [[30, 60], [5, 6], [30, 60]])


def test_a_box_without_area_and_without_point_has_none():
    assert np.isnan(rules().points_of(np.array([[5, 5, 5, 5], [5, 5, 9, 5]], np.float32), np.array([0, 1]))).all()


def test_the_default_speaks_for_the_others():
    made = ReferencePoints({"default": "top_left", "mark": "bottom_left"}, CATEGORIES)
    assert made.rules == ("top_left", "bottom_left") and made.names == ("sign", "mark")
    other = made.of([Category(1, "light"), Category(2, "mark")])
    assert other.rules == ("top_left", "bottom_left") and other.refused_flips is made.refused_flips
    only_marks = rules().of([Category(2, "mark")])  # a name that these labels lack is no mistake
    assert only_marks.rules == ("bottom_right",)
    with pytest.raises(ValueError, match="no rule for the class 'light'"):
        rules().of([Category(1, "light")])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sign": "center"}, "no rule for the class 'mark'; add it to the table, or the key 'default'"),
        ({}, "no rule for the class 'sign', 'mark'"),
        (
            {"default": "center", "pole": "center", "arm": "center"},
            "'arm', 'pole' is no class of the labels; they have",
        ),
        (
            {"default": "middle"},
            r"bottom_center, bottom_left, bottom_right, center, top_left, top_right .*'\|given'.*given, got 'middle'",
        ),
        ({"default": "center", "mark": "given|given"}, r"got 'given\|given' for 'mark'"),
    ],
)
def test_tables_that_do_not_fit(table, message):
    with pytest.raises(ValueError, match=message):
        ReferencePoints(table, CATEGORIES)


@pytest.mark.parametrize("margin", [-0.1, NAN, float("inf")])
def test_margins_that_are_none(margin):
    with pytest.raises(ValueError, match="point_margin: expected a fraction of the image's side, at least 0, got"):
        rules(margin=margin)


def test_only_a_point_where_a_box_is_needed():
    boxes, given = np.array([[10, 20, 30, 60], [5, 6, 5, 6]], np.float32), np.array([[NAN, NAN], [5, 6]], np.float32)
    message = "'bottom_right' for 'mark' needs a box, but a landmark in {} has only a point .1 such.; draw its box"
    with pytest.raises(LabelError, match=message.format("row 1")):
        rules().points_of(boxes, np.array([0, 1]), given)
    images = [
        ImageLabels.build("a.png", (80, 90), [], []),
        ImageLabels.build("b.png", (80, 90), boxes, [0, 1], points=given),
    ]
    labels = Labels.from_images(images, CATEGORIES)
    for use in (rules().check, lambda made: with_reference_points(made, rules())):
        with pytest.raises(LabelError, match=message.format("image 'b.png'")):
            use(labels)
    points = with_reference_points(labels, rules(mark="bottom_right|given")).points
    np.testing.assert_array_equal(points, [[20, 40], [5, 6]])


def test_given_points_asked_of_labels_without_any():
    labels = Labels.from_images([ImageLabels.build("a.png", (80, 90), BOX, [1])], CATEGORIES)
    with pytest.raises(LabelError, match="'given' for mark needs points, and the labels have none"):
        rules(mark="given").check(labels)
    rules(sign="given").check(labels)  # no sign is there that lacks one
    others = Labels.from_images([ImageLabels.build("a.png", (80, 90), BOX, [0])], [Category(1, "tree")])
    with pytest.raises(LabelError, match=re.escape("labels of the classes ('sign', 'mark'), got ('tree',)")):
        rules().check(others)


def test_points_of_labels_read_boxes_as_far_as_they_are_in_the_image():
    boxes = [[-10, 20, 30, 100], [10, 20, 30, 60], [200, 10, 220, 20]]
    labels = Labels.from_images([ImageLabels.build("a.png", (80, 90), boxes, [0, 1, 1])], CATEGORIES)
    points = with_reference_points(labels, rules()).points
    np.testing.assert_array_equal(points, [[15, 50], [30, 60], [NAN, NAN]])  # the last one is not in the image at all
    assert labels.points is None
    again = with_reference_points(with_reference_points(labels, rules()), rules())
    np.testing.assert_array_equal(again.points, points)


@pytest.mark.parametrize(("margin", "kept"), [(0.0, [0, 1]), (0.1, [0, 1, 2, 3]), (0.2, [0, 1, 2, 3, 4])])
def test_points_outside_the_image_are_dropped_beyond_the_margin_and_counted(margin, kept, caplog):
    given = np.array([[0, 0], [200, 100], [-19.9, 50], [100, 109.9], [238, 50], [500, 50], [NAN, NAN]], np.float32)
    boxes = [[10, 10, 20, 20]] * len(given)
    images = [
        ImageLabels.build("none.png", (100, 200), [], []),
        ImageLabels.build("a.png", (100, 200), boxes, [0] * len(given), points=given),
    ]
    labels = Labels.from_images(images, CATEGORIES)
    found = with_reference_points(labels, rules(sign="given", margin=margin)).points
    assert np.flatnonzero(~np.isnan(found[:, 0])).tolist() == kept
    np.testing.assert_array_equal(found[kept], given[kept])
    assert f"{6 - len(kept)} of 6 reference points lie outside their image" in caplog.text
    assert caplog.text.strip().endswith("in a.png")


def test_which_rules_a_mirror_moves():
    names = [*BOX_RULES, "given", "top_left|given", "center|given"]
    categories = [Category(number, name) for number, name in enumerate(names)]
    made = ReferencePoints({name: name for name in names}, categories)
    sided = made.one_sided(np.arange(len(names)))
    assert [name for name, one in zip(names, sided, strict=True) if one] == [
        "bottom_right",
        "bottom_left",
        "top_left",
        "top_right",
        "top_left|given",
    ]


class Counting(Dataset):
    """Counts each of its items."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return 300

    def __getitem__(self, index):
        self.count.add_one()
        return index


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # what newer Pythons say of any fork with threads
def test_no_count_of_several_processes_is_lost():
    count = SharedCount()
    for _ in range(2):
        list(DataLoader(Counting(count), 1, num_workers=2))
    assert int(count) == 600
    Counting(count)[0]
    assert int(count) == 601


def test_rules_survive_pickling():
    made = pickle.loads(pickle.dumps(rules(margin=0.1)))
    assert made == rules(margin=0.1) and made.points_of(BOX, np.array([1])).tolist() == [[30, 60]]

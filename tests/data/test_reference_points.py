"""Every rule by hand, tables that do not fit, and points of whole label sets."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.augmentation import Mosaic, MosaicTiles, eval_transforms, train_transforms
from simdetr.data.dataset import DetectionDataset, collate
from simdetr.data.images import open_images
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


# ----------------------------------------------------------------------------------------------------------------------
# Points of training samples against what is drawn: dots where given points are, rectangles that rules read.


SAMPLE_CATEGORIES = (Category(1, "post"), Category(2, "mark"))
GIVEN = {"post": "given", "mark": "bottom_right"}
EITHER = {"post": "given", "mark": "bottom_right|given"}
PLAIN = eval_transforms(80, 400, mean=(0, 0, 0), std=(1, 1, 1))
AUGMENTED = train_transforms([64, 80, 96], 160, colour="none", mean=(0, 0, 0), std=(1, 1, 1))
SIZES = [(80, 120), (100, 70), (90, 90), (80, 110)]
HALF = 4.5  # of the dot's 9 pixels


def scene(number):
    """A post whose given point is the middle of a red dot, and a mark that is a green rectangle."""
    height, width = SIZES[number]
    array = np.zeros((height, width, 3), np.uint8)
    generator = np.random.default_rng(number)
    x, y = (int(generator.integers(6, side - 6)) for side in (width // 2, height))
    array[y - 4 : y + 5, x - 4 : x + 5, 0] = 255
    x0, y0, x1, y1 = width // 2, height // 4, width - 8, 3 * height // 4
    array[y0:y1, x0:x1, 1] = 255
    post = [x - 4, y - 4, x + 5, y + 5]
    image = ImageLabels.build(
        f"{number}.png", (height, width), [post, [x0, y0, x1, y1]], [0, 1], points=[[x + 0.5, y + 0.5], [NAN, NAN]]
    )
    return array, image


@pytest.fixture
def dataset(tmp_path):
    def make(transform=AUGMENTED, table=GIVEN, change=lambda image: image, margin=0.0, **options):
        images = []
        for number in range(len(SIZES)):
            array, image = scene(number)
            Image.fromarray(array).save(tmp_path / f"{number}.png")
            images.append(change(image))
        labels = Labels.from_images(images, SAMPLE_CATEGORIES)
        rules = ReferencePoints(table, SAMPLE_CATEGORIES, margin)
        return DetectionDataset(open_images(tmp_path), labels, transform, reference_points=rules, **options)

    return make


def post_only_by_point(image):
    return replace(
        image, boxes_xyxy=np.concatenate([image.points[:1].repeat(2, 0).reshape(1, 4), image.boxes_xyxy[1:]])
    )


def mark_only_by_point(image):
    """The mark's lower right corner is known, and not its box."""
    corner = image.boxes_xyxy[1, 2:]
    boxes, points = image.boxes_xyxy.copy(), image.points.copy()
    boxes[1], points[1] = np.tile(corner, 2), corner
    return replace(image, boxes_xyxy=boxes, points=points)


def dots(image):
    """Middles of the red dots [n, 2], and whether each lies wholly in the image."""
    red = (image[0] - image[2]).numpy()  # the fill of mosaics is grey
    red = np.where(red > 0.25, red, 0)
    components, count = ndimage.label(red)
    middles = np.array(ndimage.center_of_mass(red, components, range(1, count + 1))).reshape(-1, 2)[:, ::-1] + 0.5
    height, width = red.shape
    whole = [
        rows.start > 0 and columns.start > 0 and rows.stop < height and columns.stop < width
        for rows, columns in ndimage.find_objects(components)
    ]
    return middles, np.array(whole, bool)


def corners(image):
    """Lower right corners [n, 2] of the green rectangles."""
    components, _ = ndimage.label((image[1] - image[2]).numpy() > 0.5)
    return np.array([[c.stop, r.stop] for r, c in ndimage.find_objects(components)], float).reshape(-1, 2)


def in_pixels(image, target, label):
    return (target["points"] * torch.tensor([image.shape[2], image.shape[1]]))[target["labels"] == label].numpy()


def assert_on_dots(image, points):
    """Every whole dot has its point, every known point its dot (one that is cut moves its middle by its half)."""
    middles, whole = dots(image)
    known = points[~np.isnan(points[:, 0])]
    distances = np.abs(middles[:, None] - known[None]).max(2) if len(middles) and len(known) else None
    if whole.any():
        assert distances is not None and distances[whole].min(1).max() < 0.75
    if len(known):
        assert distances is not None and distances.min(0).max() < 0.75 + (0 if whole.all() else HALF * 1.5)
    return int(whole.sum())


@pytest.mark.parametrize("by_point", [False, True])
@pytest.mark.parametrize("index", range(len(SIZES)))
def test_given_points_stay_on_their_pixels(dataset, index, by_point):
    made = dataset(change=post_only_by_point if by_point else lambda image: image)
    whole = 0
    for epoch in range(25):
        made.set_epoch(epoch)
        image, target = made[index]
        assert target["points"].dtype == torch.float32 and target["points"].shape == (len(target["labels"]), 2)
        points = in_pixels(image, target, 0)
        whole += assert_on_dots(image, points)
        if by_point:  # its box is the point, and it is gone with the point
            boxes = target["boxes"][target["labels"] == 0]
            assert not np.isnan(points).any() and torch.allclose(boxes[:, :2], target["points"][target["labels"] == 0])
            assert (boxes[:, 2:] == 0).all()
    assert whole > 10


@pytest.mark.parametrize("index", range(len(SIZES)))
def test_rules_read_the_flipped_and_cut_boxes(dataset, index):
    made = dataset()
    seen = 0
    for epoch in range(25):
        made.set_epoch(epoch)
        image, target = made[index]
        points, drawn = in_pixels(image, target, 1), corners(image)
        if len(points) == len(drawn) == 1:
            boxes = target["boxes"][target["labels"] == 1]
            assert np.abs(points - drawn).max() <= 1.5
            whole = (boxes[:, :2] + boxes[:, 2:] / 2) * torch.tensor([image.shape[2], image.shape[1]])
            assert np.abs(points - whole.numpy()).max() < 1e-3
            seen += 1
    assert seen > 12
    assert int(made.reference_points.refused_flips) == 0


@pytest.mark.parametrize("by_point", [False, True])
def test_points_of_mosaics_stay_on_their_pixels(dataset, by_point):
    made = dataset(PLAIN, change=post_only_by_point if by_point else lambda image: image)
    mosaic = Mosaic(made, probability=1, tiles=MosaicTiles(canvas_px=240, scale_range=(0.6, 0.8)))
    for index in range(len(mosaic)):
        for epoch in range(6):
            mosaic.set_epoch(epoch)
            image, target = mosaic[index]
            middles, _ = dots(image)
            points = in_pixels(image, target, 0)
            assert len(points) == len(middles) == 4
            assert np.abs(middles[:, None] - points[None]).max(2).min(1).max() < 0.75
            found, drawn = in_pixels(image, target, 1), corners(image)
            assert len(found) == len(drawn) == 4
            assert np.abs(drawn[:, None] - found[None]).max(2).min(1).max() < 1.5


def test_a_mosaic_may_be_augmented_too(dataset):
    mosaic = Mosaic(dataset(), probability=1, tiles=MosaicTiles(canvas_px=240, scale_range=(0.8, 0.8)))
    assert sum(
        assert_on_dots(image, in_pixels(image, target, 0)) for image, target in map(mosaic.__getitem__, range(4))
    )


MIRRORED = train_transforms([80], 160, crop=False, colour="none", mean=(0, 0, 0), std=(1, 1, 1))


def test_a_mirror_is_refused_where_the_other_side_is_unknown(dataset, caplog):
    made = dataset(MIRRORED, EITHER, mark_only_by_point)
    boxed = dataset(MIRRORED, EITHER)
    mirrored = 0
    for epoch in range(30):
        made.set_epoch(epoch), boxed.set_epoch(epoch)
        image, target = made[0]
        corner = [112 / 120, 60 / 80]
        assert torch.allclose(target["points"][1], torch.tensor(corner)) and corners(image).tolist() == [[112, 60]]
        assert torch.allclose(target["boxes"][1], torch.tensor([*corner, 0, 0]))
        # the same draws mirror the image where boxes are known, and then the other corner is the right one
        image, target = boxed[0]
        mirrored += float(image[1, 40, 60]) == 0
        x = 112 if float(image[1, 40, 61]) else 60
        assert torch.allclose(target["points"][1], torch.tensor([x / 120, 60 / 80]))
    assert 8 < mirrored < 22
    assert int(made.reference_points.refused_flips) == mirrored and int(boxed.reference_points.refused_flips) == 0
    assert caplog.text.count("are not mirrored") == 1


def test_given_points_of_a_class_without_sides_are_mirrored(dataset):
    made = dataset(MIRRORED, {"default": "given"}, mark_only_by_point)
    places = set()
    for epoch in range(20):
        made.set_epoch(epoch)
        places.add(round(float(made[0][1]["points"][1, 0]) * 120))
    assert places == {8, 112} and int(made.reference_points.refused_flips) == 0


def test_refusals_in_a_mosaic_and_in_workers_are_counted(dataset):
    made = dataset(MIRRORED, EITHER, mark_only_by_point)
    list(DataLoader(made, 1, collate_fn=collate))
    alone = int(made.reference_points.refused_flips)
    list(DataLoader(made, 1, collate_fn=collate, num_workers=2, multiprocessing_context="spawn"))
    assert alone > 0 and int(made.reference_points.refused_flips) == 2 * alone
    mosaic = Mosaic(made, probability=1)
    for epoch in range(5):
        mosaic.set_epoch(epoch)
        list(map(mosaic.__getitem__, range(4)))
    assert int(made.reference_points.refused_flips) > 2 * alone + 3


def test_points_outside_the_image_are_unknown_and_landmarks_without_box_gone(dataset):
    def far(image):
        return replace(image, points=np.array([[-2, 10], [NAN, NAN]], np.float32))

    assert dataset(PLAIN, change=far)[0][1]["points"].isnan().tolist() == [[True] * 2, [False] * 2]
    kept = dataset(PLAIN, change=far, margin=0.02)[0][1]["points"][0]
    assert torch.allclose(kept, torch.tensor([-2 / 120, 10 / 80]))

    def lone(image):
        return post_only_by_point(far(image))

    _, target = dataset(PLAIN, change=lone)[0]
    assert target["labels"].tolist() == [1] and len(target["scores"]) == 1
    _, target = dataset(PLAIN, change=lone, margin=0.02)[0]
    assert target["labels"].tolist() == [0, 1] and target["boxes"][0].tolist() == [0, 10 / 80, 0, 0]  # box in the image


def test_masks_and_crowds_follow(dataset):
    from simdetr.data import masks

    def crowded(image):
        codes = masks.of_boxes(image.boxes_xyxy, image.size_hw)
        return replace(image, crowd=np.array([True, False]), masks=codes)

    made = dataset(change=crowded, masks=True)
    for epoch in range(6):
        made.set_epoch(epoch)
        image, target = made[0]
        assert 0 not in target["labels"] and len(target["masks"]) == len(target["points"]) == len(target["labels"])
        assert target["masks"].shape[1:] == image.shape[1:]
    lone = dataset(change=lambda image: post_only_by_point(crowded(replace(image, crowd=image.crowd))), masks=True)
    assert len(lone[0][1]["masks"]) == len(lone[0][1]["labels"])


def test_nothing_changes_where_no_points_are_asked_for(dataset):
    made = dataset()
    plain = DetectionDataset(made.source, made.labels, AUGMENTED)
    for epoch in range(8):
        made.set_epoch(epoch), plain.set_epoch(epoch)
        for index in range(len(SIZES)):
            (image, target), (same_image, same) = made[index], plain[index]
            assert torch.equal(image, same_image) and "points" not in same
            assert torch.equal(target["boxes"], same["boxes"]) and torch.equal(target["labels"], same["labels"])
    prediction = DetectionDataset(made.source, None, PLAIN, reference_points=made.reference_points)
    assert "points" not in prediction[0][1]


def test_a_landmark_that_its_rule_cannot_read_is_found_before_training(dataset):
    with pytest.raises(LabelError, match=r"'bottom_right' for 'mark' needs a box, but a landmark in image '0.png'"):
        dataset(change=mark_only_by_point)


def test_transforms_that_forget_the_points_are_found(dataset):
    forgetful = v2.Compose([v2.SanitizeBoundingBoxes(min_size=20), v2.ToDtype(torch.float32, scale=True)])
    with pytest.raises(ValueError, match="expected to keep points with their boxes, got 1 boxes and 2 points"):
        dataset(forgetful)[0]

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from simdetr.data import masks
from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.augmentation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DropSmallBoxes,
    Mosaic,
    MosaicTiles,
    Placement,
    RandomMirror,
    RandomNoise,
    RandomSizeCrop,
    RandomTurn,
    ResizeShortSide,
    compose_tiles,
    eval_transforms,
    train_transforms,
)
from simdetr.data.dataset import DetectionDataset, item_randomness, pixel_boxes
from simdetr.data.images import open_images
from simdetr.data.labels import Labels

COLOURS = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)


def scene(height, width, boxes):
    """A black image with one rectangle of pure colour per box, and its target."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for colour, (x0, y0, x1, y1) in zip(COLOURS, boxes, strict=False):
        image[:, y0:y1, x0:x1] = colour[:, None, None]
    target = {
        "boxes": pixel_boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), (height, width)),
        "labels": torch.arange(len(boxes)),
        "orig_size": torch.tensor([height, width]),
    }
    return tv_tensors.Image(image), target


def drawn_box(image, label):
    """xyxy of the pixels in which the label's colour is the brightest and at least half on."""
    rows, columns = torch.nonzero((image[label] > 0.5) & (image.argmax(dim=0) == label), as_tuple=True)
    return torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=torch.float32)


def check_boxes(image, target, tolerance=1.5):
    for box, label in zip(target["boxes"], target["labels"].tolist(), strict=True):
        assert (box - drawn_box(image, label)).abs().max() <= tolerance


BOXES = [[5, 10, 45, 50], [60, 8, 110, 30], [70, 40, 90, 75]]


@pytest.mark.parametrize("seed", range(25))
def test_boxes_stay_on_their_pixels(seed):
    transform = train_transforms([64, 80, 96], 160, colour="none", mean=(0, 0, 0), std=(1, 1, 1))
    torch.manual_seed(seed)
    image, target = transform(*scene(80, 120, BOXES))
    assert image.dtype == torch.float32 and max(image.shape) <= 160
    assert len(target["labels"]) == len(target["boxes"])
    big_enough = (target["boxes"][:, 2:] - target["boxes"][:, :2]).amin(dim=1) > 3  # a sliver is half blended away
    target = {"boxes": target["boxes"][big_enough], "labels": target["labels"][big_enough]}
    check_boxes(image, target)
    visible = [label for label in range(3) if ((image[label] > 0.9) & (image.argmax(0) == label)).sum() > 16]
    assert set(visible) <= set(target["labels"].tolist())  # nothing that is seen lost its box


@pytest.mark.parametrize(
    ("size", "short", "long", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((400, 1000), 800, 1333, (533, 1333)),
        ((100, 100), 224, 400, (224, 224)),
        ((2, 4000), 224, 400, (1, 400)),
        ((1, 1), 32, 64, (32, 32)),
    ],
)
def test_short_side_and_bound(size, short, long, expected):
    image, target = ResizeShortSide([short], long)(*scene(*size, [[0, 0, size[1], size[0]]]))
    assert tuple(image.shape[-2:]) == expected
    assert torch.allclose(target["boxes"][0], torch.tensor([0, 0, expected[1], expected[0]]).float())


def test_all_short_sides_are_drawn():
    resize = ResizeShortSide([16, 24, 32], 100)
    torch.manual_seed(0)
    assert {min(resize(*scene(20, 30, []))[0].shape[-2:]) for _ in range(40)} == {16, 24, 32}


def test_crop_sides_are_in_range_and_bounded_by_the_image():
    torch.manual_seed(0)
    sizes = [tuple(RandomSizeCrop(20, 50)(*scene(40, 100, []))[0].shape[-2:]) for _ in range(300)]
    assert {height for height, _ in sizes} == set(range(20, 41))
    assert {width for _, width in sizes} == set(range(20, 51))
    white = tv_tensors.Image(torch.full((3, 40, 100), 255, dtype=torch.uint8))
    assert all(int(RandomSizeCrop(5, 9)(white, scene(40, 100, [])[1])[0].min()) == 255 for _ in range(50))
    small, _ = RandomSizeCrop(20, 50)(*scene(10, 12, []))
    assert small.shape[-2:] == (10, 12)


def test_published_crop_sizes_at_the_published_short_side():
    choice = next(step for step in train_transforms([480, 800], 1333).transforms if isinstance(step, v2.RandomChoice))
    whole, cut = choice.transforms
    assert whole.short_sides == (480, 800) and cut.transforms[0].short_sides == (400, 500, 600)
    assert (cut.transforms[1].min_side, cut.transforms[1].max_side) == (384, 600) and choice.p == [0.5, 0.5]


def masked_scene():
    """The scene with each rectangle's lower left triangle as its mask."""
    image, target = scene(80, 120, BOXES)
    masks = torch.zeros(len(BOXES), 80, 120, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, BOXES, strict=True):
        mask[y0:y1, x0:x1] = torch.ones(y1 - y0, x1 - x0, dtype=torch.uint8).tril()
    return image, {**target, "masks": tv_tensors.Mask(masks)}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("step", "alone"),
    [
        (ResizeShortSide([33, 50, 97], 140), lambda mask, size, _: F.resize_mask(mask, list(size))),
        (RandomSizeCrop(20, 70), lambda mask, size, corner: F.crop_mask(mask, *corner, *size)),
        (RandomMirror(0.5), lambda mask, _, corner: mask.flip(-1) if corner is None else mask),
    ],
)
def test_every_step_changes_masks_as_torchvision_does(seed, step, alone):
    _, target = masked_scene()
    rows, columns = torch.meshgrid(torch.arange(80.0), torch.arange(120.0), indexing="ij")
    where = tv_tensors.Image(torch.stack([rows, columns, torch.zeros(80, 120)]))  # tells how a crop or flip fell
    torch.manual_seed(seed)
    moved, changed = step(where, {**target})
    corner = [int(value) for value in moved[:2, 0, 0]] if isinstance(step, RandomSizeCrop) else (0, 0)
    if isinstance(step, RandomMirror) and moved[1, 0, 0] > 0:
        corner = None
    expected = alone(target["masks"].as_subclass(torch.Tensor), moved.shape[-2:], corner)
    assert type(changed["masks"]) is tv_tensors.Mask and changed["masks"].dtype == torch.uint8
    assert torch.equal(changed["masks"].as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("seed", range(25))
def test_masks_and_boxes_stay_aligned_through_everything(seed):
    transform = train_transforms([64, 80, 96], 160, colour="strong", mean=(0, 0, 0), std=(1, 1, 1))
    torch.manual_seed(seed)
    image, target = transform(*masked_scene())
    torch.manual_seed(seed)
    same_image, same = transform(*scene(80, 120, BOXES))
    assert torch.equal(image, same_image) and torch.equal(target["boxes"], same["boxes"])  # masks draw nothing
    assert target["masks"].shape == (len(target["boxes"]), *image.shape[-2:])
    assert len(target["labels"]) == len(target["boxes"])
    for mask, (x0, y0, x1, y1) in zip(target["masks"], target["boxes"], strict=True):
        ys, xs = torch.nonzero(mask, as_tuple=True)
        if len(xs):  # a crop may show none of the triangle
            inside = (xs + 1 >= x0 - 1) & (xs <= x1 + 1) & (ys + 1 >= y0 - 1) & (ys <= y1 + 1)
            assert inside.all()


def test_masks_are_dropped_with_their_boxes():
    image, target = masked_scene()
    target["boxes"][1, 2:] = target["boxes"][1, :2] + 0.5
    _, found = eval_transforms(80, 200)(image, target)
    assert found["labels"].tolist() == [0, 2]
    assert torch.equal(found["masks"], masked_scene()[1]["masks"].as_subclass(torch.Tensor)[[0, 2]])


def test_flip_mirrors_half_of_the_images():
    transform = train_transforms([80], 120, crop=False, colour="none")
    torch.manual_seed(0)
    lefts = [float(transform(*scene(80, 120, BOXES[:1]))[1]["boxes"][0, 0]) for _ in range(60)]
    assert set(lefts) == {5.0, 75.0} and 15 < lefts.count(75.0) < 45
    still = train_transforms([80], 120, crop=False, colour=0, flip=False)
    assert {float(still(*scene(80, 120, BOXES[:1]))[1]["boxes"][0, 0]) for _ in range(10)} == {5.0}


def test_normalisation_is_by_mean_and_deviation():
    grey = tv_tensors.Image(torch.full((3, 8, 8), 51, dtype=torch.uint8))
    target = scene(8, 8, [])[1]
    image, _ = eval_transforms(8, 8)(grey, target)
    expected = (0.2 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    assert torch.allclose(image[:, 0, 0], expected, atol=1e-6) and type(image) is torch.Tensor
    other, _ = eval_transforms(8, 8, mean=[0.1] * 3, std=[0.5] * 3)(grey, target)
    assert torch.allclose(other, torch.full((3, 8, 8), 0.2), atol=1e-6)


def test_eval_is_not_random():
    transform = eval_transforms(64, 100)
    one, two = (transform(*scene(80, 120, BOXES)) for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1]["boxes"], two[1]["boxes"])


def colour_change(colour):
    transform = train_transforms([40], 60, crop=False, flip=False, colour=colour, mean=(0, 0, 0), std=(1, 1, 1))
    image = tv_tensors.Image(
        torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    )
    torch.manual_seed(0)
    changed = [transform(image, scene(40, 60, [])[1])[0] for _ in range(30)]
    return sum(float((one - image / 255).abs().mean()) for one in changed) / 30


def test_colour_strength_orders_the_changes_and_never_moves_boxes():
    changes = [colour_change(colour) for colour in ("none", 0.1, "light", "strong")]
    assert changes[0] < 1e-6 and changes == sorted(changes) and changes[3] > 2 * changes[1]
    transform = train_transforms([80], 120, crop=False, flip=False, colour="strong")
    _, target = transform(*scene(80, 120, BOXES))
    assert target["boxes"].tolist() == BOXES


def test_boxes_below_one_pixel_are_dropped_with_their_labels():
    _, target = eval_transforms(40, 60)(*scene(80, 120, [[0, 0, 40, 40], [50, 50, 51, 70], [60, 20, 64, 24]]))
    assert target["labels"].tolist() == [0, 2] and target["boxes"].tolist() == [[0, 0, 20, 20], [30, 10, 32, 12]]


@pytest.mark.parametrize("seed", range(10))
def test_boxes_masks_and_points_turn_with_ellipses_that_fill_their_boxes(seed):
    rows, columns = torch.meshgrid(torch.arange(120) + 0.5, torch.arange(160) + 0.5, indexing="ij")
    boxes = torch.tensor([[40.0, 30, 100, 54], [90, 60, 120, 90]])
    image, masks = torch.zeros(3, 120, 160, dtype=torch.uint8), torch.zeros(2, 120, 160, dtype=torch.uint8)
    for label, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        x, y = (columns - (x0 + x1) / 2) / ((x1 - x0) / 2), (rows - (y0 + y1) / 2) / ((y1 - y0) / 2)
        masks[label] = x**2 + y**2 <= 1
        image[label] = 255 * masks[label]
    target = {
        "boxes": pixel_boxes(boxes, (120, 160)),
        "labels": torch.arange(2),
        "masks": tv_tensors.Mask(masks),
        "points": (boxes[:, :2] + boxes[:, 2:]) / 2,
    }
    torch.manual_seed(seed)
    turned, changed = RandomTurn(30)(tv_tensors.Image(image), target)
    assert turned.shape == image.shape and turned.dtype == torch.uint8
    for label, (box, point) in enumerate(zip(changed["boxes"], changed["points"], strict=True)):
        drawn = drawn_box(turned / 255, label)
        assert (box - drawn).abs().max() <= 1.5
        assert (point - (drawn[:2] + drawn[2:]) / 2).abs().max() <= 1.5
        found = torch.nonzero(changed["masks"][label])
        assert (found.float().mean(0).flip(0) + 0.5 - point).abs().max() <= 1.5
    assert not torch.allclose(changed["boxes"].as_subclass(torch.Tensor), boxes)
    corners = turned[:, [0, 0, -1, -1], [0, -1, 0, -1]].float().mean(1)
    assert (corners > 0).any()  # grey came in from outside


def test_turning_covers_both_sides_and_keeps_within_its_angle():
    torch.manual_seed(0)
    right = {"boxes": pixel_boxes(torch.zeros(0, 4), (64, 64)), "points": torch.tensor([[64.0, 32.0]])}
    image = tv_tensors.Image(torch.zeros(3, 64, 64, dtype=torch.uint8))
    points = torch.cat([RandomTurn(20)(image, right)[1]["points"] for _ in range(80)]) - 32
    angles = torch.rad2deg(torch.atan2(-points[:, 1], points[:, 0]))
    assert angles.abs().max() <= 20.001 and angles.min() < -15 and angles.max() > 15
    assert torch.allclose(points.norm(dim=1), torch.tensor(32.0))


def test_noise_stays_in_range_and_below_its_deviation():
    torch.manual_seed(0)
    grey = tv_tensors.Image(torch.full((3, 60, 60), 128, dtype=torch.uint8))
    spreads = [float(RandomNoise(0.1)(grey, {})[0].float().std()) for _ in range(60)]
    assert max(spreads) < 0.1 * 255 * 1.1 and min(spreads) < 3 and max(spreads) > 18
    white = RandomNoise(1.0)(tv_tensors.Image(torch.ones(3, 9, 9)), {})[0]
    assert type(white) is tv_tensors.Image and 0 <= white.min() and white.max() <= 1


def test_changes_that_are_off_draw_nothing_and_wrong_ones_are_refused():
    for seed in range(5):
        torch.manual_seed(seed)
        before, target = train_transforms([64, 80], 160)(*scene(80, 120, BOXES))
        torch.manual_seed(seed)
        off = train_transforms([64, 80], 160, rotation=0, noise=0, brightness=0)
        after, same = off(*scene(80, 120, BOXES))
        assert torch.equal(before, after) and torch.equal(target["boxes"], same["boxes"])
    names = [type(step).__name__ for step in off.transforms]
    assert "RandomTurn" not in names and "RandomNoise" not in names
    for wrong in ({"rotation": 181}, {"noise": 2}, {"brightness": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            train_transforms([64], 80, **wrong)


def test_brightness_keeps_within_its_part_and_boxes_turn_through_everything():
    plain = {"crop": False, "flip": False, "colour": "none", "mean": (0, 0, 0), "std": (1, 1, 1)}
    grey = tv_tensors.Image(torch.full((3, 64, 64), 100, dtype=torch.uint8))
    none = {"boxes": pixel_boxes(torch.zeros(0, 4), (64, 64)), "labels": torch.zeros(0, dtype=torch.int64)}
    torch.manual_seed(0)
    shades = [float(train_transforms([64], 64, **plain, brightness=0.3)(grey, none)[0].mean()) for _ in range(60)]
    assert 69 / 255 <= min(shades) < 80 / 255 and 120 / 255 < max(shades) <= 131 / 255
    for seed in range(10):
        torch.manual_seed(seed)
        everything = train_transforms([64, 96], 160, rotation=30, noise=0.1, brightness=0.3)
        image, target = everything(*masked_scene())
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        assert (target["boxes"] >= 0).all() and torch.isfinite(image).all()


def test_transforms_are_picklable():
    transform = pickle.loads(pickle.dumps(train_transforms([32, 40], 64)))
    torch.manual_seed(0)
    assert transform(*scene(40, 60, []))[0].shape[0] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"short_sides": []}, "at least 1 pixel"),
        ({"short_sides": [0]}, "at least 1 pixel"),
        ({"short_sides": [32], "colour": "loud"}, "colour: expected none, light, strong or a number.*got 'loud'"),
        ({"short_sides": [32], "colour": 1.5}, "colour: expected a number from 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_transforms(max_side=64, **arguments)
    with pytest.raises(ValueError, match="min_side <= max_side, got 5 and 4"):
        RandomSizeCrop(5, 4)


@pytest.mark.parametrize("seed", range(12))
def test_without_points_all_is_as_torchvision_has_it(seed):
    own = train_transforms([64, 80, 96], 160, colour="strong")
    steps = [
        v2.RandomHorizontalFlip(0.5) if isinstance(step, RandomMirror) else step
        for step in own.transforms
        if not isinstance(step, DropSmallBoxes)
    ]
    steps.insert(-3, v2.SanitizeBoundingBoxes(min_size=1.0))
    found = []
    for transform in (own, v2.Compose(steps)):
        image, target = masked_scene()
        target["boxes"][1, 2:] = target["boxes"][1, :2] + 0.5  # one that is dropped
        torch.manual_seed(seed)
        found.append((*transform(image, target), torch.rand(1)))  # as many draws too
    (image, target, draw), (same_image, same, same_draw) = found
    assert torch.equal(image, same_image) and draw == same_draw and target.keys() == same.keys()
    assert all(torch.equal(target[name], same[name]) for name in target)


def pointed(height, width, points):
    image, target = scene(height, width, BOXES[: len(points)])
    flags = torch.zeros(len(points), dtype=torch.bool)
    return image, {**target, "points": torch.tensor(points), "only_point": flags, "one_sided": flags.clone()}


def test_points_move_exactly():
    points = [[10.0, 20.0], [float("nan")] * 2, [-4.0, 90.0]]  # also outside the image
    image, target = pointed(80, 120, points)
    _, resized = ResizeShortSide([40], 200)(image, target)
    assert torch.allclose(resized["points"], torch.tensor(points) / 2, equal_nan=True)
    _, mirrored = RandomMirror(1.0)(image, target)
    assert torch.allclose(mirrored["points"][[0, 2]], torch.tensor([[110.0, 20.0], [124.0, 90.0]]))
    rows, columns = torch.meshgrid(torch.arange(80.0), torch.arange(120.0), indexing="ij")
    where = tv_tensors.Image(torch.stack([columns, rows, rows]))
    torch.manual_seed(3)
    cut, moved = RandomSizeCrop(30, 40)(where, target)
    assert cut[:2, 0, 0].min() > 0  # the window's corner is another one than the image's
    assert torch.equal(moved["points"][0], torch.tensor([10.0, 20.0]) - cut[:2, 0, 0])
    assert moved["points"][1].isnan().all() and moved["points"].dtype == torch.float32


def test_small_boxes_go_with_their_points_and_landmarks_without_box_stay():
    image, target = pointed(80, 120, [[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]])
    target["boxes"][1, 2:] = target["boxes"][1, :2] + 0.5
    _, found = DropSmallBoxes()(image, target)
    assert found["points"].tolist() == [[10, 20], [50, 60]] and found["labels"].tolist() == [0, 2]
    assert len(found["only_point"]) == 2 and isinstance(found["boxes"], tv_tensors.BoundingBoxes)
    target["only_point"][1] = True
    assert DropSmallBoxes()(image, target)[1]["labels"].tolist() == [0, 1, 2]


SIZES = [(80, 120), (100, 60), (64, 64), (50, 150), (90, 90), (120, 80)]
TILE_COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)]


@pytest.fixture
def dataset(tmp_path):
    """Black images, each with one rectangle of its own colour; the class is the colour's number."""
    images = []
    for number, ((height, width), colour) in enumerate(zip(SIZES, TILE_COLOURS, strict=True)):
        array = np.zeros((height, width, 3), np.uint8)
        x0, y0, x1, y1 = box = width // 5, height // 4, 3 * width // 4, 7 * height // 8
        array[y0:y1, x0:x1] = colour
        Image.fromarray(array).save(tmp_path / f"{number}.png")
        images.append(ImageLabels.build(f"{number}.png", (height, width), [box], [number]))
    labels = Labels.from_images(images, [Category(number, str(number)) for number in range(len(TILE_COLOURS))])
    transform = eval_transforms(160, 400, mean=(0, 0, 0), std=(1, 1, 1))
    return DetectionDataset(open_images(tmp_path), labels, transform, seed=3)


def drawn_boxes(image, label):
    """xyxy boxes of the connected pixels of a label's colour, in an image of 0 to 255."""
    from scipy import ndimage

    distance = (image.float() - torch.tensor(TILE_COLOURS[label]).view(3, 1, 1)).abs().amax(dim=0)
    components, _ = ndimage.label((distance < 128).numpy())
    found = ndimage.find_objects(components)
    boxes = [[columns.start, rows.start, columns.stop, rows.stop] for rows, columns in found]
    return torch.tensor(boxes, dtype=torch.float32)


def assert_boxes_match_pixels(image, boxes_xyxy, labels, tolerance):
    for label in set(labels.tolist()):
        expected = boxes_xyxy[labels == label]
        drawn = drawn_boxes(image, label)
        errors = (expected[:, None] - drawn[None]).abs().amax(dim=2)  # [boxes, drawn rectangles]
        assert drawn.shape == expected.shape
        assert errors.amin(dim=1).max() <= tolerance and errors.amin(dim=0).max() <= tolerance


@pytest.mark.parametrize("canvas_px", [0, 200])
def test_boxes_of_the_mosaic_are_those_of_the_rendered_masks(dataset, canvas_px):
    mosaic = Mosaic(dataset, probability=1, tiles=MosaicTiles(canvas_px=canvas_px))
    for epoch in range(10):
        for index in range(len(mosaic)):
            with item_randomness(0, epoch, index):
                image, target = mosaic.compose(index)
            height, width = SIZES[index] if canvas_px == 0 else (canvas_px, canvas_px)
            assert image.shape == (3, height, width) and image.dtype == torch.uint8
            assert len(target["labels"]) == 4 and int(target["labels"][0]) == index == int(target["image_index"])
            assert target["orig_size"].tolist() == [height, width]
            assert_boxes_match_pixels(image, target["boxes"].as_subclass(torch.Tensor), target["labels"], 1.5)


def test_boxes_of_the_transformed_mosaic_follow(dataset):
    mosaic = Mosaic(dataset, probability=1, tiles=MosaicTiles(canvas_px=200))
    for index in range(len(mosaic)):
        image, target = mosaic[index]
        height, width = image.shape[-2:]
        centres, sides = target["boxes"][:, :2], target["boxes"][:, 2:]
        boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=1) * torch.tensor([width, height] * 2)
        assert target["size"].tolist() == [height, width]
        assert_boxes_match_pixels(255 * image, boxes, target["labels"], 2)


def test_boxes_shrink_and_some_more_at_low_resolution(dataset):
    def mean_area(**options):
        mosaic = Mosaic(dataset, probability=1, tiles=MosaicTiles(canvas_px=200, **options))
        areas = []
        for index in range(len(mosaic)):
            with item_randomness(1, 0, index):
                boxes = mosaic.compose(index)[1]["boxes"]
            areas.append(float(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).mean()))
        return sum(areas) / len(areas)

    # the mean area if every image filled the canvas alone
    whole = sum(0.55 * 0.625 * height * width * (200 / max(height, width)) ** 2 for height, width in SIZES) / len(SIZES)
    full, low = mean_area(low_resolution=0), mean_area(low_resolution=1, scale_range=(0.5, 0.5))
    assert low == pytest.approx(full / 4, rel=0.05) and full < whole / 2


def test_placements_are_exact():
    red = torch.zeros(3, 10, 20, dtype=torch.uint8)
    red[0] = 200
    sample = (
        red,
        {
            "boxes": torch.tensor([[4.0, 2.0, 20.0, 10.0]]),
            "labels": torch.tensor([3]),
            "scores": torch.tensor([0.5]),
            "image_index": torch.tensor(7),
        },
    )
    image, target = compose_tiles([sample], [Placement(top=5, left=8, height=5, width=40)], (30, 50))
    assert (image[:, 5:10, 8:48] == torch.tensor([200, 0, 0]).view(3, 1, 1)).all()
    assert (image[0] == 200).sum() == 5 * 40
    assert target["boxes"].tolist() == [[16, 6, 48, 10]] and target["labels"].tolist() == [3]
    assert target["scores"].tolist() == [0.5]
    assert target["boxes"].canvas_size == (30, 50) and int(target["image_index"]) == 7


@pytest.fixture
def masked(dataset):
    """The data set with the rectangles' upper left triangles as masks."""
    rows = [dataset.labels.image(row) for row in range(len(dataset.labels))]
    images = []
    for row in rows:
        pixels = np.zeros((len(row), *row.size_hw), np.uint8)
        for plane, (x0, y0, x1, y1) in zip(pixels, row.boxes_xyxy.round().astype(int), strict=True):
            down, right = np.indices((y1 - y0, x1 - x0))
            plane[y0:y1, x0:x1] = down / (y1 - y0) + right / (x1 - x0) < 1
        images.append(replace(row, masks=masks.encode(pixels)))
    labels = Labels.from_images(images, dataset.labels.categories)
    return DetectionDataset(dataset.source, labels, dataset.transform, masks=True)


def test_masks_of_the_mosaic_lie_in_their_boxes(masked, dataset):
    tiles = MosaicTiles(canvas_px=200)
    mosaic, plain = Mosaic(masked, probability=1, tiles=tiles), Mosaic(dataset, probability=1, tiles=tiles)
    for index in range(len(mosaic)):
        with item_randomness(0, 0, index):
            image, target = mosaic.compose(index)
        with item_randomness(0, 0, index):
            same_image, same = plain.compose(index)
        assert torch.equal(image, same_image) and torch.equal(target["boxes"], same["boxes"])
        assert type(target["masks"]) is tv_tensors.Mask and "masks" not in same
        assert target["masks"].shape == (len(target["boxes"]), 200, 200)
        for mask, (x0, y0, x1, y1) in zip(target["masks"], target["boxes"], strict=True):
            ys, xs = torch.nonzero(mask, as_tuple=True)
            found = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            assert (found - torch.stack([x0, y0, x1, y1])).abs().max() <= 2
            assert float(mask.sum()) == pytest.approx(float((x1 - x0) * (y1 - y0) / 2), rel=0.2)
        _, finished = mosaic[index]
        assert finished["masks"].dtype == torch.bool
        assert finished["masks"].shape == (len(finished["boxes"]), *finished["size"].tolist())


def test_masks_are_resized_and_placed_exactly():
    pixels = tv_tensors.Mask(torch.tensor([[[1, 0], [0, 1]]], dtype=torch.uint8))
    sample = (
        torch.zeros(3, 2, 2, dtype=torch.uint8),
        {
            "boxes": torch.tensor([[0.0, 0, 2, 2]]),
            "labels": torch.tensor([0]),
            "scores": torch.ones(1),
            "image_index": 0,
            "masks": pixels,
        },
    )
    empty = (sample[0], sample[1] | {name: sample[1][name][:0] for name in ("boxes", "labels", "scores", "masks")})
    places = [Placement(1, 2, 4, 4), Placement(6, 6, 2, 2)]
    _, target = compose_tiles([sample, empty], places, (10, 12))
    expected = torch.zeros(1, 10, 12, dtype=torch.uint8)
    expected[0, 1:3, 2:4] = expected[0, 3:5, 4:6] = 1
    assert torch.equal(target["masks"].as_subclass(torch.Tensor), expected)


def test_probability_is_the_share_of_mosaics(dataset):
    def share(probability):
        mosaic = Mosaic(dataset, probability=probability)
        made = []
        for epoch in range(20):
            mosaic.set_epoch(epoch)
            made += [len(mosaic[index][1]["labels"]) > 1 for index in range(len(mosaic))]
        return sum(made) / len(made)

    assert share(0) == 0 and share(1) == 1 and 0.35 < share(0.5) < 0.65


def test_items_repeat_within_an_epoch_and_change_between_epochs(dataset):
    mosaic, again = Mosaic(dataset, probability=1), Mosaic(dataset, probability=1)
    first = mosaic[2]
    again[5], torch.rand(3)
    assert torch.equal(first[0], again[2][0]) and torch.equal(first[1]["boxes"], again[2][1]["boxes"])
    mosaic.set_epoch(1)
    assert not torch.equal(first[0], mosaic[2][0])
    mosaic.set_epoch(0)
    assert torch.equal(Mosaic(dataset, probability=1, seed=dataset.seed)[2][0], first[0])
    assert not torch.equal(Mosaic(dataset, probability=1, seed=dataset.seed + 1)[2][0], first[0])


def test_set_of_one_image_without_objects_and_of_one_pixel(tmp_path):
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(tmp_path / "dot.png")
    labels = Labels.from_images([ImageLabels.build("dot.png", (1, 1), [], [])], [Category(1, "a")])
    dataset = DetectionDataset(open_images(tmp_path), labels, train_transforms([16, 24], 32))
    for index in range(20):
        dataset.set_epoch(index)
        image, target = Mosaic(dataset, probability=1)[0]
        assert image.shape[0] == 3 and target["boxes"].shape == (0, 4)


def test_unreadable_tiles_leave_their_place_empty(dataset, tmp_path):
    for number in range(1, 6):
        (tmp_path / f"{number}.png").write_bytes(b"")
    image, target = Mosaic(dataset, probability=1, tiles=MosaicTiles(canvas_px=200))[0]
    assert image.shape == (3, 160, 160) and set(target["labels"].tolist()) == {0}
    (tmp_path / "0.png").write_bytes(b"")
    assert Mosaic(dataset, probability=1)[0] is None and Mosaic(dataset, probability=0)[0] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low_resolution": -1}, "low_resolution: expected a share from 0 to 1, got -1"),
        ({"colour": "loud"}, "colour: expected none, light, strong or a number from 0 to 1, got 'loud'"),
        ({"scale_range": (0.0, 0.5)}, "scale_range: expected 0 < smallest"),
        ({"scale_range": (0.8, 0.5)}, "scale_range"),
        ({"canvas_px": -1}, "canvas_px: expected a side in pixels"),
    ],
)
def test_bad_arguments_of_a_mosaic_are_named(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        MosaicTiles(**options)
    with pytest.raises(ValueError, match=r"mosaic: expected a share from 0 to 1, got 1\.5"):
        Mosaic(dataset, probability=1.5)


def test_every_tile_may_have_colours_of_its_own(tmp_path):
    """Four copies of one picture: alike without, of different colours with; places and boxes do not change."""
    Image.new("RGB", (40, 40), (180, 120, 60)).save(tmp_path / "a.png")
    row = ImageLabels.build("a.png", (40, 40), [[5, 5, 35, 35]], [0])
    data = DetectionDataset(open_images(tmp_path), Labels.from_images([row], [Category(1, "x")]), nn.Identity())

    def tiles_of(colour):
        mosaic = Mosaic(data, 1, MosaicTiles(canvas_px=80, low_resolution=0, colour=colour), seed=4)
        with item_randomness(4, 0, 0):
            image, target = mosaic.compose(0)
        middles = target["boxes"].reshape(-1, 2, 2).mean(dim=1).long()
        return {tuple(image[:, y, x].tolist()) for x, y in middles.tolist()}, target["boxes"].shape

    assert tiles_of("none") == ({(180, 120, 60)}, (4, 4))
    colours, shape = tiles_of("strong")
    assert len(colours) == 4 and shape == (4, 4)

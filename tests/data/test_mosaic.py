from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from simdetr.data import masks
from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.augmentation import Mosaic, Placement, compose_tiles, eval_transforms, train_transforms
from simdetr.data.dataset import DetectionDataset, item_randomness
from simdetr.data.images import open_images
from simdetr.data.labels import Labels

SIZES = [(80, 120), (100, 60), (64, 64), (50, 150), (90, 90), (120, 80)]
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)]


@pytest.fixture
def dataset(tmp_path):
    """Black images, each with one rectangle of its own colour; the class is the colour's number."""
    images = []
    for number, ((height, width), colour) in enumerate(zip(SIZES, COLOURS, strict=True)):
        array = np.zeros((height, width, 3), np.uint8)
        x0, y0, x1, y1 = box = width // 5, height // 4, 3 * width // 4, 7 * height // 8
        array[y0:y1, x0:x1] = colour
        Image.fromarray(array).save(tmp_path / f"{number}.png")
        images.append(ImageLabels.build(f"{number}.png", (height, width), [box], [number]))
    labels = Labels.from_images(images, [Category(number, str(number)) for number in range(len(COLOURS))])
    transform = eval_transforms(160, 400, mean=(0, 0, 0), std=(1, 1, 1))
    return DetectionDataset(open_images(tmp_path), labels, transform, seed=3)


def drawn_boxes(image, label):
    """xyxy boxes of the connected pixels of a label's colour, in an image of 0 to 255."""
    from scipy import ndimage

    distance = (image.float() - torch.tensor(COLOURS[label]).view(3, 1, 1)).abs().amax(dim=0)
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
    mosaic = Mosaic(dataset, probability=1, canvas_px=canvas_px)
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
    mosaic = Mosaic(dataset, probability=1, canvas_px=200)
    for index in range(len(mosaic)):
        image, target = mosaic[index]
        height, width = image.shape[-2:]
        centres, sides = target["boxes"][:, :2], target["boxes"][:, 2:]
        boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=1) * torch.tensor([width, height] * 2)
        assert target["size"].tolist() == [height, width]
        assert_boxes_match_pixels(255 * image, boxes, target["labels"], 2)


def test_boxes_shrink_and_some_more_at_low_resolution(dataset):
    def mean_area(**options):
        mosaic = Mosaic(dataset, probability=1, canvas_px=200, **options)
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
    mosaic, plain = Mosaic(masked, probability=1, canvas_px=200), Mosaic(dataset, probability=1, canvas_px=200)
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
    image, target = Mosaic(dataset, probability=1, canvas_px=200)[0]
    assert image.shape == (3, 160, 160) and set(target["labels"].tolist()) == {0}
    (tmp_path / "0.png").write_bytes(b"")
    assert Mosaic(dataset, probability=1)[0] is None and Mosaic(dataset, probability=0)[0] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 1.5}, "shares from 0 to 1, got probability=1.5"),
        ({"low_resolution": -1}, "low_resolution=-1"),
        ({"scale_range": (0.0, 0.5)}, "scale_range: expected 0 < smallest"),
        ({"scale_range": (0.8, 0.5)}, "scale_range"),
        ({"canvas_px": -1}, "canvas_px: expected a side in pixels"),
    ],
)
def test_bad_arguments_are_named(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        Mosaic(dataset, **options)

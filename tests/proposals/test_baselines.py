"""Rivals on images and maps with known objects: boxes, features, order, seeds, degenerate images."""

import sys

import numpy as np
import pytest
import torch

from simdetr.mining.batch import encode, shrink
from simdetr.mining.regions import Regions, find_candidates
from simdetr.mining.rivals import (
    BASELINES,
    LARGEST_ASPECT,
    SMALLEST_SIDE,
    baseline,
    random_boxes,
    search_boxes,
    selective_search,
)

OF_MASKS = ("lost", "token_cut", "mask_cut")


@pytest.fixture
def square():
    """A bright square on a dark ground, uint8 [3, 128, 192], and its box."""
    image = torch.full((3, 128, 192), 30, dtype=torch.uint8)
    image[:, 32:96, 64:112] = 220
    return image, [64, 32, 112, 96]


def found_by(method, image, encoder, size_hw=None, max_boxes=100, seed=0) -> Regions:
    maps = encode(image[None], encoder)
    return baseline(method)([image], maps, [size_hw or tuple(image.shape[1:])], max_boxes, seed)[0]


@pytest.mark.parametrize("method", OF_MASKS)
def test_box_of_an_object_in_pixels_of_the_original(method, square, encoder):
    image, box = square
    regions = found_by(method, image, encoder)
    assert regions.boxes_xyxy[0].tolist() == box
    assert regions.area[0] == 48 * 64
    assert (regions.stride[0], regions.k[0], regions.cluster[0], regions.score[0]) == (16, 0, 0, 1)
    twice = found_by(method, image, encoder, size_hw=(256, 96))  # the original was twice as high and half as wide
    assert twice.boxes_xyxy[0].tolist() == [32, 64, 56, 192]
    assert twice.area[0] == pytest.approx(48 * 64)


def test_selective_search_finds_the_object(square, encoder):
    pytest.importorskip("cv2.ximgproc")
    image, box = square
    regions = found_by("selective_search", image, encoder)
    off = np.abs(regions.boxes_xyxy - np.array(box)).max(axis=1)
    assert off.min() <= 192 / 128 * 2  # two pixels of the image of 128 x 128
    assert set(regions.stride.tolist()) == {0}


def test_selective_search_is_opencvs_order_and_has_a_seed(scenes):
    cv2 = pytest.importorskip("cv2")
    pytest.importorskip("cv2.ximgproc")
    image = scenes[0]
    boxes = search_boxes(image, 64, seed=1)
    np.testing.assert_array_equal(boxes, search_boxes(image, 64, seed=1))
    other = search_boxes(image, 64, seed=2)
    assert not np.array_equal(boxes, other)
    assert set(map(tuple, boxes)) == set(map(tuple, other))  # the seed orders, it does not choose
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    blue_first = image.permute(1, 2, 0).numpy()[:, :, ::-1]
    search.setBaseImage(cv2.resize(np.ascontiguousarray(blue_first), (64, 64), interpolation=cv2.INTER_AREA))
    search.switchToSelectiveSearchFast()
    expected = {(x / 64, y / 64, (x + w) / 64, (y + h) / 64) for x, y, w, h in search.process().tolist()}
    assert set(map(tuple, boxes)) == expected


def test_selective_search_without_opencv_names_the_extra(monkeypatch, square, encoder):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(RuntimeError, match=r"cv2\.ximgproc.*simdetr\[bench\]"):
        found_by("selective_search", square[0], encoder)


def test_random_boxes_are_within_and_log_uniform(encoder):
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    regions = found_by("random", image, encoder, size_hw=(100, 100), max_boxes=20000)
    sides = (regions.boxes_xyxy[:, 2:] - regions.boxes_xyxy[:, :2]) / 100
    assert regions.boxes_xyxy.min() >= 0 and regions.boxes_xyxy.max() <= 100 + 1e-4
    aspects, roots = np.log(sides[:, 0] / sides[:, 1]), np.log(np.sqrt(sides.prod(axis=1)))
    whole = sides.max(axis=1) < 0.999  # those that the image has not cut
    assert np.abs(aspects[whole]).max() <= np.log(LARGEST_ASPECT) + 1e-4
    assert roots.min() >= np.log(SMALLEST_SIDE) - 1e-3
    small = roots < np.log(0.5)  # below it the image cuts nothing, and every octave has its share
    octaves = np.histogram(roots[small], bins=np.log(2.0) * np.arange(-5, 0))[0] / small.sum()
    np.testing.assert_allclose(octaves, 0.25, atol=0.02)
    assert abs(np.median(aspects)) < 0.02


@pytest.mark.parametrize("method", BASELINES)
def test_result_depends_on_seed_and_image_only(method, scenes, encoder):
    if method == "selective_search":
        pytest.importorskip("cv2.ximgproc")
    images = [shrink(image, 128) for image in scenes[:1] + scenes[3:4]]  # of one shape
    maps = encode(torch.stack(images), encoder)
    sizes = [(96, 128)] * 2
    together = baseline(method)(images, maps, sizes, 20, 7)
    for image, expected in zip(images, together, strict=True):
        alone = found_by(method, image, encoder, (96, 128), 20, 7)
        np.testing.assert_array_equal(alone.boxes_xyxy, expected.boxes_xyxy)
        np.testing.assert_allclose(alone.features, expected.features, atol=1e-5)
    if method in ("random", "selective_search"):
        other = found_by(method, images[0], encoder, (96, 128), 20, 8)
        assert not np.array_equal(other.boxes_xyxy, together[0].boxes_xyxy)


@pytest.mark.parametrize("method", BASELINES)
def test_scores_give_the_order_and_boxes_are_limited(method, scenes, encoder):
    if method == "selective_search":
        pytest.importorskip("cv2.ximgproc")
    image = shrink(scenes[0], 128)
    many = found_by(method, image, encoder, (96, 128))
    assert (np.diff(many.score) < 0).all() and many.score[0] == 1 and many.score[-1] > 0
    few = found_by(method, image, encoder, (96, 128), max_boxes=2)
    assert len(few) == min(2, len(many))
    np.testing.assert_array_equal(few.boxes_xyxy, many.boxes_xyxy[: len(few)])


def test_features_of_a_mask_are_averaged_as_ours(square, encoder):
    """The same region as one of our candidates: the miner's own pooling must give the same feature."""
    image, _ = square
    noise = torch.randint(0, 25, image.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    maps = encode((image + noise)[None], encoder)
    regions = baseline("token_cut")([image], maps, [(128, 192)], 5, 0)[0]
    labels = torch.zeros(1, 1, 8, 12, dtype=torch.long)
    labels[..., 2:6, 4:7] = 1
    ours = find_candidates(labels, [16], [2], maps).features[0, 1]
    torch.testing.assert_close(torch.from_numpy(regions.features[0]), ours, atol=1e-5, rtol=1e-5)


def test_features_of_a_box_are_the_average_over_it():
    last = torch.arange(12.0).reshape(1, 1, 3, 4)
    regions = random_boxes([torch.zeros(3, 96, 128, dtype=torch.uint8)], {32: last}, [(96, 128)], 50, 3)[0]
    pixels = last[0, 0].repeat_interleave(320, 0).repeat_interleave(320, 1).double().numpy()  # a tenth of a pixel each
    for box, feature in zip(regions.boxes_xyxy, regions.features[:, 0], strict=True):
        x0, y0, x1, y1 = np.round(box * 10).astype(int)
        assert feature == pytest.approx(pixels[y0:y1, x0:x1].mean(), abs=0.1)
    assert np.ptp(regions.features) > 3


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("size_hw", [(1, 1), (1, 2000), (100, 100)])
@pytest.mark.parametrize("value", [0, 127])
def test_degenerate_images_have_a_defined_result(method, size_hw, value, encoder):
    if method == "selective_search":
        pytest.importorskip("cv2.ximgproc")
    image = torch.full((3, *size_hw), value, dtype=torch.uint8)
    regions = found_by(method, shrink(image, 128), encoder, size_hw, max_boxes=10)
    assert len(regions) == {"lost": 1, "token_cut": 0, "mask_cut": 0, "random": 10, "selective_search": 1}[method]
    assert regions.features.shape == (len(regions), 3) and np.isfinite(regions.features).all()
    if len(regions):
        assert (regions.boxes_xyxy[:, 2:] <= np.array(size_hw[::-1]) * (1 + 1e-6)).all()


def test_unknown_names_and_strides_are_named(encoder):
    with pytest.raises(ValueError, match=r"methods: expected some of selective_search, lost.*got 'boxes'"):
        baseline("boxes")
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"stride: expected one of the encoder's, \[32\], got 16"):
        baseline("lost")([image], {32: torch.zeros(1, 2, 2, 2)}, [(64, 64)], 5, 0)


def test_no_images_give_nothing():
    assert selective_search([], {32: torch.zeros(0, 2, 2, 2)}, [], 5, 0) == []

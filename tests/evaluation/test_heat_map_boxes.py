import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from simdetr.evaluation.heat_map_boxes import (
    check_score_map,
    component_boxes,
    contour_boxes,
    eight_bit,
    heat_map_boxes,
    resize_score_map,
)


def square_of_ones() -> np.ndarray:
    values = np.zeros((5, 5))
    values[1:4, 1:4] = 1
    return values


def random_masks(count: int, seed: int):
    """Masks of all densities: noise full of ties, lines and specks, and smooth blobs with holes and islands in them."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        if index % 3:
            yield rng.random(rng.integers(1, 16, 2)) < rng.random()
        else:
            noise = rng.random(rng.integers(20, 60, 2))
            yield ndimage.gaussian_filter(noise, 3 * rng.random()) > rng.uniform(0.45, 0.55)


def contours_of_opencv(mask: np.ndarray) -> tuple[list[int], list[list[int]]]:
    """The box of the largest contour and those of all, written with OpenCV as the public code's rule says."""
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed, the rule cannot be compared with it")
    height, width = mask.shape
    found = cv2.findContours(255 * mask.astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    if not found:
        return [0, 0, 0, 0], [[0, 0, 0, 0]]
    boxes = []
    for contour in found:
        x, y, w, h = cv2.boundingRect(contour)
        boxes.append([x, y, min(x + w, width - 1), min(y + h, height - 1)])
    areas = [cv2.contourArea(contour) for contour in found]
    return boxes[areas.index(max(areas))], sorted(boxes)


def test_contours_equal_those_of_opencv():
    with_holes = ties = 0
    for mask in random_masks(1000, seed=0):
        largest, every = contours_of_opencv(mask)
        boxes = contour_boxes(mask).tolist()
        assert boxes[0] == largest
        assert sorted(boxes) == every
        components = ndimage.label(mask, np.ones((3, 3)))[1]
        with_holes += len(every) > components > 0
        ties += components > 1 and largest[2] - largest[0] <= 1
    assert with_holes > 100 and ties > 100  # the masks hold what can go wrong


def test_oracle_of_the_two_rules():
    values = square_of_ones()
    assert heat_map_boxes(values, rule="parity").tolist() == [[1, 1, 4, 4]]
    assert (heat_map_boxes(values)[0] - [0, 0, 1, 1]).tolist() == [1, 1, 3, 3]  # its pixels, the last ones included


def test_only_the_parity_rule_cuts_boxes_at_the_last_pixel():
    values = np.zeros((6, 8))
    values[3:, 5:] = 1
    assert heat_map_boxes(values).tolist() == [[5, 3, 8, 6]]
    assert heat_map_boxes(values, rule="parity").tolist() == [[5, 3, 7, 5]]


def test_pixels_at_the_threshold_do_not_count_and_it_is_a_share_of_the_maximum():
    values = np.zeros((4, 9))
    values[1, 1:8] = [0.1, 0.2, 0.4, 0.5, 0.4, 0.2, 0.1]
    assert heat_map_boxes(values, 0.39).tolist() == [[2, 1, 7, 2]]
    assert heat_map_boxes(values, 0.4).tolist() == [[3, 1, 6, 2]]
    # in eight bits 0.2 is 51, and 0.4 of the maximum 127 is 50 when rounded down
    assert heat_map_boxes(values, 0.4, rule="parity").tolist() == [[2, 1, 7, 2]]
    assert heat_map_boxes(values, 0.41, rule="parity").tolist() == [[3, 1, 6, 2]]
    assert heat_map_boxes(values, 0.0).tolist() == [[1, 1, 8, 2]]


def test_exact_components_are_sorted_by_pixels_and_touch_by_corners():
    mask = np.zeros((8, 12), bool)
    mask[0, 0] = mask[1, 1] = mask[2, 2] = True  # one component
    mask[5:7, 4:7] = True
    mask[0, 8:12] = True
    assert component_boxes(mask).tolist() == [[4, 5, 7, 7], [8, 0, 12, 1], [0, 0, 3, 3]]
    assert heat_map_boxes(mask, largest=False).tolist() == [[4, 5, 7, 7], [8, 0, 12, 1], [0, 0, 3, 3]]


def test_a_long_line_has_pixels_but_no_area():
    mask = np.zeros((8, 20), bool)
    mask[0, :15] = True
    mask[4:7, 4:7] = True
    assert heat_map_boxes(mask).tolist() == [[0, 0, 15, 1]]
    assert heat_map_boxes(mask, rule="parity").tolist() == [[4, 4, 7, 7]]


def test_rings_have_two_contours_and_enclose_their_islands():
    mask = np.zeros((12, 12), bool)
    mask[1:10, 1:10] = True
    mask[3:8, 3:8] = False
    mask[5, 5] = True
    assert contour_boxes(mask).tolist() == [[1, 1, 10, 10], [5, 5, 6, 6], [2, 2, 9, 9]]
    assert heat_map_boxes(mask, rule="parity").tolist() == [[1, 1, 10, 10]]


@pytest.mark.parametrize("rule", ["exact", "parity"])
@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_constant_maps_have_the_empty_box(rule, value):
    assert heat_map_boxes(np.full((4, 6), value), rule=rule).tolist() == [[0, 0, 0, 0]]


def test_masks_without_a_contour_and_full_ones():
    assert contour_boxes(np.zeros((4, 6), bool)).tolist() == [[0, 0, 0, 0]]
    assert contour_boxes(np.ones((4, 6), bool)).tolist() == [[0, 0, 5, 3]]
    assert contour_boxes(np.ones((1, 1), bool)).tolist() == [[0, 0, 0, 0]]


def test_tensors_and_floats_of_32_bits_are_maps_too():
    assert heat_map_boxes(torch.from_numpy(square_of_ones()).float()).tolist() == [[1, 1, 4, 4]]
    assert heat_map_boxes(square_of_ones().astype(np.float32)).dtype == np.float32


@pytest.mark.parametrize(
    ("score_map", "message"),
    [
        (np.zeros((1, 4, 4)), r"expected one map \[H, W\], got shape \[1, 4, 4\]"),
        (np.zeros((0, 4)), r"expected one map"),
        (np.array([[0, 1], [0, math.nan]]), "expected finite values, got nan at row 1, column 1"),
        (np.array([[0, 1.5]]), r"values in \[0, 1\], got 0 to 1.5"),
        (np.array([[-0.25, 1]]), r"values in \[0, 1\], got -0.25 to 1"),
    ],
)
def test_bad_maps_are_refused(score_map, message):
    for function in (check_score_map, heat_map_boxes):
        with pytest.raises(ValueError, match=message):
            function(score_map)


def test_bad_settings_are_refused():
    for threshold in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"threshold: expected a fraction of the maximum in \[0, 1\)"):
            heat_map_boxes(square_of_ones(), threshold)
    with pytest.raises(ValueError, match="rule: expected one of exact, parity, got 'opencv'"):
        heat_map_boxes(square_of_ones(), rule="opencv")


def test_resizing_is_opencvs_bicubic_stretched_to_the_whole_range():
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed, resizing cannot be compared with it")
    for seed, size in enumerate([(7, 7), (14, 9), (28, 28)]):
        values = np.random.default_rng(seed).random(size)
        expected = cv2.resize(values, (224, 224), interpolation=cv2.INTER_CUBIC)
        expected = (expected - expected.min()) / (expected - expected.min()).max()
        assert np.abs(resize_score_map(values, (224, 224)) - expected).max() < 1e-5


def test_resizing_leaves_maps_of_that_size_and_empties_constant_ones():
    values = np.random.default_rng(0).uniform(0.2, 0.6, (9, 7))
    assert (resize_score_map(values, (9, 7)) == values).all()
    for size in ((9, 7), (3, 5)):
        assert not resize_score_map(np.full((9, 7), 0.7), size).any()
        assert resize_score_map(np.full((9, 7), 0.7), size).shape == size


def test_eight_bits_round_down():
    assert eight_bit(np.array([0, 0.0039, 0.00393, 0.5, 0.9999, 1])).tolist() == [0, 0, 1, 127, 254, 255]

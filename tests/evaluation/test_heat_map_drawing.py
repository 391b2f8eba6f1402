import math

import matplotlib
import numpy as np
import pytest
import torch

from simdetr.reports.drawing import FOUND, HUMAN, draw_heat_map


def grey_image(height: int, width: int) -> torch.Tensor:
    return torch.full((3, height, width), 90, dtype=torch.uint8)


def left_half() -> np.ndarray:
    return np.repeat([[1.0, 0.0]], 2, axis=0).repeat(50, axis=1)


def test_the_map_is_laid_over_the_image():
    picture = np.asarray(draw_heat_map(grey_image(400, 600), left_half(), opacity=0.25))
    assert picture.shape == (400, 600, 3)
    for column, value in ((10, 1.0), (590, 0.0)):
        colour = 255 * np.array(matplotlib.colormaps["jet"](value)[:3])
        assert np.abs(picture[200, column] - (0.75 * 90 + 0.25 * colour)).max() <= 0.5
    assert picture[200, 10, 0] > picture[200, 590, 0] and picture[200, 10, 2] < picture[200, 590, 2]  # red, blue


def test_without_opacity_the_image_is_left_and_with_all_of_it_the_map():
    clear = np.asarray(draw_heat_map(grey_image(400, 400), left_half(), opacity=0))
    assert (clear == 90).all()
    dense = np.asarray(draw_heat_map(torch.zeros(3, 400, 400, dtype=torch.uint8), left_half(), opacity=1))
    white = np.asarray(draw_heat_map(torch.full((3, 400, 400), 255, dtype=torch.uint8), left_half(), opacity=1))
    assert (dense == white).all()


def test_found_boxes_are_green_and_human_ones_red():
    picture = np.asarray(
        draw_heat_map(
            grey_image(40, 80),  # drawn at 160 × 320
            np.zeros((4, 4)),
            np.array([[20, 10, 60, 30]], np.float32),
            torch.tensor([[10.0, 5.0, 30.0, 20.0], [62.0, 30.0, 78.0, 38.0]]),
        )
    )
    assert picture.shape == (160, 320, 3)
    green, red = (picture == FOUND).all(2), (picture == HUMAN).all(2)
    assert np.flatnonzero(green.any(0))[[0, -1]].tolist() == [80, 239]
    assert np.flatnonzero(green.any(1))[[0, -1]].tolist() == [40, 119]
    assert np.flatnonzero(red.any(0))[[0, -1]].tolist() == [40, 311]
    assert red[:, 300:].any() and red[:, 100].any() and not red[90:110, :240].any()
    only_truth = np.asarray(draw_heat_map(grey_image(400, 400), np.zeros((4, 4)), truth=np.array([[9, 9, 99, 99]])))
    assert (only_truth == HUMAN).all(2).any() and not (only_truth == FOUND).all(2).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.zeros(3, 9, 9)}, r"image: expected uint8 \[3, H, W\], got torch.float32"),
        ({"score_map": np.zeros((1, 4, 4))}, "score_map: expected one map"),
        ({"score_map": np.full((4, 4), math.nan)}, "score_map: expected finite values"),
        ({"score_map": np.full((4, 4), 7.0)}, r"score_map: expected values in \[0, 1\]"),
        ({"boxes": np.array([[5, 0, 1, 4]])}, "boxes_xyxy: expected finite corners"),
        ({"opacity": 1.5}, "opacity: expected 0 to 1, got 1.5"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        draw_heat_map(**{"image": grey_image(9, 9), "score_map": np.zeros((4, 4)), **changes})


def test_an_unknown_colour_map_is_named():
    with pytest.raises(ValueError, match="colour_map: matplotlib has no 'rainbows'"):
        draw_heat_map(grey_image(9, 9), np.zeros((4, 4)), colour_map="rainbows")

"""Boxes around shapes by hand, outlines of masks against the pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from simdetr.data import masks as mask_codes
from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.label_formats import shapes
from simdetr.data.labels import Labels

MASKS = arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 1))


def test_a_rectangle_turns_clockwise_about_its_top_left_corner():
    corners = shapes.rotated_corners(10, 20, 30, 5, 90)  # y grows downwards: its width points down, its height left
    assert corners == pytest.approx([10, 20, 10, 50, 5, 50, 5, 20])
    assert shapes.around(corners) == pytest.approx((5, 20, 10, 50))


def test_a_box_turns_about_its_centre():
    assert shapes.around(shapes.rotated_about_centre((10, 20, 40, 30), 90)) == pytest.approx((20, 10, 30, 40))
    diagonal = 10 * math.sqrt(2)
    around = shapes.around(shapes.rotated_about_centre((0, 0, 20, 20), 45))
    assert around == pytest.approx((10 - diagonal, 10 - diagonal, 10 + diagonal, 10 + diagonal))


def test_the_box_around_an_ellipse_touches_its_points():
    centre, radii = (50, 40), (20, 5)
    assert shapes.around_ellipse(centre, radii, 0) == (30, 35, 70, 45)
    polygon = shapes.ellipse_polygon(centre, radii, 30)
    assert shapes.around(polygon) == pytest.approx(shapes.around_ellipse(centre, radii, 30), abs=0.1)


def test_no_points_have_no_box():
    assert np.isnan(shapes.around([])).all() and np.isnan(shapes.around([1, 2, math.nan, 4])).all()


@given(MASKS)
def test_the_box_around_a_mask_is_that_of_its_pixels(pixels):
    code = mask_codes.encode(pixels[None])
    image = ImageLabels.build("a", pixels.shape, [[0.5, 0.5, 0.75, 0.75]], [0], masks=code)
    box = shapes.boxes_of_masks(Labels.from_images([image], [Category(1, "a")]))[0].tolist()
    rows, columns = np.nonzero(pixels)
    there = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0.5, 0.5, 0.75, 0.75]
    assert box == there


@given(MASKS)
def test_one_outline_drawn_again_is_the_mask_with_its_holes_filled(pixels):
    points, parts = shapes.one_outline(pixels)
    assert bool(parts) == bool(pixels.any())
    if not parts:
        return
    drawn = mask_codes.of_segmentation([points], pixels.shape)
    again = mask_codes.decode(mask_codes.column([drawn]), pixels.shape)[0]
    outside_meets_at_corners = np.ones((3, 3))
    assert (again == ndimage.binary_fill_holes(pixels, outside_meets_at_corners)).all()

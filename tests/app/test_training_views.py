"""A picture of how a training might see an image."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from simdetr.app.refusals import Refusal
from simdetr.app.training_views import training_view

PLAIN = {"colour": "none", "flip": False, "crop": False}


def test_boxes_are_drawn_where_they_are_and_the_generator_is_left_alone(tmp_path):
    import torch

    Image.new("RGB", (480, 480), (90, 90, 90)).save(tmp_path / "grey.png")
    before = torch.random.get_rng_state()
    plain, boxed = (
        np.asarray(Image.open(io.BytesIO(training_view(tmp_path / "grey.png", boxes, PLAIN, 3))), np.float64)
        for boxes in ([], [((100.0, 100.0, 200.0, 300.0), 1)])
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    rows, columns = np.nonzero(np.abs(boxed - plain).max(axis=-1) > 60)
    assert plain.shape == (480, 480, 3)
    edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert edges == pytest.approx((100, 100, 200, 300), abs=4)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(Refusal, match=r"broken\.png cannot be read"):
        training_view(tmp_path / "broken.png", [], PLAIN, 0)

"""The probe's numbers against matrices of known rank, its warning, and its file."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from simdetr.data.images import open_images
from simdetr.encoder_training.probe import (
    effective_rank,
    feature_spread,
    probe_images,
    read_rows,
    warn_of_collapse,
    write_row,
)
from simdetr.mining.encoders import TimmEncoder


class Constant(torch.nn.Module):
    """Sees the same everywhere."""

    strides, region_dim, fingerprint = (16, 32), 4, "constant"

    def forward(self, images):
        return {
            stride: torch.ones(len(images), 4, images.shape[2] // stride, images.shape[3] // stride)
            for stride in (16, 32)
        }


def test_effective_rank_of_known_matrices():
    axes = torch.eye(5)
    assert effective_rank(torch.cat((axes, -axes))) == pytest.approx(5)
    assert effective_rank(torch.outer(torch.arange(6.0), torch.tensor([1.0, 2, -3]))) == pytest.approx(1)
    assert effective_rank(torch.ones(6, 4)) == 0
    two = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]])  # singular values in the ratio 3 : 1
    assert effective_rank(two) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert effective_rank(two + 100) == pytest.approx(effective_rank(two), rel=1e-4)


def test_spread_is_one_for_even_directions_and_zero_for_a_collapsed_encoder():
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 255, (3, 64, 64), generator=generator, dtype=torch.uint8) for _ in range(6)]
    collapsed = feature_spread(Constant(), images)
    assert collapsed == {"spread": 0.0, "rank": 0.0, "cell_rank": 0.0}
    untrained = feature_spread(TimmEncoder("test_resnet", random_weights=True), images)
    assert 0 < untrained["spread"] < 1 and 1 < untrained["rank"] <= 5 < untrained["cell_rank"]

    class Even(Constant):
        """Each image looks along its own axis."""

        calls = 0

        def forward(self, images):
            direction = torch.eye(3).repeat(2, 1)[self.calls] * (1 if self.calls < 3 else -1)
            self.calls += 1
            return {stride: direction.view(1, 3, 1, 1).expand(1, 3, 2, 2) for stride in (16, 32)}

    even = feature_spread(Even(), images)
    assert even["spread"] == pytest.approx(math.sqrt(6 / 5))  # the standard deviation of six values divides by five
    assert even["rank"] == pytest.approx(3, rel=1e-4)


def test_collapse_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_collapse({"step": 10.0, "spread": 0.3, "rank": 6.0})
        warn_of_collapse({"step": 0.0, "spread": 0.0, "rank": 0.0})
        assert not caplog.records
        warn_of_collapse({"step": 20.0, "spread": 0.001, "rank": 6.0})
        warn_of_collapse({"step": 30.0, "spread": 0.3, "rank": 1.1})
    assert ["collapses: at step 20" in caplog.messages[0], "rank 1.1" in caplog.messages[1]] == [True, True]


def test_rows_of_later_steps_go_when_a_run_resumes(tmp_path):
    path = tmp_path / "probe.csv"
    for step in (0, 5, 10):
        write_row(path, {"step": float(step), "spread": step / 10})
    write_row(path, {"step": 5.0, "spread": 0.7, "AR@25": 0.5})
    assert read_rows(path) == [{"step": 0.0, "spread": 0.0}, {"step": 5.0, "spread": 0.7, "AR@25": 0.5}]
    assert read_rows(tmp_path / "none.csv") == []


def test_probe_images_are_evenly_spaced_and_readable(own_scenes):
    source = open_images(own_scenes)
    source.path_of(source.ids[0]).write_bytes(b"")
    images = probe_images(source, 3, 64)
    assert len(images) == 2 and all(max(image.shape[1:]) == 64 for image in images)
    with pytest.raises(ValueError, match="images: expected at least two readable ones, got 1 of 2 tried"):
        probe_images(source, 2, 64)

"""How long a run takes: the parts add up, and what is measured scales as the recipe says."""

from __future__ import annotations

import logging

import pytest
import torch

from simdetr.data.images import open_images
from simdetr.recipe import Recipe, say_time
from simdetr.training import run_time
from simdetr.training.run_folder import RunFolder
from simdetr.training.run_time import QUERIES, RunTime, measure, step_seconds


def test_parts_add_up_and_are_said():
    time = RunTime(mining=120, training=600, relabelling=30, stages=2, steps=1560)
    assert time.total == 120 + 2 * 630
    assert str(time) == "about 23 min: mining 2 min, 2 x (1,560 training steps 10 min, relabelling 30 s)"
    later = RunTime(mining=0, training=9000, relabelling=30, stages=1, steps=10)
    assert str(later) == "about 2.5 h: 1 x (10 training steps 2.5 h, relabelling 30 s)"


@pytest.fixture
def made(scenes, tiny_config, monkeypatch):
    """A recipe, its sections and images, on a machine where every training step takes two seconds."""
    monkeypatch.setattr(run_time, "step_seconds", lambda *a, **k: 2.0)

    def make(*options):
        recipe = Recipe((str(tiny_config),), (f"--data.images={scenes}", *options))
        return recipe, recipe.sections(), open_images(scenes)

    return make


def measured(recipe, sections, source, **options):
    """What ``say_time`` asks for, on the CPU."""
    config, _ = recipe.resolved()
    detector = recipe.check_detector(sections.clustering.num_classes, config.data.num_queries or QUERIES)
    objects = sections.self_training.max_boxes
    return measure(source, sections.encoder, sections.mining, detector, config, "cpu", objects=objects, **options)


def test_training_follows_steps_and_epochs(made):
    by_steps = measured(*made("--trainer.max_steps=50"), stages=2)
    assert by_steps.steps == 50 and 100 <= by_steps.training < 110
    by_epochs = measured(*made("--trainer.max_steps=-1", "--trainer.max_epochs=3"), stages=2)
    assert by_epochs.steps == 18  # three times twelve images, two at a time
    assert measured(*made(), stages=2, mined=True).mining == 0
    assert by_steps.mining > 0 and by_steps.relabelling >= 12 * 2 / 3 / 2


def test_finished_stages_cost_nothing(made, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    run = RunFolder(tmp_path)
    recipe, sections, source = made("--self_training.stages=3")
    monkeypatch.setattr(RunFolder, "has_detector", lambda self, stage: stage == 1)
    say_time(recipe, sections, source, run, "cpu")
    assert "2 x (1 training steps" in caplog.text and "mining" in caplog.text
    caplog.clear()
    monkeypatch.setattr(RunFolder, "has_detector", lambda self, stage: True)
    say_time(recipe, sections, source, run, "cpu")
    assert not caplog.text


def test_images_that_cannot_be_read_have_no_time(tiny_config, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    recipe = Recipe((str(tiny_config),), (f"--data.images={tmp_path}",))
    assert measured(recipe, recipe.sections(), open_images(tmp_path), stages=1) is None


def test_a_forward_and_backward_pass_are_done_and_random_numbers_stay(make_detector):
    detector = make_detector(dropout=0.5)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    step_seconds(detector, torch.zeros(2, 3, 48, 64), 5, "cpu")
    assert all(parameter.grad is not None for parameter in detector.parameters())
    assert torch.equal(torch.rand(1), expected)

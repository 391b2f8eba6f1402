"""The largest batch that fits: the search, the trial steps and the learning rates that follow."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from simdetr.training import auto_batch
from simdetr.training.auto_batch import (
    BatchSettings,
    TrialStep,
    auto_batch_options,
    largest_batch,
    largest_power_of_two,
    largest_size_hw,
)

BEFORE = BatchSettings(8, 2e-4, 2e-5)


class Memory:
    """A device with room for so many images."""

    def __init__(self, room, error=None):
        self.room, self.tried = room, []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def __call__(self, batch_size):
        self.tried.append(batch_size)
        if batch_size > self.room:
            raise self.error


@pytest.mark.parametrize(
    ("room", "most", "found", "tried"),
    [
        (11, 100, 8, [1, 2, 4, 8, 16]),
        (8, 100, 8, [1, 2, 4, 8, 16]),
        (100, 6, 4, [1, 2, 4]),
        (1, 100, 1, [1, 2]),
        (0, 100, 0, [1]),
    ],
)
def test_powers_of_two_until_memory_or_images_end(room, most, found, tried):
    memory = Memory(room)
    assert largest_power_of_two(memory, most) == found
    assert memory.tried == tried


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory")])
def test_other_devices_run_out_of_memory_too(error):
    assert largest_power_of_two(Memory(2, error), 100) == 2


def test_other_errors_are_not_taken_for_it():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        largest_power_of_two(Memory(2, RuntimeError("mat1 and mat2 shapes cannot be multiplied")), 100)


def test_learning_rates_follow_the_batch():
    linear, root = BEFORE.scaled_to(32, "linear"), BEFORE.scaled_to(32, "sqrt")
    assert (linear.batch_size, linear.lr, linear.backbone_lr) == (32, pytest.approx(8e-4), pytest.approx(8e-5))
    assert (root.batch_size, root.lr, root.backbone_lr) == (32, pytest.approx(4e-4), pytest.approx(4e-5))
    less = BEFORE.scaled_to(2, "linear")
    assert (less.lr, less.backbone_lr) == (pytest.approx(5e-5), pytest.approx(5e-6))
    name, _, value = linear.options()[1].partition("=")
    assert name == "--model.lr" and float(value) == linear.lr


def test_a_rate_of_new_parts_follows_too():
    found = BatchSettings(8, 2e-4, 2e-5, 2e-3).scaled_to(16, "linear")
    assert found.new_lr == pytest.approx(4e-3)
    assert found.options()[3] == f"--model.new_lr={found.new_lr!r}"


def test_found_once_and_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        auto_batch, "largest_batch", lambda training: {"batch_size": 16, "device": training, "size_hw": [80, 90]}
    )
    path, built = tmp_path / "auto_batch.json", []
    with caplog.at_level(logging.INFO):
        first = auto_batch_options(path, BEFORE, "linear", lambda: built.append(1) or "cuda:0")
        second = auto_batch_options(path, BEFORE, "linear", lambda: built.append(1) or "cuda:0")
    assert first == second == ("--data.batch_size=16", "--model.lr=0.0004", "--model.backbone_lr=4e-05")
    assert len(built) == 1
    assert caplog.messages == [
        f"auto_batch: batch_size 8 -> 16 ({how} on cuda:0 at 80 x 90 px), lr 0.0002 -> 0.0004, backbone_lr 2e-05 -> "
        "4e-05 (linear)"
        for how in ("largest that fits or the set fills", "found before")
    ]
    assert json.loads(path.read_text())["before"] == {
        "batch_size": 8,
        "lr": 2e-4,
        "backbone_lr": 2e-5,
        "new_lr": None,
    }
    with pytest.raises(ValueError, match=r"expected 'linear', with which .* was begun, got 'sqrt'"):
        auto_batch_options(path, BEFORE, "sqrt", lambda: None)


def test_size_of_the_largest_batch(recipe, tmp_path):
    data = recipe("--data.short_sides=[48,64]", "--data.max_side=80").training(tmp_path).datamodule
    assert set(map(tuple, data.labels.sizes_hw.tolist())) == {(64, 80)}
    assert largest_size_hw(data) == (64, 80)
    data.max_side = 72  # the long side decides
    assert largest_size_hw(data) == (58, 72)
    data.max_side, data.crop = 200, True  # windows of up to 600 x 384, either way round
    assert largest_size_hw(data) == (100, 100)


def test_a_trial_is_a_training_step(recipe, tmp_path):
    """It moves the weights, and a larger batch keeps more."""
    training = recipe("--trainer.precision=bf16-mixed").training(tmp_path)
    trial = TrialStep(training)
    before = {name: value.clone() for name, value in training.model.detector.state_dict().items()}
    trial(3)
    after = training.model.detector.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert {"backbone", "transformer", "class_embed", "bbox_embed"} <= {name.partition(".")[0] for name in changed}
    smaller = trial.bytes_per_image()
    trial.size_hw = (128, 160)
    assert trial.bytes_per_image() > smaller > 0


def test_the_cpu_is_bounded_by_its_free_memory(recipe, tmp_path, monkeypatch):
    training = recipe().training(tmp_path)
    per_image = TrialStep(training).bytes_per_image()

    def free(images):
        available = type("Memory", (), {"available": int(images * per_image / 0.5) + 1})()
        monkeypatch.setattr(auto_batch.psutil, "virtual_memory", lambda: available)

    free(5)
    assert largest_batch(training) == {"batch_size": 4, "device": "cpu", "size_hw": [64, 80]}
    free(1000)
    assert largest_batch(training)["batch_size"] == 8  # of twelve images
    free(0.5)
    with pytest.raises(MemoryError, match=r"one image of 64 x 80 px does not fit.*use smaller short_sides"):
        largest_batch(training)


def test_a_trial_has_the_unlabelled_images_too(recipe, scenes, tmp_path):
    training = recipe(f"--data.unlabelled={scenes}", "--data.label_fraction=0.5").training(tmp_path)
    batch = TrialStep(training)._batch(3)
    assert batch.images.shape[0] == batch.mask.shape[0] == len(batch.targets) == 6
    assert [target.get("labelled", True) for target in batch.targets] == [True] * 3 + [False] * 3
    assert all(len(target["labels"]) == len(target["boxes"]) == 0 for target in batch.targets[3:])

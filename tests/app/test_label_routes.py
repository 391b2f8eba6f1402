"""How images look in training."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from simdetr.app.run_parameters import TrainParameters


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)), np.float64)


def test_a_preview_depends_on_its_seed_and_switches_alone(person):
    person.draw(1, (person.make_class(), [10, 10, 40, 40]))
    plain = {"colour": "none", "flip": False, "crop": False}
    first = pixels(person.get("/images/1/augmented", **plain))
    assert (first == pixels(person.get("/images/1/augmented", seed=5, **plain))).all()
    strong = [pixels(person.get("/images/1/augmented", seed=seed, colour="strong", flip=False)) for seed in (1, 1, 2)]
    assert (strong[0] == strong[1]).all() and not (strong[0] == strong[2]).all()
    mirrored = [pixels(person.get("/images/1/augmented", seed=seed, colour="none")) for seed in range(6)]
    assert any(np.abs(one[:, ::-1] - first).mean() < np.abs(one - first).mean() for one in mirrored)


def test_augmentations_are_parameters_of_a_training(person):
    for row in person.get("/augmentations")["augmentations"]:
        field = TrainParameters.model_fields[row["name"]]
        assert field.default == row["default"]


def test_rotation_noise_and_brightness_are_previewed_and_off_by_default(person):
    person.draw(1, (person.make_class(), [10, 10, 40, 40]))
    plain = {"colour": "none", "flip": False}
    first = pixels(person.get("/images/1/augmented", seed=3, **plain))
    for name, most in (("rotation", 30), ("noise", 0.2), ("brightness", 0.3)):
        assert (first == pixels(person.get("/images/1/augmented", seed=3, **plain, **{name: 0}))).all()
        assert np.abs(first - pixels(person.get("/images/1/augmented", seed=3, **plain, **{name: most}))).mean() > 1
    rows = {row["name"]: row for row in person.get("/augmentations")["augmentations"]}
    assert [rows[name]["most"] for name in ("rotation", "noise", "brightness")] == [30, 0.2, 0.3]


def test_formats_are_told(person):
    found = person.get("/formats")
    assert set(found["read"]) == set(found["write"]) and found["write"][0] == "coco"

"""Small scenes, settings and detectors that several folders of tests train on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from simdetr.data.scenes import render_scenes

TINY_DETECTOR = {
    "backbone": "test_resnet",
    "hidden_dim": 16,
    "num_heads": 2,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "ffn_dim": 16,
    "num_queries": 8,
    "num_feature_levels": 1,
    "num_points": 2,
    "dropout": 0.1,
}
"""A detector that takes a training step in a fraction of a second."""

TINY_CONFIG = {
    "mining": {"image_size": 64},
    "clustering": {"num_classes": 3},
    "self_training": {"stages": 1, "max_boxes": 5},
    "model": {
        "detector": {"class_path": "simdetr.detectors.DeformableDETR", "init_args": TINY_DETECTOR},
        "lr": 1e-3,
        "backbone_lr": 1e-3,
    },
    "data": {"batch_size": 2, "short_sides": [48, 64], "max_side": 80, "crop": False, "colour": "light", "mosaic": 0.3},
    "trainer": {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False},
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scenes of 64 × 80 px with ``instances.json``; nothing may be written here."""
    folder = tmp_path_factory.mktemp("scenes")
    render_scenes(folder, 12, (64, 80), seed=3)
    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML of the whole recipe at the smallest size."""
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY_CONFIG), encoding="utf-8")
    return path


@pytest.fixture
def own_scenes(scenes: Path, tmp_path: Path) -> Path:
    """A copy of the first six scenes and their labels that a test may damage."""
    folder = tmp_path / "own"
    content = json.loads((scenes / "instances.json").read_text())
    content["images"] = content["images"][:6]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] in kept]
    (folder / "images").mkdir(parents=True)
    for image in content["images"]:
        (folder / image["file_name"]).write_bytes((scenes / image["file_name"]).read_bytes())
    (folder / "instances.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def make_detector():
    """Build the smallest detector, with changes."""
    from simdetr.detectors import DeformableDETR

    return lambda num_classes=3, **changes: DeformableDETR(num_classes, **{**TINY_DETECTOR, **changes})

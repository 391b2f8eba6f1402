"""A small pretraining, and a few shots of its scenes."""

from __future__ import annotations

from pathlib import Path

import pytest

from simdetr import pretrain
from simdetr.data.coco import write_coco
from simdetr.data.label_files import read_labels


@pytest.fixture(scope="package")
def pretrained(tmp_path_factory: pytest.TempPathFactory, scenes: Path, tiny_config: Path) -> Path:
    """Run folder of a pretraining of the drawn scenes, finished."""
    out = tmp_path_factory.mktemp("labelling") / "run"
    pretrain(scenes, out, [tiny_config])
    return out


@pytest.fixture(scope="package")
def shots(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """The boxes of five of the twelve scenes."""
    truth = read_labels(scenes / "instances.json")
    path = tmp_path_factory.mktemp("shots") / "shots.json"
    write_coco(truth.select(truth.image_ids[:5]), path)
    return path

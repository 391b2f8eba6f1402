from __future__ import annotations

from pathlib import Path

import pytest

from simdetr import pipeline


@pytest.fixture(scope="package")
def run(tmp_path_factory, scenes, tiny_config) -> Path:
    """A small pretraining of drawn scenes, finished."""
    out = tmp_path_factory.mktemp("cli") / "run"
    pipeline.pretrain(scenes, out, [tiny_config])
    return out

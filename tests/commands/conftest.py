"""A finished pretraining for commands to work on; commands that must fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from simdetr import pipeline
from simdetr.commands.main import main


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory, scenes: Path, tiny_config: Path) -> Path:
    """A small pretraining of drawn scenes, finished."""
    out = tmp_path_factory.mktemp("cli") / "run"
    pipeline.pretrain(scenes, out, [tiny_config])
    return out


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail, and gives the one line that it says."""

    def run(*words: object) -> str:
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        assert caught.value.code == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        return line

    return run

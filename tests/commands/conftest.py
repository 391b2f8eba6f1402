"""Commands that must fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from simdetr.commands.main import main


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

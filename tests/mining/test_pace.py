from __future__ import annotations

import pytest

from simdetr.mining.pace import rate_text


@pytest.mark.parametrize(("speed", "text"), [(0, "0.0 images/s"), (12.34, "12.3 images/s"), (0.0123, "0.012 images/s")])
def test_slow_work_has_a_rate_too(speed, text):
    assert rate_text(speed, "images") == text

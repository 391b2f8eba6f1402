from __future__ import annotations

from typing import Literal

import pytest

from simdetr.data.legal_values import check_choice


def test_unknown_options_list_the_legal_ones():
    with pytest.raises(ValueError, match="mode: expected one of 'a', 'b', got 'c'"):
        check_choice("mode", "c", Literal["a", "b"])
    check_choice("mode", "a", Literal["a", "b"])

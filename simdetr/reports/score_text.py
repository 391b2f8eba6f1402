"""A number of an evaluation -> how people read it."""

from __future__ import annotations

import math


def shown_score(name: str, value: float) -> str:
    """A score for people: fractions in percent, distances and counts as they are, a dash for what is not known."""
    if math.isnan(value):
        return "    –"
    if "_px" in name:
        return f"{value:5.1f} px"
    if "error_percent" in name:
        return f"{value:5.1f} % of the diagonal"
    if name in ("points", "images", "constant_maps"):
        return f"{value:5.0f}"
    if name == "threshold":
        return f"{value:5.3f}"
    return f"{100 * value:5.1f} %"

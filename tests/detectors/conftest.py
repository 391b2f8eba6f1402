"""Detectors of other libraries."""

import pytest


@pytest.fixture(scope="module")
def detectors(make_other):
    """One detector of each kind, in evaluation mode; tests copy those that they change."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = make_other(name, num_classes=7).eval()
        return made[name]

    return get

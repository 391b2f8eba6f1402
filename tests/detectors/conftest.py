"""A batch for detectors, and detectors of other libraries."""

import pytest
import torch


@pytest.fixture(scope="module")
def detectors(make_other):
    """One detector of each kind, in evaluation mode; tests copy those that they change."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = make_other(name, num_classes=7).eval()
        return made[name]

    return get


@pytest.fixture
def batch():
    """Two images, the second padded at the bottom and right: images, mask, targets."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, 120, 136, generator=generator)
    mask = torch.zeros(2, 120, 136, dtype=torch.bool)
    mask[1, 90:] = True
    mask[1, :, 100:] = True
    images = images.masked_fill(mask[:, None], 0.0)
    targets = [
        {"labels": torch.tensor([1, 4, 4]), "boxes": torch.rand(3, 4, generator=generator) * 0.4 + 0.2},
        {"labels": torch.tensor([6]), "boxes": torch.rand(1, 4, generator=generator) * 0.4 + 0.2},
    ]
    return images, mask, targets

"""A batch for detectors."""

import pytest
import torch


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

"""Small detectors and batches."""

import pytest
import torch

from simdetr.detectors import DeformableDETR

VARIANTS = {
    "base": {},
    "refine": {"with_box_refine": True},
    "two_stage": {"with_box_refine": True, "two_stage": True},
    "single_scale": {"num_feature_levels": 1},
    "dc5": {"num_feature_levels": 1, "dilation": True, "backbone": "resnet50"},
}


@pytest.fixture
def make_detector():
    """Build a small detector in evaluation mode with a fixed seed."""

    def make(variant="base", seed=0, **changes):
        small = {
            "num_classes": 7,
            "backbone": "resnet18",
            "hidden_dim": 64,
            "num_heads": 4,
            "num_encoder_layers": 2,
            "num_decoder_layers": 3,
            "ffn_dim": 128,
            "num_queries": 20,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return DeformableDETR(**(small | VARIANTS[variant] | changes)).eval()

    return make


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


@pytest.fixture
def shake():
    """Give every parameter and batch-norm buffer of a module random values that matter."""

    def randomise(module, seed=1):
        generator = torch.Generator().manual_seed(seed)

        def noise(tensor):
            return torch.randn(tensor.shape, generator=generator)

        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "sampling_offsets.bias" in name:
                    parameter.copy_(2.0 * noise(parameter))
                elif parameter.dim() > 1:
                    parameter.copy_(noise(parameter) / parameter[0].numel() ** 0.5)
                else:
                    parameter.add_(0.1 * noise(parameter))
            for name, buffer in module.named_buffers():
                if name.endswith(("running_mean", "bias")):
                    buffer.copy_(0.1 * noise(buffer))
                elif name.endswith(("running_var", "weight")):
                    buffer.copy_(1.0 + 0.2 * noise(buffer).abs())
        return module

    return randomise

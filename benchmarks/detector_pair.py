"""Our Deformable DETR (ResNet-50) and transformers' with the same weights, and a batch for both.

No dropout, so that both compute the same; the same parameters are trained (transformers' also trains the stem, which
the published recipe keeps fixed; here it does not). transformers runs with its own defaults otherwise, which are its
fastest without a compiled extension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from simdetr.detectors import DeformableDETR
from simdetr.exchange.parameter_names import to_transformers

NUM_CLASSES = 91
OBJECTS = 10
PACKAGES = ("torch", "torchvision", "timm", "transformers")
transformers.logging.set_verbosity_error()


def build_pair(device: str, **small: Any) -> tuple[DeformableDETR, nn.Module]:
    """Both detectors in evaluation mode.

    Args:
        device: where they are.
        small: other ``init_args`` of ours; sizes that transformers' config calls the same only.
    """
    torch.manual_seed(0)
    ours = DeformableDETR(NUM_CLASSES, dropout=0.0, **small)
    with torch.no_grad():
        for parameter in ours.parameters():
            if not parameter.count_nonzero():  # what starts at zero would hide differences
                parameter.normal_(std=0.02)
    layers = {
        name: small[own]
        for name, own in (("encoder_layers", "num_encoder_layers"), ("decoder_layers", "num_decoder_layers"))
        if own in small
    }
    config = transformers.DeformableDetrConfig(
        backbone="resnet50",
        num_labels=NUM_CLASSES,
        auxiliary_loss=True,
        class_cost=2,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        **layers,
    )
    theirs = transformers.DeformableDetrForObjectDetection(config)
    theirs.load_state_dict(to_transformers(ours.state_dict(), "memory"), strict=True)
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    fixed = to_transformers({name: p for name, p in ours.named_parameters() if name not in trained}, "memory")
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name not in fixed)
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert counts[0] == counts[1], f"different parameters are trained: {counts}"
    return ours.to(device).eval(), theirs.to(device).eval()


def make_batch(batch_size: int, side: int, device: str) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Square images without padding, their mask and ten objects each."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, side, side, generator=generator)
    mask = torch.zeros(batch_size, side, side, dtype=torch.bool)
    targets = [
        {
            "labels": torch.randint(NUM_CLASSES, (OBJECTS,), generator=generator).to(device),
            "boxes": (torch.rand(OBJECTS, 4, generator=generator) * 0.4 + 0.2).to(device),
        }
        for _ in range(batch_size)
    ]
    return images.to(device), mask.to(device), targets


def transformers_inputs(images: Tensor, mask: Tensor, targets: list[dict[str, Tensor]]) -> Mapping[str, Any]:
    """The batch as transformers wants it."""
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    return {"pixel_values": images, "pixel_mask": (~mask).long(), "labels": labels}

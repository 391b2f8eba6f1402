"""Small detectors with heads, and batches for them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from simdetr.detectors import DeformableDETR, ViDT
from simdetr.heads import Head, HeadedBackbone, HeadLosses

SMALL_DETR = {
    "backbone": "test_resnet",
    "hidden_dim": 32,
    "num_heads": 2,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "ffn_dim": 32,
    "num_queries": 6,
    "num_feature_levels": 3,
    "dropout": 0.0,
    "frozen_batch_norm": False,
    "freeze_stem": False,
}
SMALL_VIDT = {
    "backbone": "swin_pico",
    "hidden_dim": 32,
    "num_heads": 2,
    "num_decoder_layers": 2,
    "ffn_dim": 32,
    "num_queries": 6,
    "dropout": 0.0,
    "drop_path": 0.0,
}
DETECTORS = {
    "detr": lambda classes: DeformableDETR(classes, **SMALL_DETR),
    "refined": lambda classes: DeformableDETR(classes, **SMALL_DETR, with_box_refine=True),
    "two-stage": lambda classes: DeformableDETR(classes, **SMALL_DETR, with_box_refine=True, two_stage=True),
    "vidt": lambda classes: ViDT(classes, **SMALL_VIDT),
}


def on_backbone(head, backbone="test_resnet", **settings):
    """A head on a small backbone that learns as a whole, with a fixed seed."""
    torch.manual_seed(0)
    return HeadedBackbone(3, head, backbone, **({"frozen_batch_norm": False, "freeze_stem": False} | settings))


class MeanHead(Head):
    """Scores classes by the mean of what it reads: the smallest head there is, for tests of what is around it."""

    name = "mean"

    def __init__(self, sizes, reads="levels", doubles=False):
        super().__init__()
        self.init_args = {"reads": reads, "doubles": doubles}
        self.needs = frozenset([reads])
        self.reads, self.is_neck = reads, doubles
        width = sizes.level_channels[-1] if reads == "levels" else sizes.query_channels
        self.classify = nn.Linear(width or 1, sizes.num_classes)

    def pass_level(self, index, level):
        """Doubles features in training and notes their stride."""
        return (2 * level.features if self.training else level.features), level.stride

    def forward(self, features):
        """Class logits [B, K]."""
        if self.reads == "levels":
            return self.classify(features.levels[-1].features.mean(dim=(2, 3)))
        return self.classify(features.queries.states[-1].mean(dim=1))

    def losses(self, outputs, features, targets):
        """Squared logits."""
        loss = outputs.square().mean()
        return HeadLosses(loss, {"loss": loss}, {"highest": outputs.detach().max()})

    def predictions(self, outputs, features):
        """One box for the whole image."""
        whole = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(len(outputs), 1, 4)
        return {"pred_logits": outputs[:, None], "pred_boxes": whole} if self.reads == "levels" else {"mean": outputs}


@pytest.fixture
def parts():
    """The smallest head, functions that make small detectors by their kind, and settings."""
    return SimpleNamespace(MeanHead=MeanHead, DETECTORS=DETECTORS, SMALL_DETR=SMALL_DETR, on_backbone=on_backbone)


@pytest.fixture
def batch():
    """Two images, the second of them narrower, with targets of three classes."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, 64, 96, generator=generator)
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, :, 64:] = True
    images[mask[:, None].expand_as(images)] = 0.0
    targets = [
        {"labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.4, 0.2]])},
        {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.6]])},
    ]
    for target in targets:
        target["points"] = target["boxes"][:, :2]
    return images, mask, targets

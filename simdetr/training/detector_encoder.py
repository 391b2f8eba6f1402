"""The backbone of a trained detector as the frozen encoder of a mining (US 2025/0265826, Algorithm 1, line 3: F = g_b).

In: a run, a detector folder or a checkpoint. Out: an `Encoder`, whatever the detector: Deformable DETR, ViDT, or one of
transformers or torchvision. So a round of self-training can mine anew with what the last one has learned, and a linear
probe can ask what that is worth.

Letters: B images, H, W their size in pixels, C channels, h, w a map's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from simdetr.detectors.detector import Detector
from simdetr.exchange.weights import load_detector
from simdetr.mining.encoders import STRIDES, digest_of, resample
from simdetr.training.run_folder import detector_folder


class DetectorEncoder(nn.Module):
    """The feature network of a detector, frozen.

    Maps of strides 16 and 32 are the network's own where it has them; else, as of a plain ViT, its last map resampled.

    Args:
        checkpoint: Run folder (its last detector), detector folder or checkpoint file.

    Raises:
        FileNotFoundError: There is no detector.
        ValueError: Its backbone gives no feature maps, as that of YOLOS.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        super().__init__()
        detector: Detector = load_detector(detector_folder(checkpoint)).detector.core
        self.body: Any = detector.get_submodule(detector.body_name)
        padded = detector if hasattr(detector, "pad_multiple") else detector.get_submodule(detector.backbone_name)
        self._multiple = lcm(STRIDES[-1], int(getattr(padded, "pad_multiple", 1)))
        self._square = bool(getattr(detector, "pad_square", False))
        colours = detector.normalisation
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(colours["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(colours["std"]).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()
        self.strides: tuple[int, ...] = STRIDES
        try:
            found = self(torch.zeros(1, 3, 2 * self._multiple, 2 * self._multiple))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"checkpoint: the backbone of {type(detector).__name__} in {checkpoint} gives no feature maps to mine "
                f"with ({error}); take a detector whose backbone is a network of its own"
            ) from error
        self.region_dim: int = found[STRIDES[-1]].shape[1]
        self.fingerprint: str = f"detector:{type(self.body).__name__}:{digest_of(self)}"

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode whatever is asked: a frozen encoder keeps its statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Feature maps of a batch as `Encoder` has them; sides that the network cannot take are continued."""
        height, width = images.shape[-2:]
        wanted = [height + -height % self._multiple, width + -width % self._multiple]
        if self._square:
            wanted = [max(wanted)] * 2
        normalised = (images - self.mean) / self.std
        padded = functional.pad(normalised, (0, wanted[1] - width, 0, wanted[0] - height), mode="replicate")
        own = {wanted[0] // level.shape[-2]: level for level in self._levels(padded)}
        last = own[max(own)]
        maps = {
            stride: own[stride] if stride in own else resample(last, wanted[0] // stride, wanted[1] // stride)
            for stride in STRIDES
        }
        return {stride: level[..., : -(-height // stride), : -(-width // stride)] for stride, level in maps.items()}

    def _levels(self, images: Tensor) -> list[Tensor]:
        """All maps [B, C, h, w] that the network gives."""
        if hasattr(self.body, "forward_intermediates"):  # a whole network of timm, as ViDT has it
            return list(self.body.forward_intermediates(images, intermediates_only=True))
        found = self.body(images)
        found = getattr(found, "feature_maps", found)
        levels = list(found.values()) if isinstance(found, Mapping) else list(found)
        if any(level.ndim != 4 for level in levels):
            raise ValueError(f"it answers with {', '.join(str([*level.shape]) for level in levels)}")
        if str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC"):
            levels = [level.permute(0, 3, 1, 2) for level in levels]
        return levels

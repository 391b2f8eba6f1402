"""A feature pyramid from the one map of a plain vision transformer: [B, D, h, w] in, three maps of C channels out.

Source: the simple feature pyramid of ViTDet (arXiv 2203.16527, section 3), its strides 8, 16 and 32 for a patch of
16 px (specs/detectors.md part 2).
"""

from __future__ import annotations

from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn


class SimpleFeaturePyramid(nn.Module):
    """Maps of twice, once and half the resolution of a transformer's map.

    Args:
        in_channels: D, width of the transformer.
        out_channels: C, channels of every map made.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = in_channels // 2
        self.scales = nn.ModuleList(
            [
                nn.Sequential(nn.ConvTranspose2d(in_channels, half, 2, stride=2), *_smooth(half, out_channels)),
                nn.Sequential(*_smooth(in_channels, out_channels)),
                nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), *_smooth(in_channels, out_channels)),
            ]
        )

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Map [B, D, h, w] to maps [B, C, 2h, 2w], [B, C, h, w] and [B, C, ceil(h/2), ceil(w/2)]."""
        return [scale(tokens) for scale in self.scales]


def _smooth(in_channels: int, out_channels: int) -> list[nn.Module]:
    """1x1 and 3x3 convolution, each followed by layer norm over the channels."""
    return [
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    ]

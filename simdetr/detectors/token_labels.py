"""Token labelling: masks and classes of a batch in, the classes that each cell of a feature map covers out; its losses.

Channel c of a target is the share of the cell's area that objects of class c cover, so that the channels of a cell sum
to the share of foreground. The original has one class too many, 0, which no object has, and uses its channel for the
foreground; ``foreground_channel`` does the same, for data whose classes start at 1.
Source: ViDT+ (arXiv 2204.07962), after token labelling (arXiv 2104.10858); definitions of specs/detectors.md B4.
Letters: B images, T objects of one image, K classes, H and W of the padded batch, h and w of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from simdetr.detectors.mask_vectors import portions
from simdetr.detectors.matcher import FOCAL_ALPHA, FOCAL_GAMMA, Target, at_least_float32


@torch.no_grad()
def token_targets(
    targets: Sequence[Target],
    num_classes: int,
    canvas_hw: tuple[int, int],
    maps_hw: Sequence[tuple[int, int]],
    foreground_channel: bool = False,
) -> list[Tensor]:
    """Classes that each cell covers.

    Args:
        targets: ``masks`` bool or uint8 [T, h, w] of each valid image, which lies at the top left of the canvas, and
            ``labels`` [T]. Where masks overlap, the earlier one counts.
        num_classes: K.
        canvas_hw: height and width of the padded batch in pixels.
        maps_hw: height and width of each feature map; it covers the canvas.
        foreground_channel: channel 0 is the share of all objects in place of class 0's.

    Returns:
        float32 [B, h, w, K] of each map, from 0 to 1.

    Raises:
        ValueError: a mask is larger than the canvas.
    """
    images = [_image_targets(target, num_classes, canvas_hw, maps_hw) for target in targets]
    levels = [torch.stack(level).permute(0, 2, 3, 1) for level in zip(*images, strict=True)]
    if foreground_channel:
        for level in levels:
            level[..., 0] = level.sum(dim=3)
    return levels


def _image_targets(
    target: Target, num_classes: int, canvas_hw: tuple[int, int], maps_hw: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Shares of one image, float32 [K, h, w] per map: objects are pooled one by one, since K can be thousands."""
    masks, labels = target["masks"].bool(), target["labels"]
    below, right = canvas_hw[0] - masks.shape[1], canvas_hw[1] - masks.shape[2]
    if below < 0 or right < 0:
        raise ValueError(f"canvas_hw: expected at least the masks' {tuple(masks.shape[1:])}, got {tuple(canvas_hw)}")
    visible = F.pad(masks & (masks.cumsum(dim=0, dtype=torch.int16) == 1), (0, right, 0, below))
    found = [torch.zeros(num_classes, *size, device=masks.device) for size in maps_hw]
    for part in portions(*visible.shape):
        pixels = visible[part, None].float()
        for level, size in zip(found, maps_hw, strict=True):
            level.index_add_(0, labels[part], F.adaptive_avg_pool2d(pixels, size)[:, 0])
    return found


def token_losses(
    tokens: Sequence[Tensor], targets: Sequence[Tensor], alpha: float = FOCAL_ALPHA, gamma: float = FOCAL_GAMMA
) -> tuple[Tensor, Tensor]:
    """Focal and dice loss of feature maps, summed over maps and images, not yet divided by the number of boxes.

    Args:
        tokens: logits [B, h, w, K] of each map.
        targets: shares of the same shapes.
        alpha: weight of positives against negatives in the focal loss.
        gamma: how much the focal loss plays down easy examples.

    Returns:
        The focal loss, a mean over cells and a sum over classes, and 1 - dice over all cells and classes.
    """
    focal, dice = [], []
    for cells, shares in zip(tokens, targets, strict=True):
        logits, wanted = at_least_float32(cells).flatten(1, 2), shares.flatten(1, 2)
        focal.append(sigmoid_focal_loss(logits, wanted.to(logits), alpha, gamma).mean(dim=1).sum())
        dice.append(_dice(logits.sigmoid().flatten(1), wanted.flatten(1)).sum())
    return torch.stack(focal).sum(), torch.stack(dice).sum()


def _dice(probabilities: Tensor, shares: Tensor) -> Tensor:
    """1 - the dice coefficient of rows, [B, n] to [B]; 1 is added to both of its parts, for images without objects."""
    common = (probabilities * shares).sum(dim=1)
    return 1.0 - (2.0 * common + 1.0) / (probabilities.sum(dim=1) + shares.sum(dim=1) + 1.0)

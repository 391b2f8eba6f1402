"""Plain numbers in, augmentation and preparation of (image, target) pairs out; torchvision.transforms.v2 does the work.

Source: multi-scale resize, flip and crop of Deformable DETR (Zhu et al. 2021, appendix; specs A9); strong colour
changes of seed 003 [0066], [0068] at the strength of MoCo v2 (Chen et al. 2020, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# published for a largest short side of 800: resize to 400, 500 or 600, cut 384 to 600; other sizes keep the ratios
_CROP_SHORT_SIDES = (400 / 800, 500 / 800, 600 / 800)
_CROP_SIDES = (384 / 800, 600 / 800)
_MAX_CROP_ASPECT = 4  # bounds the memory that a strip of an image takes before it is cropped
_COLOUR_STRENGTH = {"none": 0.0, "light": 0.4, "strong": 1.0}
_BLUR_KERNEL_PX = 9

Colour = Literal["none", "light", "strong"]


class ResizeShortSide(nn.Module):
    """Resize so that the short side has one of the given lengths, drawn at random; the long side stays in bounds.

    Args:
        short_sides: lengths in pixels.
        max_side: longest side in pixels; the short side gives way to it, down to one pixel.
    """

    def __init__(self, short_sides: Sequence[int], max_side: int) -> None:
        super().__init__()
        if not short_sides or min(short_sides) < 1 or max_side < 1:
            raise ValueError(
                f"expected lengths of at least 1 pixel, got short_sides={short_sides}, max_side={max_side}"
            )
        self.short_sides = tuple(int(side) for side in short_sides)
        self.max_side = int(max_side)

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Resize image, boxes, masks and points alike."""
        height, width = F.get_size(image)
        chosen = self.short_sides[int(torch.randint(len(self.short_sides), ()))]
        scale = min(chosen / min(height, width), self.max_side / max(height, width))
        size = [max(1, round(height * scale)), max(1, round(width * scale))]
        return _on_all(
            image,
            target,
            lambda value: F.resize(value, size, antialias=True),
            lambda points: points * points.new_tensor([size[1] / width, size[0] / height]),
        )


class RandomSizeCrop(nn.Module):
    """Cut out a window whose height and width are drawn independently; boxes and masks are cut with it, points moved.

    Args:
        min_side: smallest side of the window in pixels; smaller images are not cut along that side.
        max_side: largest side of the window in pixels.
    """

    def __init__(self, min_side: int, max_side: int) -> None:
        super().__init__()
        if not 1 <= min_side <= max_side:
            raise ValueError(f"expected 1 <= min_side <= max_side, got {min_side} and {max_side}")
        self.min_side, self.max_side = int(min_side), int(max_side)

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Cut all alike; boxes may come out empty, `DropSmallBoxes` drops them with what belongs to them."""
        full_height, full_width = F.get_size(image)
        height, width = self._draw(full_height), self._draw(full_width)
        top = int(torch.randint(full_height - height + 1, ()))
        left = int(torch.randint(full_width - width + 1, ()))
        return _on_all(
            image,
            target,
            lambda value: F.crop(value, top, left, height, width),
            lambda points: points - points.new_tensor([left, top]),
        )

    def _draw(self, side: int) -> int:
        low, high = min(self.min_side, side), min(self.max_side, side)
        return int(torch.randint(low, high + 1, ()))


class RandomMirror(nn.Module):
    """Mirror left and right, but no sample with a landmark whose point would then be on the wrong side of its object.

    Such a landmark (``target["one_sided"]``) has a class whose reference point is a left or right one, and no box to
    find the other side's by. A refusal is told as ``target["flip_refused"]``.

    Args:
        probability: share of samples that are mirrored.
    """

    def __init__(self, probability: float = 0.5) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Mirror all alike, or nothing."""
        if torch.rand(1) >= self.probability:
            return image, target
        if "one_sided" in target and target["one_sided"].any():
            return image, target | {"flip_refused": True}
        width = F.get_size(image)[1]
        return _on_all(
            image, target, F.horizontal_flip, lambda points: torch.stack([width - points[:, 0], points[:, 1]], dim=1)
        )


class DropSmallBoxes(nn.Module):
    """Leave out boxes below one pixel with their labels, masks and points; landmarks that never had a box stay."""

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Select the rows of all that goes by box."""
        boxes = target["boxes"].as_subclass(Tensor)
        kept = (boxes[:, 2:] - boxes[:, :2] >= 1).all(dim=1)
        if "only_point" in target:
            kept |= target["only_point"]
        names = [name for name in ("boxes", "labels", "scores", "masks", "points", "only_point") if name in target]
        return image, target | {name: tv_tensors.wrap(target[name][kept], like=target[name]) for name in names}


def _on_all(
    image: Tensor, target: dict[str, Any], change: Callable[[Any], Any], move: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Any]]:
    """Change the image and what lies on it; points [T, 2] move exactly, torchvision >= 0.19 may not know them."""
    changed: dict[str, Any] = {name: change(target[name]) for name in ("boxes", "masks") if name in target}
    if "points" in target:
        changed["points"] = move(target["points"])
    return change(image), target | changed


def train_transforms(
    short_sides: Sequence[int],
    max_side: int,
    crop: bool = True,
    colour: Colour | float = "strong",
    flip: bool = True,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> nn.Module:
    """Augmentation for training.

    Args:
        short_sides: lengths in pixels, one of which the short side gets.
        max_side: longest side in pixels.
        crop: in half of the images, cut out a random window before resizing.
        colour: strength of the colour changes, or 0 (none) to 1 (strong).
        flip: mirror half of the images.
        mean: channel means of the normalisation.
        std: channel deviations of the normalisation.
    """
    largest = max(short_sides, default=0)
    resize: nn.Module = ResizeShortSide(short_sides, max_side)
    if crop:
        cut = v2.Compose(
            [
                ResizeShortSide([round(part * largest) for part in _CROP_SHORT_SIDES], _MAX_CROP_ASPECT * largest),
                RandomSizeCrop(*(round(part * largest) for part in _CROP_SIDES)),
                ResizeShortSide(short_sides, max_side),
            ]
        )
        resize = v2.RandomChoice([resize, cut])
    steps = [*([RandomMirror(0.5)] if flip else []), resize, *_colour_changes(colour)]
    composed: nn.Module = v2.Compose([*steps, *_preparation(mean, std)])
    return composed


def eval_transforms(
    short_side: int, max_side: int, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> nn.Module:
    """Preparation for validation and prediction: resize and normalise; nothing is random."""
    composed: nn.Module = v2.Compose([ResizeShortSide([short_side], max_side), *_preparation(mean, std)])
    return composed


def _preparation(mean: Sequence[float], std: Sequence[float]) -> list[nn.Module]:
    return [
        v2.ClampBoundingBoxes(),
        DropSmallBoxes(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(mean), list(std)),
        v2.ToPureTensor(),
    ]


def _colour_changes(colour: Colour | float) -> list[nn.Module]:
    if isinstance(colour, str) and colour not in _COLOUR_STRENGTH:
        raise ValueError(f"colour: expected {', '.join(_COLOUR_STRENGTH)} or a number from 0 to 1, got {colour!r}")
    strength = _COLOUR_STRENGTH[colour] if isinstance(colour, str) else float(colour)
    if not 0 <= strength <= 1:
        raise ValueError(f"colour: expected a number from 0 (none) to 1 (strong), got {colour}")
    if strength == 0:
        return []
    jitter = v2.ColorJitter(0.4 * strength, 0.4 * strength, 0.4 * strength, 0.1 * strength)
    return [
        v2.RandomApply([jitter], p=0.8),
        v2.RandomGrayscale(0.2 * strength),
        v2.RandomApply([v2.GaussianBlur(_BLUR_KERNEL_PX, sigma=(0.1, 2.0))], p=0.5 * strength),
    ]

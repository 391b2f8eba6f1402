"""Plain numbers in, augmentation and preparation of (image, target) pairs out; torchvision.transforms.v2 does the work.

`Mosaic` gives a dataset's items, some of them composed of four images.

Sources: multi-scale resize, flip and crop of Deformable DETR (Zhu et al. 2021, appendix); strong colour changes of US
2025/0265826 [0066], [0068] at the strength of MoCo v2 (Chen et al. 2020, section 3); mosaics [0065]-[0067]: images are
put side by side, some of them at a lower resolution, so that their boxes shrink; without it a detector that is
pretrained on pictures of single large objects does not learn to find small ones. Boxes of rotated images hold what an
ellipse in the box before takes: "Towards Rotation Invariance in Object Detection" (Kalra et al. 2021).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from simdetr.data.dataset import DetectionDataset, Sample, item_randomness, pixel_boxes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# published for a largest short side of 800: resize to 400, 500 or 600, cut 384 to 600; other sizes keep the ratios
_CROP_SHORT_SIDES = (400 / 800, 500 / 800, 600 / 800)
_CROP_SIDES = (384 / 800, 600 / 800)
_MAX_CROP_ASPECT = 4  # bounds the memory that a strip of an image takes before it is cropped
_COLOUR_STRENGTH = {"none": 0.0, "light": 0.4, "strong": 1.0}
_BLUR_KERNEL_PX = 9
_FILL_RGB = (124, 116, 104)  # ImageNet's mean colour: near zero after the normalisation, as the padding is
_CENTRE_RANGE = (0.35, 0.65)  # where the four tiles of a mosaic meet, as a fraction of the canvas

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
            raise ValueError(f"expected lengths of at least 1 pixel, got {short_sides=}, {max_side=}")
        self.short_sides = tuple(int(side) for side in short_sides)
        self.max_side = int(max_side)

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Resize image, boxes, masks and points alike."""
        height, width = F.get_size(image)
        chosen = self.short_sides[int(torch.randint(len(self.short_sides), ()))]
        scale = min(chosen / min(height, width), self.max_side / max(height, width))
        size = [max(1, round(height * scale)), max(1, round(width * scale))]
        factors = torch.tensor([size[1] / width, size[0] / height])
        return _on_all(
            image, target, lambda value: F.resize(value, size, antialias=True), lambda points: points * factors
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
        corner = torch.tensor([left, top])
        return _on_all(
            image, target, lambda value: F.crop(value, top, left, height, width), lambda points: points - corner
        )

    def _draw(self, side: int) -> int:
        low, high = min(self.min_side, side), min(self.max_side, side)
        return int(torch.randint(low, high + 1, ()))


class RandomMirror(nn.Module):
    """Mirror left and right, but no sample with a landmark whose point would then be on the wrong side of its object.

    Such a landmark (``target["one_sided"]``) has a class whose reference point is a left or right one, and no box to
    find the other side's by. A refusal is told as ``target["flip_refused"]``. ``probability`` is of being mirrored.
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


class RandomTurn(nn.Module):
    """Rotate about the middle by an angle that is drawn; what comes in from outside is grey, what leaves is cut.

    A box that holds all of a rotated box would be far larger than its object, which seldom fills the corners. The new
    box holds the rotated ellipse that touches the four sides of the old one.

    Args:
        most_degrees: largest angle, to either side.
    """

    def __init__(self, most_degrees: float) -> None:
        super().__init__()
        if not 0 <= most_degrees <= 180:
            raise ValueError(f"rotation: expected 0 to 180 degrees, got {most_degrees}")
        self.most_degrees = float(most_degrees)

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Rotate all alike."""
        degrees = float(torch.rand(()) * 2 - 1) * self.most_degrees
        height, width = F.get_size(image)
        middle, (sine, cosine) = torch.tensor([width / 2, height / 2]), _sine_cosine(degrees)
        turn = torch.tensor([[cosine, sine], [-sine, cosine]])  # counter-clockwise, where y points down

        def move(points: Tensor) -> Tensor:
            return (points - middle) @ turn.T + middle

        def change(value: Any) -> Any:  # noqa: ANN401
            if isinstance(value, tv_tensors.BoundingBoxes):
                return tv_tensors.wrap(_turned(value.as_subclass(Tensor), move, turn), like=value)
            fill = None if isinstance(value, tv_tensors.Mask) else list(map(float, _FILL_RGB))
            smooth = F.InterpolationMode.NEAREST if fill is None else F.InterpolationMode.BILINEAR
            return F.rotate(value, degrees, interpolation=smooth, fill=fill)

        return _on_all(image, target, change, move)


def _sine_cosine(degrees: float) -> tuple[float, float]:
    return math.sin(math.radians(degrees)), math.cos(math.radians(degrees))


def _turned(boxes: Tensor, move: Callable[[Tensor], Tensor], turn: Tensor) -> Tensor:
    """Boxes [T, 4] around the rotated ellipses in them."""
    middles, halves = move((boxes[:, :2] + boxes[:, 2:]) / 2), (boxes[:, 2:] - boxes[:, :2]) / 2
    sides = (halves**2 @ (turn**2).T).sqrt()
    return torch.cat([middles - sides, middles + sides], dim=1)


class RandomNoise(nn.Module):
    """Add noise to every value, of a normal distribution whose deviation is drawn.

    Args:
        most: largest deviation, as a part of the range of the values.
    """

    def __init__(self, most: float) -> None:
        super().__init__()
        if not 0 <= most <= 1:
            raise ValueError(f"noise: expected 0 (none) to 1 (the whole range), got {most}")
        self.most = float(most)

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Change the image alone."""
        whole = 1.0 if image.is_floating_point() else 255.0
        noise = torch.randn(image.shape) * (float(torch.rand(())) * self.most * whole)
        noisy = (image.as_subclass(Tensor) + noise).clamp(0, whole).to(image.dtype)
        return tv_tensors.wrap(noisy, like=image), target


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
    changed |= {name: move(target[name]) for name in ("points", "corners") if name in target}
    return change(image), target | changed


def train_transforms(
    short_sides: Sequence[int],
    max_side: int,
    crop: bool = True,
    colour: Colour | float = "strong",
    flip: bool = True,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    *,
    rotation: float = 0.0,
    noise: float = 0.0,
    brightness: float = 0.0,
) -> nn.Module:
    """Augmentation for training.

    Args:
        short_sides: as `ResizeShortSide` has them.
        max_side: longest side in pixels.
        crop: in half of the images, cut out a random window before resizing.
        colour: strength of the colour changes, or 0 (none) to 1 (strong).
        flip: mirror half of the images.
        mean: channel means of the normalisation.
        std: channel deviations of the normalisation.
        rotation: largest angle in degrees, to either side.
        noise: largest deviation of added noise, as a part of the range of the values.
        brightness: largest part by which an image becomes brighter or darker, beside the colour changes.
    """
    largest = max(short_sides, default=0)
    resize: nn.Module = ResizeShortSide(short_sides, max_side)
    if crop:
        before = ResizeShortSide([round(part * largest) for part in _CROP_SHORT_SIDES], _MAX_CROP_ASPECT * largest)
        window = RandomSizeCrop(*(round(part * largest) for part in _CROP_SIDES))
        resize = v2.RandomChoice([resize, v2.Compose([before, window, resize])])
    if not 0 <= brightness <= 1:
        raise ValueError(f"brightness: expected 0 (as it is) to 1 (from black to twice as bright), got {brightness}")
    steps = [*([RandomMirror(0.5)] if flip else []), resize, *([RandomTurn(rotation)] if rotation else [])]
    steps += [*([v2.ColorJitter(brightness=brightness)] if brightness else []), *_colour_changes(colour)]
    steps += [RandomNoise(noise)] if noise else []
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


# ----------------------------------------------------------------------------------------------------------------------
# Mosaics


@dataclass(frozen=True)
class Placement:
    """Where one image lies on the canvas, in pixels: its top left corner and its resized height and width."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class MosaicTiles:
    """How the images of a mosaic are put together (US 2025/0265826 [0066], [0068]).

    Args:
        canvas_px: Side of the square canvas in pixels; 0 takes the size of the sample's own image.
        low_resolution: Share of tiles that are put in at a lower resolution, which makes their objects small.
        scale_range: Smallest and largest factor of a lower resolution.
        colour: Strength of colour changes that each tile gets for itself, before they are combined: none, light, strong
            or 0 to 1; the whole mosaic gets those of any image beside.
    """

    canvas_px: int = 0
    low_resolution: float = 0.5
    scale_range: tuple[float, float] = (0.4, 0.8)
    colour: Colour | float = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.low_resolution <= 1:
            raise ValueError(f"mosaic_tiles.low_resolution: expected a share from 0 to 1, got {self.low_resolution}")
        if not 0 < self.scale_range[0] <= self.scale_range[1] <= 1:
            raise ValueError(
                f"mosaic_tiles.scale_range: expected 0 < smallest <= largest <= 1, got {tuple(self.scale_range)}"
            )
        if self.canvas_px < 0:
            raise ValueError(
                f"mosaic_tiles.canvas_px: expected a side in pixels, or 0 for the image's own, got {self.canvas_px}"
            )
        _colour_changes(self.colour)


class Mosaic(Dataset[Sample | None]):
    """A detection dataset whose items are, with some probability, mosaics of 2 × 2 images.

    The item's own image comes first, three others are drawn from the set. Each is resized to fit its tile (its shape is
    kept), some to a fraction of that, and laid somewhere in the tile. A mosaic goes through the dataset's transform
    as any image does; its ``orig_size`` is the canvas and its ``image_index`` the first image's.

    Args:
        dataset: the images and labels.
        probability: share of items that become mosaics.
        tiles: how the images are put together.
        seed: seed of the draws; the dataset's own by default.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        probability: float = 0.5,
        tiles: MosaicTiles | None = None,
        seed: int | None = None,
    ) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"mosaic: expected a share from 0 to 1, got {probability}")
        self.dataset = dataset
        self.probability = probability
        self.tiles = tiles or MosaicTiles()
        self._changes = v2.Compose(changes) if (changes := _colour_changes(self.tiles.colour)) else None
        self.seed = dataset.seed if seed is None else seed

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that everything random is drawn for; also seen by workers that already run."""
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample | None:
        with item_randomness(self.seed, self.dataset.epoch, index):
            sample = self.compose(index) if float(torch.rand(())) < self.probability else self.dataset.load(index)
            return None if sample is None else self.dataset.finish(sample)

    def compose(self, index: int) -> Sample | None:
        """The untransformed mosaic of an item, drawn from torch's default generator; None where none is readable."""
        indices = [index, *torch.randint(len(self), (3,)).tolist()]
        samples = [sample for sample in map(self.dataset.load, indices) if sample is not None]
        if not samples:
            return None
        if self._changes is not None:
            samples = [(self._changes(image), target) for image, target in samples]
        own_height, own_width = samples[0][0].shape[-2:]
        canvas_hw = (max(2, self.tiles.canvas_px or own_height), max(2, self.tiles.canvas_px or own_width))
        pairs = zip(self._tiles(canvas_hw), samples, strict=False)  # fewer samples than tiles where some are unreadable
        placements = [self._place(tile, (image.shape[-2], image.shape[-1])) for tile, (image, _) in pairs]
        return compose_tiles(samples, placements, canvas_hw)

    def _tiles(self, canvas_hw: tuple[int, int]) -> list[Placement]:
        height, width = canvas_hw
        low, high = _CENTRE_RANGE
        fractions = (torch.rand(2) * (high - low) + low).tolist()
        y, x = max(1, int(fractions[0] * height)), max(1, int(fractions[1] * width))
        rows, columns = ((0, y), (y, height - y)), ((0, x), (x, width - x))
        return [Placement(top, left, tall, wide) for top, tall in rows for left, wide in columns]

    def _place(self, tile: Placement, size_hw: tuple[int, int]) -> Placement:
        """Fit an image of (height, width) into a tile, perhaps at a lower resolution, at a random place."""
        scale = min(tile.height / size_hw[0], tile.width / size_hw[1])
        if float(torch.rand(())) < self.tiles.low_resolution:
            low, high = self.tiles.scale_range
            scale *= low + (high - low) * float(torch.rand(()))
        height = min(max(1, round(size_hw[0] * scale)), tile.height)
        width = min(max(1, round(size_hw[1] * scale)), tile.width)
        top = tile.top + int(torch.randint(tile.height - height + 1, ()))
        left = tile.left + int(torch.randint(tile.width - width + 1, ()))
        return Placement(top, left, height, width)


def compose_tiles(samples: list[Sample], placements: list[Placement], canvas_hw: tuple[int, int]) -> Sample:
    """Draw samples (uint8 images with pixel boxes) at their placements on one canvas, with all that goes by box."""
    canvas = torch.tensor(_FILL_RGB, dtype=torch.uint8).view(3, 1, 1).repeat(1, *canvas_hw)
    columns: defaultdict[str, list[Tensor]] = defaultdict(list)
    for (image, target), place in zip(samples, placements, strict=True):
        rows, across = slice(place.top, place.top + place.height), slice(place.left, place.left + place.width)
        canvas[:, rows, across] = F.resize(image.as_subclass(Tensor), [place.height, place.width], antialias=True)
        factors = torch.tensor([place.width / image.shape[-1], place.height / image.shape[-2]]).repeat(2)
        shift = torch.tensor([place.left, place.top]).repeat(2)
        columns["boxes"].append(target["boxes"].as_subclass(Tensor) * factors + shift)
        if "masks" in target:
            resized = F.resize(target["masks"], [place.height, place.width]).as_subclass(Tensor)
            columns["masks"].append(resized.new_zeros(len(resized), *canvas_hw))
            columns["masks"][-1][:, rows, across] = resized
        if "points" in target:
            columns["points"].append(target["points"] * factors[:2] + shift[:2])
        for name in ("labels", "scores", "only_point", "one_sided"):
            if name in target:
                columns[name].append(target[name])
    made = {name: torch.cat(parts) for name, parts in columns.items()}
    made["boxes"] = pixel_boxes(made["boxes"], canvas_hw)
    if "masks" in made:
        made["masks"] = tv_tensors.Mask(made["masks"])
    facts = {"orig_size": torch.tensor(canvas_hw), "image_index": samples[0][1]["image_index"]}
    return tv_tensors.Image(canvas), made | facts

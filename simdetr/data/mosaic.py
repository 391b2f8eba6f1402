"""A dataset in, the same dataset with some items composed of four images out.

Source: seed 003 [0065]-[0067]: images are put side by side, some of them at a lower resolution, so that their boxes
shrink; without it a detector that is pretrained on pictures of single large objects does not learn to find small ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from simdetr.data.dataset import DetectionDataset, Sample, item_randomness, pixel_boxes

_FILL_RGB = (124, 116, 104)  # ImageNet's mean colour: near zero after the normalisation, as the padding is
_CENTRE_RANGE = (0.35, 0.65)  # where the four tiles meet, as a fraction of the canvas


@dataclass(frozen=True)
class Placement:
    """Where one image lies on the canvas, in pixels: its top left corner and its resized height and width."""

    top: int
    left: int
    height: int
    width: int


class Mosaic(Dataset[Sample | None]):
    """A detection dataset whose items are, with some probability, mosaics of 2 × 2 images.

    The item's own image comes first, three others are drawn from the set. Each is resized to fit its tile (its shape is
    kept), some to a fraction of that, and laid somewhere in the tile. A mosaic goes through the dataset's transform
    as any image does; its ``orig_size`` is the canvas and its ``image_index`` the first image's.

    Args:
        dataset: the images and labels.
        probability: share of items that become mosaics.
        canvas_px: side of the square canvas in pixels; 0 takes the size of the item's own image.
        low_resolution: share of tiles that are put in at a lower resolution.
        scale_range: smallest and largest factor of a lower resolution.
        seed: seed of the draws; the dataset's own by default.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        probability: float = 0.5,
        canvas_px: int = 0,
        low_resolution: float = 0.5,
        scale_range: tuple[float, float] = (0.4, 0.8),
        seed: int | None = None,
    ) -> None:
        if not 0 <= probability <= 1 or not 0 <= low_resolution <= 1:
            raise ValueError(f"expected shares from 0 to 1, got {probability=} and {low_resolution=}")
        if not 0 < scale_range[0] <= scale_range[1] <= 1:
            raise ValueError(f"scale_range: expected 0 < smallest <= largest <= 1, got {tuple(scale_range)}")
        if canvas_px < 0:
            raise ValueError(f"canvas_px: expected a side in pixels, or 0 for the image's own size, got {canvas_px}")
        self.dataset = dataset
        self.probability = probability
        self.canvas_px = canvas_px
        self.low_resolution = low_resolution
        self.scale_range = (float(scale_range[0]), float(scale_range[1]))
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
        own_height, own_width = samples[0][0].shape[-2:]
        canvas_hw = (max(2, self.canvas_px or own_height), max(2, self.canvas_px or own_width))
        tiles = self._tiles(canvas_hw)
        placements = [
            self._place(tile, (sample[0].shape[-2], sample[0].shape[-1]))
            for tile, sample in zip(tiles, samples, strict=False)  # fewer samples than tiles where some are unreadable
        ]
        return compose_tiles(samples, placements, canvas_hw)

    def _tiles(self, canvas_hw: tuple[int, int]) -> list[Placement]:
        height, width = canvas_hw
        low, high = _CENTRE_RANGE
        fractions = (torch.rand(2) * (high - low) + low).tolist()
        y, x = max(1, int(fractions[0] * height)), max(1, int(fractions[1] * width))
        below, right = height - y, width - x
        return [
            Placement(0, 0, y, x),
            Placement(0, x, y, right),
            Placement(y, 0, below, x),
            Placement(y, x, below, right),
        ]

    def _place(self, tile: Placement, size_hw: tuple[int, int]) -> Placement:
        """Fit an image of (height, width) into a tile, perhaps at a lower resolution, at a random place."""
        scale = min(tile.height / size_hw[0], tile.width / size_hw[1])
        if float(torch.rand(())) < self.low_resolution:
            low, high = self.scale_range
            scale *= low + (high - low) * float(torch.rand(()))
        height = min(max(1, round(size_hw[0] * scale)), tile.height)
        width = min(max(1, round(size_hw[1] * scale)), tile.width)
        top = tile.top + int(torch.randint(tile.height - height + 1, ()))
        left = tile.left + int(torch.randint(tile.width - width + 1, ()))
        return Placement(top, left, height, width)


def compose_tiles(samples: list[Sample], placements: list[Placement], canvas_hw: tuple[int, int]) -> Sample:
    """Draw samples (uint8 images with pixel boxes) at their placements on one canvas, with all that goes by box."""
    canvas = torch.tensor(_FILL_RGB, dtype=torch.uint8).view(3, 1, 1).repeat(1, *canvas_hw)
    boxes: list[Tensor] = []
    masks: list[Tensor] = []
    points: list[Tensor] = []
    for (image, target), place in zip(samples, placements, strict=True):
        rows, columns = slice(place.top, place.top + place.height), slice(place.left, place.left + place.width)
        canvas[:, rows, columns] = F.resize(image.as_subclass(Tensor), [place.height, place.width], antialias=True)
        factors = torch.tensor([place.width / image.shape[-1], place.height / image.shape[-2]]).repeat(2)
        shift = torch.tensor([place.left, place.top]).repeat(2)
        boxes.append(target["boxes"].as_subclass(Tensor) * factors + shift)
        if "masks" in target:
            resized = F.resize(target["masks"], [place.height, place.width]).as_subclass(Tensor)
            masks.append(resized.new_zeros(len(resized), *canvas_hw))
            masks[-1][:, rows, columns] = resized
        if "points" in target:
            points.append(target["points"] * factors[:2] + shift[:2])
    extra: dict[str, Tensor] = {"masks": tv_tensors.Mask(torch.cat(masks))} if masks else {}
    if points:
        flags = {name: torch.cat([target[name] for _, target in samples]) for name in ("only_point", "one_sided")}
        extra |= {"points": torch.cat(points), **flags}
    return tv_tensors.Image(canvas), {
        "boxes": pixel_boxes(torch.cat(boxes), canvas_hw),
        "labels": torch.cat([target["labels"] for _, target in samples]),
        "scores": torch.cat([target["scores"] for _, target in samples]),
        "orig_size": torch.tensor(canvas_hw),
        "image_index": samples[0][1]["image_index"],
        **extra,
    }

"""Unlabelled images in, batches of random crops out, the same for the same (seed, epoch, step).

Decoding, quarantine and order are those of detector training; only what becomes of an image differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from simdetr.data.dataset import DetectionDataset, Sample, item_randomness, item_seed
from simdetr.data.images import ImageSource, UnreadableImageError
from simdetr.data.quarantine import Quarantine
from simdetr.training.sampler import EpochBatchSampler, ResumableLoader

Crops = Callable[[Image.Image], Sequence[Any]]
"""One image to its views, each a tensor, and what else an objective needs of them."""


def as_it_is(image: Tensor, target: dict[str, object]) -> Sample:
    """The transform of a dataset whose images are cropped by someone else."""
    return image, target


class Views(Dataset[list[Tensor]]):
    """Random views of the images of a source; an unreadable one is recorded and replaced by the next.

    Seed and epoch are those that the crops are drawn for.
    """

    def __init__(
        self, source: ImageSource, crops: Crops, quarantine: Quarantine | None = None, seed: int = 0, epoch: int = 0
    ) -> None:
        self.images = DetectionDataset(source, None, as_it_is, quarantine=quarantine, replace_unreadable=True)
        self.crops, self.seed, self.epoch = crops, seed, epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        sample = self.images.load(index)
        if sample is None:  # cannot be: it is replaced, or an error
            raise UnreadableImageError(self.images.source.root, "no image can be read")
        picture = F.to_pil_image(sample[0])
        with item_randomness(self.seed, self.epoch, index), numpy_randomness(item_seed(self.seed, self.epoch, index)):
            return [view.as_subclass(Tensor) for view in self.crops(picture)]  # plain tensors, which workers can stack


@contextmanager
def numpy_randomness(seed: int) -> Iterator[None]:
    """Seed numpy's global generator inside the block: lightly's blur and solarisation draw from it."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


class EncoderData(pl.LightningDataModule):
    """Loaders of views whose position in the epoch is saved; ``quarantine`` is the file for unreadable images.

    Past the share ``max_unreadable`` of all images, unreadable ones stop the training.

    Raises:
        ValueError: for fewer images than a batch has: it would hold an image twice, as if it were two.
    """

    def __init__(
        self,
        source: ImageSource,
        crops: Crops,
        batch_size: int,
        num_workers: int,
        seed: int,
        quarantine: Path,
        max_unreadable: float = 0.05,
    ) -> None:
        super().__init__()
        if len(source) < batch_size:
            raise ValueError(
                f"batch_size: expected at most the number of images, got {batch_size} for {len(source)} in "
                f"{source.root}; lower it (2 is the least) or add images"
            )
        self.source, self.crops, self.seed = source, crops, seed
        self.batch_size, self.num_workers = batch_size, num_workers
        self.quarantine = Quarantine(quarantine, len(source), max_unreadable)
        self._loader: ResumableLoader | None = None
        self._position: dict[str, int] | None = None

    def train_dataloader(self) -> ResumableLoader:
        """Loader of the trainer's current epoch; Lightning asks again at every epoch."""
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        views = Views(self.source, self.crops, self.quarantine, self.seed, epoch)
        batches = EpochBatchSampler(len(views), self.batch_size, self.seed, epoch)
        loader = ResumableLoader(views, batch_sampler=batches, num_workers=self.num_workers)
        if self._position is not None:
            loader.load_state_dict(self._position)
        self._loader = loader
        return loader

    def state_dict(self) -> dict[str, int]:
        """Position in the epoch."""
        return self._loader.state_dict() if self._loader is not None else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Remember where an interrupted run stood."""
        self._position = state_dict or None


class CropWithPlaces:
    """A random crop, resized and perhaps mirrored, with the centres of its cells in the image that it came from.

    Lightly's own crop is not used: it spreads the cells of a view over more than the view. ``size`` is the crop's side
    in pixels, with ``cells`` per side; ``scale`` the smallest and largest part of the image's area.
    """

    def __init__(self, size: int, cells: int, scale: Sequence[float]) -> None:
        self.size, self.cells, self.scale = size, cells, list(scale)

    def __call__(self, image: Image.Image) -> tuple[Image.Image, Tensor]:
        """The crop, and the places [H, W, 2] of its cells: x, y in pixels of the image."""
        top, left, height, width = RandomResizedCrop.get_params(image, self.scale, [3 / 4, 4 / 3])
        view = F.resized_crop(image, top, left, height, width, [self.size, self.size], antialias=True)
        centres = (torch.arange(self.cells) + 0.5) / self.cells
        across = left + width * centres
        if torch.rand(()) < 0.5:
            view, across = F.hflip(view), across.flip(0)
        grid = torch.meshgrid(across, top + height * centres, indexing="xy")
        return view, torch.stack(grid, dim=-1)

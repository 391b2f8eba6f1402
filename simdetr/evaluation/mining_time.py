"""Some images of a source in; their mined rows and where the time went out.

The loop is that of a full run: :func:`simdetr.proposals.shard_mining.mine_rows` fed by decoding threads, here with
stopwatches around its parts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simdetr.data.images import ImageSource
from simdetr.proposals.batch_mining import MiningConfig
from simdetr.proposals.features import Encoder
from simdetr.proposals.image_loading import ImageLoading, LoadedImage, load_image
from simdetr.proposals.shard_mining import mine_rows
from simdetr.proposals.shards import ProposalRow


@dataclass(frozen=True)
class MiningTime:
    """Where the time went. All in seconds, for all images together.

    Attributes:
        images: number of images.
        total: from the first to the last.
        decoding: of the decoding threads, added up; it goes on beside the rest.
        waiting: for decoded images, when nothing else could be done.
        encoder: in the encoder.
        cpu: of the process, on all its cores.
        batches: number of calls of the encoder.
    """

    images: int
    total: float
    decoding: float
    waiting: float
    encoder: float
    cpu: float
    batches: int

    @property
    def images_per_s(self) -> float:
        """Speed of one process."""
        return self.images / self.total

    @property
    def clustering(self) -> float:
        """Of everything after the encoder, from clusters to boxes."""
        return max(0.0, self.total - self.waiting - self.encoder)

    @property
    def busy_cores(self) -> float:
        """Processor cores in use, on average."""
        return self.cpu / self.total


def warm_up(source: ImageSource, positions: Sequence[int], encoder: Encoder, config: MiningConfig, device: str) -> None:
    """Load, compile and allocate what the first batch would; on a processor one image does that."""
    for position in positions:
        image = load_image(source[position], config.image_size)
        if image.pixels is not None:
            copies = 1 if device == "cpu" else min(config.batch_size, len(positions))
            mine_rows([image] * copies, encoder, config, device)
            return


def mine_timed(
    source: ImageSource, positions: Sequence[int], encoder: Encoder, config: MiningConfig, device: str
) -> tuple[list[ProposalRow], dict[str, str], MiningTime]:
    """Rows, reasons and times: the loop of a full run over these images."""
    timed = _TimedEncoder(encoder, device)
    threads = config.decoding_threads(device)
    with ImageLoading(source, positions, config.image_size, threads, ahead=config.batch_size) as loading:
        images = _TimedImages(loading)
        start, cpu = time.perf_counter(), time.process_time()
        rows, unreadable = mine_rows(images, timed, config, device)
        _finish(device)
        total, cpu = time.perf_counter() - start, time.process_time() - cpu
    taken = MiningTime(len(rows), total, images.decoding, images.waiting, timed.seconds, cpu, timed.calls)
    return rows, unreadable, taken


class _TimedImages:
    """Passes loaded images through; notes how long their decoding and the waiting for it took."""

    def __init__(self, images: Iterator[LoadedImage]) -> None:
        self._images = images
        self.decoding = self.waiting = 0.0

    def __iter__(self) -> Iterator[LoadedImage]:
        return self

    def __next__(self) -> LoadedImage:
        start = time.perf_counter()
        image = next(self._images)
        self.waiting += time.perf_counter() - start
        self.decoding += image.seconds
        return image


class _TimedEncoder:
    """An encoder that notes how long it takes, until its device has finished."""

    def __init__(self, encoder: Encoder, device: str) -> None:
        self._encoder, self._device = encoder, device
        self.strides, self.region_dim, self.fingerprint = encoder.strides, encoder.region_dim, encoder.fingerprint
        self.seconds, self.calls = 0.0, 0

    def __call__(self, images: Tensor) -> dict[int, Tensor]:
        _finish(self._device)
        start = time.perf_counter()
        maps = self._encoder(images)
        _finish(self._device)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return maps


def _finish(device: str) -> None:
    """Wait until a device has done what it was given."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()

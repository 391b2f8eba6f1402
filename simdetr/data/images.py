"""A folder, list, COCO file or tar shards in, an ordered list of images with stable ids out; an image in, pixels out.

Whatever the file holds (EXIF rotation, grayscale, palette, transparency, 16 bits, CMYK), the pixels come out the same
way: uint8 [3, H, W], RGB, upright. A file that cannot be decoded raises `UnreadableImageError` with the reason, so
that a run can put it aside and go on (design.md §11).
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from io import BufferedReader, BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from simdetr.data.image_lists import IMAGE_SUFFIXES, LIST_SUFFIXES, find_images, find_tars, read_list
from simdetr.data.locations import Location, below, locate
from simdetr.data.tar_images import TarMembers, index_tars, is_tar, numbered

MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {  # EXIF orientation -> the transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAX_UINT16 = 65535


class UnreadableImageError(Exception):
    """An image file that cannot be decoded; ``path`` names it and ``reason`` says why."""

    def __init__(self, path: str | Location, reason: str) -> None:
        super().__init__(path, reason)  # both as arguments, so that the error survives pickling between processes
        self.path = Path(str(path))
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class ImageRecord:
    """One image of a source.

    Attributes:
        id: stable.
        path: the file it lies in, local or on another storage.
        span: offset and size of its bytes in a tar file; None where the file is the image.
    """

    id: str
    path: Location
    span: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The file, and the member of it, for people."""
        return str(self.path) if self.span is None else f"{self.path}: {self.id.rpartition(f'{self.path.name}/')[2]}"

    def open(self) -> BufferedReader | BytesIO:
        """A stream over its bytes; of a remote file they are fetched at once."""
        if isinstance(self.path, Path):
            if self.span is None:
                return self.path.open("rb")
            offset, size = self.span
            with self.path.open("rb") as stream:
                stream.seek(offset)
                return BytesIO(stream.read(size))
        start, end = (None, None) if self.span is None else (self.span[0], sum(self.span))
        return BytesIO(self.path.fs.cat_file(self.path.path, start=start, end=end))


@dataclass(frozen=True)
class ImageSource:
    """An ordered list of images below a root folder.

    Attributes:
        root: folder that the ids are relative to.
        ids: posix paths relative to the root, each once; they stay the same when the folder moves.
        members: where the images lie in tar files; None where every image is a file of its own.
    """

    root: Location
    ids: Sequence[str]
    members: TarMembers | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", locate(self.root))
        object.__setattr__(self, "ids", tuple(self.ids))
        if len(self._positions) != len(self.ids):
            raise ValueError(f"ids: expected each once, got {len(self.ids) - len(self._positions)} repeated")

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {image_id: position for position, image_id in enumerate(self.ids)}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> ImageRecord:
        if self.members is None:
            return ImageRecord(self.ids[index], below(self.root, self.ids[index]))
        tar, offset, size = self.members.spans[index].tolist()
        return ImageRecord(self.ids[index], below(self.root, self.members.tars[tar]), (offset, size))

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._positions

    def __iter__(self) -> Iterator[ImageRecord]:
        return map(self.__getitem__, range(len(self)))

    def position(self, image_id: str) -> int:
        """Where an image stands in the order; KeyError if it is not in this source."""
        return self._positions[image_id]

    def record(self, image_id: str) -> ImageRecord:
        """The image of an id, for :func:`read_image`; KeyError if it is not in this source."""
        return self[self._positions[image_id]]

    def path_of(self, image_id: str) -> Location:
        """The file that an image lies in."""
        return self.record(image_id).path

    def subset(self, ids: Iterable[str]) -> ImageSource:
        """The source of some of its images, in the given order.

        Raises:
            ValueError: an id is not in this source.
        """
        wanted = tuple(ids)
        unknown = set(wanted) - self._positions.keys()
        if unknown:
            raise ValueError(f"ids: {len(unknown)} of {len(wanted)} are not in this source, such as {min(unknown)!r}")
        members = None if self.members is None else self.members.take([self._positions[name] for name in wanted])
        return ImageSource(self.root, wanted, members)

    def fingerprint(self) -> str:
        """Hash of the ids in their order; the same wherever the root lies."""
        return hashlib.blake2b("\0".join(self.ids).encode(), digest_size=16).hexdigest()


def open_images(path: str | Location, root: str | Location | None = None) -> ImageSource:
    """List the images of a folder (recursively), a list file, a COCO file, tar files or a single image file.

    Args:
        path: a folder of images, or of .tar files where it holds no images; a .tar, or several as
            ``shards/{000..009}.tar``; a .txt, .csv or .parquet list (column ``path`` or the first one) of images or of
            .tar files; a COCO .json; an image. All but lists may lie on another storage, such as ``s3://bucket/photos``.
        root: folder that listed paths are relative to; by default the list's own folder or, for a COCO file, the
            folder near it in which its images are found (``instances_val.json`` may speak of ``val/``).

    Raises:
        FileNotFoundError: ``path`` or ``root`` does not exist.
        ValueError: there is no image, or the list cannot be read.
    """
    parent, names = numbered(path.as_posix() if isinstance(path, Path) else str(path))
    places = [locate(parent + name) for name in names]
    place, folder = places[0], None if root is None else locate(root)
    for argument in (*places, folder):
        if argument is not None and not argument.exists():
            raise FileNotFoundError(f"{argument} does not exist; give a folder of images, a list file or a COCO JSON")
    suffix = place.suffix.lower()
    if place.is_dir() and len(names) == 1:
        ids = find_images(place)
        source = ImageSource(place, ids) if ids else _tar_source(place, find_tars(place))
    elif all(map(is_tar, names)):
        source = _tar_source(locate(parent), names)
    elif suffix in LIST_SUFFIXES and isinstance(place, Path):
        source = _listed_source(place, *read_list(place, folder))
    elif suffix in IMAGE_SUFFIXES and len(names) == 1:
        source = ImageSource(place.parent, [place.name])
    else:
        known = ", ".join(LIST_SUFFIXES)
        raise ValueError(
            f"path: expected a folder, an image or a list ({known}) on this machine, or .tar files, got {path}"
        )
    if not len(source):
        raise ValueError(f"{path} holds no images; expected files named {', '.join(sorted(IMAGE_SUFFIXES))}")
    return source


def _tar_source(root: Location, tars: Sequence[str]) -> ImageSource:
    ids, members = index_tars(root, tars, IMAGE_SUFFIXES)
    return ImageSource(root, ids, members)


def _listed_source(path: Path, root: Location, names: Sequence[str]) -> ImageSource:
    tars = sum(map(is_tar, names))
    if tars not in (0, len(names)):
        raise ValueError(
            f"{path}: expected images or tar files, got {tars} tars among {len(names)} lines; split the list"
        )
    return _tar_source(root, names) if tars else ImageSource(root, names)


def read_image(image: ImageRecord | str | Location, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image to RGB as a viewer shows it; uint8 [3, H, W].

    Transparent pixels lie on white, 16-bit values are divided by 257, of an animation the first frame is taken.

    Args:
        image: an image of a source, or the path or URL of a file.
        max_pixels: images with more pixels are refused before they are decoded.

    Raises:
        UnreadableImageError: the file is missing, empty, truncated, no image, too large, or of an undefined range.
    """
    record = image if isinstance(image, ImageRecord) else ImageRecord(str(image), locate(image))
    try:
        with _quiet_pillow(), record.open() as stream, Image.open(stream) as opened:
            if opened.width * opened.height > max_pixels:
                raise ValueError(f"{opened.width}×{opened.height} has more than {max_pixels} pixels")
            orientation = _orientation(opened)
            rgb = _to_rgb(opened)
            upright = rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb
            pixels = torch.from_numpy(np.array(upright))
    except Exception as error:  # decoders raise all kinds of errors on damaged files
        raise UnreadableImageError(record.name, _reason(record, error)) from error
    return pixels.permute(2, 0, 1).contiguous()


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged metadata says nothing about the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; save as 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > _MAX_UINT16):
            raise ValueError(f"pixel values {values.min()} to {values.max()} exceed 16 bits; save as 8 or 16 bits")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


def _reason(record: ImageRecord, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        with record.open() as stream:
            return "no image, or of an unknown format" if stream.read(1) else "empty file"
    return f"{error or type(error).__name__}"


_quiet_lock = threading.Lock()
_quiet_blocks: list[warnings.catch_warnings] = []
_quiet_depth = 0


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings on odd but readable files (large, damaged metadata).

    Warning filters belong to the process, so threads that decode at the same time share one block: the first one in
    opens it, the last one out closes it.
    """
    global _quiet_depth
    with _quiet_lock:
        if _quiet_depth == 0:
            block = warnings.catch_warnings()
            block.__enter__()
            _quiet_blocks.append(block)
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _quiet_depth += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0:
                _quiet_blocks.pop().__exit__(None, None, None)

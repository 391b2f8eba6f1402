"""A folder, list or COCO file in, an ordered list of images with stable ids out; an image file in, RGB pixels out.

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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from simdetr.data.image_lists import IMAGE_SUFFIXES, LIST_SUFFIXES, find_images, read_list

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

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)  # both as arguments, so that the error survives pickling between processes
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class ImageRecord:
    """One image of a source: its stable id and the file it lies in."""

    id: str
    path: Path


@dataclass(frozen=True)
class ImageSource:
    """An ordered list of images below a root folder.

    Attributes:
        root: folder that the ids are relative to.
        ids: posix paths relative to the root, each once; they stay the same when the folder moves.
    """

    root: Path
    ids: Sequence[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))
        object.__setattr__(self, "ids", tuple(self.ids))
        if len(self._id_set) != len(self.ids):
            raise ValueError(f"ids: expected each once, got {len(self.ids) - len(self._id_set)} repeated")

    @cached_property
    def _id_set(self) -> frozenset[str]:
        return frozenset(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> ImageRecord:
        return ImageRecord(self.ids[index], self.path_of(self.ids[index]))

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._id_set

    def __iter__(self) -> Iterator[ImageRecord]:
        return (ImageRecord(image_id, self.path_of(image_id)) for image_id in self.ids)

    def path_of(self, image_id: str) -> Path:
        """The file of an image id."""
        return self.root / image_id

    def subset(self, ids: Iterable[str]) -> ImageSource:
        """The source of some of its images, in the given order.

        Raises:
            ValueError: an id is not in this source.
        """
        wanted = tuple(ids)
        unknown = set(wanted) - self._id_set
        if unknown:
            raise ValueError(f"ids: {len(unknown)} of {len(wanted)} are not in this source, such as {min(unknown)!r}")
        return ImageSource(self.root, wanted)

    def fingerprint(self) -> str:
        """Hash of the ids in their order; the same wherever the root lies."""
        return hashlib.blake2b("\0".join(self.ids).encode(), digest_size=16).hexdigest()


def open_images(path: str | Path, root: str | Path | None = None) -> ImageSource:
    """List the images of a folder (recursively), a list file, a COCO file or a single image file.

    Args:
        path: a folder, a .txt, .csv or .parquet list (column ``path`` or the first one), a COCO .json, or an image.
        root: folder that listed paths are relative to; by default the list's own folder or, for a COCO file, the
            folder near it in which its images are found (``instances_val.json`` may speak of ``val/``).

    Raises:
        FileNotFoundError: ``path`` or ``root`` does not exist.
        ValueError: there is no image, or the list cannot be read.
    """
    path = Path(path)
    folder = None if root is None else Path(root)
    for argument in (path, folder):
        if argument is not None and not argument.exists():
            raise FileNotFoundError(f"{argument} does not exist; give a folder of images, a list file or a COCO JSON")
    suffix = path.suffix.lower()
    if path.is_dir():
        source = ImageSource(path, find_images(path))
    elif suffix in LIST_SUFFIXES:
        source = ImageSource(*read_list(path, folder))
    elif suffix in IMAGE_SUFFIXES:
        source = ImageSource(path.parent, [path.name])
    else:
        known = ", ".join(LIST_SUFFIXES)
        raise ValueError(f"path: expected a folder, an image or a list ({known}), got {path}")
    if not len(source):
        raise ValueError(f"{path} holds no images; expected files named {', '.join(sorted(IMAGE_SUFFIXES))}")
    return source


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image file to RGB as a viewer shows it; uint8 [3, H, W].

    Transparent pixels lie on white, 16-bit values are divided by 257, of an animation the first frame is taken.

    Args:
        path: the image file.
        max_pixels: images with more pixels are refused before they are decoded.

    Raises:
        UnreadableImageError: the file is missing, empty, truncated, no image, too large, or of an undefined range.
    """
    path = Path(path)
    try:
        with _quiet_pillow(), Image.open(path) as image:
            if image.width * image.height > max_pixels:
                raise UnreadableImageError(path, f"{image.width}×{image.height} has more than {max_pixels} pixels")
            orientation = _orientation(image)
            rgb = _to_rgb(image)
            upright = rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb
            pixels = torch.from_numpy(np.array(upright))
    except UnreadableImageError:
        raise
    except Exception as error:  # decoders raise all kinds of errors on damaged files
        raise UnreadableImageError(path, _reason(path, error)) from error
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


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if path.is_file() and path.stat().st_size == 0:
        return "empty file"
    if isinstance(error, UnidentifiedImageError):
        return "no image, or of an unknown format"
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

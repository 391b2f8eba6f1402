"""A folder, list, COCO file or tar shards in, an ordered list of images with stable ids out; an image in, pixels out.

A list is a .txt (one path per line, ``#`` starts a comment line), a .csv or .parquet (column ``path``, else the first
column) or a COCO .json (the ``file_name`` of its images). An id is the posix path relative to the root; a path that
lies outside the root keeps its absolute form, a URL stays as it is.

In tar files, laid out as webdataset does, the id is ``<tar>/<member>``. The headers are read once, an image by its
offset, so any number of threads and processes may read the same tar. Members that are no images are passed over.

Whatever the file holds (EXIF rotation, grayscale, palette, transparency, 16 bits, CMYK), the pixels come out uint8
[3, H, W], RGB, upright. A file that cannot be decoded raises `UnreadableImageError` with the reason.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import re
import tarfile
import threading
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from io import SEEK_END, BufferedReader, BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from simdetr.data.annotations import LabelError
from simdetr.data.storage import Location, below, files_below, is_url, locate, read_lists

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
_FEW_PIXELS = 2**24  # so many need no more memory than many a photograph
_MOST_PIXELS_PER_BYTE = 10_000  # a blank bilevel PNG has some 8,000
IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
LIST_SUFFIXES = (".csv", ".json", ".parquet", ".txt")
_PROBED_NAMES = 32  # file names looked up when guessing the folder that a COCO file speaks of
_TAR_BLOCK_BYTES = 512
_BRIGHT = 64  # of 255: an image without a value as high as this is dark
_DARK_SAMPLE = 4
_NUMBERED = re.compile(r"(.*)\{(\d+)\.\.(\d+)\}(.*)")
_UPRIGHT = {  # EXIF orientation -> the transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_log = logging.getLogger(__name__)


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
class TarMembers:
    """Where images lie in tar files.

    Attributes:
        tars: paths of the tar files, relative to the root of the source.
        spans: int64 [N, 3]: for every image the number of its tar, and offset and size of its bytes.
    """

    tars: Sequence[str]
    spans: NDArray[np.int64]


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
        """The source of some of its images, in the given order; a ValueError if it lacks an id."""
        wanted = tuple(ids)
        unknown = set(wanted) - self._positions.keys()
        if unknown:
            raise ValueError(f"ids: {len(unknown)} of {len(wanted)} are not in this source, such as {min(unknown)!r}")
        if self.members is None:
            return ImageSource(self.root, wanted)
        spans = self.members.spans[[self._positions[name] for name in wanted]]
        return ImageSource(self.root, wanted, TarMembers(self.members.tars, spans))

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
        source = ImageSource(place, ids) if ids else _tar_source(place, sorted(filter(_is_tar, files_below(place))))
    elif all(map(_is_tar, names)):
        source = _tar_source(locate(parent), names)
    elif suffix in LIST_SUFFIXES and isinstance(place, Path):
        source = _listed_source(place, folder)
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


def find_images(folder: Location) -> list[str]:
    """Posix paths, relative to the folder and sorted, of all images below it; hidden files and folders are left out."""
    return sorted(name for name in files_below(folder) if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES)


def numbered(pattern: str) -> tuple[str, list[str]]:
    """A folder, and the names in it that ``{000..009}`` in a path stands for; one name where there is no such range."""
    cut = pattern.partition("{")[0].rfind("/") + 1
    folder, name = pattern[:cut], pattern[cut:]
    match = _NUMBERED.fullmatch(name)
    if match is None or int(match[2]) > int(match[3]):
        return folder, [name]
    before, first, last, after = match.groups()
    return folder, [f"{before}{number:0{len(first)}d}{after}" for number in range(int(first), int(last) + 1)]


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


# ----------------------------------------------------------------------------------------------------------------------
# Lists


def _listed_source(path: Path, root: Location | None) -> ImageSource:
    """The images or tars of a list file, in its order and each once."""
    folder: Location
    try:
        if path.suffix.lower() == ".json":
            names = _coco_names(path)
            folder = root if root is not None else _coco_root(path, names)
        else:
            names = {".txt": _txt_names, ".csv": _csv_names, ".parquet": _parquet_names}[path.suffix.lower()](path)
            folder = root if root is not None else path.parent
    except (UnicodeDecodeError, LabelError, csv.Error, OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as an image list: {error}") from error
    ids = list(dict.fromkeys(_relative(name, folder) for name in names))
    tars = sum(map(_is_tar, ids))
    if tars not in (0, len(ids)):
        raise ValueError(
            f"{path}: expected images or tar files, got {tars} tars among {len(ids)} lines; split the list"
        )
    return _tar_source(folder, ids) if tars else ImageSource(folder, ids)


def _coco_names(path: Path) -> list[str]:
    entries = read_lists(path, "COCO file", "images")["images"]
    names = [entry.get("file_name") for entry in entries if isinstance(entry, dict)]
    found = [name for name in names if isinstance(name, str)]
    if entries and not found:
        raise ValueError(f"{path}: expected 'images' with a 'file_name' each, got none")
    if len(found) < len(entries):  # as labels are read
        _log.warning(
            "%s: %d of its %d images have no file_name and are left out", path, len(entries) - len(found), len(entries)
        )
    return found


def _txt_names(path: Path) -> list[str]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _csv_names(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        rows = [row for row in csv.reader(stream) if row and any(cell.strip() for cell in row)]
    if not rows:
        return []
    header = [cell.strip().lower() for cell in rows[0]]
    column = header.index("path") if "path" in header else 0
    has_header = "path" in header or Path(header[0]).suffix not in IMAGE_SUFFIXES
    body = rows[1:] if has_header else rows
    if any(len(row) <= column for row in body):
        raise ValueError(f"{path}: every row needs a value in column {column + 1}, which holds the image paths")
    return [row[column].strip() for row in body]


def _parquet_names(path: Path) -> list[str]:
    names = pq.read_schema(path).names
    column = "path" if "path" in names else names[0]
    return [str(value) for value in pq.read_table(path, columns=[column])[column].to_pylist()]


def _relative(name: str, root: Location) -> str:
    path = Path(name)
    if is_url(name):
        return name
    if isinstance(root, Path) and path.is_absolute() and path.is_relative_to(root.absolute()):
        path = path.relative_to(root.absolute())
    return _spelt_as_there(path.as_posix(), root)


def _spelt_as_there(name: str, root: Location) -> str:
    """A listed name as its file spells it: with slashes for backslashes, or in another Unicode form."""
    if name.isascii() and "\\" not in name:
        return name
    slashed = name.replace("\\", "/")
    spellings = (name, slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD")))
    return next((spelling for spelling in spellings if below(root, spelling).is_file()), name)


def _coco_root(path: Path, names: list[str]) -> Path:
    """The folder in which the images of a COCO file lie: its own, or one beside it named like its split."""
    parts = (*(part for part in path.stem.split("_") if part), "images")
    folders = [path.parent, *(beside / part for beside in (path.parent, path.parent.parent) for part in parts)]
    probed = names[:: max(1, len(names) // _PROBED_NAMES)][:_PROBED_NAMES]
    hits = [sum((folder / _spelt_as_there(name, folder)).is_file() for name in probed) for folder in folders]
    if probed and max(hits) == 0:
        tried = ", ".join(str(folder) for folder in folders)
        raise ValueError(
            f"{path}: none of its images was found (first: {probed[0]!r}; looked in {tried}); put the file beside the "
            "folder that its file names are relative to, or give that folder instead of the file"
        )
    return folders[hits.index(max(hits))]


# ----------------------------------------------------------------------------------------------------------------------
# Tar files


def _tar_source(root: Location, tars: Iterable[str]) -> ImageSource:
    """All images in tar files, tar by tar in the order in which they lie there.

    Of a damaged tar, or one that is cut short, the images before the damage are kept and a warning tells of it.
    """
    names = list(dict.fromkeys(tars))
    ids: list[str] = []
    spans = [np.zeros((0, 3), np.int64)]
    with ThreadPoolExecutor() as pool:  # remote headers come with a delay
        found = pool.map(lambda name: _index(below(root, name)), names)
        for number, (name, (members, damage)) in enumerate(zip(names, found, strict=True)):
            if damage:
                _log.warning(
                    "%s: %s; its first %d images are used, restore the file for the others", name, damage, len(members)
                )
            ids += [f"{name}/{member}" for member in members]
            places = np.array(list(members.values()), np.int64).reshape(-1, 2)
            spans.append(np.insert(places, 0, number, axis=1))
    return ImageSource(root, ids, TarMembers(tuple(names), np.concatenate(spans)))


def _index(tar: Location) -> tuple[dict[str, tuple[int, int]], str]:
    """Offset and size of every image of a tar by its name, and what is wrong with the tar, if anything."""
    members: dict[str, tuple[int, int]] = {}
    total = tar.stat().st_size
    with tar.open("rb") as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # else it keeps every header
                    name = PurePosixPath(member.name)
                    if member.offset_data + member.size > total:
                        return members, f"is cut short within {member.name}"
                    hidden = any(part.startswith(".") for part in name.parts)
                    if member.isreg() and name.suffix.lower() in IMAGE_SUFFIXES and not hidden:
                        # of two of a name the last, as tar
                        members[name.as_posix()] = (member.offset_data, member.size)
                stream.seek(archive.offset)
        except tarfile.TarError as error:
            return members, f"is damaged, compressed or no tar ({error})"
        end = stream.read(_TAR_BLOCK_BYTES)
    return members, "" if end and not any(end) else "is cut short or damaged: it has no end mark"


# ----------------------------------------------------------------------------------------------------------------------
# Pixels


def read_image(image: ImageRecord | str | Location, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image to RGB as a viewer shows it; uint8 [3, H, W].

    Transparent pixels lie on white, 16-bit values are divided by 257, of an animation the first frame is taken.

    Args:
        image: an image of a source, or the path or URL of a file.
        max_pixels: images with more pixels are refused before they are decoded.

    Raises:
        UnreadableImageError: the file is missing, empty, truncated, no image, too large, or of an undefined range.
    """
    import torch  # here: who only lists images or shows them need not load it

    record = image if isinstance(image, ImageRecord) else ImageRecord(str(image), locate(image))
    return torch.from_numpy(read_pixels(record, max_pixels)).permute(2, 0, 1).contiguous()


def read_pixels(record: ImageRecord, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The same as an array of uint8 [H, W, 3], without torch.

    Raises:
        UnreadableImageError: as ``read_image``.
    """
    try:
        return _decoded(record, max_pixels)
    except Exception as error:  # decoders raise all kinds of errors on damaged files
        raise UnreadableImageError(record.name, _reason(record, error)) from error


def _decoded(record: ImageRecord, max_pixels: int) -> NDArray[np.uint8]:
    """Upright RGB pixels [H, W, 3]; Pillow's own copies of them are gone when it returns."""
    with _quiet_pillow(), record.open() as stream:
        size = stream.seek(0, SEEK_END)
        stream.seek(0)
        with Image.open(stream) as opened:
            count = opened.width * opened.height
            if count > max_pixels:
                raise ValueError(f"{opened.width}×{opened.height} has more than {max_pixels} pixels")
            if count > _FEW_PIXELS and count > _MOST_PIXELS_PER_BYTE * size:
                raise ValueError(f"{opened.width}×{opened.height} pixels are declared by a file of {size:,} bytes")
            orientation = _exif_orientation(opened)
            rgb = _to_rgb(opened)
            return np.array(rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb)


def upright_size(record: ImageRecord) -> tuple[int, int] | None:
    """(height, width) as the image is shown, from the file's header; None where there is none to read."""
    try:
        with _quiet_pillow(), record.open() as stream, Image.open(stream) as image:
            width, height = image.size
            lying = _exif_orientation(image) >= 5
    except Exception:  # decoders raise all kinds of errors on damaged files; training would put them aside too
        return None
    return (width, height) if lying else (height, width)


def page_count(record: ImageRecord) -> int:
    """Number of pages or frames of an image, of which the first is read; 1 where it cannot be told."""
    try:
        with _quiet_pillow(), record.open() as stream, Image.open(stream) as image:
            return int(getattr(image, "n_frames", 1))
    except Exception:  # decoders raise all kinds of errors on damaged files
        return 1


def darkness(record: ImageRecord, pixels: Tensor) -> str:
    """What is to be said of an image that uses only the dark part of its range; empty if it is bright enough.

    Sensors of 10 to 14 bits fill 16-bit files only in part, which comes out nearly black.
    """
    brightest = int(pixels.max())
    if brightest >= _BRIGHT:
        return ""
    try:
        with _quiet_pillow(), record.open() as stream, Image.open(stream) as image:
            largest = int(np.asarray(image).max()) if image.mode.startswith("I") else None
    except Exception:  # decoders raise all kinds of errors on damaged files
        largest = None
    deep = f"; {largest.bit_length()} bits in 16? scale them" if largest is not None else ""
    return f"values up to {brightest} of 255{deep}"


def warn_if_dark(source: ImageSource) -> None:
    """Log it if the first images of a source are all dark: learned from, they look alike."""
    said = []
    for index in range(min(_DARK_SAMPLE, len(source))):
        try:
            said.append(darkness(source[index], read_image(source[index])))
        except UnreadableImageError:
            continue
    if said and all(said):
        _log.warning("%s: its first %d images are nearly black (%s)", source.root, len(said), said[0])


def _exif_orientation(image: Image.Image) -> int:
    """How a camera says that it was held, 1 to 8: 1 is upright, 5 and more swap height and width."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata says nothing about the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; save as 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 65535):
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
_quiet_blocks: list[warnings.catch_warnings] = []  # one of each thread that decodes; the first is entered


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings on odd but readable files (large, damaged metadata).

    Warning filters belong to the process, so threads that decode at the same time share one block: the first one in
    opens it, the last one out closes it.
    """
    with _quiet_lock:
        _quiet_blocks.append(warnings.catch_warnings())
        if len(_quiet_blocks) == 1:
            _quiet_blocks[0].__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        yield
    finally:
        with _quiet_lock:
            block = _quiet_blocks.pop()
            if not _quiet_blocks:
                block.__exit__(None, None, None)

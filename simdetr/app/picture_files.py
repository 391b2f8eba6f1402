"""Images of a project in, pictures for a browser out; nothing outside the project's folder is ever opened.

Sizes, hashes and thumbnails are made when they are first asked for; thumbnails are kept in a folder of the app.
"""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path

from PIL import Image as Pictures

from simdetr.app.refusals import Refusal, missing
from simdetr.app.tables import Image, ImageStatus, Project
from simdetr.data.images import ImageRecord, UnreadableImageError, read_pixels, upright_size
from simdetr.data.storage import atomic_path

SHOWN_BY_BROWSERS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
_SHOWN_MODES = frozenset({"RGB", "RGBA", "L", "LA", "P", "1"})
_CHUNK = 1 << 20
_MARGIN = 0.15  # of a crop's longer side, around it


def path_of(project: Project, image: Image) -> Path:
    """The file of an image.

    Raises:
        Refusal: 404, the path leads out of the project's folder.
    """
    root = Path(project.own_folder if image.uploaded else project.folder)
    path = root / image.path
    if Path(image.path).is_absolute() and not image.uploaded:  # a list named it so
        return path
    if not path.resolve().is_relative_to(root.resolve()):
        raise missing("file for image", image.id)
    return path


def record_of(project: Project, image: Image) -> ImageRecord:
    """The image as the rest of the package reads it."""
    return ImageRecord(image.path, path_of(project, image))


def look_at(project: Project, image: Image) -> bool:
    """Fill in the size of an image from its header, if nobody has; False where it cannot be read."""
    if image.width is not None:
        return True
    size = upright_size(record_of(project, image))
    if size is None:
        image.status = ImageStatus.UNREADABLE
        image.reason = "the file is gone, damaged or no image"
        return False
    image.height, image.width = size
    return True


def digest_of(path: Path) -> str:
    """Hash of a file's content."""
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def for_browser(record: ImageRecord) -> tuple[Path | bytes, str]:
    """A picture that browsers show: the file itself if they know its kind, else a PNG; and its media type.

    Raises:
        Refusal: 404, there is no file; 415, it cannot be decoded.
    """
    assert isinstance(record.path, Path)
    try:
        with Pictures.open(record.path) as picture:
            if picture.format in SHOWN_BY_BROWSERS and picture.mode in _SHOWN_MODES:
                return record.path, SHOWN_BY_BROWSERS[picture.format]
    except FileNotFoundError:
        raise missing("file for image", record.id) from None
    except Exception as error:  # decoders raise all kinds of errors on damaged files
        raise Refusal(415, f"{record.name} cannot be read: {error}") from error
    return encoded(_decoded(record), "PNG"), "image/png"


def thumbnail(record: ImageRecord, size_px: int, cache: Path) -> Path:
    """A small JPEG whose longer side is ``size_px``, kept in a folder and made anew when the file changes."""
    assert isinstance(record.path, Path)
    try:
        facts = record.path.stat()
    except OSError:
        raise missing("file for image", record.id) from None
    key = f"{record.path}\0{facts.st_mtime_ns}\0{facts.st_size}\0{size_px}"
    name = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=16).hexdigest()
    kept = cache / name[:2] / f"{name}.jpg"
    if not kept.is_file():
        picture = _decoded(record)
        picture.thumbnail((size_px, size_px))
        with atomic_path(kept) as temporary:
            picture.save(temporary, "JPEG", quality=82)
    return kept


def crop(record: ImageRecord, xyxy: tuple[float, float, float, float], size_px: int) -> bytes:
    """A JPEG of a box with a little around it, its longer side ``size_px``."""
    cut = cut_out(record, xyxy, _MARGIN)
    scale = size_px / max(cut.size)
    return encoded(cut.resize((max(1, round(cut.width * scale)), max(1, round(cut.height * scale)))), "JPEG")


def cut_out(record: ImageRecord, xyxy: tuple[float, float, float, float], margin: float) -> Pictures.Image:
    """A box's part of an image, with a margin as a part of its longer side.

    Raises:
        Refusal: 404, the box lies outside; 415, the image cannot be read.
    """
    picture = _decoded(record)
    x0, y0, x1, y1 = xyxy
    margin *= max(x1 - x0, y1 - y0)
    left, top = max(0, int(x0 - margin)), max(0, int(y0 - margin))
    right = min(picture.width, max(left + 1, round(x1 + margin)))
    lower = min(picture.height, max(top + 1, round(y1 + margin)))
    if left >= right or top >= lower:
        raise missing("picture of a box outside", record.id)
    return picture.crop((left, top, right, lower))


def encoded(picture: Pictures.Image, kind: str) -> bytes:
    """The bytes of a picture file."""
    stream = BytesIO()
    picture.save(stream, kind)
    return stream.getvalue()


def _decoded(record: ImageRecord) -> Pictures.Image:
    try:
        return Pictures.fromarray(read_pixels(record))
    except UnreadableImageError as error:
        raise Refusal(415, f"{record.id} cannot be read: {error.reason}") from error

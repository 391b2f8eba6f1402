"""Ids and sizes of the images that a label format speaks of: names as another tool wrote them in, ids of images out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path, PurePosixPath

from simdetr.data.images import ImageRecord, ImageSource, find_images, upright_size
from simdetr.data.labels import Labels
from simdetr.data.spellings import Spellings, stem_of

_READERS = 8  # of image headers at a time: disks and networks are slow to answer, not to send
_HEADERS_PER_TURN = 64
_LEVELS_UP = 2


class KnownImages:
    """The images that are known when labels are read: those of a source, or of other labels, or none.

    Args:
        source: where they lie.
        sizes: (height, width) by id, where they are known without looking.
    """

    def __init__(self, source: ImageSource | None = None, sizes: Mapping[str, tuple[int, int]] | None = None) -> None:
        self.source = source
        self._sizes = sizes or {}
        self.ids: Sequence[str] = tuple(self._sizes) if source is None else source.ids

    @classmethod
    def of_labels(cls, labels: Labels) -> KnownImages:
        """The images of labels, without files."""
        pairs = zip(labels.image_ids, labels.sizes_hw.tolist(), strict=True)
        return cls(sizes={image_id: (height, width) for image_id, (height, width) in pairs})

    @classmethod
    def near(cls, folder: Path, names: Sequence[str]) -> KnownImages:
        """Images in a folder or beside it that are named so; none if there are none.

        Tried are the folder, its ``images`` and ``JPEGImages``, and those of the folders above it; if the names are
        found in none of them, all images below are known.
        """
        parents = [folder, *list(folder.parents)[:_LEVELS_UP]]
        places = [place for parent in parents for place in (parent, parent / "images", parent / "JPEGImages")]
        probed = names[:: max(1, len(names) // 16)]
        hits = [sum(_is_file(place, name) for name in probed) for place in places]
        best = max(hits)
        if best:
            root = places[hits.index(best)]
            return cls(ImageSource(root, list(dict.fromkeys(name for name in names if _is_file(root, name)))))
        below = find_images(folder)
        return cls(ImageSource(folder, below)) if below else cls()

    def __bool__(self) -> bool:
        return bool(self.ids)

    def __contains__(self, image_id: object) -> bool:
        return image_id in (self._sizes if self.source is None else self.source)

    def find(self, name: str) -> str | None:
        """The id of the one image that a file name can mean, or None."""
        return self._names(name)

    def find_stem(self, stem: str) -> str | None:
        """The same for a name without its ending, as label files beside images have it."""
        return self._stems(stem)

    def id_of_file(self, path: str) -> str | None:
        """The id of a file of the source by its absolute path, or None."""
        if self._root is None or not path.startswith(self._root):
            return None
        name = path[len(self._root) :]
        return name if self.source is not None and name in self.source else None

    def sizes(self, ids: Sequence[str]) -> list[tuple[int, int] | None]:
        """(height, width) of images as they are shown; None for those that cannot be opened."""
        if self.source is None or self._sizes:
            return [self._sizes.get(image_id) for image_id in ids]
        return upright_sizes(map(self.source.record, ids))

    @cached_property
    def _root(self) -> str | None:
        source = self.source
        return f"{source.root.absolute()}/" if source is not None and isinstance(source.root, Path) else None

    @cached_property
    def _names(self) -> Spellings:
        return Spellings(self.ids, self._root or "")

    @cached_property
    def _stems(self) -> Spellings:
        return Spellings(self.ids, self._root or "", stem_of)


def upright_sizes(records: Iterable[ImageRecord]) -> list[tuple[int, int] | None]:
    """(height, width) of images as they are shown, read side by side; None for those that cannot be opened."""
    waiting = list(records)
    turns = [waiting[start : start + _HEADERS_PER_TURN] for start in range(0, len(waiting), _HEADERS_PER_TURN)]
    with ThreadPoolExecutor(_READERS) as pool:
        return [size for sizes in pool.map(lambda turn: [upright_size(one) for one in turn], turns) for size in sizes]


def _is_file(folder: Path, name: str) -> bool:
    try:
        return not PurePosixPath(name).is_absolute() and (folder / name).is_file()
    except (OSError, ValueError):  # a name too long, or with a null character
        return False

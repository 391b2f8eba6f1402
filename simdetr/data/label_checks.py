"""Labels held against the images they are of: ids spelt otherwise, images that are not there."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath

from simdetr.data.images import ImageSource
from simdetr.data.label_report import LabelReport
from simdetr.data.labels import Labels


def with_ids_of(labels: Labels, images: ImageSource, report: LabelReport) -> Labels:
    """The same labels under the ids that their images have in a source, where the file spells them otherwise.

    Told apart are backslashes, Unicode forms, ``./``, the root folder written out before the rest, and folders that
    the file leaves out, if one image alone fits. What was matched so is noted; other ids stay as they are.
    """
    strangers = [image_id for image_id in labels.image_ids if image_id not in images]
    if not strangers:
        return labels
    spellings = _Spellings(images)
    found = {name: same for name in strangers if (same := spellings(name)) is not None}
    taken = Counter([*found.values(), *(name for name in labels.image_ids if name in images)])
    renamed = {name: same for name, same in found.items() if taken[same] == 1}
    for name, same in renamed.items():
        report.note("image found by another spelling of its path", f"{name!r} as {same!r}")
    return replace(labels, image_ids=tuple(renamed.get(name, name) for name in labels.image_ids))


class _Spellings:
    """A file name as another tool wrote it -> the id of the one image that it can mean, or None."""

    def __init__(self, images: ImageSource) -> None:
        plain: dict[str, list[str]] = {}
        ends: dict[str, list[str]] = {}
        for image_id in images.ids:
            name = _plain(image_id)
            plain.setdefault(name, []).append(image_id)
            ends.setdefault(PurePosixPath(name).name, []).append(image_id)
        self._plain: Mapping[str, list[str]] = plain
        self._ends: Mapping[str, list[str]] = ends
        self._root = _plain(images.root.name)

    def __call__(self, name: str) -> str | None:
        name = _plain(name)
        parts = name.split("/")
        below_root = ["/".join(parts[cut + 1 :]) for cut, part in enumerate(parts[:-1]) if part == self._root]
        for candidate in (name, *below_root):
            if candidate in self._plain:
                return _only(self._plain[candidate])
        return _only([image_id for image_id in self._ends.get(parts[-1], []) if _plain(image_id).endswith(f"/{name}")])


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace("\\", "/")).removeprefix("./")


def _only(candidates: list[str]) -> str | None:
    return candidates[0] if len(candidates) == 1 else None

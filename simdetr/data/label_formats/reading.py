"""What a reader of a label format is given, and what it gathers: shapes, image by image, in; checked labels out.

Numbers that are none, boxes outside their image and repeated images are counted here, for all formats alike.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from simdetr.data import masks as mask_codes
from simdetr.data.annotations import MAX_SIDE, Category, LabelError
from simdetr.data.images import MAX_PIXELS, ImageSource
from simdetr.data.label_checks import settled_sizes
from simdetr.data.label_formats.known_images import KnownImages
from simdetr.data.label_report import LabelReport
from simdetr.data.labels import Labels

Corners = Literal["voc", "zero", "shifted"]
"""How Pascal VOC's corners are counted, see `simdetr.data.label_formats.pascal_voc`."""

IntArray = np.ndarray[Any, np.dtype[np.int64]]
_ROUNDING_PX = 0.1  # a box may leave the image by this much without being called wrong: tools write two decimals
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Reading:
    """What a reader is given.

    Attributes:
        path: the file or folder.
        images: the images that the labels are of, as far as they are known.
        report: where to count what is met.
        masks: whether the objects' masks are wanted too.
        corners: how Pascal VOC's corners are counted; told by the files if None.
    """

    path: Path
    images: KnownImages
    report: LabelReport
    masks: bool = False
    corners: Corners | None = None


class Gathering:
    """Shapes of images, in any order -> labels.

    Args:
        report: where to count problems.
        categories: the classes that the file declares; others that are met follow by name.
    """

    def __init__(self, report: LabelReport, categories: Sequence[Category] = ()) -> None:
        self.report = report
        self._declared = list(categories)
        self._class_of = {category.name: index for index, category in reversed(list(enumerate(categories)))}
        self._names = [category.name for category in categories]
        self._image_of: dict[str, int] = {}
        self._sizes: list[tuple[int, int]] = []
        self._boxes = array("d")
        self._scores = array("d")
        self._owners = array("q")
        self._classes = array("q")
        self._masks: dict[int, bytes] = {}
        self._where: list[str] = []
        self._drawn: set[int] = set()  # images with something drawn that is no box here

    def begin(self, image_id: str, size_hw: tuple[int, int]) -> int:
        """The number of an image, which exists from now on, also without shapes."""
        if image_id in self._image_of:
            self.report.add("image named twice, its shapes merged", shown(image_id))
            return self._image_of[image_id]
        self._image_of[image_id] = len(self._sizes)
        self._sizes.append(size_hw)
        return len(self._sizes) - 1

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._image_of

    def number_of(self, image_id: str) -> int:
        """The number of an image that has begun."""
        return self._image_of[image_id]

    def size_of(self, image: int) -> tuple[int, int]:
        """(height, width) of an image by its number."""
        return self._sizes[image]

    def class_of(self, name: str) -> int:
        """The index of a class, which exists from now on."""
        index = self._class_of.get(name)
        if index is None:
            index = self._class_of[name] = len(self._names)
            self._names.append(name)
        return index

    def add(
        self,
        image: int,
        class_index: int,
        box_xyxy: Sequence[float],
        where: str,
        score: float = 1.0,
        mask: bytes | None = None,
    ) -> None:
        """One shape of an image: the box around it, what the file calls its place, and its mask if that is wanted."""
        if mask is not None:
            self._masks[len(self._owners)] = mask
        self._boxes.extend(box_xyxy)
        self._owners.append(image)
        self._classes.append(class_index)
        self._scores.append(score)
        self._where.append(where)

    def drop(self, image: int, kind: str, where: str, *, fault: bool = True) -> None:
        """Count something drawn on an image that is left out; ``fault`` where that is the file's.

        An image of which nothing else is left does not count as empty: somebody saw an object there.
        """
        self._drawn.add(image)
        (self.report.add if fault else self.report.note)(kind, where)

    def polygon_mask(self, image: int, points: Sequence[float], where: str) -> bytes | None:
        """The mask of a polygon x, y, x, y, …; None, and counted, where there is none."""
        return self.mask_of([list(points)], image, where)

    def mask_of(self, segmentation: Any, image: int, where: str) -> bytes | None:  # noqa: ANN401
        """The mask of polygons or run lengths as COCO has them; None, and counted, where it cannot be made."""
        size_hw = self._sizes[image]
        if math.prod(size_hw) > MAX_PIXELS:
            self.report.add("image too large for masks, the box stands in", where)
            return None
        try:
            return mask_codes.of_segmentation(segmentation, size_hw)
        except LabelError as error:
            self.report.add("mask cannot be made, the box stands in", f"{where}: {error}")
            return None

    def labels(self, source: ImageSource | None = None) -> Labels:
        """All that was gathered; boxes are cut to their image, and those that cannot be used are dropped.

        With a ``source``, the sizes that the file says are held against its images.
        """
        owners = np.array(self._owners, np.int64)
        sizes = np.array(self._sizes, np.int64).reshape(-1, 2)
        full = np.array(self._boxes, np.float64).reshape(-1, 4)
        finite = np.isfinite(full).all(1)
        full[~finite] = 0
        if source is not None:
            sizes = self._settled(sizes, owners, full, source)
        limits = sizes[owners][:, [1, 0, 1, 0]] if len(owners) else np.zeros((0, 4), np.int64)
        boxes = np.clip(full, 0, limits).astype(np.float32)
        usable = finite & (boxes[:, 2:] > boxes[:, :2]).all(1)
        self._count("box is no number, dropped", ~finite)
        self._count("box without area in the image, dropped", finite & ~usable)
        self._count("box outside the image, clipped", usable & (np.abs(full - boxes).max(1, initial=0) > _ROUNDING_PX))
        scores = np.array(self._scores, np.float64)
        proper = (scores >= 0) & (scores <= 1)
        self._count("score outside 0 to 1, clipped", usable & ~proper)
        scores = np.clip(np.nan_to_num(scores, nan=0.0), 0, 1)
        kept = np.flatnonzero(usable)
        kept = kept[np.argsort(owners[kept], kind="stable")]
        lost = self._drawn.union(owners[~usable].tolist()).difference(owners[kept].tolist())
        categories, rank = self._categories()
        classes = np.array(self._classes, np.int64)
        sides = boxes[kept, 2:] - boxes[kept, :2]
        labels = Labels(
            image_ids=tuple(self._image_of),
            sizes_hw=sizes,
            offsets=np.concatenate([[0], np.bincount(owners[kept], minlength=len(sizes)).cumsum()]),
            boxes_xyxy=boxes[kept],
            classes=rank[classes[kept]] if len(kept) else classes[:0],
            scores=scores[kept].astype(np.float32),
            categories=categories,
            areas=sides.prod(1),
            crowd=np.zeros(len(kept), np.bool_),
            masks=self._mask_column(kept, boxes, owners),
        )
        return self._without(labels, lost) if lost else labels

    def _settled(self, sizes: IntArray, owners: IntArray, boxes: Any, source: ImageSource) -> IntArray:  # noqa: ANN401
        """The sizes as `settled_sizes` has them; masks that were made for another size are gone."""
        reach_hw = np.zeros((len(sizes), 2))
        np.maximum.at(reach_hw, owners, boxes[:, [3, 2]])
        settled = settled_sizes([*self._image_of], sizes, reach_hw, source, self.report)
        turned = (settled != sizes).any(1)
        self._masks = {row: code for row, code in self._masks.items() if not turned[owners[row]]}
        self._sizes = [(height, width) for height, width in settled.tolist()]
        return settled

    def _without(self, labels: Labels, lost: set[int]) -> Labels:
        for image in sorted(lost):
            self.report.add(
                "image of which no box can be used, left out: it would teach that it is empty",
                shown(labels.image_ids[image]),
            )
            self.report.unlabelled.append(labels.image_ids[image])
        return labels.select(name for image, name in enumerate(labels.image_ids) if image not in lost)

    def _count(self, kind: str, bad: Any) -> None:  # noqa: ANN401
        for row in np.flatnonzero(bad):
            self.report.add(kind, self._where[row])

    def _categories(self) -> tuple[tuple[Category, ...], np.ndarray[Any, np.dtype[np.int64]]]:
        """Declared classes, then the others by name; and the place of each class by its index so far."""
        declared = len(self._declared)
        met = sorted(range(declared, len(self._names)), key=self._names.__getitem__)
        rank = np.arange(len(self._names))
        rank[met] = np.arange(declared, len(self._names))
        first = max((category.id for category in self._declared if isinstance(category.id, int)), default=0) + 1
        others = [Category(first + number, self._names[index]) for number, index in enumerate(met)]
        return (*self._declared, *others), rank

    def _mask_column(self, kept: Any, boxes: Any, owners: Any) -> mask_codes.Masks | None:  # noqa: ANN401
        if not self._masks:
            return None
        codes = []
        for row in kept.tolist():
            code = self._masks.get(row)
            if code is None:
                self.report.note("no mask, the box stands in", self._where[row])
                code = mask_codes.of_boxes(boxes[row][None], self._sizes[owners[row]])[0]
            codes.append(code)
        return mask_codes.column(codes)


def number(value: object) -> float:
    """A number of a file; nan for anything else."""
    if isinstance(value, bool):
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def size_hw(height: object, width: object) -> tuple[int, int] | None:
    """(height, width) where both are whole numbers of pixels, else None."""
    sides = number(height), number(width)
    if not all(1 <= side <= MAX_SIDE for side in sides) or any(side != int(side) for side in sides):
        return None
    return int(sides[0]), int(sides[1])


def shown(value: object) -> str:
    """A value as messages quote it: on one line, and cut where it is long."""
    text = repr(value) if isinstance(value, str | bytes | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…"

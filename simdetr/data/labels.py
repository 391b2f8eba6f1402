"""Boxes of a set of images in, one validated table by column out: truth, pseudo-labels T_j and predictions alike.

Letters: N images, M boxes of all images together, C categories. Boxes are xyxy in pixels of the upright original.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simdetr.data import masks as mask_codes
from simdetr.data import points as point_columns
from simdetr.data.annotations import Category, ImageLabels, LabelError, Lineage
from simdetr.data.category_matching import match_categories

_LIST_COLUMNS = ("boxes_xyxy", "classes", "scores", "areas")
_OPTIONAL_COLUMNS = ("lineage", "masks", "points")


@dataclass(frozen=True)
class Labels:
    """Boxes of a set of images, by column; checked when made.

    Attributes:
        image_ids: N ids, each once; images without boxes are among them.
        sizes_hw: int64 [N, 2], pixels of the upright originals.
        offsets: int64 [N + 1]; image i owns the rows offsets[i] to offsets[i + 1].
        boxes_xyxy: float32 [M, 4] in pixels.
        classes: int64 [M], indices into ``categories``.
        scores: float32 [M] in [0, 1], higher is better; 1 for truth; see `simdetr.mining.pseudo_labels` for those of
            mined boxes.
        categories: C categories; their order gives the class indices.
        areas: float32 [M], area of the annotation, or of the box, in square pixels.
        crowd: bool [M], COCO's ``iscrowd``.
        stage: -1 human truth, 0 mined, j relabelled by stage j.
        lineage: where each of the M boxes comes from, or None.
        masks: COCO's compressed run lengths of each object, bytes [M], see `simdetr.data.masks`; or None.
        points: float32 [M, 2], reference points (x, y) in pixels, NaN where a box has none, see `simdetr.data.points`;
            or None.

    Raises:
        LabelError: columns of different length, boxes that are not finite or upside down, classes without category,
            scores outside [0, 1], repeated ids, masks that are no bytes, infinite points.
    """

    image_ids: tuple[str, ...]
    sizes_hw: NDArray[np.int64]
    offsets: NDArray[np.int64]
    boxes_xyxy: NDArray[np.float32]
    classes: NDArray[np.int64]
    scores: NDArray[np.float32]
    categories: tuple[Category, ...]
    areas: NDArray[np.float32]
    crowd: NDArray[np.bool_]
    stage: int = -1
    lineage: Lineage | None = None
    masks: mask_codes.Masks | None = None
    points: point_columns.Points | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_ids", tuple(self.image_ids))
        object.__setattr__(self, "categories", tuple(self.categories))
        rows = np.asarray(self.boxes_xyxy).size // 4
        columns: dict[str, tuple[Any, tuple[int, ...]]] = {
            "sizes_hw": (np.int64, (len(self.image_ids), 2)),
            "offsets": (np.int64, (len(self.image_ids) + 1,)),
            "boxes_xyxy": (np.float32, (rows, 4)),
            "classes": (np.int64, (rows,)),
            "scores": (np.float32, (rows,)),
            "areas": (np.float32, (rows,)),
            "crowd": (np.bool_, (rows,)),
        }
        for name, (dtype, shape) in columns.items():
            values = np.asarray(getattr(self, name), dtype=dtype)
            if values.size == 0 == np.prod(shape):
                values = values.reshape(shape)
            if values.shape != shape:
                raise LabelError(f"{name}: expected shape {shape}, got {values.shape}; one row per image or per box")
            object.__setattr__(self, name, values)
        if self.lineage is not None and len(self.lineage) != rows:
            raise LabelError(f"lineage: expected that of {rows} boxes, got {len(self.lineage)}; select both alike")
        if self.masks is not None:
            if len(self.masks) != rows:
                raise LabelError(f"masks: expected those of {rows} boxes, got {len(self.masks)}; select both alike")
            object.__setattr__(self, "masks", mask_codes.column(self.masks))
        if self.points is not None:
            object.__setattr__(self, "points", point_columns.column(self.points, rows))
        self._check_values()

    def _check_values(self) -> None:
        boxes, classes = self.boxes_xyxy, self.classes
        steps = np.diff(self.offsets)
        if self.offsets[0] != 0 or self.offsets[-1] != len(boxes) or (steps < 0).any():
            raise LabelError(
                f"offsets: expected to rise from 0 to {len(boxes)}, got {self.offsets[0]} to {self.offsets[-1]}"
            )
        bad_rows = {
            "boxes_xyxy: expected finite x0 <= x1 and y0 <= y1": ~np.isfinite(boxes).all(1)
            | (boxes[:, 2:] < boxes[:, :2]).any(1),
            f"classes: expected 0 to {len(self.categories) - 1}": (classes < 0) | (classes >= len(self.categories)),
            "scores: expected 0 to 1": ~((self.scores >= 0) & (self.scores <= 1)),
            "areas: expected finite and >= 0": ~(np.isfinite(self.areas) & (self.areas >= 0)),
        }
        for rule, bad in bad_rows.items():
            if bad.any():
                row = int(bad.argmax())
                got = getattr(self, rule.split(":")[0])[row].tolist()
                where = self.image_ids[self.owners[row]]
                raise LabelError(f"{rule}, got {got} in image {where!r} ({int(bad.sum())} rows)")
        if (self.sizes_hw <= 0).any():
            row = int((self.sizes_hw <= 0).any(1).argmax())
            raise LabelError(f"sizes_hw: expected > 0, got {self.sizes_hw[row].tolist()} for {self.image_ids[row]!r}")
        for name, values in (("image_ids", self.image_ids), ("categories", [c.id for c in self.categories])):
            if len(set(values)) != len(values):
                raise LabelError(f"{name}: expected each id once, got {len(values) - len(set(values))} repeated")

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_classes(self) -> int:
        """Number of categories C."""
        return len(self.categories)

    @property
    def used_classes(self) -> int:
        """Number of categories that have boxes."""
        return len(np.unique(self.classes))

    @cached_property
    def _row_of_image(self) -> dict[str, int]:
        return {image_id: row for row, image_id in enumerate(self.image_ids)}

    @cached_property
    def owners(self) -> NDArray[np.int64]:
        """Which image has each box: its row in ``image_ids``, int64 [M]."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def row_of(self, image_id: str) -> int:
        """Row of an image in ``image_ids``; a LabelError if it is not there."""
        row = self._row_of_image.get(image_id)
        if row is None:
            raise LabelError(f"image {image_id!r} is not among the {len(self)} labelled images")
        return row

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._row_of_image

    def image(self, i: int) -> ImageLabels:
        """The labels of the i-th image; views, not copies."""
        rows = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        height, width = self.sizes_hw[i].tolist()
        return ImageLabels(image_id=self.image_ids[i], size_hw=(height, width), **self._columns(rows))

    def of(self, image_id: str) -> ImageLabels:
        """The labels of an image by its id."""
        return self.image(self.row_of(image_id))

    def select(self, image_ids: Iterable[str]) -> Labels:
        """The labels of some of the images, in the given order."""
        wanted = tuple(image_ids)
        images = np.array([self.row_of(image_id) for image_id in wanted], dtype=np.int64)
        counts = np.diff(self.offsets)[images]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        rows = np.repeat(self.offsets[:-1][images] - offsets[:-1], counts) + np.arange(offsets[-1])
        columns = self._columns(rows)
        return replace(self, image_ids=wanted, sizes_hw=self.sizes_hw[images], offsets=offsets, **columns)

    def _columns(self, rows: slice | NDArray[Any]) -> dict[str, Any]:
        """Some rows of all that goes by box."""
        names = [*_LIST_COLUMNS, "crowd", *(name for name in _OPTIONAL_COLUMNS if getattr(self, name) is not None)]
        return {name: getattr(self, name)[rows] for name in names}

    def rows(self, kept: NDArray[np.int64]) -> Labels:
        """Some of the boxes, by their rows in ascending order; all images stay."""
        offsets = np.concatenate([[0], np.bincount(self.owners[kept], minlength=len(self)).cumsum()])
        return replace(self, offsets=offsets.astype(np.int64), **self._columns(kept))

    def sharpened(self, min_score: float, power: float) -> Labels:
        """The boxes whose score is at least ``min_score``, and their scores to this power; all images stay."""
        kept = self.rows(np.flatnonzero(self.scores >= min_score))
        return replace(kept, scores=kept.scores**power)

    def fingerprint(self) -> str:
        """Hash of all that a training learns from, whatever the file it was read from."""
        names = [[category.id, category.name] for category in self.categories]
        content = hashlib.blake2b(json.dumps([self.image_ids, names]).encode(), digest_size=16)
        for values in (self.sizes_hw, self.offsets, self.boxes_xyxy, self.classes, self.scores, self.crowd):
            content.update(values.tobytes())
        if self.points is not None:
            content.update(self.points.tobytes())
        for mask in () if self.masks is None else self.masks:
            content.update(mask)
        return content.hexdigest()

    def class_agnostic(self) -> Labels:
        """The same boxes, all of the one category ``object``."""
        return replace(self, classes=np.zeros_like(self.classes), categories=(Category(1, "object"),))

    def with_categories(self, categories: Sequence[Category]) -> Labels:
        """The same boxes, their classes counted in another list of categories, see `match_categories`.

        Two files of one data set may number or list their categories otherwise; this makes the second one speak as the
        first.

        Raises:
            LabelError: a category that has boxes is not in the list.
        """
        mapping = match_categories(self.categories, categories).positions
        classes = mapping[self.classes]
        missing = sorted({self.categories[c].name for c in np.unique(self.classes[classes < 0])})
        if missing:
            known = ", ".join(category.name for category in categories)
            raise LabelError(f"categories: boxes of {', '.join(missing)} have no class among {known}; name them alike")
        return replace(self, classes=classes, categories=tuple(categories))

    @classmethod
    def from_images(cls, rows: Iterable[ImageLabels], categories: Sequence[Category], stage: int = -1) -> Labels:
        """Stack the labels of single images, in their order.

        If some of them have a lineage, boxes of the others count as first seen by this stage; if some have masks, the
        others' boxes stand in for theirs; if some have points, the others' are unknown.
        """
        images = list(rows)
        lineages = _of_all(images, "lineage", lambda image: Lineage.first_seen(stage, np.array([0, len(image)])))
        masks = _of_all(images, "masks", lambda image: mask_codes.of_boxes(image.boxes_xyxy, image.size_hw))
        points = _of_all(images, "points", lambda image: point_columns.unknown(len(image)))
        columns: dict[str, NDArray[Any]] = {
            name: np.concatenate([getattr(image, name) for image in images]) if images else np.zeros(0)
            for name in (*_LIST_COLUMNS, "crowd")
        }
        return cls(
            image_ids=tuple(image.image_id for image in images),
            sizes_hw=np.array([image.size_hw for image in images], dtype=np.int64).reshape(-1, 2),
            offsets=np.cumsum([0, *(len(image) for image in images)], dtype=np.int64),
            categories=tuple(categories),
            stage=stage,
            lineage=None if lineages is None else Lineage.stack(lineages),
            masks=None if masks is None else np.concatenate(masks),
            points=None if points is None else np.concatenate(points),
            **columns,
        )


def _of_all(images: Sequence[ImageLabels], name: str, stand_in: Callable[[ImageLabels], Any]) -> list[Any] | None:
    """A column that images may lack, of each of them; None if all lack it."""
    given = [getattr(image, name) for image in images]
    if all(values is None for values in given):
        return None
    return [stand_in(image) if values is None else values for values, image in zip(given, images, strict=True)]

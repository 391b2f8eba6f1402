"""The boxes of one image, their categories, and the error for labels that break a rule.

Letters: n boxes of one image. Boxes are xyxy in pixels of the upright original.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from simdetr.data import masks as mask_codes
from simdetr.data import points as point_columns
from simdetr.data.storage import atomic_path


class LabelError(ValueError):
    """Labels that break a rule; the message names the rule, what was met and where."""


@dataclass(frozen=True)
class Category:
    """A kind of object, with the id that the user's file gave it."""

    id: int | str
    name: str


@dataclass(frozen=True)
class ImageLabels:
    """The boxes of one image; not checked before they are part of a `Labels`.

    Attributes:
        image_id: id of the image in its source.
        size_hw: height and width of the upright original in pixels.
        boxes_xyxy: float32 [n, 4] in pixels.
        classes: int64 [n], indices into the categories.
        scores: float32 [n] in [0, 1].
        crowd: bool [n], True where a box stands for a group of objects.
        areas: float32 [n], area of the object in square pixels.
        lineage: where the boxes come from, None where nobody knows.
        masks: COCO's compressed run lengths of the objects at the image's size, bytes [n], None where nobody knows.
        points: float32 [n, 2], a reference point (x, y) of each object in pixels, NaN where it has none; or None.
    """

    image_id: str
    size_hw: tuple[int, int]
    boxes_xyxy: NDArray[np.float32]
    classes: NDArray[np.int64]
    scores: NDArray[np.float32]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float32]
    lineage: Lineage | None = None
    masks: NDArray[np.object_] | None = None
    points: NDArray[np.float32] | None = None

    @classmethod
    def build(
        cls,
        image_id: str,
        size_hw: tuple[int, int],
        boxes_xyxy: ArrayLike,
        classes: ArrayLike,
        scores: ArrayLike | None = None,
        crowd: ArrayLike | None = None,
        areas: ArrayLike | None = None,
        *,
        lineage: Lineage | None = None,
        masks: NDArray[np.object_] | None = None,
        points: ArrayLike | None = None,
    ) -> ImageLabels:
        """Labels from anything array-like; scores are 1, nothing is a crowd and areas are the boxes' unless given."""
        boxes = np.asarray(boxes_xyxy, dtype=np.float32).reshape(-1, 4)
        return cls(
            image_id=image_id,
            size_hw=(int(size_hw[0]), int(size_hw[1])),
            boxes_xyxy=boxes,
            classes=np.asarray(classes, dtype=np.int64).reshape(-1),
            scores=np.ones(len(boxes), np.float32) if scores is None else np.asarray(scores, np.float32).reshape(-1),
            crowd=np.zeros(len(boxes), np.bool_) if crowd is None else np.asarray(crowd, np.bool_).reshape(-1),
            areas=(boxes[:, 2:] - boxes[:, :2]).prod(1) if areas is None else np.asarray(areas, np.float32).reshape(-1),
            lineage=lineage,
            masks=masks,
            points=None if points is None else np.asarray(points, np.float32).reshape(-1, 2),
        )

    def __len__(self) -> int:
        return len(self.boxes_xyxy)


def stack_lineages(images: Sequence[ImageLabels], stage: int) -> Lineage | None:
    """Lineages of several images, one after the other; None if none has any, else the others' are of this stage."""
    if all(image.lineage is None for image in images):
        return None
    own = [Lineage.first_seen(stage, np.array([0, len(image)])) for image in images]
    return Lineage.stack(
        [first if image.lineage is None else image.lineage for first, image in zip(own, images, strict=True)]
    )


# ----------------------------------------------------------------------------------------------------------------------
# Where boxes come from: for each box the stage that first found it, and the clustering that a mined one was found in.
#
# Mining gives the first lineage; every relabelling hands on that of the box before
# (`simdetr.training.fusion`). Letters: N images, M boxes of all images together.


LINEAGE_COLUMNS: dict[str, type[np.signedinteger[Any]]] = {
    "born": np.int8,
    "born_row": np.int32,
    "stride": np.int16,
    "k": np.int16,
    "cluster": np.int16,
}


@dataclass(frozen=True)
class Lineage:
    """Origin of M boxes, by column.

    Attributes:
        born: int8 [M], stage that first found the object: -1 people, 0 mining, j the detector of stage j.
        born_row: int32 [M], which of its image's boxes it was then, counted from 0 in the labels of stage ``born``; a
            mined one is that region of the image in the proposal store.
        stride: int16 [M], feature level of the clustering that found the mined region; 0 where it is not known.
        k: int16 [M], number of clusters of that clustering; 0 where it is not known.
        cluster: int16 [M], which of these clusters the region is a part of; -1 where it is not known.

    Raises:
        ValueError: columns of different length.
    """

    born: NDArray[np.int8]
    born_row: NDArray[np.int32]
    stride: NDArray[np.int16]
    k: NDArray[np.int16]
    cluster: NDArray[np.int16]

    def __post_init__(self) -> None:
        for name, dtype in LINEAGE_COLUMNS.items():
            column = np.asarray(getattr(self, name), dtype=dtype)
            if column.shape != (len(self),):
                raise ValueError(f"{name}: expected shape ({len(self)},) as born has, got {column.shape}")
            object.__setattr__(self, name, column)

    def __len__(self) -> int:
        return len(self.born)

    def __getitem__(self, rows: slice | NDArray[Any]) -> Lineage:
        """The lineage of some of the boxes."""
        return Lineage(**{name: getattr(self, name)[rows] for name in LINEAGE_COLUMNS})

    @classmethod
    def first_seen(cls, stage: int, offsets: NDArray[np.int64]) -> Lineage:
        """Of boxes that nothing earlier is known of.

        Args:
            stage: whose boxes they are.
            offsets: int64 [N + 1]; image i owns the boxes offsets[i] to offsets[i + 1].
        """
        rows = int(offsets[-1])
        return cls(
            born=np.full(rows, stage, np.int8),
            born_row=(np.arange(rows) - np.repeat(offsets[:-1], np.diff(offsets))).astype(np.int32),
            stride=np.zeros(rows, np.int16),
            k=np.zeros(rows, np.int16),
            cluster=np.full(rows, -1, np.int16),
        )

    @classmethod
    def stack(cls, parts: Sequence[Lineage]) -> Lineage:
        """One after the other; at least one."""
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in LINEAGE_COLUMNS})


# ----------------------------------------------------------------------------------------------------------------------
# Boxes of a set of images in, one validated table by column out: truth, pseudo-labels T_j and predictions alike.
#
# Letters: N images, M boxes of all images together, C categories. Boxes are xyxy in pixels of the upright original.
# On disk (design.md §4): Parquet with one row per image, the categories and the stage in the schema's metadata.


_METADATA_KEY = b"simdetr-labels"
_ROWS_PER_GROUP = 20_000
_LIST_COLUMNS = {"boxes_xyxy": pa.float32(), "classes": pa.int64(), "scores": pa.float32(), "areas": pa.float32()}
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
        owners = np.repeat(np.arange(len(steps)), steps)
        bad_rows = {
            "boxes_xyxy: expected finite x0 <= x1 and y0 <= y1": ~np.isfinite(boxes).all(1)
            | (boxes[:, 2:] < boxes[:, :2]).any(1),
            f"classes: expected 0 to {len(self.categories) - 1}": (classes < 0) | (classes >= len(self.categories)),
            "scores: expected 0 to 1": ~((self.scores >= 0) & (self.scores <= 1)),
            "areas: expected finite and >= 0": ~(np.isfinite(self.areas) & (self.areas >= 0)),
        }
        for rule, bad in bad_rows.items():
            if bad.any():
                row = int(np.flatnonzero(bad)[0])
                got = getattr(self, rule.split(":")[0])[row].tolist()
                raise LabelError(f"{rule}, got {got} in image {self.image_ids[owners[row]]!r} ({int(bad.sum())} rows)")
        if (self.sizes_hw <= 0).any():
            row = int(np.flatnonzero((self.sizes_hw <= 0).any(1))[0])
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

    @cached_property
    def _row_of_image(self) -> dict[str, int]:
        return {image_id: row for row, image_id in enumerate(self.image_ids)}

    def row_of(self, image_id: str) -> int:
        """Row of an image in ``image_ids``.

        Raises:
            LabelError: the image is not in these labels.
        """
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
        return ImageLabels(
            image_id=self.image_ids[i],
            size_hw=(height, width),
            boxes_xyxy=self.boxes_xyxy[rows],
            classes=self.classes[rows],
            scores=self.scores[rows],
            crowd=self.crowd[rows],
            areas=self.areas[rows],
            lineage=None if self.lineage is None else self.lineage[rows],
            masks=None if self.masks is None else self.masks[rows],
            points=None if self.points is None else self.points[rows],
        )

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
        names = [*_LIST_COLUMNS, "crowd", *(name for name in _OPTIONAL_COLUMNS if getattr(self, name) is not None)]
        columns = {name: getattr(self, name)[rows] for name in names}
        return replace(self, image_ids=wanted, sizes_hw=self.sizes_hw[images], offsets=offsets, **columns)

    def sharpened(self, min_score: float, power: float) -> Labels:
        """The boxes whose score is at least ``min_score``, and their scores to this power; all images stay."""
        kept = np.flatnonzero(self.scores >= min_score)
        owner = np.repeat(np.arange(len(self)), np.diff(self.offsets))[kept]
        offsets = np.concatenate([[0], np.bincount(owner, minlength=len(self)).cumsum()]).astype(np.int64)
        names = [*_LIST_COLUMNS, "crowd", *(name for name in _OPTIONAL_COLUMNS if getattr(self, name) is not None)]
        columns = {name: getattr(self, name)[kept] for name in names}
        return replace(self, offsets=offsets, **columns | {"scores": columns["scores"] ** power})

    def class_agnostic(self) -> Labels:
        """The same boxes, all of the one category ``object``."""
        return replace(self, classes=np.zeros_like(self.classes), categories=(Category(1, "object"),))

    def with_categories(self, categories: Sequence[Category]) -> Labels:
        """The same boxes, their classes counted in another list of categories (matched by id).

        Two files of one data set may list different categories; this makes the second one speak as the first.

        Raises:
            LabelError: a category that has boxes is not in the list.
        """
        index = {category.id: position for position, category in enumerate(categories)}
        mapping = np.array([index.get(category.id, -1) for category in self.categories], dtype=np.int64)
        classes = mapping[self.classes]
        missing = sorted({self.categories[c].name for c in np.unique(self.classes[classes < 0])})
        if missing:
            raise LabelError(f"categories: boxes of {', '.join(missing)} have no category in the given {len(index)}")
        return replace(self, classes=classes, categories=tuple(categories))

    @classmethod
    def from_images(cls, rows: Iterable[ImageLabels], categories: Sequence[Category], stage: int = -1) -> Labels:
        """Stack the labels of single images, in their order.

        If some of them have a lineage, boxes of the others count as first seen by this stage; if some have masks, the
        others' boxes stand in for theirs; if some have points, the others' are unknown.
        """
        images = list(rows)
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
            lineage=stack_lineages(images, stage),
            masks=mask_codes.stack(images),
            points=point_columns.stack(images),
            **columns,
        )


def write_labels(labels: Labels, path: str | Path) -> None:
    """Write labels as Parquet, one row per image; the file appears whole or not at all."""
    offsets = pa.array(labels.offsets)
    corners = pa.FixedSizeListArray.from_arrays(pa.array(labels.boxes_xyxy.reshape(-1)), 4)
    lists = {name: pa.array(getattr(labels, name)) for name in ("classes", "scores", "areas", "crowd")}
    if labels.lineage is not None:
        lists |= {name: pa.array(getattr(labels.lineage, name)) for name in LINEAGE_COLUMNS}
    if labels.masks is not None:
        lists["masks"] = pa.array(labels.masks, pa.binary())
    if labels.points is not None:
        lists["points"] = pa.FixedSizeListArray.from_arrays(pa.array(labels.points.reshape(-1)), 2)
    table = pa.table(
        {
            "image_id": pa.array(labels.image_ids, pa.string()),
            "height": labels.sizes_hw[:, 0],
            "width": labels.sizes_hw[:, 1],
            **{
                name: pa.LargeListArray.from_arrays(offsets, values)
                for name, values in {"boxes_xyxy": corners, **lists}.items()
            },
        }
    )
    facts = {"stage": labels.stage, "categories": [[category.id, category.name] for category in labels.categories]}
    table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(facts).encode()})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, row_group_size=_ROWS_PER_GROUP, compression="zstd")


def read_labels(path: str | Path, *, strict: bool = False, masks: bool = False) -> Labels:
    """Read labels from a Parquet file of `write_labels` or a COCO .json.

    Args:
        path: the file.
        strict: raise at the first problem of a COCO file instead of repairing or dropping it, see `read_coco`.
        masks: read the objects' masks from a COCO file too; a Parquet file gives those it has anyway.

    Raises:
        LabelError: the file is missing or holds no labels, or has a problem and ``strict`` is set.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        from simdetr.data.coco import read_coco  # here, because COCO files are read into this module's types

        return read_coco(path, strict=strict, masks=masks)[0]
    try:
        table = pq.read_table(path).combine_chunks()
    except FileNotFoundError as error:
        raise LabelError(f"labels: {path} does not exist") from error
    except (OSError, pa.ArrowException) as error:
        expected = "" if path.suffix == ".parquet" else "; expected COCO's .json or simdetr's .parquet"
        raise LabelError(f"{path} cannot be read as Parquet{expected}: {error}") from error
    facts = (table.schema.metadata or {}).get(_METADATA_KEY)
    if facts is None:
        raise LabelError(f"{path} holds no labels: expected a file of write_labels, got columns {table.column_names}")
    content = json.loads(facts)

    has_lineage = set(LINEAGE_COLUMNS) <= set(table.column_names)  # labels of people and older files have none
    optional = {"masks", "points"} & set(table.column_names)
    names = (*_LIST_COLUMNS, "crowd", *(LINEAGE_COLUMNS if has_lineage else ()), *optional)
    lists = {name: pa.concat_arrays(table[name].chunks) for name in names if table.num_rows}

    def flat(name: str) -> NDArray[Any]:
        values = lists[name].flatten() if lists else pa.array([], pa.float32())
        values = values.flatten() if pa.types.is_fixed_size_list(values.type) else values
        return np.array(values.to_numpy(zero_copy_only=False))  # a copy: Arrow's memory is read-only

    counts = pc.list_value_length(lists["classes"]).to_numpy() if lists else np.zeros(0, np.int64)
    return Labels(
        image_ids=tuple(table["image_id"].to_pylist()),
        sizes_hw=np.stack([table["height"].to_numpy(), table["width"].to_numpy()], axis=1),
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        boxes_xyxy=flat("boxes_xyxy").reshape(-1, 4),
        classes=flat("classes"),
        scores=flat("scores"),
        categories=tuple(Category(id_, name) for id_, name in content["categories"]),
        areas=flat("areas"),
        crowd=flat("crowd"),
        stage=int(content["stage"]),
        lineage=Lineage(**{name: flat(name) for name in LINEAGE_COLUMNS}) if has_lineage else None,
        masks=flat("masks") if "masks" in optional else None,
        points=flat("points").reshape(-1, 2) if "points" in optional else None,
    )

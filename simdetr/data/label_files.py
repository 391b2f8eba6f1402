"""Any tool's label file or folder in, `Labels` out, with what was met on the way; `Labels` to Parquet.

In Parquet the categories and the stage stand in the schema's metadata; COCO files are `simdetr.data.coco`'s.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from simdetr.data.annotations import LINEAGE_COLUMNS, Category, LabelError, Lineage
from simdetr.data.coco import read_coco, write_coco
from simdetr.data.images import ImageSource
from simdetr.data.label_checks import with_ids_of
from simdetr.data.label_report import LabelReport
from simdetr.data.labels import _LIST_COLUMNS, Labels
from simdetr.data.storage import atomic_path

LOG = logging.getLogger(__name__)
_METADATA_KEY = b"simdetr-labels"
_ROWS_PER_GROUP = 20_000


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


def read_labels(
    path: str | Path,
    *,
    images: ImageSource | None = None,
    format: str | None = None,
    strict: bool = False,
    masks: bool = False,
) -> Labels:
    """Read labels from any label file or folder that simdetr knows, and log what had to be dropped or changed.

    Args:
        path: the file or folder; its format is told by its content, see ``FORMATS``.
        images: the images that the labels are of: theirs are the ids of the labels, also where the file spells them
            otherwise, and formats that say nothing of sizes in pixels have them from there.
        format: name of its format, instead of looking at the content.
        strict: raise at the first problem instead of repairing or dropping it.
        masks: read the objects' masks too; a Parquet file gives those it has anyway.

    Raises:
        LabelError: the file is missing or holds no labels, or has a problem and ``strict`` is set.
    """
    labels, report = read_with_report(path, images=images, format=format, strict=strict, masks=masks)
    say(report)
    return labels


def read_with_report(
    path: str | Path,
    *,
    images: ImageSource | None = None,
    format: str | None = None,
    strict: bool = False,
    masks: bool = False,
) -> tuple[Labels, LabelReport]:
    """As `read_labels`, with a count of what was met, and nothing logged."""
    path = Path(path)
    if not path.exists():
        raise LabelError(f"labels: {path} does not exist")
    kind = format_of(path) if format is None else _format_named(format)
    report = LabelReport(path, kind.name, strict=strict)
    labels = kind.read(path, images, report, masks)
    return (labels if images is None else with_ids_of(labels, images, report)), report


def say(report: LabelReport) -> None:
    """Log what reading a label file met: problems as a warning, what else was changed as information."""
    if report.total:
        LOG.warning("%s: %s", report.path, "; ".join(report.lines()))
    if notes := report.note_lines():
        LOG.info("%s: %s", report.path, "; ".join(notes))


@dataclass(frozen=True)
class LabelFormat:
    """A kind of label file or folder.

    Attributes:
        name: as ``--from`` and ``--to`` of the command line name it.
        matches: whether a file or folder looks like it.
        read: path, the images if they are known, where to count problems, whether masks are wanted -> labels.
    """

    name: str
    matches: Callable[[Path], bool]
    read: Callable[[Path, ImageSource | None, LabelReport, bool], Labels]


def format_of(path: Path) -> LabelFormat:
    """The format that a file or folder looks like; a LabelError if it looks like none."""
    for kind in FORMATS:
        if kind.matches(path):
            return kind
    raise LabelError(
        f"labels: {path} looks like none of the formats {', '.join(kind.name for kind in FORMATS)}; if it is one of "
        "them, name it (`simdetr convert --from NAME`)"
    )


def _format_named(name: str) -> LabelFormat:
    for kind in FORMATS:
        if kind.name == name:
            return kind
    raise LabelError(f"format: expected one of {', '.join(kind.name for kind in FORMATS)}, got {name!r}")


def _read_coco(path: Path, images: ImageSource | None, report: LabelReport, masks: bool) -> Labels:
    return read_coco(path, masks=masks, report=report, images=images)[0]


def _read_parquet(path: Path, images: ImageSource | None, report: LabelReport, masks: bool) -> Labels:
    try:
        table = pq.read_table(path).combine_chunks()
    except (OSError, pa.ArrowException) as error:
        raise LabelError(f"{path} cannot be read as Parquet: {error}") from error
    facts = (table.schema.metadata or {}).get(_METADATA_KEY)
    if facts is None:
        raise LabelError(
            f"{path} holds no labels: expected a .parquet that simdetr wrote, got one of columns {table.column_names}"
        )
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


FORMATS = (
    LabelFormat("simdetr", lambda path: path.suffix.lower() == ".parquet", _read_parquet),
    LabelFormat("coco", lambda path: path.suffix.lower() == ".json", _read_coco),
)
"""All formats, in the order in which they are tried."""


def write_result(labels: Labels, out: Path) -> str:
    """Write labels as COCO JSON, or as Parquet if ``out`` ends so; says what was written, in one line."""
    (write_labels if out.suffix == ".parquet" else write_coco)(labels, out)
    return f"{len(labels.boxes_xyxy):,} boxes on {len(labels):,} images in {out}"

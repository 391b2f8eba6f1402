"""Any tool's label file or folder in, `Labels` out, with what was met on the way; `Labels` to any of them.

A format is told by the content of files, never by their ending alone. In simdetr's own Parquet the categories and the
stage stand in the schema's metadata; COCO files are `simdetr.data.coco`'s, the others `simdetr.data.label_formats`'.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from simdetr.data.annotations import LINEAGE_COLUMNS, Category, LabelError, Lineage
from simdetr.data.coco import numbers_in, read_coco, write_coco
from simdetr.data.images import ImageSource, open_images
from simdetr.data.label_checks import with_ids_of
from simdetr.data.label_formats import csv_table, cvat, label_studio, pascal_voc, yolo
from simdetr.data.label_formats.json_kinds import described, json_kind
from simdetr.data.label_formats.known_images import KnownImages
from simdetr.data.label_formats.reading import Corners, Reading, shown
from simdetr.data.label_report import LabelReport
from simdetr.data.labels import _LIST_COLUMNS, Labels
from simdetr.data.storage import atomic_path, files_below

LOG = logging.getLogger(__name__)
_METADATA_KEY = b"simdetr-labels"
_ROWS_PER_GROUP = 20_000
_PARQUET_MAGIC = b"PAR1"
_PROBED_FILES = 50  # of one ending, when a folder is looked at
_LISTED_FILES = 5
_LOOKED_AT_BYTES = 4096


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
    corners: Corners | None = None,
) -> Labels:
    """Read labels from any label file or folder that simdetr knows, and log what had to be dropped or changed.

    Args:
        path: the file or folder; its format is told by its content, see ``FORMATS``.
        images: the images that the labels are of: theirs are the ids of the labels, also where the file spells them
            otherwise, and formats that say nothing of sizes in pixels have them from there.
        format: name of its format, instead of looking at the content.
        strict: raise at the first problem instead of repairing or dropping it.
        masks: read the objects' masks too; a Parquet file gives those it has anyway.
        corners: how Pascal VOC's corners are counted, see `simdetr.data.label_formats.pascal_voc`; told by the files
            if left out.

    Raises:
        LabelError: the file is missing or holds no labels, or has a problem and ``strict`` is set.
    """
    labels, report = read_with_report(path, images=images, format=format, strict=strict, masks=masks, corners=corners)
    say(report)
    return labels


def read_with_report(
    path: str | Path,
    *,
    images: ImageSource | KnownImages | None = None,
    format: str | None = None,
    strict: bool = False,
    masks: bool = False,
    corners: Corners | None = None,
) -> tuple[Labels, LabelReport]:
    """As `read_labels`, with a count of what was met, and nothing logged.

    ``images`` may also be images whose sizes alone are known.
    """
    path = Path(path)
    if not path.exists():
        raise LabelError(f"labels: {path} does not exist")
    kind = format_of(path) if format is None else format_named(format)
    report = LabelReport(path, kind.name, strict=strict)
    known = images if isinstance(images, KnownImages) else KnownImages(images)
    labels = kind.read(Reading(kind.file_of(path), known, report, masks, corners))
    return (labels if known.source is None else with_ids_of(labels, known.source, report)), report


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
        suffixes: endings of its files, by which those in a folder are looked at.
        recognises: whether a file is one of it, by its content.
        read: a file, or a folder if ``is_folder`` -> labels.
        write: labels that `simdetr.data.label_formats.conversion` has made fit, the place, and the images if known.
        is_folder: whether many files make one set of labels.
        holds: what it can say beside boxes, classes and images: columns of `Labels`, ``"ids"`` of categories, and
            ``"unused"`` classes.
    """

    name: str
    suffixes: tuple[str, ...]
    recognises: Callable[[Path], bool]
    read: Callable[[Reading], Labels]
    write: Callable[[Labels, Path, ImageSource | None], None]
    is_folder: bool = False
    holds: frozenset[str] = frozenset()

    def files_in(self, folder: Path, names: Iterable[str]) -> list[str]:
        """Those of the files below a folder that are of it; of many, the first are looked at."""
        own = sorted((name for name in names if name.lower().endswith(self.suffixes)), key=lambda n: (n.count("/"), n))
        return [name for name in own[:_PROBED_FILES] if self.recognises(folder / name)]

    def file_of(self, path: Path) -> Path:
        """The one file of it that a folder holds, where it is one of files; the path itself otherwise."""
        if self.is_folder or path.is_file():
            return path
        found = self.files_in(path, files_below(path))
        if len(found) != 1:
            got = f"{len(found)}: {', '.join(found[:_LISTED_FILES])}" if found else "none"
            raise LabelError(f"{path}: expected one file of the format {self.name} in this folder, got {got}; name it")
        return path / found[0]


def format_of(path: Path) -> LabelFormat:
    """The format that a file or folder looks like; a LabelError if it looks like none, or like several."""
    if path.is_dir():
        names = list(files_below(path))
        found = {kind: files[0] for kind in FORMATS if (files := kind.files_in(path, names))}
    else:
        first = next((kind for kind in FORMATS if kind.recognises(path)), None)
        found = {} if first is None else {first: path.name}  # what one of them recognises is none of the others
    if len(found) == 1:
        return next(iter(found))
    if found:
        both = " and ".join(f"{kind.name} ({name})" for kind, name in found.items())
        raise LabelError(f"labels: {path} looks like {both}; say which is meant (`simdetr convert --from NAME`)")
    known = ", ".join(kind.name for kind in FORMATS)
    raise LabelError(
        f"labels: {path} {_found_instead(path)}, which looks like none of the formats {known}; if it is one of them, "
        "say so (`simdetr convert --from NAME`)"
    )


def is_known(path: Path) -> bool:
    """Whether a file or folder looks like labels with boxes, of whatever format."""
    try:
        format_of(path)
    except LabelError:
        return False
    return True


def _found_instead(path: Path) -> str:
    """What is in a file or folder that looks like no format; a LabelError where there is more to say."""
    if path.is_dir():
        endings = Counter(Path(name).suffix.lower() or "no ending" for name in files_below(path))
        listed = ", ".join(f"{count} × {ending}" for ending, count in endings.most_common(_LISTED_FILES))
        return f"is a folder of {listed}" if listed else "is an empty folder"
    if json_kind(path) == "results":
        raise LabelError(
            f"labels: {path} is a list of COCO results, which names images by numbers alone; give the annotation file "
            "that it was made for (its images, annotations and categories)"
        )
    with path.open("rb") as stream:
        start = stream.read(_LOOKED_AT_BYTES).lstrip()
    if not start:
        return "is an empty file"
    if start[:1] in b"{[":
        return described(path)
    return f"begins with {shown(start[:40])}"


def format_named(name: str, argument: str = "format") -> LabelFormat:
    """The format of a name; a LabelError that lists all of them if there is none."""
    for kind in FORMATS:
        if kind.name == name.lower():
            return kind
    raise LabelError(f"{argument}: expected one of {', '.join(kind.name for kind in FORMATS)}, got {name!r}")


def format_for(out: Path) -> LabelFormat:
    """The format that is written to a file, by its ending; a LabelError where the ending does not say."""
    found = {".json": "coco", ".parquet": "simdetr", ".csv": "csv", ".xml": "cvat"}.get(out.suffix.lower())
    if found is None:
        raise LabelError(
            f"out: {out} does not say its format; say it with --to, such as yolo or voc for a folder, or end the name "
            "with .json, .parquet, .csv or .xml"
        )
    return format_named(found)


def _is_parquet(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC
    except OSError:
        return False


def _read_coco(reading: Reading) -> Labels:
    return read_coco(reading.path, masks=reading.masks, report=reading.report, images=reading.images.source)[0]


def _read_parquet(reading: Reading) -> Labels:
    path = reading.path
    try:
        table = pq.read_table(path).combine_chunks()
        facts = (table.schema.metadata or {}).get(_METADATA_KEY)
        if facts is None:
            raise LabelError(
                f"{path} holds no labels: expected a .parquet that simdetr wrote, got one of columns "
                f"{table.column_names[:_LISTED_FILES]}"
            )
        return _of_table(table, json.loads(facts))
    except LabelError:
        raise
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, OverflowError) as error:
        raise LabelError(f"{path} cannot be read as Parquet: {shown(str(error))}") from error


def _of_table(table: pa.Table, content: Mapping[str, Any]) -> Labels:
    """Labels of the columns that `write_labels` makes, and of the facts in their schema."""
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


_ALL = frozenset({"scores", "areas", "crowd", "masks", "points", "lineage", "stage", "ids", "unused"})

FORMATS = (
    LabelFormat(
        "simdetr",
        (".parquet",),
        _is_parquet,
        _read_parquet,
        lambda labels, out, _: write_labels(labels, out),
        holds=_ALL,
    ),
    LabelFormat(
        "coco",
        (".json",),
        lambda path: json_kind(path) == "coco",
        _read_coco,
        lambda labels, out, _: write_coco(labels, out),
        holds=_ALL,
    ),
    LabelFormat(
        "yolo",
        (*yolo.YAML_SUFFIXES, ".txt"),
        yolo.recognises,
        yolo.read,
        yolo.write,
        is_folder=True,
        holds=frozenset({"masks as shapes", "unused"}),
    ),
    LabelFormat("voc", (".xml",), pascal_voc.recognises, pascal_voc.read, pascal_voc.write, is_folder=True),
    LabelFormat(
        "label-studio",
        (".json",),
        lambda path: json_kind(path) == "label-studio",
        label_studio.read,
        label_studio.write,
    ),
    LabelFormat(
        "cvat", (".xml",), cvat.recognises, cvat.read, cvat.write, holds=frozenset({"masks as shapes", "unused"})
    ),
    LabelFormat(
        "csv",
        (".csv", ".tsv", ".txt"),
        csv_table.recognises,
        csv_table.read,
        csv_table.write,
        holds=frozenset({"scores"}),
    ),
)
"""All formats."""


def write_result(labels: Labels, out: Path, images: Path | None = None) -> str:
    """Write labels as Parquet or CSV if ``out`` ends so, else as COCO JSON; says what was written, in one line.

    Where ``images`` is a COCO file, COCO images keep the ids that they have in it.
    """
    kind = {".parquet": "simdetr", ".csv": "csv"}.get(out.suffix.lower(), "coco")
    if kind == "coco" and images is not None and images.suffix.lower() == ".json":
        write_coco(labels, out, numbers_in(images, open_images(images).ids))
    else:
        format_named(kind).write(labels, out, None)
    return f"{len(labels.boxes_xyxy):,} boxes on {len(labels):,} images in {out}"

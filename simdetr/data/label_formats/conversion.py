"""Label files of one tool in, those of another out, with a report of what was changed or lost, and a check by reading.

What is written is read back before it takes its place: boxes, classes and images must be those that were to be written.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from simdetr.data.annotations import LINEAGE_COLUMNS, LabelError
from simdetr.data.coco import load_coco
from simdetr.data.images import ImageSource
from simdetr.data.label_files import FORMATS, LabelFormat, format_for, format_named, format_of, read_with_report
from simdetr.data.label_formats import yolo
from simdetr.data.label_formats.known_images import KnownImages
from simdetr.data.label_formats.reading import Corners, shown
from simdetr.data.label_formats.shapes import boxes_of_masks
from simdetr.data.label_report import LabelReport
from simdetr.data.labels import Labels
from simdetr.data.spellings import shared_stems
from simdetr.data.storage import is_url

TOLERANCE_PX = 1e-3
_FILE_SUFFIXES = {suffix for kind in FORMATS for suffix in kind.suffixes}
_COCO_FIELDS = {
    "images": {"id", "file_name", "height", "width"},
    "annotations": {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "score", "segmentation", "keypoints"}
    | {"num_keypoints", "stage", *LINEAGE_COLUMNS},
    "categories": {"id", "name", "keypoints", "skeleton"},
}


@dataclass
class Conversion:
    """What a conversion did.

    Attributes:
        report: what reading met.
        source: what was read.
        written: what was written.
        to: name of the format that was written.
        out: where it is.
        changes: what was changed or lost on the way, by kind.
        advice: what the user has to know of the files.
    """

    report: LabelReport
    source: Labels
    written: Labels
    to: str
    out: Path
    changes: Counter[str] = field(default_factory=Counter)
    advice: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report for people, line by line."""
        unlabelled = len(self.report.unlabelled)
        return [
            f"read    {self.report.path} ({self.report.format}): {_figures(self.source)}, {unlabelled:,} unlabelled",
            *(f"  problem: {line}" for line in self.report.lines()),
            *(f"  note: {line}" for line in self.report.note_lines()),
            f"written {self.out} ({self.to}): {_figures(self.written)}; read back and equal",
            *(f"  changed or lost: {count:,} × {kind}" for kind, count in self.changes.items() if count),
            *(f"  {line}" for line in self.advice),
        ]


def _figures(labels: Labels) -> str:
    empty = int((np.diff(labels.offsets) == 0).sum())
    crowds = int(labels.crowd.sum())
    parts = [
        f"{len(labels):,} images",
        f"{len(labels.boxes_xyxy) - crowds:,} boxes" + (" with masks" if labels.masks is not None else ""),
        f"{crowds:,} crowds",
        f"{labels.num_classes:,} classes",
        f"{empty:,} images without objects",
    ]
    return ", ".join(parts)


def convert(
    path: Path,
    out: Path,
    *,
    source_format: str | None = None,
    target_format: str | None = None,
    images: ImageSource | None = None,
    masks: bool = False,
    overwrite: bool = False,
    link_images: bool = False,
    corners: Corners | None = None,
) -> Conversion:
    """Write labels as files of another format.

    Args:
        path: the file or folder to read.
        out: the file or folder to write.
        source_format: its format; told by the content if left out.
        target_format: the format to write; told by the ending of ``out`` if left out.
        images: the images that the labels are of, for formats that say nothing of sizes in pixels, and for spellings.
        masks: write masks in place of boxes where a format has one or the other.
        overwrite: replace what is at ``out``.
        link_images: YOLO: make links to the images beside the labels, where its readers look for them.
        corners: how Pascal VOC's corners are counted.

    Raises:
        LabelError: the labels cannot be read, or not written in this format; nothing is written then.
    """
    if not path.exists():
        raise LabelError(f"{path} does not exist; expected a file or folder of labels")
    target = format_for(out) if target_format is None else format_named(target_format, "--to")
    source = format_of(path) if source_format is None else format_named(source_format, "--from")
    _check_place(path, out, target, overwrite=overwrite)
    _check_wishes(target, images, masks=masks, link_images=link_images)
    wanted = "masks" in target.holds or (masks and "masks as shapes" in target.holds)
    labels, report = read_with_report(path, images=images, format=source.name, masks=wanted, corners=corners)
    written, changes = fitting(labels, target, masks=masks)
    if source.name == "coco":
        changes.update(_coco_extras(load_coco(source.file_of(path)), target, with_masks=wanted))
    _check_names(written, target)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        place = Path(folder, out.name)
        target.write(written, place, images)
        back, _ = read_with_report(
            place,
            images=KnownImages.of_labels(written),
            format=target.name,
            masks=written.masks is not None,
        )
        check_result(written, back)
        if written.masks is not None and back.masks is not None:
            changes["mask whose holes are filled, or whose parts are joined by lines"] += _different_masks(
                written, back
            )
        _put(place, out)
    result = Conversion(report, labels, written, target.name, out, changes)
    if target.name == "yolo":
        linked = yolo.link_images(written, out, images) if link_images and images is not None else 0
        result.advice.append(
            f"{linked:,} links to images in {out / 'images'}"
            if linked
            else f"YOLO's trainers look for images in {out / 'images'}: put them there, or link them (--link_images)"
        )
    return result


def _check_place(path: Path, out: Path, target: LabelFormat, *, overwrite: bool) -> None:
    if out.exists() and out.resolve() == path.resolve():
        raise LabelError(f"out: {out} is the file that is read; choose another place")
    if target.is_folder and out.suffix.lower() in _FILE_SUFFIXES:
        raise LabelError(f"out: {target.name} is a folder, and {out.name} is the name of a file; leave its ending out")
    if target.is_folder and out.is_file():
        raise LabelError(f"out: {target.name} is a folder, and {out} is a file; choose another place")
    if not target.is_folder and out.is_dir():
        raise LabelError(f"out: {target.name} is one file, and {out} is a folder; give a file in it")
    if out.exists() and not overwrite and (out.is_file() or any(out.iterdir())):
        raise LabelError(f"out: {out} exists; choose another place, or replace it with --overwrite")


def _check_wishes(target: LabelFormat, images: ImageSource | None, *, masks: bool, link_images: bool) -> None:
    if masks and not {"masks", "masks as shapes"} & target.holds:
        raise LabelError(f"masks: {target.name} is written with boxes alone; leave --masks out, or choose coco")
    if link_images and target.name != "yolo":
        raise LabelError(f"link_images: only yolo needs its images beside the labels, not {target.name}; leave it out")
    if link_images and images is None:
        raise LabelError("link_images: expected the images too (--images DIR)")
    if link_images and images is not None and (images.members is not None or not isinstance(images.root, Path)):
        raise LabelError("link_images: expected images that are files on this machine, got others")


def _check_names(labels: Labels, target: LabelFormat) -> None:
    """A LabelError for ids and names that cannot be written in this format."""
    by_name = "ids" not in target.holds and target.name != "yolo"
    if by_name and any(not category.name.strip() for category in labels.categories):
        raise LabelError(f"categories: {target.name} knows classes by name, and one has none; name it")
    if not target.is_folder:
        return
    for image_id in labels.image_ids:
        path = PurePosixPath(image_id.replace("\\", "/"))
        if is_url(image_id) or path.is_absolute() or ".." in path.parts or "\0" in image_id or not path.name:
            raise LabelError(
                f"image {shown(image_id)}: {target.name} has a file for each image, named as it; expected a path "
                "relative to the folder of images (--images DIR)"
            )
    if clashes := shared_stems(labels.image_ids):
        (one, other), *_ = clashes
        raise LabelError(
            f"images: {len(clashes)} share their {target.name} file with another, such as {shown(one)} and "
            f"{shown(other)}; rename them, or choose another format"
        )


def fitting(labels: Labels, target: LabelFormat, *, masks: bool = False) -> tuple[Labels, Counter[str]]:
    """The part of labels that a format can hold, and a count of what is changed or lost by that."""
    changes: Counter[str] = Counter()
    holds = target.holds
    had_boxes = np.diff(labels.offsets) > 0
    kept = np.ones(len(labels.boxes_xyxy), np.bool_)
    if "crowd" not in holds:
        kept &= ~labels.crowd
        changes[f"crowd, which {target.name} does not know: left out"] = int(labels.crowd.sum())
    if labels.points is not None and "points" not in holds:
        changes[f"reference point, which {target.name} does not know"] = int(np.isfinite(labels.points).all(1).sum())
    if target.name != "simdetr":
        labels = _clipped(labels, changes)
        boxless = ((labels.boxes_xyxy[:, 2:] - labels.boxes_xyxy[:, :2]) < TOLERANCE_PX).any(1)
        boxless &= kept if labels.points is None or "points" not in holds else False
        kept &= ~boxless
        changes["box without width or height: left out"] = int(boxless.sum())
    if not kept.all():
        labels = labels.rows(np.flatnonzero(kept))
        bare = had_boxes & (np.diff(labels.offsets) == 0)
        if bare.any():
            changes["image with none but such boxes: left out, it would say that it is empty"] = int(bare.sum())
            labels = labels.select(name for name, gone in zip(labels.image_ids, bare, strict=True) if not gone)
    labels = _shapes_of(labels, target, changes, masks=masks)
    if "scores" not in holds:
        changes[f"score, which {target.name} does not hold"] = int((labels.scores != 1).sum())
        labels = replace(labels, scores=np.ones_like(labels.scores))
    if labels.lineage is not None and "lineage" not in holds:
        changes[f"origin of a box, which {target.name} does not hold"] = len(labels.lineage)
    box_areas = (labels.boxes_xyxy[:, 2:] - labels.boxes_xyxy[:, :2]).prod(1)
    if "areas" not in holds:
        changes["area other than the box's"] = int((np.abs(labels.areas - box_areas) > 0.01 * box_areas + 0.1).sum())
        labels = replace(labels, areas=box_areas)
    labels = replace(
        labels,
        lineage=labels.lineage if "lineage" in holds else None,
        points=labels.points if "points" in holds else None,
        stage=labels.stage if "stage" in holds else -1,
    )
    _count_classes(labels, target, changes)
    return labels, changes


def _clipped(labels: Labels, changes: Counter[str]) -> Labels:
    limits = labels.sizes_hw[labels.owners][:, [1, 0, 1, 0]]
    boxes = np.clip(labels.boxes_xyxy, 0, limits).astype(np.float32)
    if labels.points is not None:  # a point may lie outside, and a box of a point alone with it
        alone = (labels.boxes_xyxy[:, 2:] == labels.boxes_xyxy[:, :2]).all(1)
        boxes[alone] = labels.boxes_xyxy[alone]
    changes["box outside its image, cut to it"] = int((boxes != labels.boxes_xyxy).any(1).sum())
    return replace(labels, boxes_xyxy=boxes)


def _shapes_of(labels: Labels, target: LabelFormat, changes: Counter[str], *, masks: bool) -> Labels:
    if labels.masks is None or "masks" in target.holds:
        return labels
    if "masks as shapes" not in target.holds:
        changes[f"mask, which {target.name} is not written with: its box kept"] = len(labels.masks)
        return replace(labels, masks=None)
    if not masks:
        changes["mask: its box kept (--masks writes the masks in place of the boxes)"] = len(labels.masks)
        return replace(labels, masks=None)
    boxes = boxes_of_masks(labels)
    changes["box replaced by that around its mask"] = int(
        (np.abs(boxes - labels.boxes_xyxy) > TOLERANCE_PX).any(1).sum()
    )
    return replace(labels, boxes_xyxy=boxes)


def _count_classes(labels: Labels, target: LabelFormat, changes: Counter[str]) -> None:
    if "ids" not in target.holds:
        ids = enumerate(labels.categories, start=1)
        changes[f"category id, which {target.name} does not hold"] = sum(one.id != place for place, one in ids)
    if "unused" not in target.holds:
        unused = labels.num_classes - len(np.unique(labels.classes))
        changes[f"class without boxes, which {target.name} does not hold"] = unused
    if "ids" not in target.holds:
        names = {category.name.strip() for category in labels.categories}
        changes["class that shares its name with another"] = labels.num_classes - len(names)


def _coco_extras(content: Mapping[str, Any], target: LabelFormat, *, with_masks: bool) -> Iterator[str]:
    """What stands in a COCO file beside what labels hold, one name for each time."""
    for key in sorted(content.keys() - {"images", "annotations", "categories"}):
        if content[key] and not (key == "info" and isinstance(content[key], dict) and "simdetr_stage" in content[key]):
            yield f"'{shown(key)[1:-1]}' of the COCO file"
    for name, known in _COCO_FIELDS.items():
        for place, entry in enumerate(content[name], start=1):
            if not isinstance(entry, dict):
                continue
            for key in sorted(entry.keys() - known):
                yield f"field '{shown(key)[1:-1]}' of {name}"
            if name != "categories" and target.name == "coco" and entry.get("id") != place:
                yield f"id of {name}, numbered anew from 1"
            if name == "annotations" and entry.get("segmentation"):
                if not with_masks:
                    reason = (
                        "--masks writes it in place of the box" if "masks as shapes" in target.holds else "boxes only"
                    )
                    yield f"segmentation, which is not written to {target.name} ({reason})"
                elif isinstance(entry["segmentation"], list):
                    yield "polygons, written as run lengths"


def check_result(written: Labels, back: Labels) -> None:
    """Compare what was to be written with what reading it gives.

    Raises:
        LabelError: other images, other boxes by more than 1e-3 px, or classes of another name.
    """
    if set(written.image_ids) != set(back.image_ids):
        other = sorted(set(written.image_ids) ^ set(back.image_ids))
        raise LabelError(_unequal(f"{len(other)} images are not in both, such as {shown(other[0])}"))
    back = back.select(written.image_ids)
    if (written.sizes_hw != back.sizes_hw).any():
        raise LabelError(_unequal("images have other sizes"))
    if (written.offsets != back.offsets).any():
        image = written.image_ids[int(np.argmax(np.diff(written.offsets) != np.diff(back.offsets)))]
        counts = f"{len(written.of(image))} and {len(back.of(image))}"
        raise LabelError(_unequal(f"image {shown(image)} has {counts} boxes"))
    tolerance = np.maximum(TOLERANCE_PX, 2 * np.spacing(np.abs(written.boxes_xyxy)))
    names = [[category.name.strip() for category in labels.categories] for labels in (written, back)]
    differences = {
        "box": (np.abs(written.boxes_xyxy - back.boxes_xyxy) > tolerance).any(1),
        "class": np.array(
            [names[0][a] != names[1][b] for a, b in zip(written.classes, back.classes, strict=True)], bool
        ),
        "crowd": written.crowd != back.crowd,
        "score": np.abs(written.scores - back.scores) > 1e-6,
    }
    for what, rows in differences.items():
        if rows.any():
            row = int(rows.argmax())
            pair = f"{written.boxes_xyxy[row].tolist()} and {back.boxes_xyxy[row].tolist()}"
            where = shown(written.image_ids[written.owners[row]])
            raise LabelError(
                _unequal(f"the {what} of {int(rows.sum())} boxes differs, such as {pair} in image {where}")
            )


def _unequal(what: str) -> str:
    return f"what was written reads back otherwise: {what}; nothing was kept"


def _different_masks(written: Labels, back: Labels) -> int:
    back = back.select(written.image_ids)
    assert written.masks is not None and back.masks is not None
    return sum(one != other for one, other in zip(written.masks, back.masks, strict=True))


def _put(place: Path, out: Path) -> None:
    """Move what was written to where it belongs; in a folder only its own parts are replaced."""
    if place.is_file():
        place.replace(out)
        return
    out.mkdir(exist_ok=True)
    for part in place.iterdir():
        target = out / part.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        part.replace(target)

"""What detections found, to be looked at: a run's parts in, boxes by image and pictures out; nothing is written."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import select
from sqlmodel import Session, col

from simdetr.app.box_life import Corners
from simdetr.app.detectors_at_hand import DetectorAtHand, files_of
from simdetr.app.image_list import OPEN, project_of
from simdetr.app.picture_files import encoded
from simdetr.app.refusals import Refusal
from simdetr.app.run_files import RunFiles, read_image_list
from simdetr.app.run_queue import ids_of_paths
from simdetr.app.settings import AppSettings
from simdetr.app.tables import Image, Project, Run
from simdetr.data.annotations import ImageLabels
from simdetr.data.images import UnreadableImageError, read_image
from simdetr.data.label_files import read_labels
from simdetr.data.labels import Labels

_LONG_SIDE_PX = 640


def _parts(files: RunFiles) -> list[Path]:
    return sorted(files.parts.glob("part-*.parquet"))


def found_by(
    session: Session, settings: AppSettings, run: Run, start: int, count: int
) -> tuple[list[tuple[int, str, ImageLabels, Labels]], bool]:
    """Of the images of a detection those from a place on: number, name, boxes, and the labels that they are of.

    Returns:
        The images, and whether there are more.
    """
    project = project_of(session, run.project_id)
    page: list[tuple[int, str, ImageLabels, Labels]] = []
    before = 0
    for part in _parts(files_of(settings, run.project_id, run.id or 0)):
        labels = read_labels(part)
        names = labels.image_ids[max(0, start - before) : max(0, start + count - before)]
        ids = ids_of_paths(session, project, names)
        for name in names:
            if name in ids:
                page.append((ids[name], _name(project, name), labels.of(name), labels))
        before += len(labels)
        if before > start + count:
            return page, True
    return page, False


def _name(project: Project, path: str) -> str:
    for root in (project.own_folder, project.folder):
        if root and Path(path).is_relative_to(root):
            return Path(path).relative_to(root).as_posix()
    return path


def found_on(settings: AppSettings, run: Run, path: Path) -> ImageLabels | None:
    """What a detection found on an image; None if it has not looked at it."""
    for part in _parts(files_of(settings, run.project_id, run.id or 0)):
        labels = read_labels(part)
        if path.as_posix() in labels.image_ids:
            return labels.of(path.as_posix())
    return None


def drawn_on(path: Path, boxes: list[tuple[Corners, int]]) -> bytes:
    """A JPEG of an image with boxes in the colours of their classes; Refusal 415 where it cannot be read."""
    import numpy as np

    from simdetr.reports.drawing import class_colour, draw_boxes  # here: another process than the server calls this

    try:
        pixels = read_image(path)
    except UnreadableImageError as error:
        raise Refusal(415, f"{path.name} cannot be read: {error.reason}") from error
    corners = np.array([xyxy for xyxy, _ in boxes], np.float32).reshape(-1, 4)
    colours = [class_colour(class_) for _, class_ in boxes]
    return encoded(draw_boxes(pixels, corners, colours=colours, max_side_px=_LONG_SIDE_PX).convert("RGB"), "JPEG")


def held_out_of(
    session: Session, settings: AppSettings, project: Project, model: DetectorAtHand, count: int
) -> list[Image]:
    """Images that a detector was measured on; some that nobody inspected where there are none."""
    found: list[Image] = []
    if model.run is not None:
        kept = files_of(settings, model.run.project_id, model.run.id or 0).path / "val_images.parquet"
        if kept.is_file():
            ids = ids_of_paths(session, project, read_image_list(kept)[:count])
            found = list(session.scalars(select(Image).where(col(Image.id).in_(ids.values())).order_by(col(Image.id))))
    if found:
        return found
    own = select(Image).where(col(Image.project_id) == project.id, col(Image.status).in_(OPEN))
    return list(session.scalars(own.order_by(col(Image.place), col(Image.id)).limit(count)))

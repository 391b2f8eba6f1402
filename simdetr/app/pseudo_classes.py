"""The pseudo-classes of a pretraining: looked at as crops, joined, parted, named; their names become classes.

They are those of the last labels of the run that the app was started with. A cluster is one of them, or several that
people took to be one kind, without the boxes that people moved to another cluster and with those moved to it. Every
change is in the log of events, and can be undone.

Letters: M boxes of the labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pictures
from PIL import ImageOps
from sqlalchemy import Engine, select
from sqlmodel import Session, col

from simdetr.app.box_life import UndoStack
from simdetr.app.class_list import add_class
from simdetr.app.database import reading
from simdetr.app.image_list import project_of
from simdetr.app.picture_files import crop, cut_out
from simdetr.app.proposals import Proposed, propose_labels
from simdetr.app.refusals import Refusal, missing
from simdetr.app.schemas import ClusterOut
from simdetr.app.tables import BoxClass, ClassKind, Cluster, Event, EventKind
from simdetr.data.annotations import Category, LabelError
from simdetr.data.images import ImageRecord
from simdetr.data.label_files import read_labels
from simdetr.data.labels import Labels

_TILE_PX, _GAP_PX = 96, 4
_GROUND = (128, 132, 138)
"""Between pictures; neither light nor dark, for the page has both colours."""
_WHAT = "cluster "
"""How the names of these events begin."""


def labels_of_run(run: Path | None) -> Labels | None:
    """The last labels that a pretraining made, None if there are none."""
    if run is None or not run.is_dir():
        return None
    found = sorted(run.glob("stage*/labels.parquet"), key=lambda path: (len(path.parent.name), path.parent.name))
    return _read(found[-1], found[-1].stat().st_mtime_ns) if found else None


def labels_at_hand(run: Path | None) -> Labels:
    """The same; Refusal 404 if there are none."""
    found = labels_of_run(run)
    if found is None:
        raise missing("pretraining", "here: the app was started without one (--run), or its labels are gone")
    return found


@lru_cache(maxsize=1)
def _read(path: Path, stamp: int) -> Labels:
    return read_labels(path)


def clusters_of(session: Session, project_id: int, labels: Labels | None) -> list[Cluster]:
    """The clusters of a project, the largest first; made when they are first asked for."""
    found = _clusters(session, project_id)
    if found or labels is None:
        return found
    counts = np.bincount(labels.classes, minlength=labels.num_classes)
    for category, count in zip(labels.categories, counts.tolist(), strict=True):
        if count and isinstance(category.id, int):
            session.add(Cluster(project_id=project_id, members=[category.id], boxes=count))
    session.flush()
    return _clusters(session, project_id)


def _clusters(session: Session, project_id: int) -> list[Cluster]:
    query = select(Cluster).where(col(Cluster.project_id) == project_id)
    return list(session.scalars(query.order_by(col(Cluster.boxes).desc(), col(Cluster.id))))


def cluster_of(session: Session, cluster_id: int) -> Cluster:
    """A cluster; Refusal 404 if there is none."""
    found = session.get(Cluster, cluster_id)
    if found is None:
        raise missing("cluster", cluster_id)
    return found


def shown_cluster(session: Session, cluster: Cluster) -> ClusterOut:
    """A cluster as answers have it."""
    named = None if cluster.class_id is None else session.get(BoxClass, cluster.class_id)
    while named is not None and named.deleted:
        named = None if named.merged_into is None else session.get(BoxClass, named.merged_into)
    return ClusterOut(
        id=cluster.id or 0,
        name=None if named is None else named.name,
        class_id=None if named is None else named.id,
        boxes=cluster.boxes,
        members=cluster.members,
        picked=len(cluster.picked),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Which boxes are in which cluster


def owners_of(clusters: Sequence[Cluster], labels: Labels) -> NDArray[np.int64]:
    """Which cluster each box is in: its place in ``clusters``, -1 for none, int64 [M]."""
    places: NDArray[np.int64] = _by_pseudo_class(clusters, labels)[labels.classes]
    for place, cluster in enumerate(clusters):
        for image, *xyxy in cluster.picked:
            places[_rows_at(labels, image, xyxy)] = place
    return places


def _by_pseudo_class(clusters: Sequence[Cluster], labels: Labels) -> NDArray[np.int64]:
    """The place of the cluster that each of the labels' categories belongs to, -1 for none."""
    rows = {category.id: row for row, category in enumerate(labels.categories)}
    places = np.full(labels.num_classes, -1, np.int64)
    for place, cluster in enumerate(clusters):
        places[[rows[member] for member in cluster.members if member in rows]] = place
    return places


def _rows_at(labels: Labels, image: str, xyxy: Sequence[float]) -> NDArray[np.int64]:
    """The rows of a box, none where labels made since do not have it."""
    try:
        row = labels.row_of(image)
    except LabelError:
        return np.zeros(0, np.int64)
    start, end = labels.offsets[row], labels.offsets[row + 1]
    there = (labels.boxes_xyxy[start:end] == np.asarray(xyxy, np.float32)).all(axis=1)
    return np.flatnonzero(there).astype(np.int64) + int(start)


def rows_of(session: Session, cluster: Cluster, labels: Labels) -> list[int]:
    """The rows of a cluster's boxes in the order in which they are shown.

    Shuffled, by a key that each box has for good: those that stay keep their order when others are moved away.
    """
    clusters = _clusters(session, cluster.project_id)
    rows = np.flatnonzero(owners_of(clusters, labels) == clusters.index(cluster))
    keys = np.random.default_rng(0).permutation(len(labels.boxes_xyxy))
    shuffled: list[int] = rows[np.argsort(keys[rows])].tolist()
    return shuffled


def _count(session: Session, project_id: int, labels: Labels | None) -> None:
    """Count the boxes of all clusters anew, and forget what was moved to where it would be anyway."""
    if labels is None:
        return
    clusters = _clusters(session, project_id)
    own = _by_pseudo_class(clusters, labels)
    for place, cluster in enumerate(clusters):
        kept = [box for box in cluster.picked if any(own[labels.classes[_rows_at(labels, box[0], box[1:])]] != place)]
        if kept != cluster.picked:
            cluster.picked = kept
    counts = np.bincount(owners_of(clusters, labels) + 1, minlength=len(clusters) + 1)[1:]
    for cluster, count in zip(clusters, counts.tolist(), strict=True):
        cluster.boxes = count


# ----------------------------------------------------------------------------------------------------------------------
# What people do with them


def name_cluster(session: Session, cluster: Cluster, name: str, author: str) -> None:
    """Call a cluster by a class, which is made if there is none of this name; an empty name takes it away."""
    with _logged(session, cluster.project_id, "name", author):
        if not name:
            cluster.class_id = None
            return
        found = session.scalar(
            select(BoxClass).where(
                col(BoxClass.project_id) == cluster.project_id, col(BoxClass.name) == name, ~col(BoxClass.deleted)
            )
        )
        made = found or add_class(session, cluster.project_id, name, kind=ClassKind.NOVEL)
        cluster.class_id = made.id


def merge(session: Session, cluster_ids: list[int], labels: Labels | None, author: str) -> Cluster:
    """Join clusters into the first; it keeps its name, or takes the first one that another has."""
    clusters = [cluster_of(session, cluster_id) for cluster_id in dict.fromkeys(cluster_ids)]
    if len(clusters) < 2 or len({cluster.project_id for cluster in clusters}) > 1:
        raise Refusal(409, "expected at least two clusters of one project")
    first = clusters[0]
    with _logged(session, first.project_id, "merge", author):
        first.members = sorted({member for cluster in clusters for member in cluster.members})
        first.picked = [box for cluster in clusters for box in cluster.picked]
        first.boxes = sum(cluster.boxes for cluster in clusters)
        first.class_id = next((cluster.class_id for cluster in clusters if cluster.class_id is not None), None)
        for cluster in clusters[1:]:
            session.delete(cluster)
        session.flush()
        _count(session, first.project_id, labels)
    return first


def split(session: Session, cluster: Cluster, labels: Labels | None, author: str) -> list[Cluster]:
    """Take a joined cluster apart into the pseudo-classes that it was joined from; all keep its name.

    The boxes that were moved to it are a cluster of their own then.

    Raises:
        Refusal: 409, it is a single pseudo-class.
    """
    parts: list[dict[str, Any]] = [{"members": [member], "picked": []} for member in cluster.members]
    parts += [{"members": [], "picked": cluster.picked}] if cluster.picked else []
    if len(parts) < 2:
        raise Refusal(409, "it is a single pseudo-class; move the crops that are another kind to a new one")
    with _logged(session, cluster.project_id, "split", author):
        cluster.sqlmodel_update(parts[0] | {"boxes": 0})
        others = [Cluster(project_id=cluster.project_id, class_id=cluster.class_id, **part) for part in parts[1:]]
        session.add_all(others)
        session.flush()
        _count(session, cluster.project_id, labels)
    return [cluster, *others]


def move(
    session: Session, cluster: Cluster, rows: Iterable[int], target: Cluster | None, labels: Labels, author: str
) -> Cluster:
    """Move boxes of a cluster, by their rows in the labels, to another cluster or a new one; returns that.

    Raises:
        Refusal: 409, a box is not in the cluster, or none would be left in it.
    """
    own, chosen = set(rows_of(session, cluster, labels)), set(rows)
    if chosen - own:
        raise Refusal(409, f"box {min(chosen - own)} is not in this cluster any more; load its crops anew")
    if target is not None and (target is cluster or target.project_id != cluster.project_id):
        raise Refusal(409, "expected another cluster of the same project as the target")
    if chosen == own:
        raise Refusal(409, "these are all crops of the cluster; name it, or merge it with the other one")
    boxes = [[labels.image_ids[labels.owners[row]], *labels.boxes_xyxy[row].tolist()] for row in sorted(chosen)]
    moved = set(map(tuple, boxes))
    with _logged(session, cluster.project_id, "move", author):
        if target is None:
            target = Cluster(project_id=cluster.project_id)
            session.add(target)
        cluster.picked = [box for box in cluster.picked if tuple(box) not in moved]
        target.picked = [*target.picked, *boxes]
        session.flush()
        _count(session, cluster.project_id, labels)
    return target


# ----------------------------------------------------------------------------------------------------------------------
# Undo


_KEPT = ("class_id", "members", "picked", "boxes")


@contextmanager
def _logged(session: Session, project_id: int, what: str, author: str) -> Iterator[None]:
    """Keep in the log what the clusters were before and are after."""
    before = _states(session, project_id)
    yield
    session.flush()
    after = _states(session, project_id)
    changed = [key for key in before | after if before.get(key) != after.get(key)]
    if changed:
        was, now_is = ({"clusters": {key: side.get(key) for key in changed}} for side in (before, after))
        session.add(_event(project_id, EventKind.EDIT, _WHAT + what, was, now_is, author))


def _states(session: Session, project_id: int) -> dict[str, dict[str, Any]]:
    return {str(row.id): {name: getattr(row, name) for name in _KEPT} for row in _clusters(session, project_id)}


def _event(
    project_id: int, kind: EventKind, what: str, before: dict[str, Any], after: dict[str, Any], author: str
) -> Event:
    return Event(project_id=project_id, kind=kind, what=what, before=before, after=after, author=author)


def undo_stack(session: Session, project_id: int) -> UndoStack:
    """What can be undone and redone."""
    log = session.execute(
        select(col(Event.id), col(Event.kind))
        .where(col(Event.project_id) == project_id, col(Event.image_id).is_(None), col(Event.what).startswith(_WHAT))
        .order_by(col(Event.id))
    )
    return UndoStack.of(log)


def step(session: Session, project_id: int, kind: EventKind, author: str) -> None:
    """Undo or redo a change of a project's clusters; Refusal 409 where there is none. Classes that were made stay."""
    stack = undo_stack(session, project_id)
    ids = stack.undoable if kind is EventKind.UNDO else stack.redoable
    if not ids:
        raise Refusal(409, f"there is nothing to {kind.value}")
    edit = session.get(Event, ids[-1])
    assert edit is not None
    side = edit.before if kind is EventKind.UNDO else edit.after
    for key, values in side["clusters"].items():
        row = session.get(Cluster, int(key))
        if values is None:
            if row is not None:
                session.delete(row)
        elif row is None:
            session.add(Cluster(id=int(key), project_id=project_id, **values))
        else:
            row.sqlmodel_update(values)
    session.add(_event(project_id, kind, edit.what, {"of": edit.id}, {}, author))
    session.flush()


# ----------------------------------------------------------------------------------------------------------------------
# Looked at


def crop_of(folder: Path, labels: Labels, row: int, size_px: int) -> bytes:
    """A JPEG of a box of the labels; Refusal 404 if there is none."""
    if row >= len(labels.boxes_xyxy):
        raise missing("box", row)
    return crop(*_place(folder, labels, row), size_px)


def _place(folder: Path, labels: Labels, row: int) -> tuple[ImageRecord, tuple[float, float, float, float]]:
    name = labels.image_ids[labels.owners[row]]
    x0, y0, x1, y1 = labels.boxes_xyxy[row].tolist()
    return ImageRecord(name, folder / name), (x0, y0, x1, y1)


def montage(folder: Path, rows: Sequence[int], labels: Labels, count: int, columns: int) -> Pictures.Image:
    """Crops of the first boxes that can be shown, side by side.

    Raises:
        Refusal: 404, none can be: its images are not in the project's folder.
    """
    tiles: list[Pictures.Image] = []
    for row in rows[: 4 * count]:
        if len(tiles) == count:
            break
        try:
            cut = cut_out(*_place(folder, labels, row), 0.0)
        except Refusal:  # unreadable ones are passed over
            continue
        tiles.append(ImageOps.pad(cut, (_TILE_PX, _TILE_PX), Pictures.Resampling.BILINEAR, _GROUND))
    if not tiles:
        raise missing("picture of the cluster", "whose images can be read in the project's folder")
    step_px = _TILE_PX + _GAP_PX
    width, height = min(columns, len(tiles)), -(-len(tiles) // columns)
    sheet = Pictures.new("RGB", (width * step_px - _GAP_PX, height * step_px - _GAP_PX), _GROUND)
    for place, tile in enumerate(tiles):
        sheet.paste(tile, (place % columns * step_px, place // columns * step_px))
    return sheet


def propose_named(engine: Engine, project_id: int, labels: Labels | None) -> Proposed:
    """Make proposals of the boxes of all clusters that have names."""
    if labels is None:
        raise Refusal(409, "the app was started without the run of a pretraining (--run)")
    with reading(engine) as session:
        project_of(session, project_id)
        clusters = _clusters(session, project_id)
        named = {place: shown_cluster(session, cluster).class_id for place, cluster in enumerate(clusters)}
        owners = owners_of(clusters, labels)
    classes = {place: class_id for place, class_id in named.items() if class_id is not None}
    if not classes:
        raise Refusal(409, "no cluster has a name yet; name some first")
    categories = tuple(Category(place + 1, f"cluster {place + 1}") for place in range(len(clusters)))
    regrouped = replace(labels, classes=np.maximum(owners, 0), categories=categories)
    kept = regrouped.rows(np.flatnonzero(np.isin(owners, list(classes))))
    return propose_labels(engine, project_id, kept, classes, shown_score=0.0)

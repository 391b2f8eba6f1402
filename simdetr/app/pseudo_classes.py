"""The pseudo-classes of a pretraining: looked at as montages, joined, named; their names become classes.

They are those of the last labels of the run that the app was started with. A cluster is one of them, or several that
people took to be one kind.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image as Pictures
from sqlalchemy import Engine, select
from sqlmodel import Session, col

from simdetr.app.class_list import add_class
from simdetr.app.database import reading, writing
from simdetr.app.image_list import project_of
from simdetr.app.proposals import Proposed, propose
from simdetr.app.refusals import Refusal, missing
from simdetr.app.schemas import ClusterOut
from simdetr.app.tables import BoxClass, BoxSource, ClassKind, Cluster, Image
from simdetr.data.images import ImageSource
from simdetr.data.label_files import read_labels
from simdetr.data.labels import Labels

_TILE_PX = 96
_CHUNK = 200


def labels_of_run(run: Path | None) -> Labels | None:
    """The last labels that a pretraining made, None if there are none."""
    if run is None or not run.is_dir():
        return None
    found = sorted(run.glob("stage*/labels.parquet"), key=lambda path: (len(path.parent.name), path.parent.name))
    return _read(found[-1], found[-1].stat().st_mtime_ns) if found else None


@lru_cache(maxsize=1)
def _read(path: Path, stamp: int) -> Labels:
    return read_labels(path)


def clusters_of(session: Session, project_id: int, labels: Labels | None) -> list[Cluster]:
    """The clusters of a project, the largest first; made when they are first asked for."""
    query = select(Cluster).where(col(Cluster.project_id) == project_id)
    query = query.order_by(col(Cluster.boxes).desc(), col(Cluster.id))
    found = list(session.scalars(query))
    if found or labels is None:
        return found
    counts = np.bincount(labels.classes, minlength=labels.num_classes)
    for category, count in zip(labels.categories, counts.tolist(), strict=True):
        if count and isinstance(category.id, int):
            session.add(Cluster(project_id=project_id, members=[category.id], boxes=count))
    session.flush()
    return list(session.scalars(query))


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
    )


def name_cluster(session: Session, cluster: Cluster, name: str) -> None:
    """Call a cluster by a class, which is made if there is none of this name; an empty name takes it away."""
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


def merge(session: Session, cluster_ids: list[int]) -> Cluster:
    """Join clusters into the first; it keeps its name, or takes the first one that another has."""
    clusters = [cluster_of(session, cluster_id) for cluster_id in dict.fromkeys(cluster_ids)]
    if len(clusters) < 2 or len({cluster.project_id for cluster in clusters}) > 1:
        raise Refusal(409, "expected at least two clusters of one project")
    first = clusters[0]
    first.members = sorted({member for cluster in clusters for member in cluster.members})
    first.boxes = sum(cluster.boxes for cluster in clusters)
    first.class_id = next((cluster.class_id for cluster in clusters if cluster.class_id is not None), None)
    for cluster in clusters[1:]:
        session.delete(cluster)
    return first


def split(session: Session, cluster: Cluster, labels: Labels | None) -> list[Cluster]:
    """Take a joined cluster apart into the pseudo-classes that it was joined from; all keep its name.

    Raises:
        Refusal: 409, it is a single pseudo-class.
    """
    if len(cluster.members) < 2:
        raise Refusal(409, "it is a single pseudo-class; for finer ones cluster again: simdetr cluster --num_classes")
    counts = {}
    if labels is not None:
        numbers = np.bincount(labels.classes, minlength=labels.num_classes).tolist()
        counts = {category.id: count for category, count in zip(labels.categories, numbers, strict=True)}
    parts = [
        Cluster(project_id=cluster.project_id, class_id=cluster.class_id, members=[member], boxes=counts.get(member, 0))
        for member in cluster.members[1:]
    ]
    cluster.members = cluster.members[:1]
    cluster.boxes = counts.get(cluster.members[0], 0)
    session.add_all(parts)
    session.flush()
    return [cluster, *parts]


def montage(folder: Path, cluster: Cluster, labels: Labels | None, rows: int, columns: int) -> Pictures.Image:
    """Crops of boxes of a cluster, drawn at random but always the same.

    Raises:
        Refusal: 404, the run is gone, or its images are not in the project's folder.
    """
    from simdetr.reports.drawing import class_montage

    if labels is None:
        raise missing("pretraining for cluster", cluster.id)
    own = {category.id: row for row, category in enumerate(labels.categories)}
    members = [own[member] for member in cluster.members if member in own]
    kept = np.flatnonzero(np.isin(labels.classes, members))
    drawn = np.random.default_rng(cluster.id).permutation(kept)[: 4 * rows * columns]
    chosen = labels.rows(np.sort(drawn))
    names = [name for row, name in enumerate(chosen.image_ids) if chosen.offsets[row] < chosen.offsets[row + 1]]
    some = chosen.select(names).class_agnostic()
    source = ImageSource(folder, some.image_ids)
    try:
        return class_montage(source, some, 0, rows * columns, cluster.id or 0, tile_px=_TILE_PX, columns=columns)
    except (ValueError, OSError) as error:
        raise missing("picture of cluster", f"{cluster.id}: {error}") from error


def propose_named(engine: Engine, project_id: int, labels: Labels | None) -> Proposed:
    """Make proposals of the boxes of all clusters that have names."""
    if labels is None:
        raise Refusal(409, "the app was started without the run of a pretraining (--run)")
    with reading(engine) as session:
        project_of(session, project_id)
        rows = {category.id: row for row, category in enumerate(labels.categories)}
        classes: dict[int, int] = {}
        for cluster in session.scalars(select(Cluster).where(col(Cluster.project_id) == project_id)):
            class_id = shown_cluster(session, cluster).class_id
            if class_id is not None:
                classes |= {rows[member]: class_id for member in cluster.members if member in rows}
    if not classes:
        raise Refusal(409, "no cluster has a name yet; name some first")
    named = labels.rows(np.flatnonzero(np.isin(labels.classes, list(classes))))
    outcome = Proposed()
    for start in range(0, len(named), _CHUNK):
        part = named.select(named.image_ids[start : start + _CHUNK])
        with writing(engine) as session:
            query = select(col(Image.path), col(Image.id)).where(
                col(Image.project_id) == project_id, col(Image.path).in_(part.image_ids)
            )
            ids = {path: image_id for path, image_id in session.execute(query) if image_id is not None}
            outcome.add(propose(session, part, ids, classes, source=BoxSource.DETECTOR))
    return outcome

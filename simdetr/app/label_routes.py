"""Requests about labels of other tools, pseudo-classes, and how images look in training."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Query, Response, UploadFile
from fastapi import Path as InPath
from fastapi.responses import FileResponse
from sqlmodel import Session

from simdetr.app import label_exchange, pseudo_classes
from simdetr.app.box_edits import boxes_of, state_of
from simdetr.app.box_life import truth
from simdetr.app.database import reading, writing
from simdetr.app.desk import AtDesk, Author, Desk
from simdetr.app.image_list import image_of, project_of
from simdetr.app.picture_files import encoded, path_of
from simdetr.app.refusals import missing
from simdetr.app.schemas import (
    COMMON,
    Augmentation,
    AugmentationList,
    ClusterCrop,
    ClusterCrops,
    ClusterEdit,
    ClusterList,
    ClusterMerge,
    ClusterMove,
    ClusterOut,
    Count,
    ExportNew,
    ExportOut,
    FormatList,
    Id,
    ImportOut,
    Problem,
)
from simdetr.app.snapshots import fingerprint
from simdetr.app.tables import Cluster, EventKind
from simdetr.app.training_views import training_view

router = APIRouter(prefix="/api", responses=COMMON)
CANNOT: dict[int | str, dict[str, Any]] = {409: {"model": Problem}}
BAD: dict[int | str, dict[str, Any]] = {400: {"model": Problem}}


@router.get("/formats")
def list_formats() -> FormatList:
    """The formats of labels that are known."""
    read, write = label_exchange.formats()
    return FormatList(read=read, write=write)


@router.post("/projects/{project_id}/imports", responses={**BAD, 413: {"model": Problem}})
def import_file(
    desk: AtDesk,
    author: Author,
    project_id: Id,
    file: Annotated[UploadFile, File()],
    dry_run: bool = False,
    skip_bad: bool = False,
    status: Annotated[Literal["manual", "proposed"], Query()] = "manual",
) -> ImportOut:
    """Read labels of another tool; with ``dry_run`` only to say what is in them."""
    with reading(desk.engine) as session:
        project_of(session, project_id)
    folder = Path(mkdtemp(prefix=".import-", dir=desk.settings.out))
    try:
        path = label_exchange.received(file.filename or "labels", file.file, folder, desk.settings.max_upload_mb << 20)
        wish = label_exchange.Wish(dry_run=dry_run, skip_bad=skip_bad, proposed=status == "proposed")
        return label_exchange.import_labels(desk.engine, project_id, path, wish, author)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exports(desk: Desk, project_id: int) -> Path:
    return desk.settings.out / "projects" / str(project_id) / "exports"


@router.post("/projects/{project_id}/exports", status_code=201, responses={**BAD, **CANNOT})
def export(desk: AtDesk, project_id: Id, asked: ExportNew) -> ExportOut:
    """Write the labels for other tools."""
    written = label_exchange.export_labels(
        desk.engine, project_id, asked.format, asked.statuses, _exports(desk, project_id), with_images=asked.images
    )
    return ExportOut(
        id=written.id,
        format=asked.format,
        images=written.images,
        boxes=written.boxes,
        notes=written.notes,
        snapshot=fingerprint(written.labels),
        download=f"/api/projects/{project_id}/exports/{written.id}/download",
    )


@router.get("/projects/{project_id}/exports/{export_id}/download", response_class=Response)
def download_export(
    desk: AtDesk, project_id: Id, export_id: Annotated[str, InPath(pattern="^[0-9a-f]{12}$")]
) -> Response:
    """The file of an export."""
    found = label_exchange.find_export(_exports(desk, project_id), export_id)
    if found is None:
        raise missing("export", export_id)
    return FileResponse(found, filename=found.name, media_type="application/octet-stream")


# ----------------------------------------------------------------------------------------------------------------------
# Pseudo-classes


@router.get("/projects/{project_id}/clusters")
def list_clusters(desk: AtDesk, project_id: Id) -> ClusterList:
    """The pseudo-classes of the pretraining, the largest first; none if the app was started without it."""
    labels = pseudo_classes.labels_of_run(desk.settings.run)
    with writing(desk.engine) as session:
        project_of(session, project_id)
        return _listed(session, project_id, pseudo_classes.clusters_of(session, project_id, labels))


def _listed(session: Session, project_id: int, clusters: Sequence[Cluster]) -> ClusterList:
    stack = pseudo_classes.undo_stack(session, project_id)
    return ClusterList(
        clusters=[pseudo_classes.shown_cluster(session, cluster) for cluster in clusters],
        can_undo=bool(stack.undoable),
        can_redo=bool(stack.redoable),
    )


@router.patch("/clusters/{cluster_id}")
def name_cluster(desk: AtDesk, author: Author, cluster_id: Id, asked: ClusterEdit) -> ClusterOut:
    """Give a cluster the name of a class, or take it away."""
    with writing(desk.engine) as session:
        cluster = pseudo_classes.cluster_of(session, cluster_id)
        pseudo_classes.name_cluster(session, cluster, asked.name, author)
        return pseudo_classes.shown_cluster(session, cluster)


@router.post("/clusters/merge", responses=CANNOT)
def merge_clusters(desk: AtDesk, author: Author, asked: ClusterMerge) -> ClusterOut:
    """Join clusters that are one kind."""
    labels = pseudo_classes.labels_of_run(desk.settings.run)
    with writing(desk.engine) as session:
        joined = pseudo_classes.merge(session, asked.cluster_ids, labels, author)
        return pseudo_classes.shown_cluster(session, joined)


@router.post("/clusters/{cluster_id}/split", responses=CANNOT)
def split_cluster(desk: AtDesk, author: Author, cluster_id: Id) -> ClusterList:
    """Take a cluster apart into the pseudo-classes that it was joined from."""
    labels = pseudo_classes.labels_of_run(desk.settings.run)
    with writing(desk.engine) as session:
        cluster = pseudo_classes.cluster_of(session, cluster_id)
        parts = pseudo_classes.split(session, cluster, labels, author)
        return _listed(session, cluster.project_id, parts)


@router.post("/clusters/{cluster_id}/move", responses=CANNOT)
def move_crops(desk: AtDesk, author: Author, cluster_id: Id, asked: ClusterMove) -> ClusterOut:
    """Move boxes that are another kind to another cluster, or to a new one; the answer is that cluster."""
    labels = pseudo_classes.labels_at_hand(desk.settings.run)
    with writing(desk.engine) as session:
        cluster = pseudo_classes.cluster_of(session, cluster_id)
        target = None if asked.target is None else pseudo_classes.cluster_of(session, asked.target)
        moved_to = pseudo_classes.move(session, cluster, asked.rows, target, labels, author)
        return pseudo_classes.shown_cluster(session, moved_to)


@router.post("/projects/{project_id}/clusters/undo", responses=CANNOT)
def undo_clusters(desk: AtDesk, author: Author, project_id: Id) -> ClusterList:
    """Take the last change of the clusters back."""
    return _step(desk, author, project_id, EventKind.UNDO)


@router.post("/projects/{project_id}/clusters/redo", responses=CANNOT)
def redo_clusters(desk: AtDesk, author: Author, project_id: Id) -> ClusterList:
    """Do again what was taken back last."""
    return _step(desk, author, project_id, EventKind.REDO)


def _step(desk: Desk, author: str, project_id: int, kind: EventKind) -> ClusterList:
    with writing(desk.engine) as session:
        project_of(session, project_id)
        pseudo_classes.step(session, project_id, kind, author)
        return _listed(session, project_id, pseudo_classes.clusters_of(session, project_id, None))


@router.get("/clusters/{cluster_id}/montage", response_class=Response)
def cluster_montage(
    desk: AtDesk,
    cluster_id: Id,
    rows: Annotated[int, Query(ge=1, le=10)] = 3,
    columns: Annotated[int, Query(ge=1, le=12)] = 6,
) -> Response:
    """Crops of boxes of a cluster, as a JPEG."""
    labels = pseudo_classes.labels_at_hand(desk.settings.run)
    with reading(desk.engine) as session:
        cluster = pseudo_classes.cluster_of(session, cluster_id)
        folder = Path(project_of(session, cluster.project_id).folder)
        shown = pseudo_classes.rows_of(session, cluster, labels)
    picture = pseudo_classes.montage(folder, shown, labels, rows * columns, columns)
    headers = {"cache-control": "private, max-age=60"}
    return Response(encoded(picture, "JPEG"), media_type="image/jpeg", headers=headers)


@router.get("/clusters/{cluster_id}/crops")
def list_crops(
    desk: AtDesk,
    cluster_id: Id,
    limit: Annotated[int, Query(ge=1, le=500)] = 60,
    after: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> ClusterCrops:
    """Boxes of a cluster, in the order of its montage."""
    labels = pseudo_classes.labels_at_hand(desk.settings.run)
    with reading(desk.engine) as session:
        rows = pseudo_classes.rows_of(session, pseudo_classes.cluster_of(session, cluster_id), labels)
    crops = [
        ClusterCrop(row=row, image=labels.image_ids[labels.owners[row]], xyxy=labels.boxes_xyxy[row].tolist())
        for row in rows[after : after + limit]
    ]
    return ClusterCrops(crops=crops, next=after + limit if len(rows) > after + limit else None)


@router.get("/clusters/{cluster_id}/crops/{row}", response_class=Response, responses={415: {"model": Problem}})
def get_cluster_crop(
    desk: AtDesk,
    cluster_id: Id,
    row: Annotated[int, InPath(ge=0, le=2**31)],
    size: Annotated[int, Query(ge=32, le=512)] = 128,
) -> Response:
    """A picture of a box of a cluster with a little around it, as a JPEG."""
    labels = pseudo_classes.labels_at_hand(desk.settings.run)
    with reading(desk.engine) as session:
        cluster = pseudo_classes.cluster_of(session, cluster_id)
        folder = Path(project_of(session, cluster.project_id).folder)
    headers = {"cache-control": "private, max-age=3600"}
    return Response(pseudo_classes.crop_of(folder, labels, row, size), media_type="image/jpeg", headers=headers)


@router.post("/projects/{project_id}/clusters/propose", responses=CANNOT)
def propose_clusters(desk: AtDesk, project_id: Id) -> Count:
    """Make proposals of the boxes of all clusters that have names."""
    labels = pseudo_classes.labels_of_run(desk.settings.run)
    return Count(boxes=pseudo_classes.propose_named(desk.engine, project_id, labels).boxes)


# ----------------------------------------------------------------------------------------------------------------------
# Augmentation


@router.get("/augmentations")
def list_augmentations() -> AugmentationList:
    """How images may be changed in training; the names are parameters of a training run."""
    return AugmentationList(
        augmentations=[
            Augmentation(
                name="colour",
                title="brightness, contrast, saturation, hue, blur",
                kind="choice",
                default="light",
                choices=["none", "light", "strong"],
            ),
            Augmentation(name="flip", title="mirror half of the images", kind="switch", default=True),
            Augmentation(name="crop", title="crop half of the images", kind="switch", default=False),
            Augmentation(
                name="mosaic", title="part made of four images", kind="number", default=0.0, least=0.0, most=1.0
            ),
            Augmentation(
                name="rotation", title="rotate, degrees at most", kind="number", default=0.0, least=0.0, most=30.0
            ),
            Augmentation(
                name="brightness", title="brighter or darker, at most", kind="number", default=0.0, least=0.0, most=0.3
            ),
            Augmentation(name="noise", title="noise, at most", kind="number", default=0.0, least=0.0, most=0.2),
        ]
    )


@router.get("/images/{image_id}/augmented", response_class=Response, responses={**CANNOT, 415: {"model": Problem}})
def augmented(
    desk: AtDesk,
    image_id: Id,
    seed: Annotated[int, Query(ge=0, le=2**31)] = 0,
    colour: Literal["none", "light", "strong"] = "light",
    flip: bool = True,
    crop: bool = False,
    rotation: Annotated[float, Query(ge=0, le=180)] = 0.0,
    brightness: Annotated[float, Query(ge=0, le=1)] = 0.0,
    noise: Annotated[float, Query(ge=0, le=1)] = 0.0,
) -> Response:
    """An image with its boxes as a training might see it, as a JPEG."""
    with reading(desk.engine) as session:
        image = image_of(session, image_id)
        path = path_of(project_of(session, image.project_id), image)
        boxes = truth([state_of(box) for box in boxes_of(session, image_id)], with_proposed=True)
    changes = {
        "colour": colour,
        "flip": flip,
        "crop": crop,
        "rotation": rotation,
        "brightness": brightness,
        "noise": noise,
    }
    content = desk.aside.ask(training_view, path, [(box.xyxy, box.class_id) for box in boxes], changes, seed)
    return Response(content, media_type="image/jpeg")

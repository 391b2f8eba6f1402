"""The labels of a project in, what trainings and exports read out: `Labels`, as they stand at this moment.

An image is among them only if a person inspected it: then, without boxes, it shows no object. What nobody looked at is
unlabelled, which is not the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from sqlalchemy import select
from sqlmodel import Session, col

from simdetr.app import box_life
from simdetr.app.box_edits import state_of
from simdetr.app.box_life import BoxState
from simdetr.app.picture_files import look_at, path_of
from simdetr.app.tables import Box, BoxClass, BoxStatus, ClassKind, Image, ImageStatus, Project, RejectedAs, Shot
from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.labels import Labels
from simdetr.data.protocols import hash_order

LEAST_HELD_OUT = 5
"""Fewer images say too little to validate on."""
MOST_HELD_OUT = 500
_IMAGES_AT_A_TIME = 500


@dataclass(frozen=True)
class Chosen:
    """Which boxes of an image a snapshot takes, and which of them are regions to ignore."""

    boxes: Sequence[BoxState]
    ignored: Sequence[BoxState] = ()


Choice = Callable[[Sequence[BoxState]], Chosen]


def categories_of(session: Session, project_id: int, *, with_unnamed: bool = False) -> tuple[Category, ...]:
    """The classes of a project by their ids, which stay the same when classes come and go.

    The class of what nobody named is none where people left no box in it, unless it is asked for.
    """
    query = select(BoxClass).where(col(BoxClass.project_id) == project_id, ~col(BoxClass.deleted))
    if not with_unnamed:
        used = select(col(Box.class_id)).where(col(Box.alive), col(Box.status).in_(box_life.TRUTH))
        query = query.where((col(BoxClass.kind) != ClassKind.PSEUDO) | col(BoxClass.id).in_(used))
    rows = session.scalars(query.order_by(col(BoxClass.id)))
    return tuple(Category(row.id or 0, row.name) for row in rows)


def as_trained(project: Project, *, with_proposed: bool = False, min_score: float = 0.0) -> Choice:
    """What a training learns of an image: truth as objects; flagged and, as the project says, rejected boxes ignored.

    A rejected box that lies on an object is about that object, and no region to ignore.
    """

    def choose(boxes: Sequence[BoxState]) -> Chosen:
        kept = box_life.truth(boxes, with_proposed=with_proposed, min_score=min_score)
        objects, ignored = [b for b in kept if not b.ignore], [b for b in kept if b.ignore]
        if project.rejected_as == RejectedAs.IGNORE:
            rejected = [box for box in boxes if box.status is BoxStatus.REJECTED]
            ignored += [b for b in rejected if all(box_life.iou(b.xyxy, o.xyxy) <= box_life.SAME_IOU for o in objects)]
        return Chosen(objects, ignored)

    return choose


def with_statuses(statuses: Collection[BoxStatus]) -> Choice:
    """Boxes of some statuses; flagged ones as regions to ignore."""

    def choose(boxes: Sequence[BoxState]) -> Chosen:
        kept = [box for box in boxes if box.status in statuses]
        return Chosen([box for box in kept if not box.ignore], [box for box in kept if box.ignore])

    return choose


def images_with(session: Session, project_id: int, statuses: Collection[ImageStatus]) -> Iterator[Image]:
    """Images of some statuses, by id, some at a time."""
    after = 0
    while True:
        query = select(Image).where(
            col(Image.project_id) == project_id, col(Image.id) > after, col(Image.status).in_(list(statuses))
        )
        found = list(session.scalars(query.order_by(col(Image.id)).limit(_IMAGES_AT_A_TIME)))
        if not found:
            return
        yield from found
        after = found[-1].id or 0
        for image in found:
            session.expunge(image)


def labels_of(
    session: Session,
    project: Project,
    choose: Choice,
    *,
    statuses: Collection[ImageStatus] = (ImageStatus.INSPECTED,),
    name: Callable[[Image], str] | None = None,
    rows_of: list[BoxState] | None = None,
    with_unnamed: bool = False,
) -> Labels:
    """The labels of the images of some statuses.

    Args:
        session: of the database.
        project: whose images.
        choose: which boxes.
        statuses: of the images; those that cannot be read are left out.
        name: ids of the labels' images; by default their paths on this machine, as lists of images have them.
        rows_of: gets the box behind every row of the labels.
        with_unnamed: boxes of the class of what nobody named are among them.
    """
    assert project.id is not None
    categories = categories_of(session, project.id, with_unnamed=with_unnamed)
    rows = {category.id: row for row, category in enumerate(categories)}
    own_name = name or (lambda image: path_of(project, image).as_posix())
    made, batch = [], []
    for image in images_with(session, project.id, statuses):
        if look_at(project, image):
            batch.append(image)
        if len(batch) == _IMAGES_AT_A_TIME:
            made += _stacked(session, batch, rows, choose, own_name, rows_of)
            batch = []
    made += _stacked(session, batch, rows, choose, own_name, rows_of)
    return Labels.from_images(made, categories)


def _stacked(
    session: Session,
    images: Sequence[Image],
    rows: dict[int | str, int],
    choose: Choice,
    name: Callable[[Image], str],
    rows_of: list[BoxState] | None,
) -> list[ImageLabels]:
    boxes = session.scalars(
        select(Box)
        .where(col(Box.image_id).in_([image.id for image in images]), col(Box.alive))
        .order_by(col(Box.image_id), col(Box.id))
    )
    by_image = {own: [state_of(box) for box in group] for own, group in groupby(boxes, key=lambda box: box.image_id)}
    made = []
    for image in images:
        chosen = choose([box for box in by_image.get(image.id or 0, []) if box.class_id in rows])
        taken = [*chosen.boxes, *chosen.ignored]
        if rows_of is not None:
            rows_of += taken
        made.append(
            ImageLabels.build(
                name(image),
                (image.height or 1, image.width or 1),
                [box.xyxy for box in taken],
                [rows[box.class_id] for box in taken],
                [box.score if box.status is BoxStatus.PROPOSED and box.score is not None else 1.0 for box in taken],
                [False] * len(chosen.boxes) + [True] * len(chosen.ignored),
            )
        )
    return made


def held_out(labels: Labels, part: float, seed: int) -> tuple[Labels, Labels | None]:
    """Labels to train on, and to validate on if there are enough: the same images whenever they are asked for."""
    count = min(MOST_HELD_OUT, round(part * len(labels)))
    if count < LEAST_HELD_OUT:
        return labels, None
    order = hash_order(labels.image_ids, seed)
    return labels.select(sorted(order[count:])), labels.select(sorted(order[:count]))


def fingerprint(labels: Labels) -> str:
    """Hash of ids, boxes, classes and regions to ignore: which data a model or file was made from."""
    names = [labels.image_ids, [category.name for category in labels.categories]]
    facts = hashlib.blake2b(json.dumps(names).encode(), digest_size=16)
    for values in (labels.offsets, labels.boxes_xyxy, labels.classes, labels.crowd):
        facts.update(values.tobytes())
    return facts.hexdigest()


def shots_of(session: Session, project: Project, *, negative: bool) -> Labels:
    """The shots of a project, or its negative ones; images that have some, by their paths on this machine."""
    assert project.id is not None
    categories = categories_of(session, project.id)
    rows = {category.id: row for row, category in enumerate(categories)}
    pairs = session.execute(
        select(Box, Image)
        .join(Shot, col(Shot.box_id) == col(Box.id))
        .join(Image, col(Image.id) == col(Box.image_id))
        .where(col(Shot.project_id) == project.id, col(Shot.negative) == negative, col(Box.alive))
        .order_by(col(Image.id), col(Box.id))
    )
    made = []
    for _, group in groupby(pairs, key=lambda pair: pair[1].id):
        own = [pair for pair in group if pair[0].class_id in rows]
        if own and look_at(project, own[0][1]):
            image = own[0][1]
            boxes = [state_of(box) for box, _ in own]
            made.append(
                ImageLabels.build(
                    path_of(project, image).as_posix(),
                    (image.height or 1, image.width or 1),
                    [box.xyxy for box in boxes],
                    [rows[box.class_id] for box in boxes],
                )
            )
    return Labels.from_images(made, categories)

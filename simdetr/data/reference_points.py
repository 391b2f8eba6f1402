"""Which point of an object is its reference point, by class: boxes or given points in, points out.

Source: US 11,544,507 (a landmark is its class and one class-specific point: the centre of the bounding box of signs and
signals, the lower right end of road markings); the table is the user's, since class sets differ by country. Rules read
the box as it is seen, in training as the transforms leave it, flipped and cut; given points are moved as the image is.
Letters: n objects of one image, M of a set, C classes, T objects of a training sample.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from simdetr.boxes import clip
from simdetr.data import points as point_columns
from simdetr.data.annotations import Category, LabelError
from simdetr.data.labels import Labels
from simdetr.data.points import Points

LOG = logging.getLogger(__name__)

BOX_RULES = {
    "center": (0.5, 0.5),
    "bottom_right": (1.0, 1.0),
    "bottom_left": (0.0, 1.0),
    "top_left": (0.0, 0.0),
    "top_right": (1.0, 0.0),
    "bottom_center": (0.5, 1.0),
}
"""Rules that read the box, and where in it they look: fractions of its width and height."""
GIVEN = "given"
"""The rule that takes the labels' own points."""
OR_GIVEN = f"|{GIVEN}"
"""Ending of a rule that reads the box, and takes the labels' point where there is no box, as that same point."""

_ROUNDING = 1e-6  # by this fraction of the image a point at its very edge may miss it
_WORKERS = 256  # each counts in a place of its own, so that no count is lost


class SharedCount:
    """A number that all loading processes of a run add to."""

    def __init__(self) -> None:
        self._parts: Tensor = torch.zeros(_WORKERS, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def __int__(self) -> int:
        return int(self._parts.sum())

    def add_one(self) -> None:
        """Count."""
        worker = get_worker_info()
        self._parts[0 if worker is None else 1 + worker.id % (_WORKERS - 1)] += 1


@dataclass(frozen=True)
class ReferencePoints:
    """The rule of every class.

    Attributes:
        table: rule by class name: one of `BOX_RULES`, such a one with ``|given``, or ``given``; the key ``default``
            speaks for the classes that are left out.
        categories: the C classes, in the order of the class indices.
        margin: how far outside the image a point may lie, as a fraction of the image's width or height.
        refused_flips: training samples that were not mirrored because a landmark with a left or right rule has no box.

    Raises:
        ValueError: a class without a rule, a name that is no class, an unknown rule, or a margin below 0.
    """

    table: Mapping[str, str]
    categories: Sequence[Category]
    margin: float = 0.0
    refused_flips: SharedCount = field(default_factory=SharedCount, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, rule in self.table.items():
            if rule != GIVEN and rule.removesuffix(OR_GIVEN) not in BOX_RULES:
                raise ValueError(
                    f"reference_points: expected one of {', '.join(sorted(BOX_RULES))} (each also with {OR_GIVEN!r}, "
                    f"for landmarks without box) or {GIVEN}, got {rule!r} for {name!r}"
                )
        if strangers := sorted(set(self.table) - {*self.names, "default"}):
            raise ValueError(
                f"reference_points: {', '.join(map(repr, strangers))} is no class of the labels; they have "
                f"{', '.join(self.names)}"
            )
        missing = [name for name in self.names if name not in self.table]
        if missing and "default" not in self.table:
            raise ValueError(
                f"reference_points: no rule for the class {', '.join(map(repr, missing))}; add it to the table, or the "
                "key 'default' for all others"
            )
        if not 0 <= self.margin < np.inf:
            raise ValueError(f"point_margin: expected a fraction of the image's side, at least 0, got {self.margin}")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Name of each class, C of them."""
        return tuple(category.name for category in self.categories)

    @cached_property
    def rules(self) -> tuple[str, ...]:
        """Rule of each class, C of them."""
        return tuple(self.table[name if name in self.table else "default"] for name in self.names)

    def of(self, categories: Sequence[Category]) -> ReferencePoints:
        """The same rules for other labels of the same data, whose classes are these or some of them, by name."""
        names = {"default", *(category.name for category in categories)}
        table = {name: rule for name, rule in self.table.items() if name in names}
        return replace(self, table=table, categories=categories)

    @cached_property
    def _places(self) -> NDArray[np.float32]:
        """Where in its box each class has its point, [C, 2]; NaN for given points."""
        places = [BOX_RULES.get(rule.removesuffix(OR_GIVEN), (np.nan, np.nan)) for rule in self.rules]
        return np.array(places, np.float32).reshape(-1, 2)

    @cached_property
    def _needs_box(self) -> NDArray[np.bool_]:
        return np.array([not rule.endswith(GIVEN) for rule in self.rules], np.bool_)

    def one_sided(self, classes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which classes [n] have their point on the left or right of a box, so that a mirror moves it; bool [n]."""
        return np.isin(self._places[classes, 0], (0, 1))

    def count_refused_flip(self) -> None:
        """Count a training sample that was not mirrored; the first one is logged."""
        if int(self.refused_flips) == 0:
            LOG.warning(
                "images with a landmark that has only a point, of a class whose point is a left or right one, are not "
                "mirrored: where the other side is cannot be known; boxes for these landmarks would help"
            )
        self.refused_flips.add_one()

    def points_of(
        self, boxes_xyxy: NDArray[np.float32], classes: NDArray[np.int64], given: Points | None = None
    ) -> Points:
        """Reference points [n, 2] of objects, NaN where an object has neither the box nor the point its rule asks for.

        Args:
            boxes_xyxy: float32 [n, 4]; a box without area counts as none.
            classes: int64 [n].
            given: the labels' own points [n, 2], NaN where unknown.

        Raises:
            LabelError: only a point where the class's rule needs a box.
        """
        given = point_columns.unknown(len(classes)) if given is None else given
        self._check_boxes(boxes_xyxy, classes, given, lambda row: f"row {row}")
        places = self._places[classes]
        points = boxes_xyxy[:, :2] * (1 - places) + boxes_xyxy[:, 2:] * places
        by_box = (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(1) & ~np.isnan(places[:, 0])
        return np.where(by_box[:, None], points, given).astype(np.float32)

    def inside(self, points: Points, sizes_hw: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which points [n, 2] in pixels lie in the image or at most the margin outside, bool [n]; unknown ones do not.

        ``sizes_hw`` is (height, width) of their image, [2], or of each one's, [n, 2].
        """
        parts = points / sizes_hw[..., ::-1]
        limit = self.margin + _ROUNDING
        inside: NDArray[np.bool_] = np.all((parts >= -limit) & (parts <= 1 + limit), axis=1)
        return inside

    def check(self, labels: Labels) -> None:
        """See that every landmark of these labels has what its rule reads.

        Raises:
            LabelError: other classes than the rules', only a point where a rule needs a box (named by image and class),
                or given points asked of labels without any.
        """
        names = tuple(category.name for category in labels.categories)
        if names != self.names:
            raise LabelError(f"reference_points: expected labels of the classes {self.names}, got {names}")
        if labels.points is None:
            asking = sorted({names[c] for c in np.unique(labels.classes) if self.rules[c] == GIVEN})
            if asking:
                raise LabelError(
                    f"reference_points: {GIVEN!r} for {', '.join(asking)} needs points, and the labels have none; "
                    f"label one keypoint per object, or take a rule by the box: {', '.join(sorted(BOX_RULES))}"
                )
            return
        ids, owners = labels.image_ids, labels.owners
        self._check_boxes(labels.boxes_xyxy, labels.classes, labels.points, lambda row: f"image {ids[owners[row]]!r}")

    def _check_boxes(
        self, boxes_xyxy: NDArray[np.float32], classes: NDArray[np.int64], given: Points, place: Callable[[int], str]
    ) -> None:
        wrong = np.flatnonzero(self._needs_box[classes] & point_columns.only_points(boxes_xyxy, given))
        if len(wrong):
            row, class_index = int(wrong[0]), int(classes[wrong[0]])
            name, rule = self.names[class_index], self.rules[class_index]
            raise LabelError(
                f"reference_points: {rule!r} for {name!r} needs a box, but a landmark in {place(row)} has only a point "
                f"({len(wrong)} such); draw its box, or write {rule + OR_GIVEN!r} if that point is meant, "
                f"{GIVEN!r} if all of the class have points of their own"
            )


def with_reference_points(labels: Labels, rules: ReferencePoints) -> Labels:
    """Labels with their reference points as ``points``, to be trained on and scored against.

    Boxes count as far as they lie in the image. Points that lie outside it by more than the margin become unknown;
    their number is logged.

    Raises:
        LabelError: as `ReferencePoints.check`.
    """
    rules.check(labels)
    sizes_hw = labels.sizes_hw[labels.owners]
    seen = np.clip(labels.boxes_xyxy, 0, np.tile(sizes_hw[:, ::-1], 2)).astype(np.float32)
    # a box that is wholly outside stays as it is: its point is outside too
    has_area = np.all(seen[:, 2:] > seen[:, :2], axis=1, keepdims=True)
    boxes = np.where(has_area, seen, labels.boxes_xyxy)
    points = rules.points_of(boxes, labels.classes, labels.points)
    known = point_columns.known(points)
    outside: NDArray[np.bool_] = known & ~rules.inside(points, sizes_hw)
    if outside.any():
        facts = (outside.sum(), known.sum(), rules.margin, labels.image_ids[labels.owners[outside.argmax()]])
        LOG.warning(
            "%d of %d reference points lie outside their image by more than %g of its side and are left out, the first "
            "in %s",
            *facts,
        )
    return replace(labels, points=np.where(outside[:, None], np.float32(np.nan), points))


def untransformed_points(
    rules: ReferencePoints,
    boxes_xyxy: NDArray[np.float32],
    classes: NDArray[np.int64],
    given: Points | None,
    size_hw: tuple[int, int],
) -> dict[str, Tensor]:
    """What the transforms of a training sample carry along with its boxes; see `ReferencePoints.points_of`.

    Returns:
        ``points`` float32 [T, 2], the given points in pixels, NaN where unknown or outside; ``only_point`` bool [T],
        landmarks without box; ``one_sided`` bool [T], those of them that no mirror may move.
    """
    given = point_columns.unknown(len(classes)) if given is None else given
    given = np.where(rules.inside(given, np.array(size_hw))[:, None], given, np.float32(np.nan))
    only_point = point_columns.only_points(boxes_xyxy, given)
    columns = {"points": given, "only_point": only_point, "one_sided": only_point & rules.one_sided(classes)}
    return {name: torch.from_numpy(values) for name, values in columns.items()}


def transformed_points(rules: ReferencePoints, target: dict[str, Any], size_hw: tuple[int, int]) -> dict[str, Any]:
    """A transformed training target with its reference points, by the boxes as they are now.

    It comes with ``boxes`` xyxy in pixels, ``labels`` and what `untransformed_points` made, and goes with ``points``
    float32 [T, 2] in pixels, NaN where there is none or it left the image of (height, width). Landmarks without box are
    gone where their point is, and have the box (x, y, x, y) else.

    Raises:
        ValueError: the transform took boxes away and left their points.
    """
    boxes = target["boxes"].as_subclass(Tensor).float().reshape(-1, 4)
    if not len(boxes) == len(target["labels"]) == len(target["points"]) == len(target["only_point"]):
        raise ValueError(
            f"transform: expected to keep points with their boxes, got {len(boxes)} boxes and {len(target['points'])} "
            "points; use the transforms of simdetr.data.augmentation, or leave reference_points out"
        )
    if target.get("flip_refused", False):
        rules.count_refused_flip()
    only_point = target["only_point"]
    boxes = torch.where(only_point[:, None], target["points"].repeat(1, 2), boxes)
    points = rules.points_of(boxes.numpy(), target["labels"].numpy(), target["points"].numpy())
    there = rules.inside(points, np.array(size_hw))
    kept = torch.from_numpy(there) | ~only_point
    points = np.where(there[:, None], points, np.float32(np.nan))
    settled = {"boxes": clip(boxes, size_hw), "points": torch.from_numpy(points)}
    settled |= {name: target[name] for name in ("labels", "scores", "masks") if name in target}
    return target | {name: values[kept] for name, values in settled.items()}

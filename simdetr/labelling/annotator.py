"""A person who looks at proposals, simulated: truth and proposals of an image in, what the person leaves out.

What the person does with an image, in this order:

1. Sees which proposal means which object: pairs of IoU of at least ``match_iou``, the tightest first, those of the
   object's own class before others. Each object has one proposal; a second one on it is a duplicate.
2. Looks at every proposal, ``verify_seconds`` each. It is *right* where the class agrees and the IoU is at least
   ``accept_iou``: accepted. Where it means an object but is loose or of another class it is corrected: a class costs
   ``rename_seconds``, a box is drawn anew. All others (nothing there, duplicates) are rejected.
3. Draws the objects that no proposal means.

Where the person errs: accepts as it stands what was to be corrected or rejected (``accepts_wrong``); rejects a right
proposal, in the belief that there is no such object, and so does not draw it either (``rejects_right``); does not see
an object that no proposal shows (``misses``); draws its edges beside the object's (``box_noise``).

Crowd regions of the truth are handed on as they are and cost nothing; a proposal on one is rejected unless it means
another object, since the region stands for it already.

Seconds: verifying a box takes 1.6 s, drawing one 3.7 to 5.9 s; these are figures at second hand, to be replaced by
times that were measured on the task at hand.
Letters: T objects, P proposals, L boxes that are left.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from simdetr.data.annotations import ImageLabels


class Verdict(StrEnum):
    """What a person says of a proposal."""

    ACCEPTED = "accepted"
    CORRECTED = "corrected"
    REJECTED = "rejected"


@dataclass(frozen=True)
class Inspection:
    """What a person leaves of an image.

    Attributes:
        labels: L boxes, all scores 1: the objects in the order of the truth, then what was accepted but is no object.
            Reference points are those of the truth, NaN elsewhere; masks and lineage are not kept.
        verdicts: one per proposal, P.
        rows: int64 [P], which of the L boxes became of a proposal; -1 where it was rejected.
        drawn: int64, which of the L boxes were drawn for objects that no proposal means.
        seconds: the person's time.
    """

    labels: ImageLabels
    verdicts: tuple[Verdict, ...]
    rows: NDArray[np.int64]
    drawn: NDArray[np.int64]
    seconds: float

    def count(self, verdict: Verdict) -> int:
        """Number of proposals of which this was said."""
        return self.verdicts.count(verdict)


@dataclass(frozen=True)
class SimulatedAnnotator:
    """How the person works and errs; what it does with an image depends on seed, image id, truth and proposals alone.

    Args:
        seed: Of all draws.
        match_iou: Overlap from which a proposal means an object.
        accept_iou: Overlap from which its box is good enough; between the two it is corrected.
        keeps_boxes: Whether an accepted box stays as proposed, as it does in an editor; else it becomes the object's,
            the usual simplification, by which a person without errors leaves the truth.
        accepts_wrong: Part of the proposals to correct or reject that are accepted, 0 to 1; the next two likewise.
        rejects_right: Part of the right proposals that are rejected.
        misses: Part of the objects without a proposal that stay undrawn.
        box_noise: Standard deviation of each edge of a drawn box, as a part of the box's side.
        verify_seconds: Per proposal.
        rename_seconds: Per class that is corrected.
        draw_seconds: Least and most per drawn box; in between all are equally likely.

    Raises:
        ValueError: A rate outside 0 to 1, times or noise below 0 or not finite, overlaps that are in the wrong order.
    """

    seed: int = 0
    match_iou: float = 0.5
    accept_iou: float = 0.5
    keeps_boxes: bool = False
    accepts_wrong: float = 0.0
    rejects_right: float = 0.0
    misses: float = 0.0
    box_noise: float = 0.0
    verify_seconds: float = 1.6
    rename_seconds: float = 1.6
    draw_seconds: tuple[float, float] = (3.7, 5.9)

    def __post_init__(self) -> None:
        for name in ("accepts_wrong", "rejects_right", "misses"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a rate from 0 to 1, got {getattr(self, name)}")
        if not 0 < self.match_iou <= self.accept_iou <= 1:
            raise ValueError(
                f"accept_iou: expected 0 < match_iou <= accept_iou <= 1, got match_iou {self.match_iou} and "
                f"accept_iou {self.accept_iou}"
            )
        for name in ("box_noise", "verify_seconds", "rename_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        least, most = self.draw_seconds
        if not 0 <= least <= most < float("inf"):
            raise ValueError(f"draw_seconds: expected the least, then the most, at least 0, got {self.draw_seconds}")

    def inspect(self, truth: ImageLabels, proposals: ImageLabels) -> Inspection:
        """Look at the proposals of one image.

        Args:
            truth: T objects and crowd regions.
            proposals: P boxes; their classes count in the categories of the truth, see ``Labels.with_categories``.

        Raises:
            ValueError: labels of different images, or of different sizes of it.
        """
        if (truth.image_id, truth.size_hw) != (proposals.image_id, proposals.size_hw):
            raise ValueError(
                f"proposals: expected those of image {truth.image_id!r} of {truth.size_hw} pixels, got "
                f"{proposals.image_id!r} of {proposals.size_hw}"
            )
        # the objects' draws come first, so that they do not depend on what is proposed
        rng = _generator(self.seed, truth.image_id)
        unseen = rng.random(len(truth)) < self.misses
        seconds = rng.uniform(*self.draw_seconds, len(truth))
        drawn_boxes = _shaken(truth, rng.normal(size=(len(truth), 4)) * self.box_noise)
        slips = rng.random((len(proposals), 2))
        of_proposal, loose = self._meant(truth, proposals)

        left = truth.crowd.copy()  # objects that are among the person's boxes
        boxes, classes = truth.boxes_xyxy.copy(), truth.classes.copy()
        extra, verdicts = [], []
        time = self.verify_seconds * len(proposals)
        shown = np.zeros(len(truth), np.bool_)
        shown[of_proposal[of_proposal >= 0]] = True
        for row, target in enumerate(of_proposal.tolist()):
            renamed = target >= 0 and truth.classes[target] != proposals.classes[row]
            right = target >= 0 and not renamed and not loose[row]
            slips_by = slips[row, 0] < (self.rejects_right if right else self.accepts_wrong)
            if right:
                verdict = Verdict.REJECTED if slips_by else Verdict.ACCEPTED
            elif slips_by:
                verdict = Verdict.ACCEPTED
            else:
                verdict = Verdict.CORRECTED if target >= 0 else Verdict.REJECTED
            verdicts.append(verdict)
            if verdict is Verdict.REJECTED:
                continue
            if target < 0:
                extra.append(row)
                continue
            left[target] = True
            corrected = verdict is Verdict.CORRECTED
            if corrected and loose[row]:
                boxes[target] = drawn_boxes[target]
                time += float(seconds[target])
            elif loose[row] or self.keeps_boxes:
                boxes[target] = proposals.boxes_xyxy[row]
            if renamed and corrected:
                time += self.rename_seconds
            elif renamed:
                classes[target] = proposals.classes[row]
        drawn = ~shown & ~truth.crowd & ~unseen
        boxes[drawn] = drawn_boxes[drawn]
        left |= drawn
        time += float(seconds[drawn].sum())
        return _inspection(truth, proposals, (boxes, classes), left, drawn, of_proposal, extra, verdicts, time)

    def _meant(self, truth: ImageLabels, proposals: ImageLabels) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Which object each proposal means, -1 for none, int64 [P]; and whether its box is too loose for it, [P]."""
        import torch  # here: who only counts verdicts needs no torch

        from simdetr.boxes import pairwise_iou

        overlaps = pairwise_iou(torch.tensor(proposals.boxes_xyxy), torch.tensor(truth.boxes_xyxy)).numpy()
        overlaps = np.where(truth.crowd[None, :], -1.0, overlaps)
        same = proposals.classes[:, None] == truth.classes[None, :]
        of_proposal = np.full(len(proposals), -1, np.int64)
        taken = np.zeros(len(truth), np.bool_)
        for allowed in (same & (overlaps >= self.accept_iou), same, np.ones_like(same)):
            open_pairs = np.where(allowed & (of_proposal < 0)[:, None] & ~taken[None, :], overlaps, -1.0)
            for row, target in greedy_pairs(open_pairs, self.match_iou):
                of_proposal[row], taken[target] = target, True
        own = overlaps[np.arange(len(proposals)), of_proposal] if len(truth) else np.zeros(len(proposals))
        return of_proposal, (of_proposal >= 0) & (own < self.accept_iou)


def greedy_pairs(overlaps: NDArray[np.floating], min_iou: float) -> list[tuple[int, int]]:
    """Pairs of a row and a column, the tightest first, each row and each column once.

    Args:
        overlaps: [A, B]; pairs below ``min_iou`` are none.
        min_iou: above 0.

    Returns:
        Indices; of equal overlaps the earlier row, then the earlier column.
    """
    rows, columns = np.nonzero(overlaps >= min_iou)
    order = np.argsort(-overlaps[rows, columns], kind="stable")
    used_rows: set[int] = set()
    used_columns: set[int] = set()
    pairs = []
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if row not in used_rows and column not in used_columns:
            pairs.append((row, column))
            used_rows.add(row)
            used_columns.add(column)
    return pairs


def _generator(seed: int, image_id: str) -> np.random.Generator:
    """Draws that depend on the seed and the image, not on what was looked at before."""
    digest = hashlib.sha256(f"{seed}/{image_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _shaken(truth: ImageLabels, noise: NDArray[np.float64]) -> NDArray[np.float32]:
    """The objects' boxes with each edge moved by a part of the side, within the image; those of no noise stay."""
    boxes = truth.boxes_xyxy.astype(np.float64)
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    moved = boxes + noise * sides
    height, width = truth.size_hw
    moved = np.clip(moved, 0, [width, height, width, height])
    moved = np.concatenate([np.minimum(moved[:, :2], moved[:, 2:]), np.maximum(moved[:, :2], moved[:, 2:])], axis=1)
    return np.where(noise != 0, moved, boxes).astype(np.float32)


def _inspection(
    truth: ImageLabels,
    proposals: ImageLabels,
    changed: tuple[NDArray[np.float32], NDArray[np.int64]],
    left: NDArray[np.bool_],
    drawn: NDArray[np.bool_],
    of_proposal: NDArray[np.int64],
    extra: list[int],
    verdicts: list[Verdict],
    seconds: float,
) -> Inspection:
    """Objects that are left, then proposals that are none, as one set of labels."""
    kept = np.flatnonzero(left)
    boxes = np.concatenate([changed[0][kept], proposals.boxes_xyxy[extra]])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    untouched = (changed[0][kept] == truth.boxes_xyxy[kept]).all(axis=1)
    areas[: len(kept)][untouched] = truth.areas[kept][untouched]
    points = None
    if truth.points is not None:
        points = np.concatenate([truth.points[kept], np.full((len(extra), 2), np.nan, np.float32)])
    labels = ImageLabels.build(
        truth.image_id,
        truth.size_hw,
        boxes,
        np.concatenate([changed[1][kept], proposals.classes[extra]]),
        crowd=np.concatenate([truth.crowd[kept], np.zeros(len(extra), np.bool_)]),
        areas=areas,
        points=points,
    )
    place = np.full(len(truth) + 1, -1, np.int64)
    place[kept] = np.arange(len(kept))
    rows = place[of_proposal]
    rows[extra] = len(kept) + np.arange(len(extra))
    rows[[verdict is Verdict.REJECTED for verdict in verdicts]] = -1
    return Inspection(labels, tuple(verdicts), rows, place[:-1][drawn], seconds)

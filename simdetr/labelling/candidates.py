"""Detections and a few labelled boxes in, candidates for labels out: the source stage of label, verify, correct.

Every detection of the unlabelled images stays in the table with what speaks for and against it, so that a person can
see why a box became a label and why another did not. Source: Kaul et al., Label, Verify, Correct (2022), section 3.

Letters: M detections of all images together, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from simdetr.boxes import pairwise_iou
from simdetr.data.annotations import ImageLabels
from simdetr.data.label_files import read_labels, write_labels
from simdetr.data.labels import Labels
from simdetr.data.storage import atomic_path
from simdetr.labelling.choices import ScoreRule

LOG = logging.getLogger(__name__)
RIGHT_IOU = 0.5
"""Overlap with an object of its class from which a box is right."""
KEPT = ""
"""The reason of a candidate that nothing speaks against so far."""
REASONS = {
    KEPT: "kept",
    "low_score": "the detector is not sure enough",
    "holds_shots": "its image holds shots of its class, where what is unlabelled is left open",
    "elsewhere": "its image is one of shots that is not to be labelled",
    "person": "a person labelled this object or this image",
    "base_class": "it lies on an object of a class that was known before",
    "too_small": "a side of less than 2 pixels",
    "outside": "it lies outside the image",
    "unreadable": "its image cannot be read",
    "no_direction": "its crop looks like the mean of all shots",
    "unknown_class": "there is no shot of its class",
    "other_class": "the shots that it looks like are of another class",
    "negative": "it looks like background, or like what a person said is none",
    "tie": "as many of the nearest shots speak for another class",
    "unsure": "the nearest shots of its class are hardly nearer than others",
    "not_seen_again": "the detector does not find it in other views of the image",
    "duplicate": "a surer candidate lies on the same object",
}
"""What the codes of the column ``reason`` mean."""


SOURCED = ("elsewhere", "low_score", "holds_shots", "person", "base_class")
"""Reasons of the first stage; between them and those of the last stand those of the votes."""
CORRECTED = ("not_seen_again", "duplicate")
"""Reasons of the last stage."""


@dataclass(frozen=True)
class Candidates:
    """Boxes that may become labels, a row each, with what was found out about them.

    Attributes:
        labels: The detections, M boxes with the detector's scores.
        reason: Object [M]: ``""`` for what is kept so far, else a key of ``REASONS``; the first that spoke against it.
        evidence: Further columns [M, ...] by name, such as the vote of the nearest shots.
    """

    labels: Labels
    reason: NDArray[np.object_]
    evidence: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = len(self.labels.boxes_xyxy)
        for name, values in {"reason": self.reason, **self.evidence}.items():
            if len(values) != rows:
                raise ValueError(f"{name}: expected a value for each of {rows} candidates, got {len(values)}")
        unknown = set(np.unique(self.reason.astype(str))) - REASONS.keys()
        if unknown:
            raise ValueError(f"reason: expected some of {', '.join(map(repr, REASONS))}, got {sorted(unknown)}")

    @classmethod
    def of(cls, detections: Labels) -> Candidates:
        """All detections, with nothing against any."""
        return cls(detections, np.full(len(detections.boxes_xyxy), KEPT, object))

    @property
    def kept(self) -> NDArray[np.int64]:
        """Rows that nothing speaks against."""
        return np.flatnonzero(self.reason == KEPT)

    def reject(self, rows: NDArray[np.bool_], reason: str) -> Candidates:
        """The same candidates, ``rows`` bool [M] of them rejected unless something spoke against them before."""
        return replace(self, reason=np.where(rows & (self.reason == KEPT), reason, self.reason))

    def reasons(self, found: NDArray[np.object_], rows: NDArray[np.int64]) -> Candidates:
        """The same candidates with the reasons that a stage found for some rows, where nothing spoke before."""
        reason = self.reason.copy()
        reason[rows] = np.where(reason[rows] == KEPT, found, reason[rows])
        return replace(self, reason=reason)

    def before(self, reasons: Collection[str]) -> Candidates:
        """The candidates as they were before they were rejected for some reasons."""
        return replace(self, reason=np.where(np.isin(self.reason.astype(str), list(reasons)), KEPT, self.reason))

    def with_evidence(self, **columns: NDArray[Any]) -> Candidates:
        """The same candidates with more columns."""
        return replace(self, evidence={**self.evidence, **columns})

    def counts(self) -> dict[str, int]:
        """How many were kept, and rejected for each reason that occurs, by what it means in ``REASONS``."""
        codes, numbers = np.unique(self.reason.astype(str), return_counts=True)
        found = dict(zip(codes.tolist(), numbers.tolist(), strict=True))
        return {code or "kept": found[code] for code in REASONS if code in found}


def write_candidates(candidates: Candidates, path: Path) -> None:
    """Write the boxes to ``path`` (Parquet, as ``write_labels``) and reasons and evidence to ``<name>_why.parquet``."""
    columns = {"reason": candidates.reason.astype(str), **candidates.evidence}
    arrays = {
        name: pa.array(values)
        if values.ndim == 1
        else pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1])
        for name, values in columns.items()
    }
    with atomic_path(_why(path)) as temporary:
        pq.write_table(pa.table(arrays), temporary)
    write_labels(candidates.labels, path)


def read_candidates(path: Path) -> Candidates:
    """Read what ``write_candidates`` wrote."""
    table = pq.read_table(_why(path))
    columns = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        rows: tuple[int, ...] = (len(table),)
        if pa.types.is_fixed_size_list(column.type):
            rows, column = (len(table), column.type.list_size), column.flatten()
        columns[name] = column.to_numpy(zero_copy_only=False).reshape(rows)
    return Candidates(read_labels(path), columns.pop("reason").astype(object), columns)


def _why(path: Path) -> Path:
    return path.with_name(f"{path.stem}_why.parquet")


def thresholds(
    detections: Labels,
    rule: ScoreRule,
    *,
    agreeing: NDArray[np.bool_] | None = None,
    agreement: float = 0.5,
    min_score: float = 0.8,
    most_per_class: int = 200,
    left_out: tuple[NDArray[np.float32], NDArray[np.bool_]] | None = None,
    precision: float = 0.8,
) -> NDArray[np.float64]:
    """The score above which a detection of each class is a candidate.

    Scores of a focal loss are not those of a softmax: .8 may be out of reach, so that one number for all detectors, as
    in the paper, does not do.

    Args:
        detections: M of them.
        rule: ``agreement``: the smallest score above which the shots' votes agree with the detector often enough;
            ``absolute``: ``min_score``; ``per_class_top``: the best ``most_per_class`` of every class; ``precision``:
            the smallest score above which ``precision`` of the detections of ``left_out`` are right.
        agreeing: Of ``agreement``: whether the vote of each detection is its class [M].
        agreement: The share of them that is often enough.
        min_score: Of ``absolute``; not part of it itself: .8 is out, 1 is in.
        most_per_class: Of ``per_class_top``.
        left_out: Of ``precision``: scores [n] of detections on shots that the detector has not seen, and whether each
            is right [n].
        precision: The share of them that is right.

    Returns:
        float64 [C]; scores above it are candidates.

    Raises:
        ValueError: What the rule looks at is missing; an unknown rule.
    """
    count, scores = detections.num_classes, detections.scores
    if rule == "absolute":
        return np.full(count, min_score)
    if rule == "agreement":
        if agreeing is None:
            raise ValueError("agreeing: expected the votes of the detections for the rule 'agreement', got None")
        return np.full(count, precise_score(scores, agreeing, agreement))
    if rule == "precision":
        if left_out is None:
            raise ValueError("left_out: expected scores on left-out shots for the rule 'precision', got None")
        return np.full(count, precise_score(*left_out, precision))
    if rule != "per_class_top":
        raise ValueError(f"score_rule: expected one of {', '.join(map(repr, get_args(ScoreRule)))}, got {rule!r}")
    found = np.full(count, -1.0)
    for category in range(count):
        own = np.sort(scores[detections.classes == category])[::-1]
        if len(own) > most_per_class:
            found[category] = own[most_per_class]
    return found


def precise_score(scores: NDArray[np.float32], right: NDArray[np.bool_], precision: float) -> float:
    """The smallest score above which at least ``precision`` of the detections are right; infinity if there is none."""
    order = np.argsort(-scores, kind="stable")
    share = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    last_of_score = np.append(np.diff(scores[order]) != 0, [True] * (len(order) > 0)).astype(bool)
    good = np.flatnonzero((share >= precision) & last_of_score)
    if not len(good):
        return float("inf")
    return float(np.nextafter(scores[order][good[-1]], np.float32(-1.0)))


def source(detections: Labels, shots: Labels, people: Labels | None = None) -> Candidates:
    """The candidates among the detections of the unlabelled images, before their scores are looked at.

    Args:
        detections: Of the detector that was trained on the shots, with its scores.
        shots: The few labelled boxes; images that hold shots of a class give no candidates of that class, for what else
            they hold of it is not labelled.
        people: Labels that people made of whole images; detections there are no candidates.

    Returns:
        All detections, rejected as ``person`` or ``holds_shots`` where they are.
    """
    candidates = Candidates.of(detections)
    if people is not None:
        inspected = np.array([image_id in people for image_id in detections.image_ids], bool)
        candidates = candidates.reject(inspected[detections.owners], "person")
    candidates = candidates.reject(on_labels(detections, shots), "person")
    return candidates.reject(holders(shots, detections.image_ids)[detections.owners, detections.classes], "holds_shots")


def without_base(candidates: Candidates, is_base: NDArray[np.bool_], base: Labels | None) -> Candidates:
    """Reject what is of a class known before, or lies on such an object: labelled, or found with a higher score.

    Args:
        candidates: M of them, of C classes.
        is_base: Which classes were known before, bool [C].
        base: Labels of those classes on some of the images.
    """
    if not is_base.any():
        return candidates
    labels, of_base = candidates.labels, is_base[candidates.labels.classes]
    covered = of_base if base is None else of_base | on_labels(labels, base)
    for start, stop in zip(labels.offsets[:-1].tolist(), labels.offsets[1:].tolist(), strict=True):
        rows = slice(start, stop)
        if of_base[rows].any() and not of_base[rows].all():
            boxes = torch.from_numpy(labels.boxes_xyxy[rows])
            over = pairwise_iou(boxes, boxes).numpy() > RIGHT_IOU
            surer = labels.scores[rows][None] > labels.scores[rows][:, None]
            covered[rows] |= (over & surer & of_base[rows][None]).any(axis=1)
    return candidates.reject(covered, "base_class")


def worth_a_look(candidates: Candidates, per_image: float, most_per_class: int) -> NDArray[np.bool_]:
    """Which candidates are encoded, whatever the score rule says later, so that another rule needs no encoder.

    Args:
        candidates: M of them; only those that are kept so far.
        per_image: The best so many times the number of images, of all classes together.
        most_per_class: And the best so many of every class.

    Returns:
        bool [M].
    """
    chosen = np.zeros(len(candidates.reason), bool)
    rows = candidates.kept
    order = rows[np.argsort(-candidates.labels.scores[rows], kind="stable")]
    chosen[order[: round(per_image * len(candidates.labels))]] = True
    classes = candidates.labels.classes[order]
    for category in range(candidates.labels.num_classes):
        chosen[order[classes == category][:most_per_class]] = True
    return chosen


def holders(labels: Labels, image_ids: tuple[str, ...]) -> NDArray[np.bool_]:
    """Which of the images hold a box of each class of ``labels``: bool [images, C]."""
    held = np.zeros((len(image_ids), labels.num_classes), bool)
    for row, image_id in enumerate(image_ids):
        if image_id in labels:
            held[row, labels.of(image_id).classes] = True
    return held


def on_labels(
    detections: Labels, labels: Labels, *, iou: float = RIGHT_IOU, by_class: bool = False
) -> NDArray[np.bool_]:
    """Which detections overlap a labelled box of their image by more than ``iou``, of any class or of theirs: [M]."""
    covered = np.zeros(len(detections.boxes_xyxy), bool)
    for row, image_id in enumerate(detections.image_ids):
        if image_id not in labels:
            continue
        known, rows = labels.of(image_id), slice(*detections.offsets[row : row + 2].tolist())
        overlaps = pairwise_iou(torch.from_numpy(detections.boxes_xyxy[rows]), torch.from_numpy(known.boxes_xyxy))
        over = overlaps.numpy() > iou
        if by_class:
            over &= detections.classes[rows][:, None] == known.classes
        covered[rows] = over.any(axis=1)
    return covered


def quality(candidates: Candidates, boxes_xyxy: NDArray[np.float32], truth: Labels) -> dict[str, float]:
    """How good the kept candidates are, on the images that have truth.

    Args:
        candidates: M of them, of the categories of the truth.
        boxes_xyxy: Their boxes [M, 4].
        truth: Labels of some of the images; crowds are not looked for.

    Returns:
        ``precision`` and ``recall`` at IoU 0.5 and of the right class, an object counting once, for the surest
        candidate; ``mean_iou`` of the right ones; ``candidates`` and ``objects``, their numbers. NaN of none.
    """
    labels, right, judged = candidates.labels, [], 0
    for row, image_id in enumerate(labels.image_ids):
        if image_id not in truth:
            continue
        own = np.arange(*labels.offsets[row : row + 2])
        own = own[candidates.reason[own] == KEPT]
        judged += len(own)
        right += matched_ious(boxes_xyxy[own], labels.classes[own], labels.scores[own], truth.of(image_id))
    looked_at = truth.select(image_id for image_id in truth.image_ids if image_id in labels)
    objects = int((~looked_at.crowd).sum())
    mean = float(np.mean(right)) if right else float("nan")
    shares = {"precision": len(right) / judged if judged else float("nan")}
    shares |= {"recall": len(right) / objects if objects else float("nan")}
    return {**shares, "mean_iou": mean, "candidates": judged, "objects": objects}


def matched_ious(
    boxes_xyxy: NDArray[np.float32], classes: NDArray[np.int64], scores: NDArray[np.float32], truth: ImageLabels
) -> list[float]:
    """IoU of every box [n, 4] of an image that finds an object of its class by at least .5, the surest first."""
    overlaps = pairwise_iou(torch.from_numpy(boxes_xyxy), torch.from_numpy(truth.boxes_xyxy)).numpy()
    overlaps = np.where((classes[:, None] == truth.classes) & ~truth.crowd, overlaps, 0.0)
    found: list[float] = []
    for box in np.argsort(-scores, kind="stable"):
        best = int(overlaps[box].argmax()) if overlaps.shape[1] else 0
        if overlaps.shape[1] and overlaps[box, best] >= RIGHT_IOU:
            found.append(float(overlaps[box, best]))
            overlaps[:, best] = 0.0
    return found


def stage_rows(candidates: Candidates, truth: Labels | None = None) -> list[dict[str, Any]]:
    """What each stage kept and rejected and, with truth, how good what it kept is: a row each, read off the last.

    Args:
        candidates: After correction, with the column ``corrected_xyxy``.
        truth: Of some of the images.

    Returns:
        Rows with ``stage`` (source, verify, correct), ``counts`` by reason and, with truth, ``quality``.
    """
    found, corrected = candidates.labels.boxes_xyxy, candidates.evidence["corrected_xyxy"]
    votes = set(REASONS) - {KEPT, *SOURCED, *CORRECTED}
    stages = {
        "source": (candidates.before({*votes, *CORRECTED}), found),
        "verify": (candidates.before(CORRECTED), found),
        "correct": (candidates, corrected),
    }
    rows: list[dict[str, Any]] = []
    for name, (own, boxes) in stages.items():
        rows.append({"stage": name, "counts": own.counts()})
        if truth is not None:
            rows[-1]["quality"] = quality(own, boxes, truth)
    return rows

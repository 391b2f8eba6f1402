"""When to stop: how many errors are left among the images nobody has seen, with an interval; and rules that decide.

The estimate rests on an *audit*: images drawn at random (`draw_audit`) from those that are left once the round's own
images are chosen, inspected like the others. What is wrong among their detections says, by score, how much is wrong
among the rest; what was drawn on them, by image, how much is missed there. It speaks of those images and of the very
detections that were audited, and is made anew in every round. Images chosen because they are uncertain say nothing
about the rest: their chance to be chosen is 1 or 0, and no weight mends that (Kossen et al., Active Testing, 2021,
weights draws whose chances are known), so they must not be among the audit.

The image is the unit that was drawn. Errors come in clusters, so counting detections as if they were drawn one by one
gives intervals that are too short (Cochran, Sampling Techniques, 1977, §9A).

Letters: n audited images, D their detections, R images left, L their detections, H strata of the score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincinv, ndtri, stdtrit

from simdetr.data.labels import Labels
from simdetr.labelling.annotator import Inspection, Verdict, greedy_pairs

Floats = NDArray[np.float64]
MAX_STRATA = 5
DETECTIONS_PER_STRATUM = 30
_LEAST_FREEDOM = 4.0
_MAX_LEVERAGE = 0.8


@dataclass(frozen=True)
class Audit:
    """What a person found on images that were drawn at random; checked when made.

    Attributes:
        owner: int64 [D], which of the n images each detection is on.
        scores: float32 [D] in [0, 1], as `Labels` has them.
        wrong: bool [D], whether the person rejected or corrected it.
        missed: int64 [n], objects of each image that the person had to draw; n >= 2.

    Raises:
        ValueError: less than two images, or columns that do not fit.
    """

    owner: NDArray[np.int64]
    scores: NDArray[np.float32]
    wrong: NDArray[np.bool_]
    missed: NDArray[np.int64]

    def __post_init__(self) -> None:
        for name, kind in (("owner", np.int64), ("scores", np.float32), ("wrong", np.bool_), ("missed", np.int64)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), kind).reshape(-1))
        if len(self.missed) < 2:
            raise ValueError(
                f"missed: expected at least 2 audited images, got {len(self.missed)}; how much images differ cannot "
                "be told from fewer, 20 or more are of use"
            )
        if not len(self.owner) == len(self.scores) == len(self.wrong):
            raise ValueError(
                f"owner, scores, wrong: expected one per detection, got {len(self.owner)}, {len(self.scores)} and "
                f"{len(self.wrong)}"
            )
        if len(self.owner) and not (0 <= self.owner.min() and self.owner.max() < len(self.missed)):
            raise ValueError(f"owner: expected images 0 to {len(self.missed) - 1}, got {self.owner.max()}")
        if (self.missed < 0).any():
            raise ValueError(f"missed: expected counts of at least 0, got {self.missed.min()}")
        if not ((self.scores >= 0) & (self.scores <= 1)).all():
            raise ValueError("scores: expected 0 to 1, got others or none")

    def __len__(self) -> int:
        return len(self.missed)

    @classmethod
    def of(cls, detections: Labels, inspections: Sequence[Inspection]) -> Audit:
        """From what a person did with the detections on images that `draw_audit` drew.

        Args:
            detections: what the person was shown; of the audited images alone, or of more.
            inspections: one per audited image.

        Raises:
            ValueError: an image twice, or verdicts that are not those of its detections.
        """
        rows = [detections.row_of(inspection.labels.image_id) for inspection in inspections]
        if len(set(rows)) < len(rows):
            raise ValueError("inspections: expected each image once; the draw is without repetition")
        counts = np.diff(detections.offsets)[rows]
        for inspection, count in zip(inspections, counts.tolist(), strict=True):
            if len(inspection.verdicts) != count:
                raise ValueError(
                    f"inspections: expected a verdict on each of the {count} detections on "
                    f"{inspection.labels.image_id!r}, got {len(inspection.verdicts)}"
                )
        scores = [detections.image(row).scores for row in rows]
        return cls(
            owner=np.repeat(np.arange(len(rows)), counts),
            scores=np.concatenate([np.zeros(0), *scores]),
            wrong=np.array([v is not Verdict.ACCEPTED for i in inspections for v in i.verdicts], np.bool_),
            missed=np.array([len(inspection.drawn) for inspection in inspections], np.int64),
        )


@dataclass(frozen=True)
class ErrorEstimate:
    """Errors left among the detections on images that nobody has seen.

    Attributes:
        wrong: detections that a person would reject or correct.
        missed: objects that a person would have to draw.
        total: both.
        low: lower end of the interval of ``total``.
        high: upper end.
        confidence: of the interval: it covers the true total in about this part of all audits.
        basis: what it rests on, for the reader.
        images: R, images that it speaks of.
        detections: L, their detections.
    """

    wrong: float
    missed: float
    total: float
    low: float
    high: float
    confidence: float
    basis: str
    images: int
    detections: int


def draw_audit(image_ids: Sequence[str], count: int, seed: int) -> tuple[str, ...]:
    """Images for the audit of a round, each as likely as any other.

    Args:
        image_ids: those that nobody has seen and that are not chosen for this round either.
        count: how many; all if there are no more.
        seed: of the draw; the round's number will do. The order of ``image_ids`` does not matter.
    """
    if count < 0:
        raise ValueError(f"count: expected at least 0, got {count}")
    ids = sorted(image_ids)
    drawn = np.random.default_rng(seed).permutation(len(ids))[:count]
    return tuple(ids[i] for i in drawn)


def errors_left(audit: Audit, left: Labels, confidence: float = 0.95) -> ErrorEstimate:
    """Estimate the errors on the images that are left, from an audit of a random part of them.

    Wrong detections: in each stratum of the score the audited part that is wrong, times the detections left (a
    post-stratified ratio, Cochran 1977, §5A.9 and §6). Missed objects: their mean per audited image, times the images
    left. The variance is between audited images, jackknifed, and counts the chance in the rest too, whose number is
    finite. The interval is that of a gamma distribution of this mean and variance, as for weighted sums of counts (Fay
    and Feuer, Confidence intervals for directly standardized rates, 1997; Korn and Graubard, 1998, widen it likewise
    for the number of clusters). It adds half an error of the largest weight, between exact intervals, which cover too
    often, and none (the mid-P idea: Fay and Kim, 2017). At 95 % an audit without any error has the lower end 0 and as
    the upper end 2.5 times what one error in it would stand for, near the rule of three.

    Args:
        audit: n images drawn at random, with the detections of the detector that ``left`` is of.
        left: the detections on the R images left, without the audited ones, from the same score on.
        confidence: of the interval, two-sided.

    Returns:
        The estimate; exact zeros where no image is left.

    Raises:
        ValueError: a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected above 0 and below 1, got {confidence}")
    images, detections = len(left), len(left.scores)
    basis = f"random audit of {len(audit)} of {len(audit) + images} images with {len(audit.scores)} detections"
    if not images:
        return ErrorEstimate(0.0, 0.0, 0.0, 0.0, 0.0, confidence, f"{basis}; none is left", 0, 0)
    strata = _Strata.of(audit, left.scores)
    wrong, missed = float((strata.left * strata.rates).sum()), images * float(audit.missed.mean())
    low, high = _interval(audit, strata, images, confidence)
    seen = int(audit.wrong.sum() + audit.missed.sum())
    basis = f"{basis} in {len(strata.left)} strata of the score, {seen} errors found"
    if not len(audit.scores) and detections:
        basis += "; none of them has a detection, so those left are taken to be right"
    return ErrorEstimate(wrong, missed, wrong + missed, low, high, confidence, basis, images, detections)


@dataclass(frozen=True)
class _Strata:
    """Audited and remaining detections by score.

    Attributes:
        edges: float64 [H − 1], scores from which the next stratum begins.
        found: float64 [n, H], audited detections by image.
        wrong: float64 [n, H], of these the wrong ones.
        left: int64 [H], detections left.
    """

    edges: Floats
    found: Floats
    wrong: Floats
    left: NDArray[np.int64]

    @classmethod
    def of(cls, audit: Audit, scores_left: NDArray[np.float32]) -> _Strata:
        """As many strata as the audited detections allow, with equally many detections left in each."""
        count = int(np.clip(len(audit.scores) // DETECTIONS_PER_STRATUM, 1, MAX_STRATA))
        edges = np.zeros(0)
        if len(scores_left):
            edges = np.unique(np.quantile(scores_left.astype(np.float64), np.arange(1, count) / count))
        edges = edges[[bool((audit.scores >= edge).any() and (audit.scores < edge).any()) for edge in edges]]
        own = np.searchsorted(edges, audit.scores, side="right")
        shape = (len(audit), len(edges) + 1)
        cells = audit.owner * shape[1] + own
        found, wrong = (
            np.bincount(cells, weights, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)
            for weights in (None, audit.wrong)
        )
        # an empty stratum between two edges has no rate: it goes with the one below it
        while (empty := np.flatnonzero(found.sum(axis=0)[1:] == 0)).size and found.sum():
            edges = np.delete(edges, empty[0])
            found, wrong = (_joined(table, int(empty[0])) for table in (found, wrong))
        left = np.bincount(np.searchsorted(edges, scores_left, side="right"), minlength=len(edges) + 1)
        return cls(edges, found, wrong, left)

    @property
    def rates(self) -> Floats:
        """Part of the audited detections that is wrong, [H]."""
        return np.asarray(self.wrong.sum(axis=0) / np.maximum(self.found.sum(axis=0), 1))


def _joined(table: Floats, column: int) -> Floats:
    """The table [n, H] with the column after this one added to it; [n, H − 1]."""
    joined = np.delete(table, column + 1, axis=1)
    joined[:, column] += table[:, column + 1]
    return joined


def _interval(audit: Audit, strata: _Strata, images: int, confidence: float) -> tuple[float, float]:
    """Ends of the interval of the number of errors left; see `errors_left`."""
    count, missed = len(audit), audit.missed.astype(np.float64)
    found, rates = np.maximum(strata.found.sum(axis=0), 1), strata.rates
    weights = strata.left / found  # errors left that an audited wrong detection stands for
    per_image = images / count
    total = float((strata.left * rates).sum() + images * missed.mean())
    # what each image contributes beyond the mean; images that hold most of a stratum pull its rate towards their own
    pull = 1 - np.minimum(strata.found / found, _MAX_LEVERAGE)
    parts = per_image * (missed - missed.mean()) * count / (count - 1)
    parts = parts + ((strata.wrong - rates * strata.found) / pull) @ weights
    rest = 1 + count / images  # the errors left vary about their mean too
    clustered = float((parts**2).sum()) * (count - 1) / count * rest
    independent = float(per_image**2 * missed.sum() + (strata.left * weights * rates * (1 - rates)).sum()) * rest
    tail = (1 - confidence) / 2
    errors = float(missed.sum() + strata.wrong.sum())
    freedom = _freedom(parts, errors)
    widening = float(stdtrit(freedom, 1 - tail) / ndtri(1 - tail)) ** 2
    largest = max(per_image, float(weights.max()))
    mean = total + 0.5 * largest
    variance = max(clustered, independent) * widening + 0.5 * largest**2
    scale, shape = variance / mean, mean**2 / variance
    low = scale * float(gammaincinv(shape, tail)) if errors else 0.0
    return min(low, total), max(scale * float(gammaincinv(shape, 1 - tail)), total)


def _freedom(parts: Floats, errors: float) -> float:
    """Degrees of freedom of the variance: n − 1, fewer where few images differ much more than rare errors do by chance.

    By the kurtosis of the images' contributions, less that which independent errors of this number have.
    """
    count = len(parts)
    spread = parts - parts.mean()
    square = float((spread**2).mean())
    if square == 0:
        return float(count - 1)
    kurtosis = float((spread**4).mean()) / square**2
    excess = max(kurtosis - 1 - count / max(errors, 1.0), 2.0)
    return min(count - 1.0, max(2 * count / excess, min(_LEAST_FREEDOM, count - 1.0)))


# ----------------------------------------------------------------------------------------------------------------------
# Rules.


@dataclass(frozen=True)
class Round:
    """One round of labelling.

    Attributes:
        images: that a person inspected.
        seconds: of the person.
        accepted: proposals accepted as they were; then those corrected and rejected, and the objects drawn.
        corrected: proposals.
        rejected: proposals.
        drawn: objects.
        predictions: of the round's detector on images that stay the same over the rounds, or None; with all boxes
            down to low scores, see `box_kappa`.
        estimate: errors left after the round, or None.
    """

    images: int
    seconds: float
    accepted: int = 0
    corrected: int = 0
    rejected: int = 0
    drawn: int = 0
    predictions: Labels | None = None
    estimate: ErrorEstimate | None = None

    @classmethod
    def of(
        cls,
        inspections: Sequence[Inspection],
        predictions: Labels | None = None,
        estimate: ErrorEstimate | None = None,
    ) -> Round:
        """Count what a person did."""
        counts = {v.value: sum(inspection.count(v) for inspection in inspections) for v in Verdict}
        return cls(
            images=len(inspections),
            seconds=sum(inspection.seconds for inspection in inspections),
            drawn=sum(len(inspection.drawn) for inspection in inspections),
            predictions=predictions,
            estimate=estimate,
            **counts,
        )

    @property
    def accept_rate(self) -> float | None:
        """Accepted part of the proposals; None without proposals."""
        proposals = self.accepted + self.corrected + self.rejected
        return self.accepted / proposals if proposals else None


@dataclass(frozen=True)
class Decision:
    """Whether to stop, and why in words."""

    stop: bool
    reason: str


class StopRule(Protocol):
    """When it is enough."""

    def stop(self, history: Sequence[Round]) -> Decision:
        """Decide after the last of these rounds, the first one first; an empty history never stops."""
        ...


@dataclass(frozen=True)
class Budget:
    """Stop once so many images, or seconds of a person, are spent.

    What most projects do (Settles, Active Learning Literature Survey, 2009, §6.7); it says nothing about the labels.

    Args:
        images: Inspected in all rounds; None sets no limit.
        seconds: Spent in all rounds; None sets no limit.

    Raises:
        ValueError: No limit at all, or one that is not above 0.
    """

    images: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.images is None and self.seconds is None:
            raise ValueError("images, seconds: expected at least one limit, got none")
        for name in ("images", "seconds"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise ValueError(f"{name}: expected above 0, got {limit}")

    def stop(self, history: Sequence[Round]) -> Decision:
        """As `StopRule`."""
        images, seconds = sum(r.images for r in history), sum(r.seconds for r in history)
        spent = []
        if self.images is not None:
            spent.append((images >= self.images, f"{images} of {self.images} images"))
        if self.seconds is not None:
            spent.append((seconds >= self.seconds, f"{seconds:.0f} of {self.seconds:.0f} seconds"))
        over = any(reached for reached, _ in spent)
        return Decision(over, f"{' and '.join(text for _, text in spent)} are spent")


@dataclass(frozen=True)
class AcceptRate:
    """Stop once the person accepts nearly all that is proposed: the mean rate of the last rounds.

    The classifier is right about those that it is asked about: the minimum-error rule of Zhu, Wang and Hovy, Learning
    a Stopping Criterion for Active Learning for Word Sense Disambiguation and Text Classification, 2008. It does not
    see objects that nothing is proposed for; ``ErrorBound`` does. Rate and number of rounds are this package's.

    Args:
        rate: From which mean rate on.
        rounds: Over how many rounds, each with proposals.

    Raises:
        ValueError: A rate outside (0, 1], or no round.
    """

    rate: float = 0.95
    rounds: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate: expected above 0, at most 1, got {self.rate}")
        if self.rounds < 1:
            raise ValueError(f"rounds: expected at least 1, got {self.rounds}")

    def stop(self, history: Sequence[Round]) -> Decision:
        """As `StopRule`."""
        rates = [r.accept_rate for r in history[-self.rounds :]]
        known = [rate for rate in rates if rate is not None]
        if len(known) < self.rounds:
            return Decision(False, f"{len(known)} of the last {self.rounds} rounds have proposals to accept")
        mean = sum(known) / len(known)
        return Decision(
            mean >= self.rate, f"accepted {mean:.1%} in the last {self.rounds} rounds, to stop at {self.rate:.1%}"
        )


@dataclass(frozen=True)
class Kappa:
    """Stop once successive detectors say the same: their mean agreement over the last rounds.

    Bloodgood and Vijay-Shanker, A Method for Stopping Active Learning Based on Stabilizing Predictions and the Need for
    User-Adjustable Stopping, 2009: Cohen's kappa between successive models on a fixed set of unlabelled examples, .99
    on average over three comparisons. What is compared of boxes is defined in `box_kappa`. Detectors that agree may
    still be wrong alike.

    Args:
        agreement: From which mean kappa on.
        comparisons: Of successive rounds.
        min_score: Score from which a box counts as found, see `box_kappa`.

    Raises:
        ValueError: An agreement outside (0, 1], or no comparison.
    """

    agreement: float = 0.99
    comparisons: int = 3
    min_score: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.agreement <= 1:
            raise ValueError(f"agreement: expected above 0, at most 1, got {self.agreement}")
        if self.comparisons < 1:
            raise ValueError(f"comparisons: expected at least 1, got {self.comparisons}")

    def stop(self, history: Sequence[Round]) -> Decision:
        """As `StopRule`."""
        predictions = [r.predictions for r in history[-self.comparisons - 1 :]]
        known = [labels for labels in predictions if labels is not None]
        if len(known) < self.comparisons + 1:
            return Decision(False, f"{len(known)} of {self.comparisons + 1} rounds have predictions to compare")
        pairs = pairwise(known)
        mean = sum(box_kappa(before, after, min_score=self.min_score) for before, after in pairs) / self.comparisons
        return Decision(
            mean >= self.agreement, f"successive detectors agree with kappa {mean:.3f}, to stop at {self.agreement:.3f}"
        )


def box_kappa(before: Labels, after: Labels, *, min_score: float = 0.5, min_iou: float = 0.5) -> float:
    """Cohen's kappa between what two detectors say of the same images.

    Compared are the places where either has a box: pairs of boxes of IoU of at least ``min_iou``, the tightest first
    and whatever their classes, and boxes without partner. Each detector says of a place the class of its box, or
    *none* where it has no box there or one below ``min_score``. Boxes of low score are what makes agreement on *none*
    visible; without them, and with a single class, chance explains all agreement and kappa says little.

    Returns:
        −1 to 1; 1 where both say the same of all places, or nobody says anything.

    Raises:
        ValueError: different images or categories.
    """
    import torch  # here: an estimate of errors needs no torch

    from simdetr.boxes import pairwise_iou

    if set(before.image_ids) != set(after.image_ids):
        raise ValueError("after: expected predictions on the images of before, got other images; keep the set fixed")
    if before.categories != after.categories:
        raise ValueError("after: expected the categories of before, got others; see Labels.with_categories")
    none = before.num_classes
    table = np.zeros((none + 1, none + 1), np.int64)
    for index, image_id in enumerate(before.image_ids):
        one, two = before.image(index), after.of(image_id)
        said_one, said_two = (np.where(x.scores >= min_score, x.classes, none) for x in (one, two))
        overlaps = pairwise_iou(torch.tensor(one.boxes_xyxy), torch.tensor(two.boxes_xyxy)).numpy()
        pairs = np.array(greedy_pairs(overlaps, min_iou), np.int64).reshape(-1, 2)
        rest_one, rest_two = np.delete(said_one, pairs[:, 0]), np.delete(said_two, pairs[:, 1])
        rows = np.concatenate([said_one[pairs[:, 0]], rest_one, np.full(len(rest_two), none)])
        columns = np.concatenate([said_two[pairs[:, 1]], np.full(len(rest_one), none), rest_two])
        np.add.at(table, (rows, columns), 1)
    places = int(table.sum())
    agreed = int(np.trace(table))
    if agreed == places:
        return 1.0
    chance = float(table.sum(axis=0) @ table.sum(axis=1)) / places**2
    return (agreed / places - chance) / (1 - chance)


@dataclass(frozen=True)
class ErrorBound:
    """Stop once the upper end of the estimate of the errors left is below a target.

    A random sample of the rest that bounds what is missed there: Callaghan and Müller-Hansen, Statistical stopping
    criteria for automated screening in systematic reviews, 2020. Whoever looks after every round stops at the first
    lucky audit. In simulated loops of eight rounds whose detector stays just above the target, one audit is enough to
    stop 14 in 100 of them too early, two in a row one in 100; where the detector goes on learning, 2 and none.

    Args:
        errors: Most errors left; or
        share: most errors left, as a part of the detections left.
        rounds: In a row.

    Raises:
        ValueError: None of the two or both, a target that is not above 0, or no round.
    """

    errors: float | None = None
    share: float | None = None
    rounds: int = 2

    def __post_init__(self) -> None:
        if (self.errors is None) == (self.share is None):
            raise ValueError(f"errors, share: expected one of the two, got {self.errors} and {self.share}")
        target = self.errors if self.share is None else self.share
        if target is None or not target > 0:
            raise ValueError(f"errors, share: expected a target above 0, got {target}")
        if self.rounds < 1:
            raise ValueError(f"rounds: expected at least 1, got {self.rounds}")

    def stop(self, history: Sequence[Round]) -> Decision:
        """As `StopRule`."""
        recent = [r.estimate for r in history[-self.rounds :]]
        estimates = [estimate for estimate in recent if estimate is not None]
        if len(estimates) < self.rounds:
            return Decision(
                False, f"{len(estimates)} of the last {self.rounds} rounds have an estimate of the errors left"
            )
        met = all(estimate.high <= self._target(estimate) for estimate in estimates)
        last = estimates[-1]
        return Decision(
            met,
            f"at most {last.high:.0f} errors are left ({last.confidence:.0%} interval), to stop at "
            f"{self._target(last):.0f} in {self.rounds} rounds in a row",
        )

    def _target(self, estimate: ErrorEstimate) -> float:
        return self.errors if self.errors is not None else (self.share or 0.0) * estimate.detections

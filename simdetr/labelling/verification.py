"""Features of candidates and of a gallery of shots in; for each candidate the class its nearest shots vote for, out.

The second step of label-verify-correct (Kaul, Xie and Zisserman, CVPR 2022): a detector tuned on few shots names its
detections badly, and an encoder that knows nothing of the detector, asked which shots a crop looks like, removes most
of the wrong ones. The gallery holds the shots of all classes, and may hold negative ones: crops that look like a class
and are none.

Letters: M candidates, n shots in the gallery, D length of a feature, k neighbours, C classes of the gallery.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist

from simdetr.labelling.crop_features import UNREADABLE, CropFeatures

Ties = Literal["similarity", "reject", "lowest"]
Distance = Literal["cosine", "euclidean"]
NEGATIVE, ABSTAINED = -1, -2
"""Votes that are no class: the shots that win are negative; none wins."""
KEPT = ""
REASONS = (
    "too_small",
    "outside",
    "unreadable",
    "unknown_class",
    "no_direction",
    "tie",
    "negative",
    "other_class",
    "unsure",
)
"""Why a candidate is rejected, in the order in which they are looked for."""
MOST_NEIGHBOURS = 10
_DIGITS = 10  # of a cosine; the shots' order must not decide between cosines that rounding alone tells apart
_SLACK = 1e-9  # of a sum of them
_NO_LENGTH = 4 * float(np.finfo(np.float32).eps)  # of a difference against what it is the difference of
_SIMILARITIES = 1 << 21  # held at once, 16 MB in float64
LOG = logging.getLogger(__name__)


def neighbours_for(shots_per_class: int) -> int:
    """How many neighbours vote, min(⌊K / 3⌋ + 1, 10): for K = 1, 2, 3, 5, 10, 30 these are 1, 1, 2, 2, 4, 10.

    Args:
        shots_per_class: K, at least 1.
    """
    if shots_per_class < 1:
        raise ValueError(f"shots_per_class: expected at least 1, got {shots_per_class}")
    return min(shots_per_class // 3 + 1, MOST_NEIGHBOURS)


@dataclass(frozen=True)
class Gallery:
    """What candidates are compared with; see :meth:`of`.

    Attributes:
        features: float32 [n, D], finite.
        classes: int64 [n]; -1 is a negative shot, which looks like a class and is none, or background.
        ids: Where each comes from, for pictures; n texts, which may repeat.

    Raises:
        ValueError: No shot, columns of different length, features that are not finite, classes below -1.
    """

    features: NDArray[np.float32]
    classes: NDArray[np.int64]
    ids: tuple[str, ...]

    def __post_init__(self) -> None:
        features = np.ascontiguousarray(self.features, np.float32)
        classes = np.asarray(self.classes)
        object.__setattr__(self, "ids", tuple(self.ids))
        if features.ndim != 2 or not len(features):
            raise ValueError(
                f"features: expected [n, D] of at least one shot, got {features.shape}; label some objects"
            )
        if classes.shape != (len(features),) or len(self.ids) != len(features):
            got = f"{classes.shape} and {len(self.ids)}"
            raise ValueError(f"classes, ids: expected one for each of the {len(features)} shots, got {got}")
        if not np.issubdtype(classes.dtype, np.integer) or classes.min() < NEGATIVE:
            raise ValueError(f"classes: expected integers from {NEGATIVE}, got {classes.dtype} down to {classes.min()}")
        bad = ~np.isfinite(features).all(1)
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(f"features: expected finite numbers, got others in row {row} ({self.ids[row]!r})")
        object.__setattr__(self, "features", features)
        object.__setattr__(self, "classes", classes.astype(np.int64))

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def of(cls, features: CropFeatures | ArrayLike, classes: ArrayLike, ids: Sequence[str]) -> Gallery:
        """The gallery of some shots; those without a feature are left out with a warning.

        Raises:
            ValueError: None is left, or as the class itself.
        """
        values = np.asarray(features.values if isinstance(features, CropFeatures) else features, np.float32)
        kinds, names = np.asarray(classes), tuple(ids)
        if values.ndim != 2 or kinds.shape != (len(values),) or len(names) != len(values):
            return cls(values, kinds, names)  # which says what is wrong
        usable: NDArray[np.bool_] = np.isfinite(values).all(axis=1)  # type: ignore[assignment]
        if not usable.all():
            lost = [name for name, good in zip(names, usable, strict=True) if not good]
            LOG.warning("%d of %d shots have no feature and are left out, such as %s", len(lost), len(names), lost[0])
            gone = sorted(set(kinds.tolist()) - set(kinds[usable].tolist()))
            if usable.any() and gone:
                LOG.warning("classes without a shot, whose candidates are all rejected: %s", gone)
        return cls(values[usable], kinds[usable], tuple(n for n, good in zip(names, usable, strict=True) if good))

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """The mean feature μ [D]."""
        mean: NDArray[np.float64] = self.features.mean(axis=0, dtype=np.float64)
        return mean

    @property
    def neighbours(self) -> int:
        """The k by :func:`neighbours_for` of the class with the fewest shots: with more, it could not win a vote."""
        counts = np.bincount(self.classes[self.classes >= 0])
        return neighbours_for(int(counts[counts > 0].min())) if counts.any() else 1


@dataclass(frozen=True)
class Votes:
    """What the gallery says of M candidates, by column.

    Attributes:
        vote: int64 [M], the class; -1 negative, -2 none.
        reason: Text [M], why the candidate is rejected, one of ``REASONS``; "" if it is kept.
        nearest: int64 [M, k], rows of the gallery, the most similar first; -1 where the candidate has no feature.
        similarity: float32 [M, k], theirs: the cosine, or the distance's negative; NaN likewise.
        margin: float32 [M], similarity of the nearest shot of the vote's class less that of the nearest shot of any
            other: how sure the vote is. Infinite where the gallery has one class, NaN where there is no vote.
    """

    vote: NDArray[np.int64]
    reason: NDArray[np.str_]
    nearest: NDArray[np.int64]
    similarity: NDArray[np.float32]
    margin: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.vote)

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Which candidates are kept, bool [M]."""
        kept: NDArray[np.bool_] = self.reason == KEPT
        return kept

    def counts(self) -> dict[str, int]:
        """Candidates per reason, "kept" first; those that do not occur are left out."""
        found = {"kept": int(self.kept.sum())}
        return found | {name: int(n) for name in REASONS if (n := (self.reason == name).sum())}


def verify(
    features: CropFeatures | ArrayLike,
    wanted_classes: ArrayLike,
    gallery: Gallery,
    *,
    k: int | None = None,
    ties: Ties = "similarity",
    distance: Distance = "cosine",
    centred: bool = True,
    min_margin: float | None = None,
    chunk: int | None = None,
) -> Votes:
    """Ask the k nearest shots of each candidate for its class, and keep it if that is the class it came with.

    The similarity of features q and g is the cosine of q - μ and g - μ, μ the gallery's mean. Neither the scale of all
    features nor a vector added to all changes it. Of equally similar shots those of the lower class are nearer, then
    the earlier ones.

    Args:
        features: Of the candidates, float [M, D]; a row that is not finite is rejected as "unreadable".
        wanted_classes: int64 [M], the class that each candidate came with.
        gallery: The shots.
        k: How many vote; the gallery's own number when left out, and no more than it has shots.
        ties: What decides between classes of equally many votes: "similarity", the larger sum over their voting shots,
            and nobody where these are equal; "reject", nobody; or "lowest", the lowest class, as the published code.
        distance: "cosine", or "euclidean" without normalisation.
        centred: Subtract μ; without effect on Euclidean distances.
        min_margin: Reject votes that are less sure, see ``Votes.margin``; None accepts all.
        chunk: Candidates that are compared at once; by default what takes some 50 MB. Does not change the result.

    Raises:
        ValueError: Columns of different length, features of another length than the gallery's, or an option that is
            unknown or out of range.
    """
    values = features.values if isinstance(features, CropFeatures) else np.asarray(features)
    if values.ndim == 1 and not values.size:
        values = values.reshape(0, gallery.features.shape[1])
    wanted = np.asarray(wanted_classes, np.int64)
    _check(values, wanted, gallery, k, chunk)
    for name, got, known in (("ties", ties, Ties), ("distance", distance, Distance)):
        if got not in known.__args__:  # type: ignore[attr-defined]
            raise ValueError(f"{name}: expected one of {', '.join(known.__args__)}, got {got!r}")  # type: ignore[attr-defined]
    neighbours = gallery.neighbours if k is None else k
    if neighbours > len(gallery):
        LOG.info("k: %d neighbours of %d shots, so all of these vote", neighbours, len(gallery))
        neighbours = len(gallery)
    if len(np.unique(gallery.classes)) == 1:
        LOG.warning("the gallery has one class: every candidate of it is kept; add shots of others or negative ones")
    search = _Search(gallery, neighbours, ties, distance, centred)
    votes = _empty(len(values), neighbours)
    for part in _parts(len(values), chunk or max(1, _SIMILARITIES // max(len(gallery), values.shape[1]))):
        rows = np.asarray(values[part], np.float64)
        usable = np.isfinite(rows).all(1)
        found = search(rows[usable])
        for name in ("vote", "nearest", "similarity", "margin"):
            getattr(votes, name)[part][usable] = getattr(found, name)
        votes.reason[part][usable] = found.reason
        votes.reason[part][~usable] = UNREADABLE
    faults = features.faults if isinstance(features, CropFeatures) else np.full(len(values), "", "<U12")
    _judge(votes, wanted, gallery, faults, -np.inf if min_margin is None else min_margin)
    return votes


def _check(
    values: NDArray[np.floating], wanted: NDArray[np.int64], gallery: Gallery, k: int | None, chunk: int | None
) -> None:
    if values.ndim != 2 or values.shape[1] != gallery.features.shape[1]:
        raise ValueError(
            f"features: expected shape [M, {gallery.features.shape[1]}] as the gallery's, got {values.shape}; encode "
            "both with one encoder"
        )
    if wanted.shape != (len(values),):
        raise ValueError(f"wanted_classes: expected one for each of {len(values)} candidates, got shape {wanted.shape}")
    for name, number in (("k", k), ("chunk", chunk)):
        if number is not None and number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")


def _empty(count: int, k: int) -> Votes:
    return Votes(
        vote=np.full(count, ABSTAINED, np.int64),
        reason=np.full(count, KEPT, "<U13"),
        nearest=np.full((count, k), -1, np.int64),
        similarity=np.full((count, k), np.nan, np.float32),
        margin=np.full(count, np.nan, np.float32),
    )


def _parts(count: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, count, chunk))


def _judge(
    votes: Votes, wanted: NDArray[np.int64], gallery: Gallery, faults: NDArray[np.str_], min_margin: float
) -> None:
    """Fill in the reasons that depend on the class wanted; the first of ``REASONS`` that holds stands."""
    found = votes.reason.copy()
    rules = {
        "too_small": faults == "too_small",
        "outside": faults == "outside",
        UNREADABLE: (faults == UNREADABLE) | ((found == UNREADABLE) & (faults == "")),
        "unknown_class": ~np.isin(wanted, gallery.classes[gallery.classes >= 0]),
        "no_direction": found == "no_direction",
        "tie": found == "tie",
        "negative": votes.vote == NEGATIVE,
        "other_class": votes.vote != wanted,
        "unsure": votes.margin < min_margin,
    }
    votes.reason[:] = KEPT
    for name in reversed(REASONS):
        votes.reason[rules[name]] = name


class _Search:
    """Votes of the nearest shots, for candidates with finite features, whatever class they came with."""

    def __init__(self, gallery: Gallery, k: int, ties: Ties, distance: Distance, centred: bool) -> None:
        self.k, self.ties, self.cosine = k, ties, distance == "cosine"
        self.mean = gallery.mean if centred else np.zeros_like(gallery.mean)
        self.order = np.argsort(gallery.classes, kind="stable")  # by class, so that one's similarities lie together
        features = gallery.features[self.order].astype(np.float64)
        self.shots = _directions(features, self.mean)[0] if self.cosine else features
        self.kinds, self.starts = np.unique(gallery.classes[self.order], return_index=True)
        self.kind_of = np.searchsorted(self.kinds, gallery.classes[self.order])

    def __call__(self, rows: NDArray[np.float64]) -> Votes:
        """Votes of float64 [m, D]; of the reasons only "no_direction" and "tie"."""
        if not len(rows):
            return _empty(0, self.k)
        if self.cosine:
            directions, pointless = _directions(rows, self.mean)
            similarity = directions @ self.shots.T
            np.round(similarity, _DIGITS, out=similarity)
        else:
            pointless = np.zeros(len(rows), np.bool_)
            similarity = -cdist(rows, self.shots)  # squares expanded would lose the small ones
        nearest = _nearest(similarity, self.k)
        of_nearest = np.take_along_axis(similarity, nearest, axis=1)
        winner = self._winner(self.kind_of[nearest], of_nearest)
        voted = (winner >= 0) & ~pointless
        vote = np.where(voted, self.kinds[winner], ABSTAINED)
        reason = np.where(pointless, "no_direction", np.where(voted, KEPT, "tie")).astype("<U13")
        margin = np.where(voted, self._margin(similarity, winner), np.nan)
        return Votes(vote, reason, self.order[nearest], of_nearest.astype(np.float32), margin.astype(np.float32))

    def _winner(self, kinds: NDArray[np.int64], similarity: NDArray[np.float64]) -> NDArray[np.int64]:
        """Index into ``self.kinds`` for each candidate, -1 where nobody wins; both arguments [m, k]."""
        each = np.arange(len(kinds))
        counts = np.zeros((len(kinds), len(self.kinds)), np.int64)
        sums = np.zeros(counts.shape)
        for column in range(self.k):
            counts[each, kinds[:, column]] += 1
            sums[each, kinds[:, column]] += similarity[:, column]
        first = counts == counts.max(axis=1, keepdims=True)
        if self.ties == "similarity":
            best = np.where(first, sums, -np.inf).max(axis=1, keepdims=True)
            slack = _SLACK * (1 if self.cosine else np.abs(best))
            first &= sums >= best - slack
        winner: NDArray[np.int64] = first.argmax(axis=1)
        return winner if self.ties == "lowest" else np.where(first.sum(axis=1) == 1, winner, -1)

    def _margin(self, similarity: NDArray[np.float64], winner: NDArray[np.int64]) -> NDArray[np.float64]:
        """How much nearer the nearest shot of the winning class is than that of any other; -1 counts as the last."""
        best = np.maximum.reduceat(similarity, self.starts, axis=1)
        own = np.take_along_axis(best, winner[:, None], axis=1)[:, 0]
        np.put_along_axis(best, winner[:, None], -np.inf, axis=1)
        margin: NDArray[np.float64] = own - best.max(axis=1)
        return margin


def _directions(rows: NDArray[np.float64], mean: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Unit vectors from the mean to rows [m, D], and which rows [m] are the mean itself and get zeros instead."""
    differences = rows - mean
    lengths = np.linalg.norm(differences, axis=1)
    pointless = lengths <= _NO_LENGTH * np.maximum(np.linalg.norm(rows, axis=1), np.linalg.norm(mean))
    differences /= np.where(pointless, np.inf, lengths)[:, None]
    return differences, pointless


def _nearest(similarity: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Columns of the k largest of each row [m, n], largest first and equals in the order of their columns."""
    count = similarity.shape[1]
    last = np.partition(similarity, count - k, axis=1)[:, count - k, None]
    chosen = similarity >= last
    crowded = chosen.sum(axis=1) > k
    if crowded.any():  # several are equal to the last: the first of these
        rows, least = similarity[crowded], last[crowded]
        equal = rows == least
        equal &= np.cumsum(equal, axis=1) <= k - (rows > least).sum(axis=1, keepdims=True)
        chosen[crowded] = (rows > least) | equal
    columns = np.nonzero(chosen)[1].reshape(-1, k)
    order = np.argsort(-np.take_along_axis(similarity, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)


@dataclass(frozen=True)
class Confusion:
    """What verification did to candidates whose truth is known.

    Attributes:
        true_kept: Right before, kept.
        false_removed: Wrong before, rejected.
        true_lost: Right before, rejected.
        false_kept: Wrong before, kept.
    """

    true_kept: int
    false_removed: int
    true_lost: int
    false_kept: int

    @property
    def precision_before(self) -> float:
        """Right ones among all candidates; NaN without candidates."""
        right = self.true_kept + self.true_lost
        return _share(right, right + self.false_kept + self.false_removed)

    @property
    def precision_after(self) -> float:
        """Right ones among the kept; NaN if none is."""
        return _share(self.true_kept, self.true_kept + self.false_kept)

    @property
    def recall(self) -> float:
        """Kept ones among the right; 1 before; NaN if none is right."""
        return _share(self.true_kept, self.true_kept + self.true_lost)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def confusion(votes: Votes | NDArray[np.bool_], wanted: ArrayLike, truth: ArrayLike) -> Confusion:
    """Count right and wrong candidates, kept and rejected.

    Args:
        votes: The votes, or bool [M], which candidates were kept.
        wanted: int64 [M], the class that each candidate came with.
        truth: int64 [M], the class of the object there; -1 if there is none.

    Raises:
        ValueError: Columns of different length.
    """
    kept = votes.kept if isinstance(votes, Votes) else np.asarray(votes, np.bool_)
    claimed, real = np.asarray(wanted, np.int64), np.asarray(truth, np.int64)
    if not kept.shape == claimed.shape == real.shape:
        raise ValueError(
            f"wanted, truth: expected one for each of {len(kept)} candidates, got {claimed.shape} and {real.shape}"
        )
    right = claimed == real
    counts = (right & kept, ~right & ~kept, right & ~kept, ~right & kept)
    return Confusion(*(int(column.sum()) for column in counts))

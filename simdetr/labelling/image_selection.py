"""Which images should a person see first? What is known of a pool of images in, an order with reasons out.

The patent's two orders are by distance to a k-means centre and by size of the boxes; it says neither which size comes
first nor how uncertainty could take part. Interleaved clusters (the default before anything is labelled), uncertainty,
cover (k-center) and their mixture (the default afterwards) are choices of this package.
Sources: the labelling apparatus' image selector (clustering of feature vectors, box size); entropy: Settles, Active
Learning Literature Survey, 2009, §3.1; k-center: Sener and Savarese, Active Learning for Convolutional Neural Networks:
A Core-Set Approach, 2018, and the greedy rule's bound: Gonzalez, Clustering to minimize the maximum intercluster
distance, 1985.

Letters: N images of the pool, n of them to order, M boxes of the pool, C classes, d feature dimensions, K clusters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist
from scipy.special import entr
from sklearn.cluster import KMeans

from simdetr.boxes import pairwise_iou
from simdetr.data.labels import Labels
from simdetr.data.legal_values import check_choice
from simdetr.labelling.choices import SelectionSettings, Size

LOG = logging.getLogger(__name__)
Floats = NDArray[np.float64]
Outputs = Literal["sigmoid", "softmax"]
MAX_CLUSTERS = 100
PREFILTER = 4
"""Images that `mixed` keeps for every one that it is to choose."""
_PLACES = 6  # decimals of a share of the largest distance up to which distances are told apart: float32 has no more


@dataclass(frozen=True)
class Pool:
    """What is known of the images among which is chosen; checked when made.

    Attributes:
        labels: boxes with scores, proposed or detected, of every image of the pool, whether it has boxes or not.
        vectors: float32 [N, d], a row per image of ``labels``, see `image_vectors`; a row that is not finite stands for
            an image without features; None where no order needs them.
        entropies: float64 [M], uncertainty of every box of ``labels``, see `entropy`; None where no order needs them.
        labelled: ids of images that a person has seen; they are not ordered again, but k-center counts them as covered.
        conflicts: ids of those among ``labelled`` that are to be seen again, see `label_conflicts`.
        unreadable: ids of images that cannot be read, in ``labels`` or not; never ordered, listed in the order.

    Raises:
        ValueError: rows that are not those of ``labels``, entropies below 0 or not finite, labelled images that the
            pool does not hold, conflicts that are not labelled.
    """

    labels: Labels
    vectors: NDArray[np.float32] | None = None
    entropies: Floats | None = None
    labelled: frozenset[str] = frozenset()
    conflicts: frozenset[str] = frozenset()
    unreadable: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in ("labelled", "conflicts", "unreadable"):
            object.__setattr__(self, name, frozenset(getattr(self, name)))
        if self.vectors is not None:
            vectors = np.asarray(self.vectors, np.float32)
            if vectors.ndim != 2 or len(vectors) != len(self.labels):
                raise ValueError(
                    f"vectors: expected [{len(self.labels)}, d], a row per image of labels, got {list(vectors.shape)}"
                )
            object.__setattr__(self, "vectors", vectors)
        if self.entropies is not None:
            entropies, rows = np.asarray(self.entropies, np.float64), len(self.labels.scores)
            if entropies.shape != (rows,):
                raise ValueError(f"entropies: expected [{rows}], one per box of labels, got {list(entropies.shape)}")
            if not (entropies >= 0).all() or not np.isfinite(entropies).all():
                raise ValueError(f"entropies: expected finite and >= 0, got {_first_bad(entropies)}")
            object.__setattr__(self, "entropies", entropies)
        unknown = sorted(image_id for image_id in self.labelled if image_id not in self.labels)
        if unknown:
            raise ValueError(
                f"labelled: {len(unknown)} images are not among the {len(self.labels)} of the pool (first: "
                f"{unknown[0]!r}); give labels of the labelled images too, they may be without boxes"
            )
        if not self.conflicts <= self.labelled:
            raise ValueError(
                f"conflicts: expected labelled images, got {min(self.conflicts - self.labelled)!r}, which is not"
            )

    def candidates(self) -> NDArray[np.int64]:
        """Rows of the n images to order, by id, so that no order depends on how the pool is sorted."""
        left_out = (self.labelled - self.conflicts) | self.unreadable
        rows = [row for row, image_id in enumerate(self.labels.image_ids) if image_id not in left_out]
        return np.array(sorted(rows, key=self.labels.image_ids.__getitem__), np.int64)

    def needed_vectors(self) -> NDArray[np.float32]:
        """The vectors.

        Raises:
            ValueError: there are none.
        """
        if self.vectors is None:
            raise ValueError("vectors: this order compares features of images; give image_vectors(...), [N, d]")
        return self.vectors


@dataclass(frozen=True)
class Order:
    """Images in the order in which a person should see them.

    Attributes:
        strategy: its name.
        image_ids: n ids, the first one first.
        priorities: float64 [n], finite, never rising: what the strategy goes by (a share of area, an entropy, a
            distance to what is known, or minus one to a centre), or minus the place where it goes by turns.
        reasons: n sentences for the person.
        flags: per image ``no_feature``, ``no_box`` and ``conflict`` where they hold.
        excluded: unreadable images.
    """

    strategy: str
    image_ids: tuple[str, ...]
    priorities: Floats
    reasons: tuple[str, ...]
    flags: tuple[frozenset[str], ...]
    excluded: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.image_ids)


@dataclass(frozen=True)
class Ranking:
    """What a strategy says of the candidates.

    Attributes:
        rows: the candidates' rows of the pool, best first; those that it cannot judge are left out.
        priorities: float64, per row.
        reasons: per row.
    """

    rows: NDArray[np.int64]
    priorities: Floats
    reasons: Sequence[str]


Strategy = Callable[[Pool, NDArray[np.int64], SelectionSettings], Ranking]
"""Pool, rows of the candidates in the order of their ids, and settings to a ranking."""


def check_strategy(name: str | None) -> None:
    """Raise a ValueError for a name that is none of ``STRATEGIES``; None, the default, is fine."""
    if name is not None and name not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(map(repr, STRATEGIES))}, got {name!r}")


def order_images(pool: Pool, strategy: str | None = None, settings: SelectionSettings | None = None) -> Order:
    """Order the images that nobody has labelled.

    Args:
        pool: what is known.
        strategy: one of ``STRATEGIES``; None is ``interleave`` while nothing is labelled (the uncertainty of an
            untrained detector says little), then ``mixed``.
        settings: how; the defaults if left out.

    Returns:
        Every candidate once; those that the strategy cannot judge come last, by id.

    Raises:
        ValueError: an unknown strategy, or one that needs vectors or entropies that the pool lacks.
    """
    settings = settings or SelectionSettings()
    name = strategy or ("mixed" if pool.labelled else "interleave")
    check_strategy(name)
    candidates = pool.candidates()
    found = STRATEGIES[name](pool, candidates, settings)
    rest = candidates[~np.isin(candidates, found.rows)]
    least = float(found.priorities[-1]) - 1.0 if len(found.rows) else 0.0
    rows = np.concatenate([found.rows, rest])
    return Order(
        strategy=name,
        image_ids=tuple(pool.labels.image_ids[row] for row in rows),
        priorities=np.concatenate([found.priorities, np.full(len(rest), least)]),
        reasons=(*found.reasons, *["no features to compare it by, so it comes last"] * len(rest)),
        flags=tuple(_flags(pool, int(row)) for row in rows),
        excluded=tuple(sorted(pool.unreadable)),
    )


def _flags(pool: Pool, row: int) -> frozenset[str]:
    held = {
        "no_feature": pool.vectors is not None and not np.isfinite(pool.vectors[row]).all(),
        "no_box": pool.labels.offsets[row] == pool.labels.offsets[row + 1],
        "conflict": pool.labels.image_ids[row] in pool.conflicts,
    }
    return frozenset(name for name, holds in held.items() if holds)


# ----------------------------------------------------------------------------------------------------------------------
# What the orders go by.


def image_vectors(
    features: ArrayLike,
    scores: ArrayLike,
    offsets: ArrayLike,
    whole_images: ArrayLike | None = None,
) -> NDArray[np.float32]:
    """One vector per image: the mean of its boxes' features, weighted by their scores, of length 1.

    Args:
        features: [M, d], of the boxes, for example means over their area or the decoder's embeddings.
        scores: [M], not negative; where all of an image are 0, its boxes count alike.
        offsets: [N + 1]; image i owns the boxes offsets[i] to offsets[i + 1].
        whole_images: [N, d], the features of images without boxes; without it these have none.

    Returns:
        float32 [N, d]; NaN where there is no box and no feature, the mean has no direction, or a feature is not finite.

    Raises:
        ValueError: shapes that do not fit, scores that are negative or not finite.
    """
    values, weights = np.asarray(features, np.float32), np.asarray(scores, np.float64)
    bounds = np.asarray(offsets, np.int64)
    if values.ndim != 2 or weights.shape != (len(values),):
        raise ValueError(
            f"features: expected [M, d] with scores [M], got {list(values.shape)} and {list(weights.shape)}"
        )
    if not (weights >= 0).all() or not np.isfinite(weights).all():
        raise ValueError(f"scores: expected finite and >= 0, got {_first_bad(weights)}")
    if (
        bounds.ndim != 1
        or len(bounds) == 0
        or bounds[0] != 0
        or bounds[-1] != len(values)
        or (np.diff(bounds) < 0).any()
    ):
        raise ValueError(f"offsets: expected to rise from 0 to {len(values)}, the number of boxes")
    images = len(bounds) - 1
    whole = None if whole_images is None else np.asarray(whole_images, np.float32)
    if whole is not None and whole.shape != (images, values.shape[1]):
        raise ValueError(f"whole_images: expected [{images}, {values.shape[1]}], got {list(whole.shape)}")
    vectors = np.full((images, values.shape[1]), np.nan, np.float32)
    for row, (start, stop) in enumerate(pairwise(bounds.tolist())):
        if start < stop:
            own = weights[start:stop] if weights[start:stop].any() else np.ones(stop - start)
            mean = (own / own.sum()) @ values[start:stop].astype(np.float64)
        elif whole is not None:
            mean = whole[row].astype(np.float64)
        else:
            continue
        length = np.linalg.norm(mean)
        if np.isfinite(length) and length > 0:
            vectors[row] = mean / length
    return vectors


def entropy(probabilities: ArrayLike, outputs: Outputs = "sigmoid") -> Floats:
    """Uncertainty of boxes in nats.

    Args:
        probabilities: [M, C] in [0, 1]; with softmax including the background, rows that sum to 1.
        outputs: what made them: ``sigmoid`` sums over the classes −[p ln p + (1 − p) ln(1 − p)], ``softmax`` −p ln p.

    Returns:
        float64 [M].

    Raises:
        ValueError: values outside [0, 1], softmax rows that do not sum to 1, an unknown kind of outputs.
    """
    values = np.asarray(probabilities, np.float64)
    check_choice("outputs", outputs, Outputs)
    if values.ndim != 2:
        raise ValueError(f"probabilities: expected [M, C], got {list(values.shape)}")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"probabilities: expected 0 to 1, got {_first_bad(values, 1.0)}; apply {outputs} first")
    if outputs == "sigmoid":
        return np.asarray((entr(values) + entr(1 - values)).sum(axis=1), np.float64)
    sums = values.sum(axis=1)
    if (np.abs(sums - 1) > 1e-3).any():
        wrong = float(sums[np.abs(sums - 1).argmax()])
        raise ValueError(f"probabilities: expected rows that sum to 1, got {wrong:.4g}; use outputs='sigmoid'")
    return np.asarray(entr(values).sum(axis=1), np.float64)


def image_uncertainty(pool: Pool, settings: SelectionSettings) -> tuple[Floats, NDArray[np.int64]]:
    """Uncertainty of every image of the pool, 0 where no box counts, and the number of boxes that count; [N] each.

    Raises:
        ValueError: the pool has no entropies.
    """
    if pool.entropies is None:
        raise ValueError("entropies: this order goes by uncertainty; give entropy(probabilities), [M]")
    scores, images = pool.labels.scores, len(pool.labels)
    owner = np.repeat(np.arange(images), np.diff(pool.labels.offsets))
    kept = np.flatnonzero(scores > settings.min_score)
    if settings.aggregate == "top":
        kept = kept[np.lexsort((kept, -scores[kept], owner[kept]))]
        counts = np.bincount(owner[kept], minlength=images)
        place = np.arange(len(kept)) - np.repeat(np.cumsum(counts) - counts, counts)
        kept = kept[place < settings.top]
    kind = {"top": "mean"}.get(settings.aggregate, settings.aggregate)
    counts = np.bincount(owner[kept], minlength=images)
    return _by_image(pool.entropies[kept], owner[kept], images, kind), counts


def box_shares(labels: Labels, size: Size = "mean") -> Floats:
    """Part of each image's area that its boxes take: of all on average, of the largest, or together; [N], 0 without."""
    sides_hw = np.repeat(labels.sizes_hw, np.diff(labels.offsets), axis=0).astype(np.float64)
    limits = sides_hw[:, [1, 0, 1, 0]]
    corners = np.clip(labels.boxes_xyxy.astype(np.float64), 0, limits)
    shares = (corners[:, 2:] - corners[:, :2]).prod(axis=1) / sides_hw.prod(axis=1)
    owner = np.repeat(np.arange(len(labels)), np.diff(labels.offsets))
    return _by_image(shares, owner, len(labels), size)


def _by_image(values: Floats, owner: NDArray[np.int64], images: int, kind: str) -> Floats:
    """Mean, max or sum of the values of each image, 0 where it has none; [images]."""
    if kind == "max":
        largest = np.zeros(images)
        np.maximum.at(largest, owner, values)
        return largest
    sums = np.bincount(owner, values, minlength=images).astype(np.float64)
    return sums if kind == "sum" else sums / np.maximum(np.bincount(owner, minlength=images), 1)


def label_conflicts(inspected: Labels, found: Labels, min_iou: float = 0.5) -> tuple[str, ...]:
    """Inspected images in which a new detection contradicts a person: above this overlap, but of another class.

    A detection is compared with the inspected box that it overlaps most; crowd boxes do not count. Categories are
    compared by id; ``found`` need not hold all of the images.
    """
    conflicts = []
    for index, image_id in enumerate(inspected.image_ids):
        if image_id not in found:
            continue
        truth, new = inspected.image(index), found.of(image_id)
        single = ~truth.crowd
        if not len(new) or not single.any():
            continue
        overlaps = pairwise_iou(torch.tensor(new.boxes_xyxy), torch.tensor(truth.boxes_xyxy[single])).numpy()
        said = [inspected.categories[c].id for c in truth.classes[single][overlaps.argmax(axis=1)]]
        now = [found.categories[c].id for c in new.classes]
        differs = np.array([a != b for a, b in zip(said, now, strict=True)])
        if (differs & (overlaps.max(axis=1) > min_iou)).any():
            conflicts.append(image_id)
    return tuple(conflicts)


# ----------------------------------------------------------------------------------------------------------------------
# Orders. Each takes candidates by id and sorts stably, so that equals stay in the order of their ids.


@dataclass(frozen=True)
class _Clusters:
    """The candidates that have features, and where k-means puts them; clusters are numbered from the largest."""

    rows: NDArray[np.int64]
    cluster: NDArray[np.int64]
    distance: Floats
    sizes: NDArray[np.int64]

    @property
    def ties(self) -> Floats:
        """Distances in which what rounding alone tells apart is equal."""
        return _told_apart(self.distance)

    def reason(self, index: int) -> str:
        """Of the index-th candidate."""
        own = int(self.cluster[index])
        return (
            f"{self.distance[index]:.3g} from the centre of cluster {own + 1} of {len(self.sizes)}, "
            f"which has {_counted(int(self.sizes[own]), 'image')}"
        )


def _told_apart(distances: Floats) -> Floats:
    """Shares of the largest, rounded, or zeros."""
    largest = distances.max(initial=0.0)
    return np.round(distances / largest, _PLACES) if largest > 0 else np.zeros_like(distances)


def _clusters(pool: Pool, candidates: NDArray[np.int64], settings: SelectionSettings) -> _Clusters:
    vectors = pool.needed_vectors()
    rows = _with_features(vectors, candidates)
    if settings.centres_from == "pool":
        sample = vectors[rows].astype(np.float64)
    else:
        known = np.array(sorted(pool.labels.row_of(image_id) for image_id in pool.labelled), np.int64)
        sample = vectors[_with_features(vectors, known)].astype(np.float64)
        if not len(sample):
            raise ValueError("centres_from: no labelled image has features; use 'pool' until some are labelled")
    if not len(rows):
        return _Clusters(rows, rows, np.zeros(0), rows)
    wanted = settings.clusters
    if wanted is None:
        wanted = min(max(2, round((len(sample) / 2) ** 0.5)), MAX_CLUSTERS)
    elif wanted > len(sample):
        LOG.warning("clusters: %d were asked for, but there are %d images; it is %d", wanted, len(sample), len(sample))
    # k-means warns of more clusters than there are different points
    count = min(wanted, len(sample), len(np.unique(sample, axis=0)))
    kmeans = KMeans(count, init="k-means++", n_init=10, max_iter=300, random_state=settings.seed).fit(sample)
    values = vectors[rows].astype(np.float64)
    own = kmeans.labels_ if settings.centres_from == "pool" else kmeans.predict(values)
    distance = np.linalg.norm(values - kmeans.cluster_centers_[own], axis=1)
    sizes, first = np.bincount(own, minlength=count), np.full(count, len(own))
    np.minimum.at(first, own, np.arange(len(own)))
    by_size = np.lexsort((first, -sizes))
    number = np.empty(count, np.int64)
    number[by_size] = np.arange(count)
    return _Clusters(rows, number[own], distance, sizes[by_size])


def _with_features(vectors: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return rows[np.isfinite(vectors[rows]).all(axis=1)]


def cluster(pool: Pool, candidates: NDArray[np.int64], settings: SelectionSettings) -> Ranking:
    """The patent's order of clusters: the smaller the distance to its k-means centre, the earlier an image."""
    found = _clusters(pool, candidates, settings)
    return _by_distance(found, np.argsort(found.ties, kind="stable"))


def cluster_size(pool: Pool, candidates: NDArray[np.int64], settings: SelectionSettings) -> Ranking:
    """The patent's order of clusters refined by that of sizes: of equal distances the larger boxes come first."""
    found = _clusters(pool, candidates, settings)
    shares = box_shares(pool.labels, settings.size)[found.rows]
    return _by_distance(found, np.lexsort((-shares, found.ties)))


def _by_distance(found: _Clusters, order: NDArray[np.int64]) -> Ranking:
    # what counts as equal differs by rounding only, and priorities must not rise
    priorities = np.minimum.accumulate(-found.distance[order])
    return Ranking(found.rows[order], priorities, [found.reason(int(i)) for i in order])


def interleave(pool: Pool, candidates: NDArray[np.int64], settings: SelectionSettings) -> Ranking:
    """One image of each cluster in turn, the largest cluster first, and of each the nearest to its centre first."""
    found = _clusters(pool, candidates, settings)
    inner = np.lexsort((found.ties, found.cluster))
    turn = np.empty(len(inner), np.int64)
    turn[inner] = np.arange(len(inner)) - (np.cumsum(found.sizes) - found.sizes)[found.cluster[inner]]
    order = np.lexsort((found.cluster, turn))
    reasons = [f"turn {turn[i] + 1}: {found.reason(int(i))}" for i in order]
    return Ranking(found.rows[order], -np.arange(len(order), dtype=np.float64), reasons)


def box_size(pool: Pool, candidates: NDArray[np.int64], settings: SelectionSettings) -> Ranking:
    """The patent's order of sizes: the larger the boxes, as part of the image, the earlier."""
    shares = box_shares(pool.labels, settings.size)[candidates]
    order = np.argsort(-shares, kind="stable")
    said = {"mean": "boxes take {:.2%} of the image on average", "max": "the largest box takes {:.2%} of the image"}
    text = said.get(settings.size, "boxes take {:.2%} of the image together")
    return Ranking(candidates[order], shares[order], [text.format(shares[i]) for i in order])


def by_entropy(pool: Pool, candidates: NDArray[np.int64], settings: SelectionSettings) -> Ranking:
    """The less certain the detector is of an image's boxes, the earlier."""
    values, counts = image_uncertainty(pool, settings)
    values, counts = values[candidates], counts[candidates]
    order = np.argsort(-values, kind="stable")
    kind = {"top": "mean"}.get(settings.aggregate, settings.aggregate)
    reasons = [
        f"uncertain: {kind} entropy {values[i]:.3f} of {_counted(int(counts[i]), 'box', 'boxes')}"
        if counts[i]
        else f"no box above score {settings.min_score:g} to be uncertain of"
        for i in order
    ]
    return Ranking(candidates[order], values[order], reasons)


def k_center(pool: Pool, candidates: NDArray[np.int64], settings: SelectionSettings) -> Ranking:
    """Again and again the image that is farthest from all that is labelled or chosen; then the rest by distance.

    Of equal distances the lowest id is chosen; with nothing labelled that is the very first. Chosen one by one are as
    many as the budget has; memory is linear in n, time is n times the sum of budget and labelled images.
    """
    vectors = pool.needed_vectors()
    rows = _with_features(vectors, candidates)
    known = np.array(sorted(pool.labels.row_of(image_id) for image_id in pool.labelled - pool.conflicts), np.int64)
    known = _with_features(vectors, known) if len(known) else known
    values = vectors[rows].astype(np.float64)
    nearest = np.full(len(rows), np.inf)
    for row in known:
        nearest = np.minimum(nearest, cdist(values, vectors[row : row + 1].astype(np.float64))[:, 0])
    chosen, distances = [], []
    waiting = np.ones(len(rows), bool)
    for _ in range(min(settings.budget, len(rows))):
        open_distances = np.where(waiting, nearest, -1.0)
        farthest = float(open_distances.max())
        pick = int(np.flatnonzero(open_distances >= farthest * (1 - 10.0**-_PLACES))[0])
        chosen.append(pick)
        distances.append(farthest)
        waiting[pick] = False
        nearest = np.minimum(nearest, cdist(values, values[pick : pick + 1])[:, 0])
    left = np.flatnonzero(waiting)
    left = left[np.argsort(-_told_apart(nearest[left]), kind="stable")]
    order = np.array([*chosen, *left], np.int64)
    priorities = np.array([*distances, *nearest[left]])
    reasons = [
        f"{d:.3g} from the nearest image that is labelled or chosen before" if np.isfinite(d) else "the first of all"
        for d in priorities
    ]
    if len(priorities) and np.isinf(priorities[0]):  # nothing was labelled: as far away as the second one is
        priorities[0] = priorities[1] if len(priorities) > 1 else 0.0
    return Ranking(rows[order], np.minimum.accumulate(priorities), reasons)


def mixed(pool: Pool, candidates: NDArray[np.int64], settings: SelectionSettings) -> Ranking:
    """K-center among the most uncertain images, four for each that is to be chosen; then the rest by uncertainty."""
    uncertain = by_entropy(pool, candidates, settings)
    usable = np.isin(uncertain.rows, _with_features(pool.needed_vectors(), candidates))
    rows = uncertain.rows[usable]
    said = dict(zip(uncertain.rows.tolist(), uncertain.reasons, strict=True))
    kept = np.sort(rows[: PREFILTER * settings.budget])
    by_id = candidates[np.isin(candidates, kept)]
    spread = k_center(pool, by_id, settings)
    picks = spread.rows[: settings.budget]
    later = rows[~np.isin(rows, picks)]
    reasons = [
        f"{said[int(row)]}; {why}" for row, why in zip(picks.tolist(), spread.reasons[: len(picks)], strict=True)
    ] + [said[int(row)] for row in later]
    order = np.concatenate([picks, later])
    return Ranking(order, -np.arange(len(order), dtype=np.float64), reasons)


def at_random(pool: Pool, candidates: NDArray[np.int64], settings: SelectionSettings) -> Ranking:
    """By chance: what every other order has to be better than. The draws depend on seed and number of images alone."""
    draws = np.random.default_rng(settings.seed).random(len(candidates))
    order = np.argsort(-draws, kind="stable")
    return Ranking(candidates[order], draws[order], ["drawn by chance"] * len(order))


STRATEGIES: Mapping[str, Strategy] = {
    "interleave": interleave,
    "cluster": cluster,
    "cluster_size": cluster_size,
    "box_size": box_size,
    "entropy": by_entropy,
    "k_center": k_center,
    "mixed": mixed,
    "random": at_random,
}


def _counted(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _first_bad(values: Floats, most: float = np.inf) -> str:
    """The first value below 0, above ``most`` or not finite, and where it is."""
    bad = ~((values >= 0) & (values <= most)) | ~np.isfinite(values)
    index = np.unravel_index(int(bad.argmax()), values.shape)
    return f"{float(values[index])} at {[int(i) for i in index]}"

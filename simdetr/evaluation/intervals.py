"""Trainings of equal seeds in, differences with intervals that say what they cover out.

Two things make a measured difference uncertain. Another *seed* draws other labels, another order and other new weights:
few seeds, so Student's t over the paired differences. Other *validation images* give other scores to the same
detectors: a bootstrap, which draws the images again with replacement, the same for every training. The joint interval
is as wide as both together, as the sides of a right angle (modified large sample, Graybill and Wang 1980): it is the
one that a verdict may rest on.

AP on drawn images is exact, not an approximation: matching is done once, for it does not depend on other images, and an
image that is drawn n times counts n times. Letters: B draws, N images, D detections of a class, T IoU thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from simdetr.data.labels import Labels
from simdetr.evaluation.coco_metric import CategoryMatches, matches_by_category

CONFIDENCE = 0.95
DRAWS = 1000
AVERAGED = {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6)}
"""IoU thresholds that a metric is averaged over."""
_CHUNK = 1 << 23  # numbers in one table of draws by detections
_RECALLS = np.linspace(0, 1, 101)
Covers = Literal["seeds", "images", "seeds and images"]


@dataclass(frozen=True)
class Interval:
    """From where to where, and which chance it covers."""

    low: float
    high: float
    covers: Covers

    def __str__(self) -> str:
        return f"{self.low:+.1f} to {self.high:+.1f}"


def seed_interval(differences: ArrayLike, confidence: float = CONFIDENCE) -> Interval | None:
    """Student's interval of the mean of paired differences [n], one per seed; None of fewer than two."""
    values = np.asarray(differences, np.float64)
    if len(values) < 2:
        return None
    half = float(special.stdtrit(len(values) - 1, (1 + confidence) / 2) * values.std(ddof=1) / np.sqrt(len(values)))
    return Interval(float(values.mean()) - half, float(values.mean()) + half, "seeds")


def image_interval(draws: ArrayLike, confidence: float = CONFIDENCE) -> Interval | None:
    """Percentile interval of a number [B] on images drawn again and again; None where no draw has one."""
    values = np.asarray(draws, np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.percentile(values, [50 * (1 - confidence), 50 * (1 + confidence)])
    return Interval(float(low), float(high), "images")


def joint_interval(
    differences: ArrayLike, draws: ArrayLike, num_images: int, confidence: float = CONFIDENCE
) -> Interval | None:
    """Interval of the mean difference over other seeds and other images; never narrower than that over seeds.

    Adding variances with Welch's degrees of freedom would hold 89 % instead of 95 with two seeds, whose deviation may
    be small by chance.

    Args:
        differences: One per seed [n].
        draws: The mean difference on images drawn again [B].
        num_images: N, that were drawn from.
        confidence: Of the interval.

    Returns:
        None of fewer than two seeds, images or draws.
    """
    values, drawn = np.asarray(differences, np.float64), np.asarray(draws, np.float64)
    drawn = drawn[np.isfinite(drawn)]
    if len(values) < 2 or len(drawn) < 2 or num_images < 2:
        return None
    quantiles = special.stdtrit([len(values) - 1, num_images - 1], (1 + confidence) / 2)
    deviations = [values.std(ddof=1) / np.sqrt(len(values)), drawn.std(ddof=1)]
    half = float(np.linalg.norm(quantiles * deviations))
    return Interval(float(values.mean()) - half, float(values.mean()) + half, "seeds and images")


def drawn_images(num_images: int, draws: int = DRAWS, seed: int = 0) -> NDArray[np.int64]:
    """How often each image is in each bootstrap sample, int64 [B, N]; the same for every training of a comparison."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=draws)


def resampled_scores(truth: Labels, predictions: Labels, counts: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """COCO's AP, AP50 and AP75 of every draw, fractions in 0..1, nan where no object was drawn.

    Args:
        truth: Human labels of N images.
        predictions: Detections on them.
        counts: How often each of the truth's images is in each draw [B, N].

    Raises:
        ValueError: As of ``coco_metrics``.
    """
    of_classes = [_average_precision(own, counts) for own in matches_by_category(truth, predictions)]
    values = np.stack(of_classes)  # [K, B, T]
    return {name: _mean_of_present(values[:, :, thresholds]) for name, thresholds in AVERAGED.items()}


def _mean_of_present(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over classes and thresholds [K, B, T] of what is no nan -> [B]."""
    present = np.isfinite(values)
    sums, numbers = np.where(present, values, 0.0).sum(axis=(0, 2)), present.sum(axis=(0, 2))
    return np.where(numbers > 0, sums / np.maximum(numbers, 1), np.nan)


def _average_precision(own: CategoryMatches, counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """AP of one class in every draw, by threshold [B, T]; nan where the draw has no object of it."""
    thresholds, step = len(own.right), max(1, _CHUNK // max(len(own.images), 1))
    parts = [_of_draws(own, counts[start : start + step]) for start in range(0, len(counts), step)]
    return np.concatenate(parts) if parts else np.empty((0, thresholds))


def _of_draws(own: CategoryMatches, counts: NDArray[np.int64]) -> NDArray[np.float64]:
    objects = counts @ own.objects
    weights = counts[:, own.images]  # [B, D]
    seen = weights.cumsum(axis=1)
    needed = _objects_needed(objects)
    found = np.zeros((len(counts), len(own.right)))
    for place, (right, ignored) in enumerate(zip(own.right, own.ignored, strict=True)):
        at = np.flatnonzero(right)
        if len(at):
            judged = seen[:, at]
            if ignored.any():
                judged = judged - (weights * ignored).cumsum(axis=1)[:, at]
            found[:, place] = _mean_precision(weights[:, at].cumsum(axis=1), judged, needed)
    found[objects == 0] = np.nan
    return found


def _objects_needed(objects: NDArray[np.int64]) -> NDArray[np.int64]:
    """Objects to find for each of COCO's recall levels, by draw [B, 101]: the fewest m with m / objects >= level."""
    total = np.maximum(objects, 1)[:, None]
    needed = np.ceil(_RECALLS * total).astype(np.int64)
    needed -= (needed - 1) / total >= _RECALLS
    return np.where(needed / total >= _RECALLS, needed, needed + 1)


def _mean_precision(
    found: NDArray[np.int64], judged: NDArray[np.int64], needed: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Mean over the recall levels of the best precision from there on [B].

    ``found`` [B, P] are right detections up to each right one, ``judged`` all detections up to it that count, and
    ``needed`` [B, 101] is of `_objects_needed`. A detection of an image that was not drawn repeats a state that another
    one has reached, with no better precision, and so changes nothing.
    """
    draws, length = found.shape
    precision = found / (judged + np.spacing(1))
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    best = np.concatenate([best, np.zeros((draws, 1))], axis=1)  # a recall that is never reached
    apart = np.arange(draws)[:, None] * (int(max(found.max(), needed.max())) + 1)
    place = np.searchsorted((found + apart).ravel(), needed + apart) - np.arange(draws)[:, None] * length
    mean: NDArray[np.float64] = np.take_along_axis(best, np.minimum(place, length), axis=1).mean(axis=1)
    return mean


def mean_of_draws(draws: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Mean of several trainings' scores on the same draws [B]."""
    mean: NDArray[np.float64] = np.mean(np.stack(draws), axis=0)
    return mean

"""Score maps and human boxes in, accuracy of weakly supervised localisation out: MaxBoxAcc, MaxBoxAccV2, PxAP.

The numbers are those of the public evaluation code: maps and boxes are brought to 224 × 224 pixels, maps are cut at
fractions of their maximum, and a map counts as right where a box around what remains meets a human one. The best of all
thresholds is picked **on the images that are scored**; pick it elsewhere (`LocalisationMetric.best_thresholds`) and
pass it to `compute` for a number that is not. Letters: T thresholds, D IoU limits, H × W pixels of a map.
Source: KR 10-2022-0050617, figures 6 and 7; Choe et al., Evaluating Weakly Supervised Object Localization Methods
Right, 2020.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simdetr.evaluation.heat_map_boxes import check_score_map, contour_boxes, eight_bit, resize_score_map

Contours = Literal["largest", "all"]
CONTOURS: tuple[Contours, ...] = ("largest", "all")
MAIN_DELTA = 0.5  # of MaxBoxAcc, GT-known and Top-1 localisation
SIDE_PX = 224


class LocalisationMetric:
    """Counts, image by image, at which thresholds the boxes of a score map meet a human box.

    Memory does not grow with the number of images.

    Args:
        deltas: IoU limits between 0 and 1, MaxBoxAcc's 0.5 among them.
        step: distance of the thresholds; 0.001 in the public code's training, 0.01 on its command line. Equal cuts of
            an 8-bit map are scored once, so that no more than 256 of them cost time.

    Raises:
        ValueError: limits outside (0, 1] or without 0.5, or a step outside (0, 1).

    Example:
        >>> metric = LocalisationMetric()
        >>> metric.update(centre_gaussian_map(), [[20, 20, 80, 80]], (100, 100))
        >>> metric.compute()["MaxBoxAcc"]
        1.0
    """

    def __init__(self, deltas: Sequence[float] = (0.3, 0.5, 0.7), step: float = 0.001) -> None:
        if MAIN_DELTA not in deltas or not all(0 < delta <= 1 for delta in deltas):
            raise ValueError(f"deltas: expected IoU limits in (0, 1] with {MAIN_DELTA} among them, got {tuple(deltas)}")
        if not 0 < step < 1:
            raise ValueError(f"step: expected a distance of thresholds in (0, 1), got {step}")
        self.deltas = tuple(deltas)
        self.thresholds: NDArray[np.float64] = np.arange(0, 1, step)
        self.images = self.constant_maps = 0
        self._classified = 0  # images of which it was said whether their class is right
        self._correct = np.zeros((len(CONTOURS), len(self.deltas), len(self.thresholds)), np.int64)
        self._correct_with_class = np.zeros(len(self.thresholds), np.int64)

    def update(
        self,
        score_map: ArrayLike,
        boxes_xyxy: ArrayLike,
        size_hw: tuple[int, int],
        *,
        class_correct: bool | None = None,
    ) -> None:
        """Score one image.

        Args:
            score_map: [H, W] in [0, 1] over the whole image, of any size; a constant one has the box (0, 0, 0, 0).
            boxes_xyxy: human boxes [n, 4] in pixels of the image, at least one; any of them may be met.
            size_hw: height and width of the image.
            class_correct: whether the predicted class is right, for Top-1 localisation. The map is that of the
                true class, which is the predicted one wherever it matters.

        Raises:
            ValueError: a map that is not 2-D, not finite or outside [0, 1], no boxes, or boxes of another shape.
        """
        values = resize_score_map(check_score_map(score_map), (SIDE_PX, SIDE_PX))
        truth = resize_boxes(boxes_xyxy, size_hw)
        levels = eight_bit(values)
        cuts, cut_of_threshold = np.unique((self.thresholds * int(levels.max())).astype(np.int64), return_inverse=True)
        boxes = [contour_boxes(levels > cut) for cut in cuts]
        met = inclusive_iou(np.concatenate(boxes), truth).max(axis=1)
        firsts = np.cumsum([0, *(len(own) for own in boxes[:-1])])
        # at each cut of the largest contour's box, which comes first, and of any contour's
        ious = np.stack([met[firsts], np.maximum.reduceat(met, firsts)])[:, cut_of_threshold]
        hits = ious[:, None] >= np.array(self.deltas)[:, None]
        self.images += 1
        self.constant_maps += int(values.max() == 0)
        self._correct += hits
        if class_correct is not None:
            self._classified += 1
            self._correct_with_class += hits[0, self.deltas.index(MAIN_DELTA)] & class_correct

    def accuracies(self, contours: Contours) -> NDArray[np.float64]:
        """Share of images whose box, of the ``largest`` contour or the best of ``all``, is right: [D, T].

        Raises:
            ValueError: unknown contours, or no image scored yet.
        """
        if contours not in CONTOURS:
            raise ValueError(f"contours: expected one of {', '.join(CONTOURS)}, got {contours!r}")
        if not self.images:
            raise ValueError("expected at least one scored image; call update before")
        table: NDArray[np.float64] = self._correct[CONTOURS.index(contours)] / self.images
        return table

    def best_thresholds(self, contours: Contours) -> dict[float, float]:
        """The threshold with the most right images per IoU limit; the lowest of equally good ones."""
        best = self.accuracies(contours).argmax(axis=1)
        return {delta: float(self.thresholds[index]) for delta, index in zip(self.deltas, best, strict=True)}

    def accuracy_at(self, thresholds: float | Mapping[float, float], contours: Contours) -> dict[float, float]:
        """Share of right images per IoU limit at thresholds chosen elsewhere.

        They are one for all limits, or one per limit, such as `best_thresholds` of other images gives; ValueError for
        one that is absent or outside [0, 1), and as `accuracies`.
        """
        table = self.accuracies(contours)
        given = thresholds if isinstance(thresholds, Mapping) else dict.fromkeys(self.deltas, thresholds)
        return {delta: float(table[row, self._index_of(given, delta)]) for row, delta in enumerate(self.deltas)}

    def compute(self, threshold: float | None = None) -> dict[str, float]:
        """All numbers of the images so far, fractions in 0..1.

        Args:
            threshold: the one at which all are read, chosen on other images; None reads each at its best one here.

        Returns:
            With the best thresholds: ``MaxBoxAcc`` (largest contour, IoU 0.5) and its ``threshold``; ``MaxBoxAccV2``
            (best of all contours), the mean over the limits, and ``MaxBoxAccV2@30`` and so on of each. With one given:
            ``BoxAcc``, ``BoxAccV2``, ``BoxAccV2@30`` and so on at it. Always: ``GT-known Loc``, which is the first of
            them by another name; ``Top-1 Loc``, the share of images whose class is right too, at the same threshold
            (``nan`` unless every update said so); ``images`` and ``constant_maps``.

        Raises:
            ValueError: no image scored yet, or a threshold outside [0, 1).
        """
        given = None if threshold is None else dict.fromkeys(self.deltas, threshold)
        largest = given or self.best_thresholds("largest")
        box_acc = self.accuracy_at(largest, "largest")[MAIN_DELTA]
        by_delta = self.accuracy_at(given or self.best_thresholds("all"), "all")
        with_class = self._correct_with_class[self._index_of(largest, MAIN_DELTA)] / self.images
        name = "MaxBoxAcc" if threshold is None else "BoxAcc"
        return {
            name: box_acc,
            f"{name}V2": float(np.mean(list(by_delta.values()))),
            **{f"{name}V2@{100 * delta:g}": accuracy for delta, accuracy in by_delta.items()},
            "GT-known Loc": box_acc,
            "Top-1 Loc": float(with_class) if self._classified == self.images else float("nan"),
            "threshold": largest[MAIN_DELTA],
            "images": float(self.images),
            "constant_maps": float(self.constant_maps),
        }

    def _index_of(self, thresholds: Mapping[float, float], delta: float) -> int:
        threshold = thresholds.get(delta)
        if threshold is None or not 0 <= threshold < 1:
            raise ValueError(f"thresholds: expected one in [0, 1) for the IoU limit {delta}, got {threshold}")
        return int(np.abs(self.thresholds - threshold).argmin())


class PixelAveragePrecision:
    """PxAP: area under the precision-recall curve of the pixels of all images, from histograms of their scores.

    Args:
        step: width of the histograms' bins.

    Raises:
        ValueError: a step outside (0, 1).
    """

    def __init__(self, step: float = 0.001) -> None:
        if not 0 < step < 1:
            raise ValueError(f"step: expected a width of bins in (0, 1), got {step}")
        self._edges = np.append(np.arange(0, 1, step), [1.0, 2.0])  # the last bin holds 1 alone
        self._counts = np.zeros((2, len(self._edges) - 1), np.int64)  # of background and object pixels

    def update(self, score_map: ArrayLike, mask: ArrayLike, ignore: ArrayLike | None = None) -> None:
        """Count the pixels of one image; ValueError for a bad map, or masks that are not 2-D.

        The score map [H, W] is in [0, 1] over the whole image, ``mask`` bool [h, w] True on the objects, of any sizes;
        ``ignore`` bool [h, w] are pixels outside the objects that do not count.
        """
        values = resize_score_map(check_score_map(score_map), (SIDE_PX, SIDE_PX))
        objects = _resize_mask("mask", mask)
        counted = np.ones_like(objects) if ignore is None else objects | ~_resize_mask("ignore", ignore)
        for kind in (0, 1):
            self._counts[kind] += np.histogram(values[(objects == kind) & counted], self._edges)[0]

    def compute(self) -> float:
        """The area in 0..1, ``nan`` without object pixels."""
        false_positives, true_positives = self._counts[:, ::-1].cumsum(axis=1)
        if not true_positives[-1]:
            return float("nan")
        precision = true_positives / np.maximum(true_positives + false_positives, 1)
        gained = np.diff(true_positives, prepend=0) / true_positives[-1]
        return float((precision * gained).sum())


def centre_gaussian_map(size_hw: tuple[int, int] = (SIDE_PX, SIDE_PX)) -> NDArray[np.float64]:
    """The baseline that learns nothing: a bell around the image's centre, a quarter of each side wide, up to 1."""
    rows, columns = (np.exp(-8 * ((np.arange(side) + 0.5) / side - 0.5) ** 2) for side in size_hw)
    values: NDArray[np.float64] = np.outer(rows, columns) / (rows.max() * columns.max())
    return values


def full_image_map() -> NDArray[np.float64]:
    """The baseline whose box is the whole image at every threshold: ones, and 0 in a corner, lest it be constant."""
    values = np.ones((SIDE_PX, SIDE_PX))
    values[0, 0] = 0
    return values


def resize_boxes(boxes_xyxy: ArrayLike, size_hw: tuple[int, int]) -> NDArray[np.int64]:
    """Boxes [n, 4] of an image in the whole pixels of 224 × 224, rounded down and not beyond the last one.

    Raises:
        ValueError: no boxes, other than four finite corners in order, or an image without pixels.
    """
    boxes = np.asarray(boxes_xyxy, dtype=np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not len(boxes):
        raise ValueError(f"boxes_xyxy: expected at least one box [n, 4], got shape {list(boxes.shape)}")
    if not np.isfinite(boxes).all() or (boxes[:, 2:] < boxes[:, :2]).any() or min(size_hw) <= 0:
        raise ValueError("boxes_xyxy: expected finite corners with x0 <= x1 and y0 <= y1 in an image with pixels")
    height, width = size_hw
    scaled = boxes * SIDE_PX / np.array([width, height, width, height])
    pixels: NDArray[np.int64] = scaled.astype(np.int64).clip(0, SIDE_PX - 1)
    return pixels


def inclusive_iou(boxes_a: NDArray[np.int64], boxes_b: NDArray[np.int64]) -> NDArray[np.float64]:
    """IoU [a, b] of boxes in whole pixels whose last row and column belong to them, as the public code counts."""
    first, second = boxes_a[:, None], boxes_b[None]
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2]) + 1
    shared = np.maximum(sides, 0).prod(axis=2)
    areas = [(boxes[..., 2:] - boxes[..., :2] + 1).prod(axis=-1) for boxes in (first, second)]
    ious: NDArray[np.float64] = shared / (areas[0] + areas[1] - shared)
    return ious


def _resize_mask(name: str, mask: ArrayLike) -> NDArray[np.bool_]:
    values = np.asarray(mask, dtype=np.bool_)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"{name}: expected one mask [h, w], got shape {list(values.shape)}")
    rows, columns = (np.arange(SIDE_PX) * side // SIDE_PX for side in values.shape)  # nearest, as OpenCV rounds
    resized: NDArray[np.bool_] = values[np.ix_(rows, columns)]
    return resized

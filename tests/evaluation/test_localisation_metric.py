import math
import pickle

import numpy as np
import pytest
from scipy import ndimage

from simdetr.evaluation.heat_map_boxes import check_score_map, resize_score_map
from simdetr.evaluation.localisation_metric import (
    LocalisationMetric,
    PixelAveragePrecision,
    centre_gaussian_map,
    full_image_map,
    inclusive_iou,
    resize_boxes,
)

SIZE = (300, 200)  # height and width of the images


def blob_map(rng: np.random.Generator, side: int = 28) -> np.ndarray:
    """Two to four bells on noise, half of them with a hollow in the middle, in [0, 1]."""
    y, x = np.mgrid[:side, :side] / side
    values = 0.25 * rng.random((side, side))
    for _ in range(rng.integers(2, 5)):
        centre, width = rng.uniform(0.2, 0.8, 2), rng.uniform(0.04, 0.18)
        bell = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * width**2))
        values += bell - (rng.random() < 0.5) * 0.8 * bell**8
    values = values.clip(0)
    return values / values.max()


def random_set(seed: int, count: int):
    """Maps at 224 × 224 with human boxes on images of `SIZE`: one near a part of the map, up to two anywhere."""
    rng = np.random.default_rng(seed)
    scale = np.array([SIZE[1], SIZE[0]]) / 224
    for _ in range(count):
        values = resize_score_map(check_score_map(blob_map(rng)), (224, 224))
        parts, number = ndimage.label(values > rng.uniform(0.3, 0.9))
        shown = np.argwhere(parts == rng.integers(1, number + 1))[:, ::-1]
        near = np.stack([shown.min(0), shown.max(0)]) * scale + rng.normal(0, 12, (2, 2))
        corners = np.concatenate([near[None], rng.uniform(0, 1, (rng.integers(0, 3), 2, 2)) * [SIZE[1], SIZE[0]]])
        corners = corners.clip(0, [SIZE[1], SIZE[0]])
        yield values, np.concatenate([corners.min(1), corners.max(1)], axis=1)


def naive_correct(values: np.ndarray, truth: np.ndarray, thresholds: np.ndarray, deltas: tuple[float, ...]):
    """Hits [2, D, T] of one map by OpenCV, one threshold, contour and human box after the other."""
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed, there is nothing to compare the metric with")
    image = (values * 255).astype(np.uint8)
    scale = (224 / SIZE[1], 224 / SIZE[0])
    people = [[min(int(v * scale[i % 2] + 1e-9), 223) for i, v in enumerate(box)] for box in truth]
    hits = np.zeros((2, len(deltas), len(thresholds)), bool)
    for column, threshold in enumerate(thresholds):
        _, binary = cv2.threshold(image, int(threshold * image.max()), 255, cv2.THRESH_BINARY)
        contours = list(cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0])
        scored = [(0.0, (0, 0, 0, 0))]
        if contours:
            scored = []
            for contour in contours:
                x, y, w, h = cv2.boundingRect(contour)
                scored.append((cv2.contourArea(contour), (x, y, min(x + w, 223), min(y + h, 223))))
        best = [max(naive_iou(box, human) for human in people) for _, box in scored]
        areas = [area for area, _ in scored]
        for row, delta in enumerate(deltas):
            hits[0, row, column] = best[areas.index(max(areas))] >= delta
            hits[1, row, column] = max(best) >= delta
    return hits


def naive_iou(a, b) -> float:
    """Pixels in common among pixels in either, counted one by one along each side."""
    width = len(set(range(a[0], a[2] + 1)) & set(range(b[0], b[2] + 1)))
    height = len(set(range(a[1], a[3] + 1)) & set(range(b[1], b[3] + 1)))
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_a_naive_reading_of_the_definition(seed):
    metric = LocalisationMetric(step=0.02)
    expected = np.zeros((2, 3, 50))
    for values, truth in random_set(seed, 12):
        metric.update(values, truth, SIZE)
        expected += naive_correct(values, truth, metric.thresholds, metric.deltas)
    expected /= 12
    assert (metric.accuracies("largest") == expected[0]).all()
    assert (metric.accuracies("all") == expected[1]).all()
    assert 0.1 < expected[0, 1].max() < 1 and (expected[1] > expected[0]).any()  # the sets tell right from wrong
    numbers = metric.compute()
    assert numbers["MaxBoxAcc"] == numbers["GT-known Loc"] == expected[0, 1].max()
    assert numbers["MaxBoxAccV2"] == pytest.approx(expected[1].max(axis=1).mean())
    assert [numbers[f"MaxBoxAccV2@{d}"] for d in (30, 50, 70)] == expected[1].max(axis=1).tolist()
    assert numbers["threshold"] == metric.thresholds[expected[0, 1].argmax()]


def test_all_thousand_thresholds_equal_the_naive_reading():
    metric = LocalisationMetric()
    assert len(metric.thresholds) == 1000
    values, truth = next(random_set(5, 1))
    values = values * 0.9  # 229 levels: neighbouring thresholds share a cut
    metric.update(values, truth, SIZE)
    expected = naive_correct(values, truth, metric.thresholds, metric.deltas)
    assert (np.stack([metric.accuracies("largest"), metric.accuracies("all")]) == expected).all()


def test_iou_counts_the_last_pixels():
    boxes = np.array([[1, 2, 5, 6], [1, 1, 3, 3], [0, 0, 0, 0]])
    ious = inclusive_iou(boxes, np.array([[3, 1, 4, 5], [1, 1, 4, 4], [0, 0, 0, 0], [1, 1, 3, 3]]))
    assert ious[0, 0] == pytest.approx(8 / 27)
    assert ious[1, 1] == 0.5625
    assert ious[2, 2] == ious[1, 3] == 1
    assert ious[2, 1] == 0


def test_boxes_are_scaled_rounded_down_and_kept_inside():
    boxes = [[10.0, 30.0, 200.0, 300.0], [0.9, 0, 1.8, 299]]
    assert resize_boxes(boxes, SIZE).tolist() == [[11, 22, 223, 223], [1, 0, 2, 223]]
    assert resize_boxes([[-5, -5, 900, 900]], SIZE).tolist() == [[0, 0, 223, 223]]


def test_the_threshold_is_one_for_all_images():
    # the box of one map is right below 0.5 only, that of the other above only
    low, high = np.zeros((224, 224)), np.zeros((224, 224))
    low[20:100, 20:100], low[20:40, 20:40] = 0.5, 1
    high[10:200, 10:200], high[60:100, 60:100] = 0.5, 1
    metric = LocalisationMetric()
    metric.update(low, [[20, 20, 100, 100]], (224, 224))
    metric.update(high, [[60, 60, 100, 100]], (224, 224))
    assert metric.compute()["MaxBoxAcc"] == 0.5
    assert metric.accuracy_at(0.3, "largest")[0.5] == metric.accuracy_at(0.8, "largest")[0.5] == 0.5


def two_bars() -> np.ndarray:
    values = np.zeros((224, 224))
    values[10:60, 10:60] = 1
    values[100:220, 100:200] = 0.9
    return values


def test_all_contours_find_what_the_largest_one_misses():
    metric = LocalisationMetric()
    metric.update(two_bars(), [[10, 10, 60, 60]], (224, 224))
    assert metric.accuracies("largest")[1, 0] == 0 and metric.accuracies("all")[1, 0] == 1
    assert metric.compute()["MaxBoxAcc"] == 1  # above 0.9 the smaller one is left
    assert metric.best_thresholds("largest")[0.5] == pytest.approx(0.9, abs=0.005)
    assert metric.best_thresholds("all") == {0.3: 0, 0.5: 0, 0.7: 0}


def test_a_hole_counts_as_a_contour():
    values = np.zeros((224, 224))
    values[10:210, 10:210] = 1
    values[91:130, 91:130] = 0
    metric = LocalisationMetric()
    metric.update(values, [[90, 90, 131, 131]], (224, 224))
    assert (metric.accuracies("all") == 1).all() and (metric.accuracies("largest") == 0).all()


def test_thresholds_chosen_elsewhere():
    chosen, scored = LocalisationMetric(), LocalisationMetric()
    chosen.update(two_bars(), [[10, 10, 60, 60]], (224, 224))
    scored.update(two_bars(), [[100, 100, 200, 220]], (224, 224))
    assert scored.compute()["MaxBoxAcc"] == 1
    best = chosen.best_thresholds("largest")
    assert scored.accuracy_at(best, "largest") == {0.3: 0, 0.5: 0, 0.7: 0}
    assert scored.accuracy_at({**best, 0.7: 0.4}, "largest") == {0.3: 0, 0.5: 0, 0.7: 1}
    numbers = scored.compute(threshold=best[0.5])
    assert (numbers["BoxAcc"], numbers["GT-known Loc"], numbers["threshold"]) == (0, 0, best[0.5])
    assert "MaxBoxAcc" not in numbers
    assert scored.compute(threshold=0.5)["BoxAccV2"] == 1


def test_top_1_needs_box_and_class():
    metric = LocalisationMetric()
    for box, right in (([10, 10, 60, 60], True), ([10, 10, 60, 60], False), ([150, 10, 200, 60], True)):
        metric.update(two_bars(), [box], (224, 224), class_correct=right)
    numbers = metric.compute()
    assert numbers["GT-known Loc"] == pytest.approx(2 / 3)
    assert numbers["Top-1 Loc"] == pytest.approx(1 / 3)
    metric.update(two_bars(), [[10, 10, 60, 60]], (224, 224))
    assert math.isnan(metric.compute()["Top-1 Loc"])


def test_constant_maps_have_the_pixel_in_the_corner_and_are_counted():
    metric = LocalisationMetric()
    metric.update(np.full((14, 14), 0.5), [[0, 0, 224, 224]], (224, 224))
    metric.update(np.zeros((224, 224)), [[0, 0, 0.5, 0.5]], (224, 224))
    numbers = metric.compute()
    assert (numbers["constant_maps"], numbers["images"], numbers["MaxBoxAcc"]) == (2, 2, 0.5)


def test_baselines():
    whole, centre = LocalisationMetric(), LocalisationMetric()
    whole.update(full_image_map(), [[0, 0, 100, 50]], (50, 100))
    whole.update(full_image_map(), [[0, 0, 70, 50]], (50, 100))
    whole.update(full_image_map(), [[0, 0, 40, 50]], (50, 100))
    assert (whole.accuracies("largest") == np.array([3, 2, 2])[:, None] / 3).all()  # IoU 1, 0.7 and 0.4
    for size in ((50, 100), (100, 60)):
        height, width = size
        centre.update(centre_gaussian_map(), [[width / 4, height / 4, width * 0.75, height * 0.75]], size)
        centre.update(centre_gaussian_map(size), [[width / 4, height / 4, width * 0.75, height * 0.75]], size)
        centre.update(centre_gaussian_map(), [[0, 0, width / 4, height / 4]], size)
    assert centre.compute()["MaxBoxAccV2"] == pytest.approx(2 / 3)
    assert centre_gaussian_map((9, 5)).max() == 1 and centre_gaussian_map((9, 5)).argmax() == 22


def test_memory_does_not_grow_with_the_images():
    metric = LocalisationMetric(step=0.1)
    sizes = []
    for _ in range(4):
        metric.update(two_bars(), [[10, 10, 60, 60]], (224, 224))
        sizes.append(len(pickle.dumps(metric)))
    assert len(set(sizes)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_map": np.full((4, 4), math.nan)}, "score_map: expected finite values"),
        ({"score_map": np.full((4, 4), 2.0)}, r"score_map: expected values in \[0, 1\]"),
        ({"score_map": np.zeros((2, 4, 4))}, "score_map: expected one map"),
        ({"boxes_xyxy": np.zeros((0, 4))}, r"boxes_xyxy: expected at least one box \[n, 4\], got shape \[0, 4\]"),
        ({"boxes_xyxy": [[5, 0, 1, 4]]}, "boxes_xyxy: expected finite corners with x0 <= x1"),
        ({"boxes_xyxy": [[5, 0, math.nan, 4]]}, "boxes_xyxy: expected finite corners"),
    ],
)
def test_bad_images_are_refused_and_not_counted(changes, message):
    metric = LocalisationMetric()
    with pytest.raises(ValueError, match=message):
        metric.update(**{"score_map": two_bars(), "boxes_xyxy": [[0, 0, 4, 4]], "size_hw": (9, 9), **changes})
    assert metric.images == 0


def test_bad_settings_are_refused():
    for deltas in ((0.3, 0.7), (0.5, 1.5), (0.0, 0.5)):
        with pytest.raises(ValueError, match="deltas: expected IoU limits"):
            LocalisationMetric(deltas)
    for make in (LocalisationMetric, PixelAveragePrecision):
        with pytest.raises(ValueError, match="step: expected"):
            make(step=0.0)
    metric = LocalisationMetric()
    with pytest.raises(ValueError, match="expected at least one scored image"):
        metric.compute()
    metric.update(two_bars(), [[10, 10, 60, 60]], (224, 224))
    with pytest.raises(ValueError, match="contours: expected one of largest, all, got 'some'"):
        metric.accuracies("some")
    with pytest.raises(ValueError, match=r"thresholds: expected one in \[0, 1\) for the IoU limit 0.3, got 1.0"):
        metric.accuracy_at(1.0, "all")
    with pytest.raises(ValueError, match=r"for the IoU limit 0.7, got None"):
        metric.accuracy_at({0.3: 0.1, 0.5: 0.1}, "all")


def test_pixel_precision_equals_sorting_all_pixels():
    for seed in range(3):
        rng = np.random.default_rng(seed)
        metric = PixelAveragePrecision()
        scores, kinds = [], []
        for _ in range(3):
            values = np.floor(rng.random((224, 224)) * 1000) / 1000 + 0.0005  # every value in a bin of its own
            values[0, 0] = 1.0
            mask = ndimage.gaussian_filter(rng.random((224, 224)), 8) > 0.5
            ignore = rng.random((224, 224)) < 0.2
            values = np.where(mask, np.minimum(1, values + 0.1), values)
            metric.update(values, mask, ignore)
            counted = mask | ~ignore
            scores.append(values[counted])
            kinds.append(mask[counted])
        score, kind = np.floor(np.concatenate(scores) * 1000 + 1e-9), np.concatenate(kinds)
        _, level = np.unique(-score, return_inverse=True)
        hits, seen = np.bincount(level, kind).cumsum(), np.bincount(level).cumsum()
        area = float((hits / seen * np.diff(hits / hits[-1], prepend=0)).sum())
        assert metric.compute() == pytest.approx(area, abs=1e-12)
        assert 0.3 < area < 0.9


def test_pixel_precision_of_known_maps():
    mask = np.zeros((112, 112), bool)
    mask[:, :28] = True
    perfect, nothing, empty = PixelAveragePrecision(), PixelAveragePrecision(), PixelAveragePrecision()
    perfect.update(np.repeat(np.repeat(mask, 2, 0), 2, 1).astype(float), mask)
    assert perfect.compute() == 1
    nothing.update(np.full((7, 7), 0.5), mask)
    assert nothing.compute() == pytest.approx(0.25)  # a constant map is as precise as the mask is large
    nothing.update(np.full((7, 7), 0.5), mask, ~mask)
    assert nothing.compute() == pytest.approx(0.4)
    empty.update(np.full((7, 7), 0.5), np.zeros((7, 7), bool))
    assert math.isnan(empty.compute())
    with pytest.raises(ValueError, match=r"mask: expected one mask \[h, w\], got shape \[2, 3, 3\]"):
        empty.update(np.full((7, 7), 0.5), np.zeros((2, 3, 3), bool))

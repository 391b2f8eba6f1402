"""Average precision as COCO defines it: human truth and predictions in, the twelve COCO numbers out.

Both sides are `Labels`; COCOeval does the matching and the averaging, so the numbers are the ones that papers print:
hotcoco's, which takes columns and is some hundred times faster, or pycocotools' own where hotcoco has no wheel. Their
tables are equal bit for bit. Images are matched by image id and categories by name (`simdetr.data.category_matching`).
Fractions in 0..1; ``nan`` where the truth holds no object that the number could be about (pycocotools says -1 there,
which poisons averages).
Source: https://cocodataset.org/#detection-eval.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from simdetr.data.category_matching import check_comparable
from simdetr.data.labels import Labels

try:
    import hotcoco
except ImportError:  # no wheel for this machine
    hotcoco = None  # type: ignore[assignment]

Columns = dict[str, NDArray[Any]]
"""What an evaluator reads of every box: image_id, category_id, bbox (xywh in pixels), area, iscrowd, score."""
SIZES = ("all", "small", "medium", "large")  # COCO's area ranges: below 32², 32² to 96², above 96² px²
SIZE_SUFFIX = {"all": "", "small": "s", "medium": "m", "large": "l"}


@dataclass(frozen=True)
class MatchScores:
    """COCOeval's tables, with -1 where the truth holds no object.

    T = 10 IoU thresholds 0.50:0.05:0.95, R = 101 recall levels, K = categories of the truth (1 if class-agnostic),
    A = 4 area ranges in the order of `SIZES`, M = the asked numbers of boxes per image.
    """

    precision: NDArray[np.float64]  # [T, R, K, A, M]
    recall: NDArray[np.float64]  # [T, K, A, M]
    max_boxes: tuple[int, ...]  # M, ascending

    def average_precision(self, *, size: str = "all", iou: int | None = None) -> float:
        """AP with the largest number of boxes, over all IoU thresholds or at one given in percent (50, 55 .. 95)."""
        return mean_of_present(self.precision[_thresholds(iou), :, :, SIZES.index(size), -1])

    def average_recall(self, boxes: int, *, size: str = "all", iou: int | None = None) -> float:
        """Recall with at most ``boxes`` boxes per image, over all IoU thresholds or at one given in percent."""
        return mean_of_present(self.recall[_thresholds(iou), :, SIZES.index(size), self.max_boxes.index(boxes)])


def _thresholds(iou: int | None) -> slice:
    return slice(None) if iou is None else slice((iou - 50) // 5, (iou - 45) // 5)


def mean_of_present(values: NDArray[np.float64]) -> float:
    """Mean of the numbers that are not COCOeval's -1, ``nan`` if all are."""
    present = values[values > -1]
    return float(present.mean()) if present.size else float("nan")


def coco_metrics(truth: Labels, predictions: Labels) -> dict[str, float]:
    """The twelve COCO numbers: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl.

    Args:
        truth: the human labels; crowd boxes neither count nor punish. Images without predictions count as missed.
        predictions: detections on these images, ranked by score (100 per image and class count; equal scores
            keep their order). Boxes of categories that the truth does not know cannot match and are left out.

    Returns:
        Fractions in 0..1, 0 without predictions, ``nan`` where the truth holds no object of that size.

    Raises:
        ValueError: predictions for images that the truth does not hold, or no category in common.
    """
    scores = match_boxes(truth, predictions)
    metrics = {"AP": scores.average_precision()} | {f"AP{iou}": scores.average_precision(iou=iou) for iou in (50, 75)}
    metrics |= {f"AP{size[0]}": scores.average_precision(size=size) for size in SIZES[1:]}
    metrics |= {f"AR{boxes}": scores.average_recall(boxes) for boxes in scores.max_boxes}
    return metrics | {f"AR{size[0]}": scores.average_recall(100, size=size) for size in SIZES[1:]}


def per_class_ap(truth: Labels, predictions: Labels) -> dict[int | str, float]:
    """AP (IoU 0.50:0.95) of each category of the truth by its id, ``nan`` without objects; errors as `coco_metrics`."""
    precision = match_boxes(truth, predictions).precision[:, :, :, 0, -1]
    return {c.id: mean_of_present(precision[:, :, index]) for index, c in enumerate(truth.categories)}


def match_boxes(
    truth: Labels, predictions: Labels, *, class_agnostic: bool = False, max_boxes: Sequence[int] = (1, 10, 100)
) -> MatchScores:
    """Match scored predictions to truth greedily in every image, as COCOeval does.

    ``class_agnostic`` ignores the classes of both sides (COCOeval's ``useCats=0``); ``max_boxes`` are numbers of
    best-scored boxes per image (and class) that are looked at. ValueError for predictions for unknown images, no
    category in common, or ``max_boxes`` empty or below 1.
    """
    if not max_boxes or min(max_boxes) < 1:
        raise ValueError(f"max_boxes: expected at least one number of boxes >= 1, got {tuple(max_boxes)}")
    images = rows_of_images(truth, predictions)
    category_ids = range(1, 2 if class_agnostic else len(truth.categories) + 1)
    if class_agnostic:
        truth_categories, predicted_categories = np.ones_like(truth.classes), np.ones_like(predictions.classes)
    else:
        truth_categories, predicted_categories = truth.classes + 1, categories_in_truth(truth, predictions)
    human = _columns(truth, truth.owners, truth_categories)
    found = _columns(predictions, images, predicted_categories, as_detections=True)
    tables = by_hotcoco if hotcoco is not None else by_pycocotools
    return tables(human, found, len(truth), category_ids, sorted(set(max_boxes)))


def by_hotcoco(
    human: Columns, found: Columns, images: int, category_ids: Sequence[int], max_boxes: Sequence[int]
) -> MatchScores:
    """Tables of hotcoco for truth and predictions by column; see `match_boxes`."""
    known = found["category_id"] > 0  # what the truth does not know cannot match
    listed = [found["image_id"], *found["bbox"].T, found["score"], found["category_id"]]
    truth = hotcoco.COCO.from_arrays(
        [{"id": index} for index in range(images)],
        [{"id": category, "name": str(category)} for category in category_ids],
        human["image_id"],
        human["category_id"],
        human["bbox"],
        area=human["area"],
        iscrowd=human["iscrowd"],
    )
    evaluation = hotcoco.COCOeval(truth, truth.load_res(np.column_stack(listed)[known]), "bbox")
    evaluation.params.max_dets = list(max_boxes)
    evaluation.evaluate()
    evaluation.accumulate()
    tables = evaluation.eval or {}
    return MatchScores(tables["precision"], tables["recall"], tuple(max_boxes))


def by_pycocotools(
    human: Columns, found: Columns, images: int, category_ids: Sequence[int], max_boxes: Sequence[int]
) -> MatchScores:
    """Tables of pycocotools, as `by_hotcoco`."""
    evaluation = COCOeval(indexed(human, images, category_ids), indexed(found, images, category_ids), "bbox")
    evaluation.params.maxDets = list(max_boxes)
    run_quietly(evaluation)
    return MatchScores(evaluation.eval["precision"], evaluation.eval["recall"], tuple(max_boxes))


def run_quietly(evaluation: COCOeval) -> None:
    """Match and accumulate, without what COCOeval prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()


def indexed(columns: Columns, images: int, category_ids: Sequence[int]) -> COCO:
    """Annotations by column as pycocotools has them; their ids start at 1, since COCOeval takes 0 for no match."""
    columns = {"id": np.arange(1, len(columns["image_id"]) + 1)} | columns
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": index} for index in range(images)],
        "categories": [{"id": category} for category in category_ids],
        "annotations": [dict(zip(columns, row, strict=True)) for row in rows],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def rows_of_images(truth: Labels, predictions: Labels) -> NDArray[np.int64]:
    """The truth's image index of every predicted box."""
    unknown = [image_id for image_id in predictions.image_ids if image_id not in truth]
    if unknown:
        raise ValueError(
            f"predictions: {len(unknown)} of {len(predictions)} images are not among the {len(truth)} images of the "
            f"truth (first: {unknown[0]!r}); the truth's ids look like {list(truth.image_ids[:1])}. Predict on the "
            "truth's images alone"
        )
    indices = np.asarray([truth.row_of(image_id) for image_id in predictions.image_ids], np.int64)
    return indices[predictions.owners]


def categories_in_truth(truth: Labels, predictions: Labels) -> NDArray[np.int64]:
    """COCO category (truth's class index + 1) of every predicted box, 0 for categories unknown to the truth."""
    match = check_comparable(predictions.categories, truth.categories, "the predictions", "the truth")
    classes: NDArray[np.int64] = (match.positions + 1)[predictions.classes]
    return classes


def _columns(
    labels: Labels, images: NDArray[np.int64], categories: NDArray[np.int64], *, as_detections: bool = False
) -> Columns:
    """Boxes by column; a prediction's area is its box's."""
    corners = labels.boxes_xyxy.astype(np.float64)
    sides = corners[:, 2:] - corners[:, :2]
    return {
        "image_id": images,
        "category_id": categories,
        "bbox": np.concatenate([corners[:, :2], sides], axis=1),
        "area": sides.prod(axis=1) if as_detections else labels.areas.astype(np.float64),
        "iscrowd": (labels.crowd & (not as_detections)).astype(np.int64),
        "score": labels.scores.astype(np.float64),
    }


# ----------------------------------------------------------------------------------------------------------------------
# What was matched on each image, for whoever averages over other images than all of them once.


@dataclass(frozen=True)
class CategoryMatches:
    """Detections of one category on all images, best first, and what COCOeval matched them to.

    N images, D detections (100 best of an image), T = 10 IoU thresholds.
    """

    images: NDArray[np.int64]  # [D], index of the truth's image
    right: NDArray[np.bool_]  # [T, D], matched to an object
    ignored: NDArray[np.bool_]  # [T, D], matched to a crowd: neither right nor wrong
    objects: NDArray[np.int64]  # [N]


def matches_by_category(truth: Labels, predictions: Labels) -> list[CategoryMatches]:
    """What `coco_metrics` averages, one per category of the truth; arguments and errors as there."""
    images, category_ids = rows_of_images(truth, predictions), range(1, len(truth.categories) + 1)
    human = _columns(truth, truth.owners, truth.classes + 1)
    found = _columns(predictions, images, categories_in_truth(truth, predictions), as_detections=True)
    evaluation = COCOeval(indexed(human, len(truth), category_ids), indexed(found, len(truth), category_ids), "bbox")
    evaluation.params.maxDets, evaluation.params.areaRng = [100], evaluation.params.areaRng[:1]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    by_category = np.array(evaluation.evalImgs, object).reshape(len(truth.categories), len(truth))
    return [_matches(row, len(evaluation.params.iouThrs)) for row in by_category]


def _matches(of_images: NDArray[Any], thresholds: int) -> CategoryMatches:
    """One category's entries of COCOeval, in the order of the images; None where an image has neither boxes."""
    there = [(index, entry) for index, entry in enumerate(of_images) if entry is not None]
    objects = np.zeros(len(of_images), np.int64)
    for index, entry in there:
        objects[index] = np.count_nonzero(np.logical_not(entry["gtIgnore"]))
    scores = np.concatenate([np.zeros(0), *(entry["dtScores"] for _, entry in there)])
    images = np.repeat([index for index, _ in there], [len(entry["dtScores"]) for _, entry in there])
    none = np.zeros((thresholds, 0), bool)
    matched = np.concatenate([none, *(np.asarray(entry["dtMatches"]) > 0 for _, entry in there)], axis=1)
    ignored = np.concatenate([none, *(np.asarray(entry["dtIgnore"]) > 0 for _, entry in there)], axis=1)
    order = np.argsort(-scores, kind="mergesort")  # as COCOeval sorts
    return CategoryMatches(images[order].astype(np.int64), (matched & ~ignored)[:, order], ignored[:, order], objects)

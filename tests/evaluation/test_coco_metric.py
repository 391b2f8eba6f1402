import contextlib
import io
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.coco import read_coco, write_detections
from simdetr.data.labels import Labels
from simdetr.evaluation import coco_metric
from simdetr.evaluation.coco_metric import by_hotcoco, by_pycocotools, coco_metrics, match_boxes, per_class_ap

NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
SQUARE = (0, 0, 100, 100)
OTHER = (200, 200, 300, 300)


def pycocotools_numbers(truth_json: Path, detections_json: Path) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(truth_json))
        evaluation = COCOeval(truth, truth.loadRes(str(detections_json)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: math.nan if value == -1 else value for name, value in zip(NAMES, evaluation.stats, strict=True)}


def test_perfect_predictions_score_one_and_sizes_without_objects_are_nan(make_labels, capsys):
    truth = make_labels({"a": [(*SQUARE, 0), (10, 10, 30, 30, 1)], "b": [], "c": [(*OTHER, 1)]}, (5, 9))
    metrics = coco_metrics(truth, truth)
    assert list(metrics) == NAMES
    present = {name: value for name, value in metrics.items() if name not in ("APm", "ARm", "AR1")}
    assert present == pytest.approx(dict.fromkeys(present, 1.0))
    assert math.isnan(metrics["APm"]) and math.isnan(metrics["ARm"])
    assert capsys.readouterr().out == ""


def test_one_false_positive_between_two_hits(make_labels):
    truth = make_labels({"a": [(*SQUARE, 0), (*OTHER, 0)]})
    found = make_labels({"a": [(*OTHER, 0, 0.7), (400, 400, 500, 500, 0, 0.8), (*SQUARE, 0, 0.9)]})
    metrics = coco_metrics(truth, found)
    # recall levels 0.00..0.50 at precision 1, the 50 above at 2/3
    assert metrics["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert metrics["AR1"] == pytest.approx(0.5)
    assert metrics["AR10"] == pytest.approx(1.0)


def test_overlap_decides_at_which_thresholds_a_box_counts(make_labels):
    truth = make_labels({"a": [(*SQUARE, 0)]})
    found = make_labels({"a": [(0, 0, 100, 72, 0, 0.9)]})  # IoU 0.72: hits at 0.50 .. 0.70
    metrics = coco_metrics(truth, found)
    assert (metrics["AP50"], metrics["AP75"]) == (pytest.approx(1.0), 0.0)
    assert metrics["AP"] == pytest.approx(0.5)


def test_crowds_neither_count_nor_punish(make_labels):
    boxes = {"a": [(*SQUARE, 0), (200, 200, 600, 600, 0)]}
    found = make_labels({"a": [(*SQUARE, 0, 0.5), (210, 210, 250, 250, 0, 0.9), (300, 300, 350, 350, 0, 0.8)]})
    with_crowd = coco_metrics(make_labels(boxes, crowd=[False, True]), found)
    assert with_crowd["AP"] == pytest.approx(1.0)
    assert coco_metrics(make_labels(boxes), found)["AP"] < 0.5


def test_no_predictions_score_zero(make_labels):
    truth = make_labels({"a": [(*SQUARE, 0)], "b": []})
    for found in (make_labels({"a": [], "b": []}), make_labels({})):
        metrics = coco_metrics(truth, found)
        assert {metrics[name] for name in ("AP", "AP50", "APl", "AR100")} == {0.0}


def test_truth_without_objects_gives_nan(make_labels):
    metrics = coco_metrics(make_labels({"a": []}), make_labels({"a": [(*SQUARE, 0, 0.9)]}))
    assert all(math.isnan(value) for value in metrics.values())


def test_images_and_categories_are_matched_by_id_not_by_position(make_labels):
    truth = make_labels({"a": [(*SQUARE, 0)], "b": [(*OTHER, 1)]}, ("cat", 17))
    found = make_labels({"b": [(*OTHER, 2, 0.9)], "a": [(*SQUARE, 1, 0.9), (*OTHER, 0, 0.95)]}, ("dog", "cat", 17))
    # the dog is unknown to the truth and is left out
    assert coco_metrics(truth, found)["AP"] == pytest.approx(1.0)
    assert per_class_ap(truth, found) == {"cat": pytest.approx(1.0), 17: pytest.approx(1.0)}


def test_per_class_ap_averages_to_ap_and_is_nan_for_absent_classes(make_labels):
    truth = make_labels({"a": [(*SQUARE, 0), (*OTHER, 2)]}, (1, 2, 3))
    found = make_labels({"a": [(*SQUARE, 0, 0.9), (0, 0, 90, 90, 2, 0.9)]}, (1, 2, 3))
    by_class = per_class_ap(truth, found)
    assert by_class[1] == pytest.approx(1.0) and by_class[3] == 0.0
    assert math.isnan(by_class[2])
    assert coco_metrics(truth, found)["AP"] == pytest.approx(np.nanmean(list(by_class.values())))


def test_equal_scores_keep_their_order(make_labels):
    truth = make_labels({"a": [(*SQUARE, 0)]})
    wrong = (400, 400, 500, 500, 0, 0.5)
    hit_first = coco_metrics(truth, make_labels({"a": [(*SQUARE, 0, 0.5), wrong]}))
    hit_second = coco_metrics(truth, make_labels({"a": [wrong, (*SQUARE, 0, 0.5)]}))
    assert (hit_first["AR1"], hit_second["AR1"]) == (pytest.approx(1.0), 0.0)
    assert (hit_first["AP"], hit_second["AP"]) == (pytest.approx(1.0), pytest.approx(0.5))


def test_predictions_for_unknown_images_are_refused(make_labels):
    truth = make_labels({"a": [], "b": []})
    with pytest.raises(ValueError, match=r"2 of 3 images are not among the 2 images of the truth \(first: 'c'\)"):
        coco_metrics(truth, make_labels({"a": [], "c": [], "d": []}))


def test_other_classes_are_refused(make_labels):
    truth = make_labels({"a": [(*SQUARE, 0)]}, (1,))
    with pytest.raises(ValueError, match=r"no category in common: .*'kind x'.*'kind 1'"):
        coco_metrics(truth, make_labels({"a": [(*SQUARE, 0, 0.9)]}, ("x", "y")))


def test_classes_are_matched_by_name_whatever_their_ids_and_order(make_labels):
    boxes = {"a": [(0, 0, 10, 10, 0, 1.0), (20, 20, 40, 40, 1, 1.0)]}
    truth = make_labels(boxes, (1, 2))
    found = make_labels({"a": [(0, 0, 10, 10, 1, 1.0), (20, 20, 40, 40, 0, 1.0)]}, (1, 2))
    assert coco_metrics(truth, found)["AP"] == 0
    swapped = replace(found, categories=tuple(replace(c, id=3 - c.id) for c in reversed(found.categories)))
    assert [c.name for c in swapped.categories] == ["kind 2", "kind 1"] and swapped.categories[0].id == 1
    assert coco_metrics(truth, swapped)["AP"] == pytest.approx(1)


@pytest.mark.parametrize("max_boxes", [(), (0, 10)])
def test_box_numbers_below_one_are_refused(make_labels, max_boxes):
    labels = make_labels({"a": []})
    with pytest.raises(ValueError, match="max_boxes: expected at least one number of boxes >= 1"):
        match_boxes(labels, labels, max_boxes=max_boxes)


@st.composite
def columns_of_both(draw):
    """Truth and predictions by column: crowds, areas of another size, ties, empty images, classes without objects."""
    images, classes = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    objects, boxes = draw(st.integers(0, 30)), draw(st.integers(0, 400))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sides = np.exp(rng.uniform(0, np.log(300), (objects, 2))).round()
    human = {
        "image_id": rng.integers(0, images, objects),
        "category_id": rng.integers(1, classes + 1, objects),
        "bbox": np.concatenate([rng.integers(0, 200, (objects, 2)), sides], axis=1).astype(np.float64),
        "area": sides.prod(axis=1) * rng.choice([1.0, 0.5], objects),
        "iscrowd": (rng.random(objects) < 0.15).astype(np.int64),
        "score": np.ones(objects),
    }
    near = rng.integers(0, max(objects, 1), boxes)
    bbox = np.concatenate([rng.integers(0, 200, (boxes, 2)), rng.integers(1, 200, (boxes, 2))], axis=1) * 1.0
    image_id, category_id = rng.integers(0, images, boxes), rng.integers(0, classes + 1, boxes)
    if objects:
        like = rng.random(boxes) < 0.7
        image_id, category_id = (
            np.where(like, human[name][near], own)
            for name, own in (("image_id", image_id), ("category_id", category_id))
        )
        bbox[like] = np.maximum(human["bbox"][near][like] + rng.integers(-3, 4, (int(like.sum()), 4)), [0, 0, 1, 1])
    scores = rng.integers(0, draw(st.sampled_from([1, 4, 1000])), boxes) / 8
    found = {"image_id": image_id, "category_id": category_id, "bbox": bbox, "area": bbox[:, 2:].prod(axis=1)}
    found |= {"iscrowd": np.zeros(boxes, np.int64), "score": scores}
    most = sorted(draw(st.sets(st.sampled_from([1, 5, 10, 100, 300]), min_size=1)))
    return human, found, images, range(1, classes + 1), most


@settings(max_examples=150, deadline=None)
@given(columns_of_both())
def test_both_evaluators_give_the_same_tables_bit_for_bit(columns):
    fast, usual = by_hotcoco(*columns), by_pycocotools(*columns)
    np.testing.assert_array_equal(fast.precision, usual.precision)
    np.testing.assert_array_equal(fast.recall, usual.recall)
    assert fast.max_boxes == usual.max_boxes


def test_without_hotcoco_pycocotools_gives_the_same_numbers(make_labels, monkeypatch):
    truth = make_labels({"a": [(*SQUARE, 0), (10, 10, 30, 30, 1)], "b": [(*OTHER, 1)]}, (5, 9))
    found = make_labels({"a": [(*SQUARE, 0, 0.9), (10, 10, 34, 30, 1, 0.4)], "b": []}, (5, 9))
    numbers = coco_metrics(truth, found)
    monkeypatch.setattr(coco_metric, "hotcoco", None)
    monkeypatch.setattr(coco_metric, "by_hotcoco", lambda *columns: pytest.fail("hotcoco was asked"))
    assert coco_metrics(truth, found) == pytest.approx(numbers, abs=0, nan_ok=True)
    assert 0 < numbers["AP"] < 1


@pytest.mark.parametrize("first_id", [1, 0])
@pytest.mark.parametrize("evaluator", [by_hotcoco, by_pycocotools], ids=["hotcoco", "pycocotools"])
def test_an_object_with_the_id_zero_can_be_found(evaluator, first_id, tmp_path, monkeypatch):
    """pycocotools 2.0.11 (and faster-coco-eval 1.8.0) never finds it: 0 is also its mark of no match."""
    images = [{"id": number, "width": 100, "height": 100, "file_name": f"{number}.jpg"} for number in (1, 2)]
    box = {"category_id": 1, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0}
    objects = [box | {"id": first_id + number, "image_id": 1 + number} for number in (0, 1)]
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"images": images, "annotations": objects, "categories": [{"id": 1, "name": "thing"}]}))
    truth, _ = read_coco(path)
    monkeypatch.setattr(coco_metric, "by_hotcoco", evaluator)
    assert coco_metrics(truth, truth)["AP"] == pytest.approx(1)
    write_detections(truth, detections := tmp_path / "detections.json")
    assert pycocotools_numbers(path, detections)["AP"] == pytest.approx(1 if first_id else 0.252, abs=5e-4)


def test_equals_pycocotools_on_json_files_with_ties_crowds_and_all_sizes(tmp_path):
    rng = np.random.default_rng(0)
    category_ids = [3, 7, 90]
    content = {
        "images": [{"id": 10 + i, "file_name": f"{i:02d}.jpg", "height": 512, "width": 512} for i in range(12)],
        "categories": [{"id": id_, "name": f"kind {id_}"} for id_ in category_ids],
        "annotations": [],
    }
    detections = []
    for image in content["images"][:10]:  # the last two stay empty in the truth
        for _ in range(rng.integers(0, 9)):
            x, y = rng.integers(0, 400, 2) / 2
            width, height = np.exp(rng.uniform(np.log(8), np.log(250), 2)).round()
            box = [float(v) for v in (x, y, width, height)]
            category = int(rng.choice(category_ids))
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": box,
                    "area": float(width * height * rng.choice([1.0, 0.5])),
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
            for _ in range(rng.integers(0, 4)):
                shifted = [max(0.0, v + float(d)) for v, d in zip(box, rng.integers(-10, 11, 4) / 2, strict=True)]
                detections.append({"image_id": image["id"], "category_id": category, "bbox": shifted})
    for image in content["images"]:
        for _ in range(3):
            box = [float(v) for v in (*rng.integers(0, 200, 2), *rng.integers(4, 200, 2))]
            detections.append({"image_id": image["id"], "category_id": int(rng.choice(category_ids)), "bbox": box})
    detections = [{**d, "score": float(rng.integers(1, 16)) / 16} for d in detections if min(d["bbox"][2:]) > 0]
    (tmp_path / "truth.json").write_text(json.dumps(content))
    (tmp_path / "detections.json").write_text(json.dumps(detections))

    truth, _ = read_coco(tmp_path / "truth.json")
    rows = []
    for image in content["images"]:
        own = [d for d in detections if d["image_id"] == image["id"]]
        xywh = np.asarray([d["bbox"] for d in own]).reshape(-1, 4)
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        classes = [category_ids.index(d["category_id"]) for d in own]
        rows.append(ImageLabels.build(image["file_name"], (512, 512), corners, classes, [d["score"] for d in own]))
    found = Labels.from_images(rows, [Category(id_, "") for id_ in category_ids])

    expected = pycocotools_numbers(tmp_path / "truth.json", tmp_path / "detections.json")
    assert 0.05 < expected["AP"] < 0.95  # the data can tell right from wrong
    assert coco_metrics(truth, found) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_equals_pycocotools_on_real_annotations(tmp_path):
    data = Path(os.environ.get("SIMDETR_DATA", Path(__file__).parents[3] / "shared/data"))
    path = data / "coco256/instances_val.json"
    if not path.is_file():
        pytest.skip(f"no {path}; set SIMDETR_DATA to the folder of the image sets")
    truth, _ = read_coco(path)
    rng = np.random.default_rng(1)
    rows = []
    for index in range(len(truth)):
        boxes = truth.image(index)
        sides = np.tile(boxes.boxes_xyxy[:, 2:] - boxes.boxes_xyxy[:, :2], 2)
        moved = boxes.boxes_xyxy + rng.normal(0, 0.07, sides.shape) * sides
        corners = np.concatenate([np.minimum(moved[:, :2], moved[:, 2:]), np.maximum(moved[:, :2], moved[:, 2:])], 1)
        scores = rng.random(len(boxes))
        rows.append(ImageLabels.build(boxes.image_id, boxes.size_hw, corners, boxes.classes, scores))
    found = Labels.from_images(rows, truth.categories)
    write_detections(found, tmp_path / "detections.json", path)
    expected = pycocotools_numbers(path, tmp_path / "detections.json")
    assert 0.2 < expected["AP"] < 0.9
    # float32 boxes and areas against the file's decimals: a box at the very edge of a threshold may fall to either side
    assert coco_metrics(truth, found) == pytest.approx(expected, abs=2e-3)

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from simdetr.data import masks
from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.coco import read_coco, with_known_ids, write_coco, write_detections
from simdetr.data.label_files import read_labels
from simdetr.data.label_report import LEFT_OUT
from simdetr.data.labels import Labels

IMAGES = [
    {"id": 10, "file_name": "a.png", "height": 40, "width": 60},
    {"id": "x7", "file_name": "sub/b.png", "height": 30, "width": 20},
    {"id": 3, "file_name": "empty.png", "height": 8, "width": 9},
]
CATEGORIES = [{"id": 90, "name": "owl"}, {"id": 3, "name": "cat"}, {"id": "dog", "name": "Dog"}, {"id": 17}]


def box(number, image_id=10, category_id=3, bbox=(1, 2, 10, 20), **more):
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": list(bbox), **more}


def test_ids_with_gaps_and_strings_become_contiguous(coco_file):
    path = coco_file(IMAGES, [box(1, category_id=90), box(2, "x7", "dog"), box(3, category_id=17)], CATEGORIES)
    labels, problems = read_coco(path)
    assert labels.categories == (Category(3, "cat"), Category(17, "17"), Category(90, "owl"), Category("dog", "Dog"))
    assert labels.image_ids == ("a.png", "sub/b.png", "empty.png") and labels.offsets.tolist() == [0, 2, 3, 3]
    assert labels.classes.tolist() == [2, 1, 3]
    assert labels.boxes_xyxy.tolist() == [[1, 2, 11, 22]] * 3
    assert labels.sizes_hw.tolist() == [[40, 60], [30, 20], [8, 9]]
    assert labels.stage == -1 and problems.total == 0 and problems.lines() == []


def test_order_of_the_category_list_does_not_matter(coco_file):
    one, _ = read_coco(coco_file(IMAGES, [box(1, category_id=90)], CATEGORIES, "one.json"))
    two, _ = read_coco(coco_file(IMAGES, [box(1, category_id=90)], CATEGORIES[::-1], "two.json"))
    assert one.categories == two.categories and one.classes.tolist() == two.classes.tolist()


def test_area_score_and_crowd_are_kept(coco_file):
    path = coco_file(IMAGES, [box(1, area=50.5, iscrowd=1, score=0.25), box(2, area=0)], CATEGORIES)
    labels, problems = read_coco(path)
    assert labels.areas.tolist() == [50.5, 200] and labels.crowd.tolist() == [True, False]
    assert labels.scores.tolist() == [0.25, 1] and problems.total == 0


BAD_ANNOTATIONS = {
    "unknown category, dropped": box(71, category_id=4),
    "unknown image, dropped": box(72, image_id=99),
    "box outside the image, clipped": box(73, bbox=(-1, 2, 10, 20)),
    "box without area in the image, dropped": box(74, bbox=(5, 5, 0, 10)),
    "box, score or area is no number, dropped": box(75, bbox=(5, None, 10, 10)),
    "annotation id repeated, both kept": box(1, bbox=(5, 5, 9, 9)),
    "the same box of the same class again, dropped": box(77),
    "box of negative width or height, dropped": box(78, bbox=(10, 10, -3, 5)),
    "iscrowd is neither 0 nor 1, taken as 0": box(79, bbox=(5, 5, 9, 9), iscrowd="maybe"),
    "area is not that of the object, taken anew": box(80, bbox=(5, 5, 9, 9), area=5000),
    "no bbox, and the segmentation cannot be read, dropped": box(81) | {"bbox": None, "segmentation": [[1, 2]]},
    "annotation is no object, dropped": 5,
    "score outside 0 to 1, clipped": box(76, score=2),
}


@pytest.mark.parametrize("kind", BAD_ANNOTATIONS)
def test_each_problem_is_counted_or_is_an_error_when_strict(coco_file, kind):
    path = coco_file(IMAGES, [box(1), BAD_ANNOTATIONS[kind]], CATEGORIES)
    labels, problems = read_coco(path)
    assert dict(problems.counts) == {kind: 1} and problems.total == 1
    assert len(labels.boxes_xyxy) == (1 if "dropped" in kind else 2)
    assert problems.lines()[0].startswith(f"1 × {kind}: annotation")
    number = "number 2" if kind.startswith("annotation is") else str(BAD_ANNOTATIONS[kind]["id"])
    with pytest.raises(LabelError, match=rf"instances.json: annotation {number}.*{kind}"):
        read_coco(path, strict=True)
    with pytest.raises(LabelError, match="strict"):
        read_labels(path, strict=True)


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ((-5, -5, 20, 20), [0, 0, 15, 15]),
        ((50, 30, 20, 20), [50, 30, 60, 40]),
        ((1, 1, 60, 40), [1, 1, 60, 40]),  # off by one, as boxes counted from 1
        ((0, 0, 60.05, 40), [0, 0, 60, 40]),
        ((70, 10, 5, 5), None),
        ((10, 10, -3, 5), None),
        ((10, 10, 1e-9, 5), None),
        ((10, 10, float("inf"), 5), None),
        ((float("nan"), 10, 5, 5), None),
        ((1, 2, 3), None),
        ("none", None),
    ],
)
def test_boxes_are_clipped_or_dropped(coco_file, bbox, expected):
    labels, problems = read_coco(coco_file(IMAGES, [box(1, bbox=bbox)], CATEGORIES))
    assert labels.boxes_xyxy.tolist() == ([] if expected is None else [expected])
    left_out = {} if expected else {LEFT_OUT: 1}
    kinds = dict(problems.counts)
    assert {kind: kinds.pop(kind) for kind in left_out} == left_out
    assert len(kinds) == (0 if bbox == (0, 0, 60.05, 40) else 1)  # rounding is no problem


def test_problems_of_images_and_categories(coco_file):
    images = [*IMAGES, IMAGES[0], {"id": 11}]
    images.append({"id": 12, "file_name": "a.png", "height": 40, "width": 60})
    path = coco_file(images, [box(1), box(2, 12, 90)], [*CATEGORIES, {"id": 3, "name": "lion"}, {"name": "no id"}])
    labels, problems = read_coco(path)
    assert labels.image_ids == ("a.png", "sub/b.png", "empty.png") and labels.offsets.tolist() == [0, 2, 2, 2]
    assert labels.categories[0] == Category(3, "cat")
    assert dict(problems.counts) == {
        "image id repeated, first kept": 1,
        "image without id or file_name, dropped": 1,
        "file_name repeated, annotations merged": 1,
        "category id repeated, first kept": 1,
        "category without id, dropped": 1,
    }


def test_examples_are_few_and_counts_are_full(coco_file):
    path = coco_file(IMAGES, [box(number, category_id=4) for number in range(50)], CATEGORIES)
    _, problems = read_coco(path)
    assert problems.counts["unknown category, dropped"] == 50
    assert len(problems.examples["unknown category, dropped"]) == 5


def test_image_ids_choose_and_order_the_images(coco_file):
    path = coco_file(IMAGES, [box(1), box(2, "x7")], CATEGORIES)
    labels, _ = read_coco(path, image_ids=["sub/b.png", "empty.png"])
    assert labels.image_ids == ("sub/b.png", "empty.png") and len(labels.boxes_xyxy) == 1


def test_image_without_size_names_the_fix(coco_file):
    path = coco_file([{"id": 1, "file_name": "a.png"}], [], CATEGORIES)
    with pytest.raises(LabelError, match=r"image 1 .a.png.: expected a positive width and height.*write them"):
        read_coco(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read as JSON"), ("[]", "expected the lists"), ('{"images": []}', "annotations, categories")],
)
def test_unusable_file(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(LabelError, match=message):
        read_coco(tmp_path / "a.json")
    with pytest.raises(LabelError, match=r"missing\.json does not exist"):
        read_coco(tmp_path / "missing.json")


def test_round_trip_keeps_ids_scores_and_stage(coco_file, tmp_path):
    annotations = [
        box(1, category_id="dog", score=0.1234567, area=33),
        box(2, "x7", 90, (0.3, 0.7, 3.3, 4.1), iscrowd=1),
    ]
    labels, _ = read_coco(coco_file(IMAGES, annotations, CATEGORIES))
    object.__setattr__(labels, "stage", 1)
    write_coco(labels, tmp_path / "out.json")
    again, problems = read_coco(tmp_path / "out.json", strict=True)
    assert problems.total == 0 and again.image_ids == labels.image_ids and again.categories == labels.categories
    assert again.stage == 1 and (again.scores == labels.scores).all() and (again.crowd == labels.crowd).all()
    assert (again.classes == labels.classes).all() and (again.offsets == labels.offsets).all()
    assert np.abs(again.boxes_xyxy - labels.boxes_xyxy).max() < 1e-3
    assert np.abs(again.areas - labels.areas).max() < 1e-3
    written = json.loads((tmp_path / "out.json").read_text())
    assert [entry["category_id"] for entry in written["annotations"]] == ["dog", 90]
    assert written["annotations"][0]["score"] == 0.1234567 and written["images"][1]["file_name"] == "sub/b.png"


def test_real_files_read_without_problems_and_agree_with_pycocotools(shared_data):
    path = shared_data / "coco256" / "instances_val.json"
    labels, problems = read_coco(path, strict=True)
    truth = COCO(str(path))
    assert problems.total == 0 and len(labels) == len(truth.imgs) and len(labels.boxes_xyxy) == len(truth.anns)
    for image_id, entry in list(truth.imgs.items())[:20]:
        mine = labels.of(entry["file_name"])
        theirs = truth.loadAnns(truth.getAnnIds(image_id))
        expected = np.array([annotation["bbox"] for annotation in theirs]).reshape(-1, 4)
        expected[:, 2:] += expected[:, :2]
        assert np.abs(mine.boxes_xyxy - expected).max(initial=0) < 0.1
        names = [labels.categories[index].id for index in mine.classes]
        assert names == [annotation["category_id"] for annotation in theirs]


POLYGON = [[2, 2, 12, 2, 12, 22, 2, 22]]


def test_segmentations_of_every_kind_are_read_when_asked_for(coco_file):
    pixels = np.zeros((40, 60), np.uint8)
    pixels[5:25, 3:30] = 1
    run_lengths = {"size": [40, 60], "counts": [3 * 40 + 5, *([20, 20] * 26), 20, 31 * 40 - 25]}
    code = masks.encode(pixels[None])[0]
    path = coco_file(
        IMAGES,
        [
            box(1, segmentation=POLYGON),
            box(2, segmentation=run_lengths, iscrowd=1),
            box(3, segmentation={"size": [40, 60], "counts": code.decode()}),
        ],
        CATEGORIES,
    )
    labels, problems = read_coco(path, masks=True)
    decoded = masks.decode(labels.image(0).masks, (40, 60))
    assert problems.total == 0 and (decoded[1:] == pixels).all()
    truth = COCO(path)
    for mask, annotation in zip(decoded, truth.loadAnns([1, 2, 3]), strict=True):
        counts = truth.annToRLE(annotation)["counts"]
        assert (counts.encode() if isinstance(counts, str) else counts) == masks.encode(mask[None])[0]
    assert read_coco(path)[0].masks is None and read_labels(path).masks is None
    assert read_labels(path, masks=True).masks.tolist() == labels.masks.tolist()


@pytest.mark.parametrize(
    ("segmentation", "kind"),
    [
        (None, "no segmentation, the box stands in"),
        ([], "no segmentation, the box stands in"),
        ([[1, 2, 3]], "segmentation cannot be read, the box stands in"),
        ({"size": [1, 1], "counts": [1]}, "segmentation cannot be read, the box stands in"),
    ],
)
def test_the_box_stands_in_for_a_mask_that_is_not_there(coco_file, segmentation, kind):
    path = coco_file(
        IMAGES, [box(1, segmentation=POLYGON), box(2, segmentation=segmentation), box(3, "x7")], CATEGORIES
    )
    labels, problems = read_coco(path, masks=True)
    x, y, width, height = box(2)["bbox"]
    filled = masks.decode(labels.image(0).masks, (40, 60))[1]
    assert filled.sum() == width * height and filled[y : y + height, x : x + width].all()
    assert problems.counts[kind] >= 1 and problems.examples[kind][0].startswith("annotation 2")
    assert problems.total == 2  # the third has none either
    with pytest.raises(LabelError, match=kind):
        read_coco(path, masks=True, strict=True)
    assert read_coco(path)[1].total == 0  # of no interest to those who want boxes


def test_a_file_of_boxes_gives_labels_without_masks(coco_file):
    labels, problems = read_coco(coco_file(IMAGES, [box(1), box(2, "x7")], CATEGORIES), masks=True, strict=True)
    assert labels.masks is None and problems.total == 0


def test_masks_survive_writing(coco_file, tmp_path):
    path = coco_file(IMAGES, [box(1, segmentation=POLYGON), box(2, "x7", segmentation=POLYGON)], CATEGORIES)
    labels, _ = read_coco(path, masks=True)
    write_coco(labels, tmp_path / "out.json")
    again, problems = read_coco(tmp_path / "out.json", masks=True)
    assert again.masks.tolist() == labels.masks.tolist() and problems.total == 0
    truth = COCO(tmp_path / "out.json")
    assert all(truth.annToRLE(annotation)["size"] in ([40, 60], [30, 20]) for annotation in truth.anns.values())


def test_one_keypoint_is_the_point(coco_file):
    annotations = [box(1, keypoints=[4.5, 6, 2], num_keypoints=1), box(2, keypoints=[0, 0, 0]), box(3, "x7")]
    labels, problems = read_coco(coco_file(IMAGES, annotations, CATEGORIES), strict=True)
    np.testing.assert_array_equal(labels.points, [[4.5, 6], [np.nan] * 2, [np.nan] * 2])
    assert labels.boxes_xyxy.tolist() == [[1, 2, 11, 22]] * 3 and problems.total == 0
    assert read_coco(coco_file(IMAGES, [box(1)], CATEGORIES))[0].points is None
    people = [box(1, keypoints=[4, 6, 2]), box(2, keypoints=[1, 2, 2] * 17)]
    labels, problems = read_coco(coco_file(IMAGES, people, CATEGORIES))
    assert labels.points is None and problems.total == 0 and len(labels.classes) == 2


@pytest.mark.parametrize("bbox", [{}, {"bbox": None}, {"bbox": []}, {"bbox": [0, 0, 0, 0]}, {"bbox": [4, 5, 0, 9]}])
@pytest.mark.parametrize("masks_too", [False, True])
def test_a_keypoint_without_a_box_is_a_landmark(coco_file, bbox, masks_too):
    entry = {"id": 1, "image_id": 10, "category_id": 3, "keypoints": [12.5, 7, 1], **bbox}
    others = [box(2, segmentation=[[1, 2, 11, 2, 11, 22]])] if masks_too else []
    labels, problems = read_coco(coco_file(IMAGES, [entry, *others], CATEGORIES), masks=masks_too)
    assert labels.boxes_xyxy[0].tolist() == [12.5, 7, 12.5, 7] and labels.areas[0] == 0
    assert labels.points[0].tolist() == [12.5, 7] and problems.total == (1 if masks_too else 0)
    if masks_too:
        assert masks.decode(labels.of("a.png").masks, (40, 60))[0].sum() == 0
    entry["keypoints"][2] = 0  # not labelled: nothing is left
    labels, problems = read_coco(coco_file(IMAGES, [entry], CATEGORIES))
    assert len(labels.classes) == 0 and problems.total == 2 and labels.points is None


def test_broken_keypoints_are_counted_and_a_broken_box_is_no_missing_one(coco_file):
    labels, problems = read_coco(coco_file(IMAGES, [box(1, keypoints=[1, "a", 2])], CATEGORIES))
    assert labels.points is None and dict(problems.counts) == {"keypoint cannot be read, left out": 1}
    negative = box(1, bbox=(10, 10, -3, 5), keypoints=[4, 5, 2])
    labels, problems = read_coco(coco_file(IMAGES, [negative], CATEGORIES))
    assert problems.counts["box of negative width or height, dropped"] == 1 and len(labels.classes) == 0


def test_points_survive_writing_and_pycocotools_reads_them(coco_file, tmp_path):
    annotations = [
        box(1, keypoints=[4.5, 6, 2]),
        box(2),
        {"id": 3, "image_id": 10, "category_id": 90, "keypoints": [70.25, -3, 2]},  # outside the image
    ]
    labels, _ = read_coco(coco_file(IMAGES, annotations, CATEGORIES))
    write_coco(labels, tmp_path / "out.json")
    again, problems = read_coco(tmp_path / "out.json", strict=True)
    np.testing.assert_array_equal(again.points, labels.points)
    assert (again.boxes_xyxy == labels.boxes_xyxy).all() and problems.total == 0
    coco = COCO(str(tmp_path / "out.json"))
    assert [coco.anns[n]["keypoints"] for n in (1, 2, 3)] == [[4.5, 6, 2], [0, 0, 0], [70.25, -3, 2]]
    assert [coco.anns[n]["num_keypoints"] for n in (1, 2, 3)] == [1, 0, 1]
    assert coco.cats[3]["keypoints"] == ["reference point"]
    write_coco(read_coco(coco_file(IMAGES, [box(1)], CATEGORIES))[0], tmp_path / "plain.json")
    assert "keypoint" not in (tmp_path / "plain.json").read_text()


def detections():
    images = [
        ImageLabels.build("b.png", (30, 20), [[1, 2, 4, 8], [0, 0, 5, 5]], [1, 0], scores=[0.9, 0.3]),
        ImageLabels.build("none.png", (30, 20), [], []),
        ImageLabels.build("a.png", (40, 60), [[10, 10, 30, 20]], [0], scores=[0.5]),
    ]
    return Labels.from_images(images, [Category(3, "cat"), Category(90, "owl")], stage=1)


def truth_file(coco_file):
    images = [
        {"id": 100, "file_name": "a.png", "height": 40, "width": 60},
        {"id": 7, "file_name": "b.png", "height": 30, "width": 20},
    ]
    annotations = [
        {"id": 1, "image_id": 100, "category_id": 3, "bbox": [10, 10, 20, 10], "area": 200, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 90, "bbox": [1, 2, 3, 6], "area": 18, "iscrowd": 0},
    ]
    return coco_file(images, annotations, [{"id": 3, "name": "cat"}, {"id": 90, "name": "owl"}], "truth.json")


def test_results_carry_the_ids_of_the_truth(tmp_path, coco_file):
    write_detections(detections(), tmp_path / "out.json", truth_file(coco_file))
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"image_id": 7, "category_id": 90, "bbox": [1, 2, 3, 6], "score": 0.9},
        {"image_id": 7, "category_id": 3, "bbox": [0, 0, 5, 5], "score": 0.3},
        {"image_id": 100, "category_id": 3, "bbox": [10, 10, 20, 10], "score": 0.5},
    ]


def average_precision(path, results, kind):
    truth = COCO(str(path))
    evaluation = COCOeval(truth, truth.loadRes(str(results)), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[0]


def test_pycocotools_scores_the_results(tmp_path, coco_file):
    path = truth_file(coco_file)
    write_detections(detections(), tmp_path / "out.json", path)
    assert average_precision(path, tmp_path / "out.json", "bbox") == pytest.approx(1.0)


def test_pycocotools_scores_the_masks_of_the_results(tmp_path, coco_file):
    content = json.loads(truth_file(coco_file).read_text())
    content["annotations"][0]["segmentation"] = [[10, 10, 30, 10, 10, 20]]  # half of its box
    content["annotations"][1]["segmentation"] = [[1, 2, 4, 2, 4, 8, 1, 8]]
    path = coco_file(content["images"], content["annotations"], content["categories"], "truth.json")
    labels, _ = read_coco(path, masks=True)
    write_detections(labels, tmp_path / "out.json", path)
    assert average_precision(path, tmp_path / "out.json", "segm") == pytest.approx(1.0)
    write_detections(replace(labels, masks=None), tmp_path / "boxes.json", path)
    assert "segmentation" not in (tmp_path / "boxes.json").read_text()


def test_without_truth_images_are_numbered_and_named(tmp_path):
    write_detections(detections(), tmp_path / "out.json")
    entries = json.loads((tmp_path / "out.json").read_text())
    assert [(entry["image_id"], entry["file_name"]) for entry in entries] == [
        (1, "b.png"),
        (1, "b.png"),
        (3, "a.png"),
    ]


def test_image_that_the_truth_lacks_is_an_error(tmp_path, coco_file):
    image = {"id": 1, "file_name": "a.png", "height": 40, "width": 60}
    path = coco_file([image], [], [{"id": 3, "name": "cat"}], "truth.json")
    with pytest.raises(LabelError, match=r"'b.png' has detections but is not in"):
        write_detections(detections(), tmp_path / "out.json", path)
    assert not (tmp_path / "out.json").exists()
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(LabelError, match=r"coco_truth: .*broken.json"):
        write_detections(detections(), tmp_path / "out.json", tmp_path / "broken.json")


def test_scores_are_the_shortest_decimals_that_read_back_equal(tmp_path, coco_file):
    image = ImageLabels.build("a.png", (40, 60), [[0, 0, 5, 5]] * 3, [0] * 3, scores=[0.1, 1 / 3, 1e-7])
    labels = Labels.from_images([image], [Category(3, "cat")])
    write_detections(labels, tmp_path / "out.json")
    assert '"score": 0.1,' in (tmp_path / "out.json").read_text()
    read, _ = read_coco(
        coco_file(
            [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
            [{"id": n, **entry} for n, entry in enumerate(json.loads((tmp_path / "out.json").read_text()))],
            [{"id": 3}],
        )
    )
    assert (read.scores == labels.scores).all()


def test_results_carry_points(tmp_path, coco_file):
    labels = replace(detections(), points=[[1.5, 2], [float("nan")] * 2, [30, 20]])
    write_detections(labels, tmp_path / "out.json", truth_file(coco_file))
    entries = json.loads((tmp_path / "out.json").read_text())
    assert [entry["keypoints"] for entry in entries] == [[1.5, 2, 2], [0, 0, 0], [30, 20, 2]]
    write_detections(detections(), tmp_path / "plain.json")
    assert "keypoints" not in (tmp_path / "plain.json").read_text()


def read(coco_file, annotations, images=IMAGES, **choices):
    return read_coco(coco_file(images, annotations, CATEGORIES), **choices)


@pytest.mark.parametrize(
    ("entry", "note"),
    [
        (box(1) | {"bbox": ["1", "2.0", "10", "20"]}, "number given as text"),
        (box(1, area="200"), "number given as text"),
        (box(1, score="1.0"), "number given as text"),
        (box(1, iscrowd="0"), "number given as text"),
        (box(1, iscrowd="False"), "number given as text"),
        (box(1, image_id="10"), "image_id given as text"),
        (box(1, category_id="3"), "category_id given as text"),
        (box(1) | {"bbox": None, "segmentation": [[1, 2, 11, 2, 11, 22, 1, 22]]}, "no bbox"),
        (box(1) | {"bbox": [], "segmentation": [1, 2, 11, 2, 11, 22, 1, 22]}, "no bbox"),
    ],
)
def test_what_is_written_otherwise_is_the_same_box(coco_file, entry, note):
    labels, report = read(coco_file, [entry], strict=True)
    assert labels.boxes_xyxy.tolist() == [[1, 2, 11, 22]] and labels.areas.tolist() == [200]
    assert not labels.crowd.any() and labels.scores.tolist() == [1]
    ((kind, count),) = report.notes.items()
    assert kind.startswith(note) and count == 1


def test_text_ids_are_no_numbers_where_the_file_has_both(coco_file):
    images = [IMAGES[0] | {"id": identity, "file_name": repr(identity)} for identity in (1, "1")]
    labels, report = read(coco_file, [box(1, 1), box(2, "1")], images)
    assert np.diff(labels.offsets).tolist() == [1, 1] and not report.notes


def test_a_crowd_may_be_text(coco_file):
    assert read(coco_file, [box(1, iscrowd="1"), box(2, 3, bbox=(1, 1, 5, 5))])[0].crowd.tolist() == [True, False]


def test_a_box_is_that_of_its_run_lengths(coco_file):
    pixels = np.zeros((40, 60), np.uint8)
    pixels[5:25, 3:30] = 1
    pixels[5, 3] = 0
    code = {"size": [40, 60], "counts": masks.encode(pixels[None])[0].decode()}
    labels, _ = read(coco_file, [box(1) | {"bbox": None, "segmentation": code}])
    assert labels.boxes_xyxy.tolist() == [[3, 5, 30, 25]] and labels.areas.tolist() == [20 * 27]


def test_an_image_is_not_empty_because_its_boxes_cannot_be_used(coco_file):
    labels, report = read(coco_file, [box(1, category_id=4), box(2, "x7", bbox=(1, 1, 5, 5))])
    assert labels.image_ids == ("sub/b.png", "empty.png") and report.unlabelled == ["a.png"]
    assert report.counts[LEFT_OUT] == 1 and not report.note_lines()  # said once


def test_boxes_of_two_files_under_one_id_are_nobodys(coco_file):
    images = [*IMAGES, IMAGES[0] | {"file_name": "c.png"}]
    labels, report = read(coco_file, [box(1), box(2, "x7", bbox=(1, 1, 5, 5))], images)
    assert labels.image_ids == ("sub/b.png", "empty.png") and sorted(report.unlabelled) == ["a.png", "c.png"]
    assert report.counts["annotation of an image id given to two files, dropped"] == 1


def test_a_name_of_two_classes_is_counted(coco_file):
    path = coco_file(IMAGES, [box(1)], [*CATEGORIES, {"id": 4, "name": "cat"}])
    labels, report = read_coco(path)
    assert labels.num_classes == 5 and report.counts["category name repeated, kept as two classes"] == 1


@pytest.mark.parametrize("center", [False, True])
def test_fractions_are_no_pixels(coco_file, center):
    boxes = [(0.6, 0.4, 0.3, 0.5), (0, 0, 1, 1), (0.25, 0.1, 0.5, 0.2)]
    boxes = [(x + w / 2, y + h / 2, w, h) if center else (x, y, w, h) for x, y, w, h in boxes]
    with pytest.raises(LabelError, match=r"bbox looks like fractions of the image; COCO's are pixels: .* of 3 boxes"):
        read(coco_file, [box(n, bbox=bbox) for n, bbox in enumerate(boxes)])
    labels, report = read(
        coco_file, [box(1), box(2, bbox=(0, 0, 1, 1)), box(3, bbox=(5, 5, 9, 9)), box(4, bbox=boxes[0])]
    )
    assert len(labels.classes) == 4 and sum("a fraction?" in kind for kind in report.notes) == 1 and not report.counts


def test_corners_are_no_width_and_height(coco_file):
    corners = [(30, 20, 55, 35), (2, 3, 20, 30), (40, 5, 60, 40), (20, 20, 50, 39)]
    with pytest.raises(LabelError, match=r"bbox looks like corners \[x0, y0, x1, y1\].*3 of 4 boxes leave"):
        read(coco_file, [box(n, bbox=bbox) for n, bbox in enumerate(corners)])
    right = [(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in corners]
    assert read(coco_file, [box(n, bbox=bbox) for n, bbox in enumerate(right)], strict=True)[1].total == 0
    sloppy = [*corners[:3], (40, 30, 35, 25)]  # no corners: leaves the image on either reading
    assert read(coco_file, [box(n, bbox=bbox) for n, bbox in enumerate(sloppy)])[1].total == 3


def test_one_area_for_boxes_of_all_sizes_is_none(coco_file):
    boxes = [(0, 0, 10, 10), (5, 5, 20, 10), (10, 10, 30, 20)]
    labels, report = read(coco_file, [box(n, bbox=bbox, area=1.0) for n, bbox in enumerate(boxes)])
    assert labels.areas.tolist() == [100, 200, 600] and report.total == 3
    triangle = {"segmentation": [[0, 0, 10, 0, 0, 10]]}
    labels, report = read(coco_file, [box(1, bbox=boxes[0], area=0.02) | triangle, box(2, bbox=boxes[1], area=150)])
    assert labels.areas.tolist() == [50, 150] and report.total == 1
    labels, report = read(coco_file, [box(n, bbox=boxes[n], area=area) for n, area in enumerate((-4, "wide", None))])
    assert labels.areas.tolist() == [100, 200, 600] and report.total == 2  # that there is none is no problem


@pytest.mark.parametrize(
    ("degrees", "expected"), [(90, [15, 5, 25, 35]), (-90, [15, 5, 25, 35]), (180, [5, 15, 35, 25])]
)
def test_a_rotation_is_taken_up_by_the_box(coco_file, degrees, expected):
    labels, report = read(coco_file, [box(1, bbox=(5, 15, 30, 10), attributes={"rotation": degrees})])
    np.testing.assert_allclose(labels.boxes_xyxy[0], expected, atol=1e-4)
    assert sum(report.notes.values()) == (degrees != 180) and report.total == 0


def test_a_rotated_box_is_the_upright_one_around_it(coco_file):
    labels, _ = read(coco_file, [box(1, bbox=(20, 15, 20, 10), area=200, attributes={"rotation": 30.0})])
    half_width, half_height = 10 * np.cos(np.pi / 6) + 5 / 2, 10 / 2 + 5 * np.cos(np.pi / 6)
    expected = [30 - half_width, 20 - half_height, 30 + half_width, 20 + half_height]
    np.testing.assert_allclose(labels.boxes_xyxy[0], expected, atol=1e-4)
    assert labels.areas.tolist() == [200]  # that of the object


def test_ids_and_crowds_stand_alike_where_they_are_read_alike():
    content = {
        "images": [IMAGES[0], {"id": "12", "file_name": "d.png"}, {"id": 5}],
        "annotations": [box(1, image_id="10"), box(2, 12, "3", iscrowd="0"), box(3, 99), 5],
        "categories": CATEGORIES,
        "info": {"kept": 1},
    }
    known = with_known_ids(content)
    assert [image["id"] for image in known["images"]] == [10, "12"] and known["info"] == {"kept": 1}
    facts = [(entry["image_id"], entry["category_id"], entry.get("iscrowd")) for entry in known["annotations"]]
    assert facts == [(10, 3, None), ("12", 3, 0), (99, 3, None)]
    assert [category["name"] for category in known["categories"]] == ["owl", "cat", "Dog", "17"]
    assert content["annotations"][0]["image_id"] == "10"  # a copy


@pytest.mark.parametrize("contributor", ["Label Studio", "somebody else"])
def test_an_image_without_boxes_of_label_studio_may_be_a_task_that_nobody_touched(tmp_path, contributor):
    content = {
        "info": {"contributor": contributor},
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 20, "width": 30} for n in range(2)],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 0, "bbox": [1, 1, 5, 5]}],
        "categories": [{"id": 0, "name": "cat"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    labels, report = read_coco(tmp_path / "a.json")
    assert not report.counts
    if contributor == "Label Studio":
        assert labels.image_ids == ("1.jpg",) and report.unlabelled == ["0.jpg"]
        assert report.note_lines()[0].startswith("1 × image without boxes in Label Studio's export to another format")
    else:
        assert labels.image_ids == ("0.jpg", "1.jpg") and not report.unlabelled
